"""Unusual but valid files, as found in real archives, are read correctly; invalid geometry is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

Files = list[tuple[str, bytes]]
MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]
Edit = Callable[[Dataset], Any]

GE_PRIVATE_SYNTAX = "1.2.840.113619.5.2"
"""Implicit VR with big-endian pixels."""

EXPECTED = np.arange(120).reshape(5, 6, 4) - 1024


def group_and_read(files: Files) -> Volume:
    (scan,) = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])
    assert scan.reason is None
    contents = dict(files)
    return read_series([(name, contents[name]) for name in scan.files], max_voxels=10**6)


def encode_files(slices: dict[str, Dataset], encode_file: EncodeFile, suffix: str = "") -> Files:
    return [(name.removesuffix(".dcm") + suffix, encode_file(dataset)) for name, dataset in slices.items()]


def make_item(**tags: Any) -> Dataset:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


def make_icon_edit(*, undefined_length: bool) -> Edit:
    """Return an edit that adds an icon image, with its own PixelData, before the pixel data."""

    def edit(dataset: Dataset) -> None:
        icon = make_item(Rows=2, Columns=2, BitsAllocated=8, SamplesPerPixel=1, PixelData=bytes([9] * 4))
        if undefined_length:
            icon.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
            icon["PixelData"].VR = "OB"
            icon["PixelData"].is_undefined_length = True
        dataset.IconImageSequence = Sequence([icon])
        dataset["IconImageSequence"].is_undefined_length = undefined_length

    return edit


def add_private_sequence(dataset: Dataset) -> None:
    dataset.add_new(0x00091001, "SQ", Sequence([make_item(Rows=77, PixelSpacing=[9, 9])]))
    dataset[0x00091001].is_undefined_length = True


def set_unknown_vr(dataset: Dataset) -> None:
    for tag, text in ((0x00280030, b"0.5\\0.25"), (0x00281053, b"1 ")):
        dataset[tag] = DataElement(tag, "UN", text)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(make_icon_edit(undefined_length=False), id="icon"),
        pytest.param(make_icon_edit(undefined_length=True), id="compressed-icon-of-undefined-length"),
        pytest.param(add_private_sequence, id="private-sequence-of-undefined-length"),
        pytest.param(set_unknown_vr, id="numbers-of-unknown-vr"),
        pytest.param(lambda d: d.add_new(0x00280000, "UL", 200), id="group-length"),
        pytest.param(lambda d: d.add_new(0x00111010, "OB", bytes(70_001)), id="large-private-blob"),
        pytest.param(lambda d: d.add_new(0x60003000, "OW", bytes(6)), id="overlay"),
        pytest.param(lambda d: d.add_new(0xFFFCFFFC, "OB", bytes(500)), id="trailing-padding"),
        pytest.param(lambda d: setattr(d, "InstanceNumber", 1), id="one-number-for-all"),
        pytest.param(lambda d: setattr(d, "InstanceNumber", None), id="no-number"),
        pytest.param(lambda d: setattr(d, "PixelSpacing", [" 0.5 ", "0.2500000"]), id="spaces"),
        pytest.param(lambda d: setattr(d, "PhotometricInterpretation", "MONOCHROME1"), id="monochrome1"),
        pytest.param(lambda d: setattr(d, "RescaleType", "US"), id="unspecified-units"),
        pytest.param(lambda d: setattr(d, "SOPInstanceUID", ""), id="no-instance-uid"),
        pytest.param(lambda d: setattr(d, "SeriesInstanceUID", ""), id="no-series-uid"),
        pytest.param(lambda d: setattr(d, "Modality", ""), id="no-modality"),
        pytest.param(lambda d: d.add_new(0x00080060, "LO", "ct"), id="small-letters"),
        pytest.param(lambda d: delattr(d, "SOPClassUID"), id="no-class"),
    ],
)
def test_unusual_but_valid_headers_do_not_change_the_volume(
    make_series: MakeSeries, encode_file: EncodeFile, edit: Edit
) -> None:
    slices = make_series()
    for dataset in slices.values():
        edit(dataset)

    volume = group_and_read(encode_files(slices, encode_file))

    assert np.array_equal(volume.voxels_zyx, EXPECTED)
    assert volume.spacing_zyx == (2.0, 0.5, 0.25)


@pytest.mark.parametrize("suffix", ["", ".dcm", ".IMA", ".0001", ".mag"])
def test_file_names_do_not_change_the_volume(
    make_series: MakeSeries, encode_file: EncodeFile, suffix: str
) -> None:
    files = encode_files(make_series(), encode_file, suffix)

    assert np.array_equal(group_and_read(files).voxels_zyx, EXPECTED)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_files_without_preamble_and_file_meta_information_are_read(
    make_series: MakeSeries, encode_file: EncodeFile, syntax: str
) -> None:
    slices = make_series()
    for dataset in slices.values():
        dataset.file_meta.TransferSyntaxUID = syntax
    bare = [(name, data[data.index(b"\x08\0\x08\0") :]) for name, data in encode_files(slices, encode_file)]

    assert np.array_equal(group_and_read(bare).voxels_zyx, EXPECTED)


def test_pixel_data_padded_to_an_even_length_are_read(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    slices = make_series(
        3, Rows=3, Columns=5, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0
    )
    for dataset in slices.values():
        dataset.PixelData = bytes(range(15)) + b"\0"

    assert group_and_read(encode_files(slices, encode_file)).voxels_zyx[1].ravel().tolist() == list(
        range(-1024, -1009)
    )


@pytest.mark.parametrize(
    ("orientation", "step", "letters"),
    [
        pytest.param([0, 1, 0, 0, 0, -1], [2, 0, 0], "PIR", id="sagittal"),
        pytest.param([1, 0, 0, 0, 0, -1], [0, 2, 0], "LIP", id="coronal"),
        pytest.param([1, 0, 0, 0, 1, 0], [0, 0, -2], "LPS", id="head-to-feet"),
        pytest.param([-1, 0, 0, 0, -1, 0], [0, 0, 2], "RAS", id="prone"),
    ],
)
def test_every_slice_direction_keeps_the_patient_position_of_each_voxel(
    make_series: MakeSeries, encode_file: EncodeFile, orientation: list[int], step: list[int], letters: str
) -> None:
    slices = make_series()
    for index, dataset in enumerate(slices.values()):
        dataset.ImageOrientationPatient = orientation
        dataset.ImagePositionPatient = [10 + index * mm for mm in step]

    volume = group_and_read(encode_files(slices, encode_file))

    assert volume.orientation == letters
    for index in range(5):
        point_lps = np.array([10 + index * mm for mm in step]) + 3 * 0.25 * np.array(orientation[:3])
        x, y, z = np.rint(np.linalg.inv(volume.affine_lps) @ [*point_lps, 1])[:3].astype(int)
        assert (x, y) == (3, 0)
        assert volume.voxels_zyx[z, y, x] == EXPECTED[index, 0, 3]


def test_slices_may_differ_in_pixel_representation_and_rescale(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    slices = make_series()
    expected: NDArray[np.int64] = EXPECTED.copy()
    slices["002.dcm"].PixelRepresentation = 0
    slices["004.dcm"].RescaleIntercept = -1000
    slices["005.dcm"].RescaleSlope = 2
    expected[3] += 24
    expected[4] = (expected[4] + 1024) * 2 - 1024

    assert np.array_equal(group_and_read(encode_files(slices, encode_file)).voxels_zyx, expected)


def test_a_slice_of_another_series_in_the_folder_is_a_separate_scan(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    stray = ("stray", encode_file(make_series(1, uid="9.9")["001.dcm"]))
    files = [*encode_files(make_series(), encode_file), stray]

    scans = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])

    assert sorted(len(scan.files) for scan in scans) == [1, 5]


def test_a_slice_whose_modality_or_sop_class_is_damaged_stays_in_its_scan(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    slices = make_series()
    slices["004.dcm"].Modality = "CU"
    slices["005.dcm"].SOPClassUID = "1.2.840.10008.5.1.4.1.1.9999"

    assert np.array_equal(group_and_read(encode_files(slices, encode_file)).voxels_zyx, EXPECTED)


def test_a_private_transfer_syntax_is_unsupported(make_series: MakeSeries, encode_file: EncodeFile) -> None:
    slices = make_series()
    for dataset in slices.values():
        dataset.file_meta.TransferSyntaxUID = GE_PRIVATE_SYNTAX

    with pytest.raises(ScanError) as caught:
        group_and_read(encode_files(slices, encode_file))
    assert caught.value.reason == Reason.UNSUPPORTED


def move_slices(slices: dict[str, Dataset], positions: list[list[float]]) -> dict[str, Dataset]:
    for dataset, position in zip(slices.values(), positions, strict=True):
        dataset.ImagePositionPatient = position
    return slices


RESAMPLE_BOTH = {"resample_tilt": True, "resample_steps": True}


@pytest.mark.parametrize(
    ("positions", "warnings"),
    [
        pytest.param([[0, 0, z] for z in (0, 2, 4, 5, 6)], ("resampled_steps",), id="two-zones"),
        pytest.param([[0, 0, z] for z in (0, 2, 4.1, 6, 8)], ("resampled_steps",), id="one-off"),
        pytest.param([[0, 0.6 * i, 2 * i] for i in range(5)], ("gantry_tilt",), id="tilt"),
        pytest.param([[0.09 * i, 0, 2 * i] for i in range(5)], ("gantry_tilt",), id="slow-shear"),
        pytest.param([[0, 0, 2 * i] for i in range(5)], (), id="regular"),
    ],
)
def test_slices_to_resample_are_returned_with_their_positions(
    make_series: MakeSeries, encode_file: EncodeFile, positions: list[list[float]], warnings: tuple[str, ...]
) -> None:
    files = encode_files(move_slices(make_series(), positions), encode_file)

    volume = read_series(files, max_voxels=10**6, **RESAMPLE_BOTH)  # type: ignore[arg-type]

    assert volume.warnings == warnings
    assert np.array_equal(volume.voxels_zyx, EXPECTED)
    if warnings:
        assert volume.slice_origins_lps == pytest.approx(np.array(positions))
        with pytest.raises(ScanError):
            read_series(files, max_voxels=10**6)
    else:
        assert volume.slice_origins_lps is None


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        pytest.param([[0, 0, z] for z in (0, 2, 4, 8, 10)], Reason.MISSING_SLICES, id="one-gap"),
        pytest.param(
            [[0, 0, z] for z in (0, 2, 4, 9.1, 11)], Reason.MISSING_SLICES, id="hole-of-no-multiple"
        ),
        pytest.param([[0, 0, z] for z in (0, 2, 4, 6, 12.7)], Reason.MISSING_SLICES, id="hole-at-the-end"),
        pytest.param([[0, 0, z] for z in (0, 2, 4, 4, 6)], Reason.DUPLICATE_SLICES, id="duplicate"),
        pytest.param([[0, 3 * i, 2 * i] for i in range(5)], Reason.GANTRY_TILT, id="steeper-than-any-gantry"),
    ],
)
def test_missing_slices_and_impossible_tilts_fail_even_if_resampling_is_allowed(
    make_series: MakeSeries, encode_file: EncodeFile, positions: list[list[float]], reason: Reason
) -> None:
    files = encode_files(move_slices(make_series(), positions), encode_file)

    with pytest.raises(ScanError) as caught:
        read_series(files, max_voxels=10**6, **RESAMPLE_BOTH)  # type: ignore[arg-type]
    assert caught.value.reason == reason


@pytest.mark.parametrize("allowed", ["resample_tilt", "resample_steps"])
def test_allowing_only_tilt_or_only_irregular_steps_does_not_allow_both(
    make_series: MakeSeries, encode_file: EncodeFile, allowed: str
) -> None:
    positions = [[0, 0.3 * z, z] for z in (0, 2, 4, 5, 6)]
    files = encode_files(move_slices(make_series(), positions), encode_file)

    with pytest.raises(ScanError):
        read_series(files, max_voxels=10**6, **{allowed: True})  # type: ignore[arg-type]


@pytest.mark.parametrize("tags", [{"RescaleSlope": "1e39"}, {"RescaleIntercept": "-1e300"}])
def test_rescaled_values_that_would_overflow_fail_the_scan(
    make_series: MakeSeries, encode_file: EncodeFile, tags: dict[str, str]
) -> None:
    with pytest.raises(ScanError) as caught:
        group_and_read(encode_files(make_series(**tags), encode_file))
    assert caught.value.reason == Reason.NON_FINITE
