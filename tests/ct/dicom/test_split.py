"""Volumes that share a SeriesInstanceUID are told apart where headers do so cleanly, else refused whole."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage

from featray.ct.dicom.group import DicomScan, group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.errors import Reason, ScanError

SeriesOf = Callable[..., dict[str, Dataset]]
ToBytes = Callable[[Dataset], bytes]
MR, PET = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"


def shown(found: Iterable[DicomScan]) -> list[tuple[int, str | None]]:
    return [(len(series.files), series.reason.value if series.reason else None) for series in found]


@pytest.fixture
def outcomes(file_bytes: ToBytes) -> Callable[..., list[tuple[int, str]]]:
    """Return a function that groups and reads a folder: slices and outcome of each entry."""

    def run(*folders: dict[str, Dataset]) -> list[tuple[int, str]]:
        files = {
            f"{letter}{name}": file_bytes(dataset)
            for letter, folder in zip("abcdef", folders, strict=False)
            for name, dataset in folder.items()
        }
        found = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files.items()])
        return [(len(series.files), outcome(series, files)) for series in found]

    return run


def outcome(series: DicomScan, files: dict[str, bytes]) -> str:
    if series.reason:
        return ("excluded " if series.excluded else "") + series.reason.value
    try:
        volume = read_series([(name, files[name]) for name in series.files], max_voxels=10**7)
    except ScanError as refused:
        return refused.reason.value
    return " ".join(["ok", *series.warnings, *volume.warnings])


Outcomes = Callable[..., list[tuple[int, str]]]


def test_two_patients_who_share_a_uid_are_two_scans(series_of: SeriesOf, outcomes: Outcomes) -> None:
    other = series_of(PatientID="PID-4712-ZZ", RescaleIntercept=-1000)

    assert outcomes(series_of(), other) == [(5, "ok"), (5, "ok")]


def test_the_hash_of_a_patient_is_no_id(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    first, second = (
        read_header(io.BytesIO(file_bytes(series_of(1, PatientID=name)["001.dcm"])), "1")
        for name in ("PID-4711-ZZ", "PID-4712-ZZ")
    )

    assert first.patient_hash != second.patient_hash
    assert not {"PID", "ZZ"} & set(re.findall("[A-Z]+", repr(first)))
    assert len(first.patient_hash) == 16


def test_two_studies_that_share_a_uid_are_two_scans(series_of: SeriesOf, outcomes: Outcomes) -> None:
    first, second = series_of(StudyInstanceUID="1.1"), series_of(StudyInstanceUID="1.2", RescaleIntercept=0)

    assert outcomes(first, second) == [(5, "ok"), (5, "ok")]


def test_a_missing_patient_id_in_one_slice_splits_nothing(series_of: SeriesOf, outcomes: Outcomes) -> None:
    slices = series_of(StudyInstanceUID="1.1")
    slices["003.dcm"].PatientID = ""
    slices["004.dcm"].StudyInstanceUID = ""

    assert outcomes(slices) == [(5, "ok")]


@pytest.mark.parametrize(
    ("keyword", "values"),
    [
        ("TemporalPositionIdentifier", (1, 2)),
        ("AcquisitionNumber", (3, 4)),
        ("TriggerTime", (0, 350.5)),
        ("ConvolutionKernel", ("B30f", "B70f")),
        ("FrameOfReferenceUID", ("1.1", "1.2")),
        ("ImageType", (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL"])),
    ],
)
def test_volumes_at_the_same_places_are_one_scan_each(
    series_of: SeriesOf, outcomes: Outcomes, keyword: str, values: tuple[Any, Any]
) -> None:
    first, second = (series_of(**{keyword: value, "RescaleIntercept": i}) for i, value in enumerate(values))

    assert outcomes(first, second) == [(5, "ok duplicate_slices")] * 2


def test_time_points_and_kernels_together_are_told_apart_too(series_of: SeriesOf, outcomes: Outcomes) -> None:
    folders = [
        series_of(AcquisitionNumber=time, ConvolutionKernel=kernel, RescaleIntercept=time)
        for time in (1, 2)
        for kernel in ("soft", "sharp")
    ]

    assert outcomes(*folders) == [(5, "ok duplicate_slices")] * 4


def test_thin_and_thick_slices_in_one_series_are_two_scans(series_of: SeriesOf, outcomes: Outcomes) -> None:
    thin = series_of(9, step=1.0, SliceThickness=1)
    thick = series_of(5, step=2.0, SliceThickness=2, RescaleIntercept=0)

    assert outcomes(thin, thick) == [(9, "ok duplicate_slices"), (5, "ok duplicate_slices")]


def test_nothing_that_tells_them_apart_leaves_duplicates(series_of: SeriesOf, outcomes: Outcomes) -> None:
    assert outcomes(series_of(), series_of(RescaleIntercept=0)) == [(10, "duplicate_slices")]


def test_a_time_point_that_lacks_a_slice_is_never_split_off(series_of: SeriesOf, outcomes: Outcomes) -> None:
    second = series_of(AcquisitionNumber=2, RescaleIntercept=0)
    del second["005.dcm"]

    assert outcomes(series_of(AcquisitionNumber=1), second) == [(9, "duplicate_slices")]


def test_table_positions_that_meet_in_one_slice_are_not_split(
    series_of: SeriesOf, outcomes: Outcomes
) -> None:
    first = series_of(5, AcquisitionNumber=1)
    second = {
        f"2{name}": dataset for name, dataset in series_of(5, AcquisitionNumber=2, RescaleIntercept=0).items()
    }
    for dataset in second.values():
        dataset.ImagePositionPatient[2] += 8

    assert outcomes(first, second) == [(10, "duplicate_slices")]


def test_acquisitions_one_behind_the_other_are_one_volume(series_of: SeriesOf, outcomes: Outcomes) -> None:
    slices = series_of(6)
    for index, dataset in enumerate(slices.values()):
        dataset.AcquisitionNumber = 1 + index // 3

    assert outcomes(slices) == [(6, "ok")]


def test_bolus_tracking_stays_one_refused_scan(series_of: SeriesOf, outcomes: Outcomes) -> None:
    slices = series_of(4, step=0.0)
    for index, dataset in enumerate(slices.values()):
        dataset.AcquisitionNumber = index

    assert outcomes(slices) == [(4, "not_a_volume")]


def test_interleaved_time_points_are_never_one_volume(series_of: SeriesOf, outcomes: Outcomes) -> None:
    slices = series_of(6, step=1.0)
    for index, dataset in enumerate(slices.values()):
        dataset.TemporalPositionIdentifier = index % 2

    assert outcomes(slices) == [(3, "ok duplicate_slices")] * 2
    slices["006.dcm"].TemporalPositionIdentifier = 0
    assert outcomes(slices) == [(6, "duplicate_slices")]


def test_a_damaged_file_in_a_split_series_fails_every_part(
    series_of: SeriesOf, outcomes: Outcomes, file_bytes: ToBytes
) -> None:
    headers = [
        replace(read_header(io.BytesIO(file_bytes(dataset)), f"{number}{name}"))
        for number in (1, 2)
        for name, dataset in series_of(AcquisitionNumber=number).items()
    ]
    lost = replace(headers[0], name="3", problem=Reason.TRUNCATED, message="cut", position=None)

    assert shown(group_into_scans([*headers, lost])) == [(6, "truncated"), (6, "truncated")]


@pytest.mark.parametrize("tags", [{"Rows": 5}, {"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}])
def test_an_odd_slice_in_line_with_the_others_refuses_the_volume(
    series_of: SeriesOf, outcomes: Outcomes, tags: dict[str, Any]
) -> None:
    slices = series_of()
    for keyword, value in tags.items():
        setattr(slices["005.dcm"], keyword, value)  # the last: no gap would tell
    slices["005.dcm"].PixelData = bytes(2 * 4 * slices["005.dcm"].Rows)

    assert outcomes(slices) == [(5, "not_a_volume")]


@pytest.mark.parametrize(("modality", "sop_class"), [("MR", MR), ("PT", PET)])
def test_other_modalities_are_scans_only_where_they_are_accepted(
    series_of: SeriesOf, file_bytes: ToBytes, modality: str, sop_class: str
) -> None:
    slices = series_of(Modality=modality, SOPClassUID=sop_class, RescaleType="")
    files = {name: file_bytes(dataset) for name, dataset in slices.items()}
    headers = [read_header(io.BytesIO(data), name) for name, data in files.items()]

    (left_out,) = group_into_scans(headers)
    (taken,) = group_into_scans(headers, accept_other_modalities=True)

    assert (left_out.reason, left_out.excluded) == (Reason.NOT_CT, True)
    assert (taken.reason, taken.warnings) == (None, ("not_ct",))
    assert outcome(taken, files) == "ok not_ct"


def test_accepting_mr_leaves_reports_out_and_ct_without_a_warning(
    series_of: SeriesOf, file_bytes: ToBytes
) -> None:
    ct, report = (
        series_of(),
        series_of(1, Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", uid="9"),
    )
    headers = [
        read_header(io.BytesIO(file_bytes(dataset)), f"{letter}{name}")
        for letter, folder in (("a", ct), ("b", report))
        for name, dataset in folder.items()
    ]

    found = group_into_scans(headers, accept_other_modalities=True)

    assert shown(found) == [(5, None), (1, "not_ct")]
    assert found[0].warnings == ()


def test_a_screenshot_that_calls_itself_a_ct_image_is_excluded(
    series_of: SeriesOf, outcomes: Outcomes
) -> None:
    page = series_of(1, uid="9", ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    del page["001.dcm"].ImagePositionPatient, page["001.dcm"].ImageOrientationPatient

    assert outcomes(series_of(), page) == [(5, "ok"), (1, "excluded not_ct")]


def test_a_series_that_lost_all_positions_fails_visibly(series_of: SeriesOf, outcomes: Outcomes) -> None:
    slices = series_of()
    for dataset in slices.values():
        del dataset.ImagePositionPatient

    assert outcomes(slices) == [(5, "not_a_volume")]


def enhanced(series_of: SeriesOf, frames: list[dict[str, Any]], **tags: Any) -> Dataset:
    """An enhanced file; each frame's dict gives z and what FrameContentSequence holds."""
    slices = series_of(len(frames), SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(frames), **tags)
    dataset = slices["001.dcm"]
    dataset.PixelData = b"".join(slice_.PixelData for slice_ in slices.values())
    del dataset.ImagePositionPatient
    groups = []
    for frame in frames:
        place, content, group = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [0, 0, frame.pop("z")]
        for keyword, value in frame.items():
            setattr(content, keyword, value)
        group.PlanePositionSequence, group.FrameContentSequence = Sequence([place]), Sequence([content])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return dataset


