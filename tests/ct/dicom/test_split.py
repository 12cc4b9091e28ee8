"""Volumes that share a SeriesInstanceUID are split if headers separate them cleanly, else the scan fails."""

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

from featray.ct.dicom.dicom_scan import DicomScan
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.errors import Reason, ScanError

MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]
MR, PET = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.128"


def summarize(scans: Iterable[DicomScan]) -> list[tuple[int, str | None]]:
    """Return the number of files and the reason of each scan."""
    return [(len(scan.files), scan.reason.value if scan.reason else None) for scan in scans]


@pytest.fixture
def read_outcomes(encode_file: EncodeFile) -> Callable[..., list[tuple[int, str]]]:
    """Return a function that groups and reads folders: number of files and outcome of each scan."""

    def run(*folders: dict[str, Dataset]) -> list[tuple[int, str]]:
        files = {
            f"{letter}{name}": encode_file(dataset)
            for letter, folder in zip("abcdef", folders, strict=False)
            for name, dataset in folder.items()
        }
        scans = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files.items()])
        return [(len(scan.files), read_outcome(scan, files)) for scan in scans]

    return run


def read_outcome(scan: DicomScan, files: dict[str, bytes]) -> str:
    if scan.reason:
        return ("excluded " if scan.excluded else "") + scan.reason.value
    try:
        volume = read_series([(name, files[name]) for name in scan.files], max_voxels=10**7)
    except ScanError as caught:
        return caught.reason.value
    return " ".join(["ok", *scan.warnings, *volume.warnings])


ReadOutcomes = Callable[..., list[tuple[int, str]]]


