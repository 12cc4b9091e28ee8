"""Maps are colored by facts of the scans, and never by what identifies a person."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from featray.commands.report.describe.scan_columns import MAX_COLUMNS, choose_columns, is_identity
from featray.commands.report.page.model import Column
from featray.schema import SCAN_COLUMNS

SCANS = 40
ALL = np.arange(SCANS)


def make_table(**columns: list[object]) -> pa.Table:
    kinds = {name: SCAN_COLUMNS.field(name).type for name in columns if name in SCAN_COLUMNS.names}
    return pa.table({name: pa.array(values, kinds.get(name)) for name, values in columns.items()})


def test_header_values_that_differ_are_columns() -> None:
    table = make_table(
        scan_id=[f"scan-{number}" for number in range(SCANS)],
        format=["nifti"] * SCANS,
        spacing=[[1.25 + number % 2, 0.7031251, 0.7] for number in range(SCANS - 1)] + [None],
        shape=[[30 + number, 512, 512 - number % 2] for number in range(SCANS)],
        hu_p50=[float(number) for number in range(SCANS)],
        warnings=[["oblique", "anisotropic"] if number % 4 == 0 else [] for number in range(SCANS)],
        patches=[1] * SCANS,
    )
    columns = {column.name: column for column in choose_columns(table, (), ALL).columns}
    assert list(columns) == ["slice spacing (mm)", "slice count", "matrix", "median HU", "warnings"]
    assert columns["slice spacing (mm)"].values[:2] == (1.25, 2.25)
    assert columns["slice spacing (mm)"].values[-1] is None
    assert columns["slice count"].values[0] == 30
    assert columns["matrix"].values[1] == "512 × 511"
    assert columns["warnings"].values[:2] == ("anisotropic, oblique", "none")


def test_further_columns_follow_the_rules_of_labels() -> None:
    table = make_table(
        kernel=["B30f", "B70f"] * 20,
        dose=[str(number / 3) for number in range(SCANS)],
        series=[f"a{number:09d}" for number in range(SCANS)],
        acquired=[f"2026-01-{1 + number % 28:02d}" for number in range(SCANS)],
        empty=[None] * SCANS,
        flags=[str(number % 2) if number % 5 else None for number in range(SCANS)],
    )
    columns = {column.name: column for column in choose_columns(table, (), ALL).columns}
    assert list(columns) == ["kernel", "dose", "flags"]
    assert columns["dose"].is_numeric
    assert columns["flags"].values[:3] == (None, "1", "0")


def test_few_patients_are_no_colors() -> None:
    table = make_table(PatientID=[str(number % 4) for number in range(SCANS)], PatientSex=["F", "M"] * 20)
    assert [column.name for column in choose_columns(table, (), ALL).columns] == ["PatientSex"]


@pytest.mark.parametrize(
    "name",
    [
        "patient",
        "PatientID",
        "patientid",
        "PatientName",
        "subject_id",
        "participant",
        "OtherPatientNames",
        "StudyInstanceUID",
        "StudyID",
        "AccessionNumber",
        "ReferringPhysicianName",
        "PatientBirthDate",
        "AcquisitionDateTime",
        "MRN",
        "id",
    ],
)
def test_names_of_identities_and_dates_are_recognized(name: str) -> None:
    assert is_identity(name)


@pytest.mark.parametrize(
    "name",
    ["PatientSex", "patient_age", "scanner_id", "Manufacturer", "ManufacturerModelName", "KVP", "site"],
)
def test_names_of_facts_are_not_taken_for_identities(name: str) -> None:
    assert not is_identity(name)


def test_labels_come_first_and_are_of_the_shown_scans() -> None:
    label = Column("kernel", tuple(str(number) for number in range(SCANS)))
    table = make_table(kernel=["x", "y"] * 20, format=["nifti", "dicom"] * 20)
    chosen = choose_columns(table, (label,), np.array([3, 7])).columns
    assert chosen == (Column("kernel", ("3", "7")), Column("format", ("dicom", "dicom")))


def test_there_is_a_limit_of_columns() -> None:
    table = make_table(**{f"fact_{number}": ["a", "b"] * 20 for number in range(MAX_COLUMNS + 3)})
    chosen = choose_columns(table, (), ALL)
    assert (len(chosen.columns), chosen.left_out) == (MAX_COLUMNS, 3)