def test_time_points_and_stacks_in_one_enhanced_file_are_refused(
    series_of: SeriesOf, outcomes: Outcomes
) -> None:
    times = [{"z": 2 * (i // 2), "TemporalPositionIndex": i % 2} for i in range(6)]
    stacks = [{"z": 2 * i, "StackID": str(i // 3)} for i in range(6)]

    assert outcomes({"1": enhanced(series_of, times)}) == [(1, "duplicate_slices")]
    assert outcomes({"1": enhanced(series_of, stacks)}) == [(1, "duplicate_slices")]
    assert outcomes({"1": enhanced(series_of, [{"z": 2 * i, "StackID": "1"} for i in range(6)])}) == [
        (1, "ok")
    ]


def test_an_image_divided_over_files_is_one_scan_and_only_whole(
    series_of: SeriesOf, outcomes: Outcomes, file_bytes: ToBytes
) -> None:
    parts = {
        str(part): enhanced(
            series_of,
            [{"z": 2 * i} for i in range(3 * part, 3 * part + 3)],
            ConcatenationUID="7.7",
            InConcatenationTotalNumber=2,
            SOPInstanceUID=f"1.2.{part}",
        )
        for part in range(2)
    }
    files = [(name, file_bytes(dataset)) for name, dataset in parts.items()]

    assert outcomes(parts) == [(2, "ok")]
    assert outcomes({"0": parts["0"]}) == [(1, "missing_slices")]
    assert read_series(files, max_voxels=10**6).voxels_zyx.shape == (6, 6, 4)


def test_single_frame_enhanced_files_are_slices(series_of: SeriesOf, outcomes: Outcomes) -> None:
    slices = {str(z): enhanced(series_of, [{"z": 2 * z}], SOPInstanceUID=f"1.2.{z}") for z in range(4)}
    for z, dataset in slices.items():
        dataset.PixelData = np.full(24, int(z), np.int16).tobytes()

    assert outcomes(slices) == [(4, "ok")]