def test_two_patients_who_share_a_series_uid_are_two_scans(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    other = make_series(PatientID="PID-4712-ZZ", RescaleIntercept=-1000)

    assert read_outcomes(make_series(), other) == [(5, "ok duplicate_slices")] * 2


def test_the_patient_hash_does_not_reveal_the_patient_id(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    first, second = (
        read_header(io.BytesIO(encode_file(make_series(1, PatientID=name)["001.dcm"])), "1")
        for name in ("PID-4711-ZZ", "PID-4712-ZZ")
    )

    assert first.patient_hash != second.patient_hash
    assert not {"PID", "ZZ"} & set(re.findall("[A-Z]+", repr(first)))
    assert len(first.patient_hash) == 16


def test_two_studies_that_share_a_series_uid_are_two_scans(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    first, second = (
        make_series(StudyInstanceUID="1.1"),
        make_series(StudyInstanceUID="1.2", RescaleIntercept=0),
    )

    assert read_outcomes(first, second) == [(5, "ok duplicate_slices")] * 2


def test_a_missing_patient_id_in_one_slice_does_not_split_the_scan(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    slices = make_series(StudyInstanceUID="1.1")
    slices["003.dcm"].PatientID = ""
    slices["004.dcm"].StudyInstanceUID = ""

    assert read_outcomes(slices) == [(5, "ok")]


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
def test_volumes_at_the_same_positions_are_one_scan_each(
    make_series: MakeSeries, read_outcomes: ReadOutcomes, keyword: str, values: tuple[Any, Any]
) -> None:
    first, second = (make_series(**{keyword: value, "RescaleIntercept": i}) for i, value in enumerate(values))

    assert read_outcomes(first, second) == [(5, "ok duplicate_slices")] * 2


def test_each_combination_of_time_point_and_kernel_is_one_scan(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    folders = [
        make_series(AcquisitionNumber=time, ConvolutionKernel=kernel, RescaleIntercept=time)
        for time in (1, 2)
        for kernel in ("soft", "sharp")
    ]

    assert read_outcomes(*folders) == [(5, "ok duplicate_slices")] * 4


def test_thin_and_thick_slices_in_one_series_are_two_scans(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    thin = make_series(9, step=1.0, SliceThickness=1)
    thick = make_series(5, step=2.0, SliceThickness=2, RescaleIntercept=0)

    assert read_outcomes(thin, thick) == [(9, "ok duplicate_slices"), (5, "ok duplicate_slices")]


def test_volumes_with_equal_headers_fail_as_duplicate_slices(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    assert read_outcomes(make_series(), make_series(RescaleIntercept=0)) == [(10, "duplicate_slices")]


def test_a_time_point_that_lacks_a_slice_is_never_split_off(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    second = make_series(AcquisitionNumber=2, RescaleIntercept=0)
    del second["005.dcm"]

    assert read_outcomes(make_series(AcquisitionNumber=1), second) == [(9, "duplicate_slices")]


def test_table_positions_that_overlap_in_one_slice_are_not_split(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    first = make_series(5, AcquisitionNumber=1)
    second = {
        f"2{name}": dataset
        for name, dataset in make_series(5, AcquisitionNumber=2, RescaleIntercept=0).items()
    }
    for dataset in second.values():
        dataset.ImagePositionPatient[2] += 8

    assert read_outcomes(first, second) == [(10, "duplicate_slices")]


def test_acquisitions_in_succession_along_the_table_are_one_volume(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    slices = make_series(6)
    for index, dataset in enumerate(slices.values()):
        dataset.AcquisitionNumber = 1 + index // 3

    assert read_outcomes(slices) == [(6, "ok")]


def test_bolus_tracking_at_one_position_is_one_failed_scan(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    slices = make_series(4, step=0.0)
    for index, dataset in enumerate(slices.values()):
        dataset.AcquisitionNumber = index

    assert read_outcomes(slices) == [(4, "not_a_volume")]


def test_interleaved_time_points_are_never_one_volume(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    slices = make_series(6, step=1.0)
    for index, dataset in enumerate(slices.values()):
        dataset.TemporalPositionIdentifier = index % 2

    assert read_outcomes(slices) == [(3, "ok duplicate_slices")] * 2
    slices["006.dcm"].TemporalPositionIdentifier = 0
    assert read_outcomes(slices) == [(6, "duplicate_slices")]


def test_a_damaged_file_in_a_split_series_fails_every_volume(
    make_series: MakeSeries, read_outcomes: ReadOutcomes, encode_file: EncodeFile
) -> None:
    headers = [
        replace(read_header(io.BytesIO(encode_file(dataset)), f"{number}{name}"))
        for number in (1, 2)
        for name, dataset in make_series(AcquisitionNumber=number).items()
    ]
    damaged = replace(headers[0], name="3", problem=Reason.TRUNCATED, message="cut", position=None)

    assert summarize(group_into_scans([*headers, damaged])) == [(6, "truncated"), (6, "truncated")]


@pytest.mark.parametrize("tags", [{"Rows": 5}, {"ImageOrientationPatient": [0, 1, 0, 0, 0, 1]}])
def test_a_deviating_slice_in_line_with_the_others_fails_the_scan(
    make_series: MakeSeries, read_outcomes: ReadOutcomes, tags: dict[str, Any]
) -> None:
    slices = make_series()
    for keyword, value in tags.items():
        setattr(slices["005.dcm"], keyword, value)  # the last slice, because losing it leaves no gap
    slices["005.dcm"].PixelData = bytes(2 * 4 * slices["005.dcm"].Rows)

    assert read_outcomes(slices) == [(5, "not_a_volume")]


@pytest.mark.parametrize(("modality", "sop_class"), [("MR", MR), ("PT", PET)])
def test_mr_and_pet_are_scans_only_if_they_are_accepted(
    make_series: MakeSeries, encode_file: EncodeFile, modality: str, sop_class: str
) -> None:
    slices = make_series(Modality=modality, SOPClassUID=sop_class, RescaleType="")
    files = {name: encode_file(dataset) for name, dataset in slices.items()}
    headers = [read_header(io.BytesIO(data), name) for name, data in files.items()]

    (excluded,) = group_into_scans(headers)
    (accepted,) = group_into_scans(headers, accept_other_modalities=True)

    assert (excluded.reason, excluded.excluded) == (Reason.NOT_CT, True)
    assert (accepted.reason, accepted.warnings) == (None, ("not_ct",))
    assert read_outcome(accepted, files) == "ok not_ct"


def test_accepting_mr_still_excludes_reports_and_adds_no_warning_to_ct(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    ct, report = (
        make_series(),
        make_series(1, Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", uid="9"),
    )
    headers = [
        read_header(io.BytesIO(encode_file(dataset)), f"{letter}{name}")
        for letter, folder in (("a", ct), ("b", report))
        for name, dataset in folder.items()
    ]

    scans = group_into_scans(headers, accept_other_modalities=True)

    assert summarize(scans) == [(5, None), (1, "not_ct")]
    assert scans[0].warnings == ()


def test_a_screenshot_with_the_sop_class_of_ct_is_excluded(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    page = make_series(1, uid="9", ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"])
    del page["001.dcm"].ImagePositionPatient, page["001.dcm"].ImageOrientationPatient

    assert read_outcomes(make_series(), page) == [(5, "ok"), (1, "excluded not_ct")]


def test_a_series_without_positions_is_a_failed_scan(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    slices = make_series()
    for dataset in slices.values():
        del dataset.ImagePositionPatient

    assert read_outcomes(slices) == [(5, "not_a_volume")]


def make_enhanced(make_series: MakeSeries, frames: list[dict[str, Any]], **tags: Any) -> Dataset:
    """Return an enhanced file; the dict of each frame has `z` and the items of its FrameContentSequence."""
    slices = make_series(len(frames), SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(frames), **tags)
    dataset = slices["001.dcm"]
    dataset.PixelData = b"".join(slice_.PixelData for slice_ in slices.values())
    del dataset.ImagePositionPatient
    groups = []
    for frame in frames:
        plane_position, content, group = Dataset(), Dataset(), Dataset()
        plane_position.ImagePositionPatient = [0, 0, frame.pop("z")]
        for keyword, value in frame.items():
            setattr(content, keyword, value)
        group.PlanePositionSequence, group.FrameContentSequence = (
            Sequence([plane_position]),
            Sequence([content]),
        )
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return dataset


def test_several_time_points_or_stacks_in_one_enhanced_file_fail_the_scan(
    make_series: MakeSeries, read_outcomes: ReadOutcomes
) -> None:
    times = [{"z": 2 * (i // 2), "TemporalPositionIndex": i % 2} for i in range(6)]
    stacks = [{"z": 2 * i, "StackID": str(i // 3)} for i in range(6)]

    assert read_outcomes({"1": make_enhanced(make_series, times)}) == [(1, "duplicate_slices")]
    assert read_outcomes({"1": make_enhanced(make_series, stacks)}) == [(1, "duplicate_slices")]
    assert read_outcomes(
        {"1": make_enhanced(make_series, [{"z": 2 * i, "StackID": "1"} for i in range(6)])}
    ) == [(1, "ok")]


def test_a_concatenation_is_one_scan_and_fails_if_a_file_is_missing(
    make_series: MakeSeries, read_outcomes: ReadOutcomes, encode_file: EncodeFile
) -> None:
    parts = {
        str(part): make_enhanced(
            make_series,
            [{"z": 2 * i} for i in range(3 * part, 3 * part + 3)],
            ConcatenationUID="7.7",
            InConcatenationTotalNumber=2,
            SOPInstanceUID=f"1.2.{part}",
        )
        for part in range(2)
    }
    files = [(name, encode_file(dataset)) for name, dataset in parts.items()]

    assert read_outcomes(parts) == [(2, "ok")]
    assert read_outcomes({"0": parts["0"]}) == [(1, "missing_slices")]
    assert read_series(files, max_voxels=10**6).voxels_zyx.shape == (6, 6, 4)


def test_single_frame_enhanced_files_are_slices(make_series: MakeSeries, read_outcomes: ReadOutcomes) -> None:
    slices = {str(z): make_enhanced(make_series, [{"z": 2 * z}], SOPInstanceUID=f"1.2.{z}") for z in range(4)}
    for z, dataset in slices.items():
        dataset.PixelData = np.full(24, int(z), np.int16).tobytes()

    assert read_outcomes(slices) == [(4, "ok")]
