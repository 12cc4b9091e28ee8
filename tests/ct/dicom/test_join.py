"""Shares of one series are one volume or fail; they never come out as whole scans or as a finer volume."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage

from featray.ct.dicom.dicom_scan import DicomScan
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.errors import ScanError

MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]
Volumes = list[tuple[DicomScan, NDArray[Any] | str]]
GroupAndRead = Callable[..., Volumes]
MR_CLASS, CAPTURE_CLASS = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.7"
TWO_VALUES: dict[str, tuple[Any, Any]] = {
    "ConvolutionKernel": ("B30f", "B70f"),
    "AcquisitionNumber": (1, 2),
    "ImageType": (["ORIGINAL", "PRIMARY", "AXIAL"], ["DERIVED", "PRIMARY", "AXIAL"]),
    "FrameOfReferenceUID": ("1.1", "1.2"),
    "KVP": ("80", "140"),
    "SliceThickness": ("2", "3"),
    "SeriesNumber": (1, 2),
    "EchoNumbers": (1, 2),
    "TemporalPositionIdentifier": (1, 2),
}


@pytest.fixture
def group_and_read(encode_file: EncodeFile) -> GroupAndRead:
    """Return a function that groups files and reads each scan: its voxels, or the reason without voxels."""

    def run(slices: dict[str, Dataset], *, accept: bool = False, resample: bool = False) -> Volumes:
        files = {name: encode_file(dataset) for name, dataset in slices.items()}
        headers = [read_header(io.BytesIO(data), name) for name, data in files.items()]
        scans = group_into_scans(headers, accept_other_modalities=accept)
        return [(scan, read_voxels(scan, files, resample=resample)) for scan in scans]

    return run


def read_voxels(scan: DicomScan, files: dict[str, bytes], *, resample: bool) -> NDArray[Any] | str:
    if scan.reason:
        return ("excluded " if scan.excluded else "") + scan.reason.value
    contents = [(name, files[name]) for name in scan.files]
    try:
        return read_series(contents, max_voxels=10**6, resample_steps=resample).voxels_zyx
    except ScanError as caught:
        return caught.reason.value


def get_reasons(volumes: Volumes) -> list[Any]:
    """Return the number of slices of each volume that was read, else its reason."""
    return [voxels if isinstance(voxels, str) else len(voxels) for _, voxels in volumes]


def make_expected(count: int) -> NDArray[np.int64]:
    return np.arange(count * 24).reshape(count, 6, 4) - 1024


def set_labels(slices: dict[str, Dataset], keyword: str, labels: list[Any]) -> dict[str, Dataset]:
    for dataset, label in zip(slices.values(), labels, strict=True):
        setattr(dataset, keyword, label)
    return slices


def put_in_folders(slices: dict[str, Dataset], folders: list[str]) -> dict[str, Dataset]:
    return {f"{folder}/{name}": slices[name] for name, folder in zip(slices, folders, strict=True)}


@pytest.mark.parametrize("keyword", TWO_VALUES)
def test_two_volumes_that_lie_between_each_other_are_two_scans(
    make_series: MakeSeries, group_and_read: GroupAndRead, keyword: str
) -> None:
    slices = set_labels(make_series(12), keyword, [TWO_VALUES[keyword][i % 2] for i in range(12)])

    volumes = group_and_read(slices)

    assert sorted(np.asarray(voxels)[0, 0, 0] for _, voxels in volumes) == [-1024, -1000]
    assert get_reasons(volumes) == [6, 6]
    assert all(scan.warnings == ("duplicate_slices",) for scan, _ in volumes)


@pytest.mark.parametrize("keyword", TWO_VALUES)
@pytest.mark.parametrize("pattern", ["AABAABAAB", "ABABABABA", "AAABAAAB", "AAAABABBBB", "AABBAABBAABB"])
def test_volumes_that_alternate_but_are_not_clean_fail(
    make_series: MakeSeries, group_and_read: GroupAndRead, keyword: str, pattern: str
) -> None:
    values = TWO_VALUES[keyword]
    slices = set_labels(make_series(len(pattern)), keyword, [values[letter == "B"] for letter in pattern])

    ((scan, voxels),) = group_and_read(slices, resample=True)

    assert voxels == "duplicate_slices"
    assert keyword in scan.message


@pytest.mark.parametrize("keyword", TWO_VALUES)
@pytest.mark.parametrize("pattern", ["AAAAAABBBBBB", "AAABBBBBBBBB", "AAAAABAAAAAA", "AAAABBBBAAAA"])
def test_ranges_of_one_label_and_single_deviating_slices_stay_one_volume(
    make_series: MakeSeries, group_and_read: GroupAndRead, keyword: str, pattern: str
) -> None:
    values = TWO_VALUES[keyword]
    slices = set_labels(make_series(12), keyword, [values[letter == "B"] for letter in pattern])
    if keyword == "TemporalPositionIdentifier":
        assert get_reasons(group_and_read(slices)) == ["duplicate_slices"]
        return

    ((scan, voxels),) = group_and_read(slices)

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ()


@pytest.mark.parametrize(
    ("keyword", "labels"),
    [
        ("AcquisitionNumber", list(range(12))),
        ("AcquisitionNumber", [i // 3 for i in range(12)]),
        ("TriggerTime", [350, 351, 350, 352, 349, 351, 350, 350, 353, 351, 349, 350]),
        ("SliceThickness", ["3.26999999999998", "3.27000000000001"] * 6),
        ("FrameOfReferenceUID", [f"1.{i}" for i in range(12)]),
    ],
)
def test_fields_that_vary_in_one_volume_do_not_split_it(
    make_series: MakeSeries, group_and_read: GroupAndRead, keyword: str, labels: list[Any]
) -> None:
    ((scan, voxels),) = group_and_read(set_labels(make_series(12), keyword, labels))

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ()


def test_two_passes_that_overlap_off_the_grid_fail_even_if_steps_are_resampled(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    first, second = make_series(6, AcquisitionNumber=1), make_series(6, AcquisitionNumber=2)
    for dataset in second.values():
        dataset.ImagePositionPatient[2] += 9
    slices = {f"{n}{name}": d for n, part in enumerate((first, second)) for name, d in part.items()}

    assert get_reasons(group_and_read(slices, resample=True)) == ["duplicate_slices"]


def test_folders_whose_slices_alternate_fail_and_say_what_to_do(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    ((scan, voxels),) = group_and_read(put_in_folders(make_series(12), ["a", "b"] * 6))

    assert voxels == "duplicate_slices"
    assert "2 folders" in scan.message


def test_slices_distributed_over_folders_at_random_are_one_volume_with_a_warning(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    ((scan, voxels),) = group_and_read(put_in_folders(make_series(12), list("abbabaaababb")))

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ("duplicate_slices",)


def test_folders_that_share_slices_are_one_volume_without_the_doubles(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = make_series(12)
    shared = put_in_folders(slices, ["a"] * 7 + ["b"] * 5) | {"b/007.dcm": slices["007.dcm"]}

    ((scan, voxels),) = group_and_read(shared)

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ("duplicate_slices",)


@pytest.mark.parametrize("chosen", [range(5), range(4, 9), range(0, 12, 2)])
def test_a_folder_with_some_slices_of_a_complete_series_is_excluded(
    make_series: MakeSeries, group_and_read: GroupAndRead, chosen: range
) -> None:
    slices = make_series(12)
    names = [f"{number + 1:03d}.dcm" for number in chosen]
    files = put_in_folders(slices, ["a"] * 12) | {f"b/{name}": slices[name] for name in names}

    volumes = group_and_read(files)

    assert get_reasons(volumes) == [12, "excluded duplicate_slices"]
    assert volumes[0][0].warnings == ("duplicate_slices",)


@pytest.mark.parametrize(
    "studies", [["1.1"] * 6 + ["1.2"] * 6, [f"1.{i}" for i in range(12)], ["1.1", "1.1", "1.2"] * 4]
)
def test_slices_of_several_studies_that_complete_one_stack_are_one_volume_with_a_warning(
    make_series: MakeSeries, group_and_read: GroupAndRead, studies: list[str]
) -> None:
    slices = set_labels(make_series(12), "StudyInstanceUID", studies)

    ((scan, voxels),) = group_and_read(slices)

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ("duplicate_slices",)


def test_two_patients_whose_slices_complete_one_stack_fail(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    ((scan, voxels),) = group_and_read(set_labels(make_series(12), "PatientID", ["A"] * 6 + ["B"] * 6))

    assert voxels == "not_a_volume"
    assert "2 PatientIDs" in scan.message


def test_a_patient_id_per_slice_is_one_volume_with_a_warning(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = set_labels(make_series(12), "PatientID", [f"P{i}" for i in range(12)])

    ((scan, voxels),) = group_and_read(slices)

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ("duplicate_slices",)


def test_two_patients_far_from_each_other_are_two_scans_with_a_warning(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    other = make_series(6, PatientID="PID-4712-ZZ")
    for dataset in other.values():
        dataset.ImagePositionPatient[2] += 101

    volumes = group_and_read({**make_series(6), **{f"b{name}": d for name, d in other.items()}})

    assert get_reasons(volumes) == [6, 6]
    assert all(scan.warnings == ("duplicate_slices",) for scan, _ in volumes)


@pytest.mark.parametrize("number", [1, 5, 12])
@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"SOPClassUID": MR_CLASS}, "not_ct"),
        ({"SOPClassUID": CAPTURE_CLASS}, "not_ct"),
        ({"Modality": "OT"}, "not_ct"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "not_a_volume"),
    ],
)
def test_an_excluded_image_on_a_place_of_the_stack_fails_the_scan(
    make_series: MakeSeries, group_and_read: GroupAndRead, tags: dict[str, Any], reason: str, number: int
) -> None:
    slices = make_series(12)
    for keyword, value in tags.items():
        setattr(slices[f"{number:03d}.dcm"], keyword, value)

    ((scan, voxels),) = group_and_read(slices)

    assert voxels == reason
    assert f"{number:03d}.dcm" in scan.message


def test_an_annotated_copy_at_the_position_of_a_slice_is_excluded_alone(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    copy = make_series(12, SOPClassUID=CAPTURE_CLASS)["003.dcm"]

    assert get_reasons(group_and_read({**make_series(12), "copy": copy})) == [12, "excluded not_ct"]


def test_a_slice_with_the_class_of_mr_is_read_with_a_warning_if_the_policy_says_so(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = make_series(12)
    slices["012.dcm"].SOPClassUID = MR_CLASS

    ((scan, voxels),) = group_and_read(slices, accept=True)

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ("not_ct",)


def test_secondary_captures_with_the_geometry_of_slices_need_the_policy(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = make_series(6, SOPClassUID=CAPTURE_CLASS)

    ((excluded, reason),) = group_and_read(slices)
    ((accepted, voxels),) = group_and_read(slices, accept=True)

    assert reason == "excluded not_ct"
    assert "policy.not_ct: warn" in excluded.message
    assert np.array_equal(voxels, make_expected(6))
    assert accepted.warnings == ("not_ct",)


def test_a_secondary_capture_without_geometry_is_always_excluded(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = make_series(1, SOPClassUID=CAPTURE_CLASS)
    del slices["001.dcm"].ImagePositionPatient

    assert get_reasons(group_and_read(slices, accept=True)) == ["excluded not_ct"]


def test_a_matrix_that_alternates_fails(make_series: MakeSeries, group_and_read: GroupAndRead) -> None:
    slices = set_labels(make_series(12), "Rows", [6, 5] * 6)
    for dataset in slices.values():
        dataset.PixelData = dataset.PixelData[: 8 * dataset.Rows]

    assert get_reasons(group_and_read(slices)) == ["not_a_volume"]


def test_slices_with_a_series_uid_each_are_one_volume_with_a_warning(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = set_labels(make_series(12), "SeriesInstanceUID", [f"1.2.{i}" for i in range(12)])

    ((scan, voxels),) = group_and_read(slices)

    assert np.array_equal(voxels, make_expected(12))
    assert scan.warnings == ("duplicate_slices",)


def test_slices_with_a_series_uid_each_that_are_no_stack_fail_with_advice(
    make_series: MakeSeries, group_and_read: GroupAndRead
) -> None:
    slices = set_labels(make_series(6), "SeriesInstanceUID", [f"1.2.{i}" for i in range(6)])
    slices["004.dcm"].ImagePositionPatient[2] += 0.7

    volumes = group_and_read(slices)

    assert get_reasons(volumes) == ["not_a_volume"] * 6
    assert "the same SeriesInstanceUID" in volumes[0][0].message


def make_multiframe(make_series: MakeSeries, number: int, places: list[float]) -> Dataset:
    """Return an enhanced file with frames at some z in mm."""
    slices = make_series(len(places), SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(places))
    dataset = slices["001.dcm"]
    dataset.SOPInstanceUID = f"1.9.{number}"
    dataset.PixelData = b"".join(
        np.full(24, z, np.int16).tobytes() if i else np.arange(24, dtype=np.int16).tobytes()
        for i, z in enumerate(places)
    )
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient
    orientation, shared = Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    shared.PlaneOrientationSequence = Sequence([orientation])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for z in places:
        position, group = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, z]
        group.PlanePositionSequence = Sequence([position])
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return dataset


@pytest.mark.parametrize(
    ("starts", "step", "reasons"),
    [
        ((0, 12), 2, [12]),  # one continues the other
        ((0, 0), 2, [6, 6]),  # two time points
        ((0, 2), 4, ["duplicate_slices"]),  # frames lie between each other
        ((0, 200), 2, [6, 6]),  # far from each other
    ],
)
def test_multi_frame_files_without_concatenation_are_joined_by_position(
    make_series: MakeSeries,
    group_and_read: GroupAndRead,
    starts: tuple[int, int],
    step: int,
    reasons: list[Any],
) -> None:
    files = {
        f"{number}.dcm": make_multiframe(make_series, number, [start + step * i for i in range(6)])
        for number, start in enumerate(starts)
    }

    volumes = group_and_read(files)

    assert get_reasons(volumes) == reasons
    assert all(scan.warnings == ("duplicate_slices",) for scan, _ in volumes)


@pytest.mark.parametrize("seed", range(40))
def test_a_stack_labelled_at_random_is_one_equal_volume_or_fails_or_is_split_into_regular_stacks(
    make_series: MakeSeries, group_and_read: GroupAndRead, seed: int
) -> None:
    generator = random.Random(seed)
    count = generator.randint(5, 14)
    numbers = [generator.randrange(2) for _ in range(count)]
    keyword = generator.choice([*TWO_VALUES, "StudyInstanceUID", "PatientID", "SOPClassUID", "folder"])
    values = TWO_VALUES.get(
        keyword, (MR_CLASS, CAPTURE_CLASS) if keyword == "SOPClassUID" else ("1.1", "1.2")
    )
    slices = make_series(count)
    if keyword == "folder":
        slices = put_in_folders(slices, [values[number] for number in numbers])
    else:
        set_labels(slices, keyword, [values[number] for number in numbers])

    for scan, voxels in group_and_read(slices, accept=generator.random() < 0.5, resample=True):
        if isinstance(voxels, str):
            continue
        if len(voxels) == count:
            assert np.array_equal(voxels, make_expected(count))
            continue
        assert scan.warnings
        indices = [int(value + 1024) // 24 for value in voxels[:, 0, 0]]
        assert len({b - a for a, b in pairwise(indices)}) == 1
