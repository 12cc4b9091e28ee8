"""Kinds of files that real archives hold: odd, but right, so they must be read right; or refused."""

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
SeriesOf = Callable[..., dict[str, Dataset]]
ToBytes = Callable[[Dataset], bytes]
Edit = Callable[[Dataset], Any]

EXPECTED = np.arange(120).reshape(5, 6, 4) - 1024


def grouped_and_read(files: Files) -> Volume:
    (series,) = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])
    assert series.reason is None
    contents = dict(files)
    return read_series([(name, contents[name]) for name in series.files], max_voxels=10**6)


def written(slices: dict[str, Dataset], to_bytes: ToBytes, suffix: str = "") -> Files:
    return [(name.removesuffix(".dcm") + suffix, to_bytes(dataset)) for name, dataset in slices.items()]


def item(**tags: Any) -> Dataset:
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def icon(undefined: bool) -> Edit:
    """Put a small picture, with pixels of its own, before the pixels."""

    def edit(dataset: Dataset) -> None:
        picture = item(Rows=2, Columns=2, BitsAllocated=8, SamplesPerPixel=1, PixelData=bytes([9] * 4))
        if undefined:
            picture.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
            picture["PixelData"].VR = "OB"
            picture["PixelData"].is_undefined_length = True
        dataset.IconImageSequence = Sequence([picture])
        dataset["IconImageSequence"].is_undefined_length = undefined

    return edit


def private_sequence(dataset: Dataset) -> None:
    dataset.add_new(0x00091001, "SQ", Sequence([item(Rows=77, PixelSpacing=[9, 9])]))
    dataset[0x00091001].is_undefined_length = True


def unknown_numbers(dataset: Dataset) -> None:
    for tag, text in ((0x00280030, b"0.5\\0.25"), (0x00281053, b"1 ")):
        dataset[tag] = DataElement(tag, "UN", text)


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(icon(False), id="icon"),
        pytest.param(icon(True), id="compressed-icon-of-undefined-length"),
        pytest.param(private_sequence, id="private-sequence-of-undefined-length"),
        pytest.param(unknown_numbers, id="numbers-of-unknown-vr"),
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
def test_odd_but_right_headers_change_nothing(series_of: SeriesOf, file_bytes: ToBytes, edit: Edit) -> None:
    slices = series_of()
    for dataset in slices.values():
        edit(dataset)

    volume = grouped_and_read(written(slices, file_bytes))

    assert np.array_equal(volume.voxels_zyx, EXPECTED)
    assert volume.spacing_zyx == (2.0, 0.5, 0.25)


@pytest.mark.parametrize("suffix", ["", ".dcm", ".IMA", ".0001", ".mag"])
def test_names_do_not_matter(series_of: SeriesOf, file_bytes: ToBytes, suffix: str) -> None:
    files = written(series_of(), file_bytes, suffix)

    assert np.array_equal(grouped_and_read(files).voxels_zyx, EXPECTED)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
def test_files_without_preamble_and_meta_group_are_read(
    series_of: SeriesOf, file_bytes: ToBytes, syntax: str
) -> None:
    slices = series_of()
    for dataset in slices.values():
        dataset.file_meta.TransferSyntaxUID = syntax
    bare = [(name, data[data.index(b"\x08\0\x08\0") :]) for name, data in written(slices, file_bytes)]

    assert np.array_equal(grouped_and_read(bare).voxels_zyx, EXPECTED)


def test_an_odd_number_of_bytes_is_padded_by_one(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    slices = series_of(3, Rows=3, Columns=5, BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0)
    for dataset in slices.values():
        dataset.PixelData = bytes(range(15)) + b"\0"

    assert grouped_and_read(written(slices, file_bytes)).voxels_zyx[1].ravel().tolist() == list(
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
def test_every_direction_of_slices_keeps_each_voxel_in_place(
    series_of: SeriesOf, file_bytes: ToBytes, orientation: list[int], step: list[int], letters: str
) -> None:
    slices = series_of()
    for index, dataset in enumerate(slices.values()):
        dataset.ImageOrientationPatient = orientation
        dataset.ImagePositionPatient = [10 + index * mm for mm in step]

    volume = grouped_and_read(written(slices, file_bytes))

    assert volume.orientation == letters
    for index in range(5):
        where = np.array([10 + index * mm for mm in step]) + 3 * 0.25 * np.array(orientation[:3])
        x, y, z = np.rint(np.linalg.inv(volume.affine_lps) @ [*where, 1])[:3].astype(int)
        assert (x, y) == (3, 0)
        assert volume.voxels_zyx[z, y, x] == EXPECTED[index, 0, 3]


def test_slices_may_differ_in_sign_and_scaling(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    slices = series_of()
    wanted: NDArray[np.int64] = EXPECTED.copy()
    slices["002.dcm"].PixelRepresentation = 0
    slices["004.dcm"].RescaleIntercept = -1000
    slices["005.dcm"].RescaleSlope = 2
    wanted[3] += 24
    wanted[4] = (wanted[4] + 1024) * 2 - 1024

    assert np.array_equal(grouped_and_read(written(slices, file_bytes)).voxels_zyx, wanted)


def test_a_slice_of_another_series_in_the_folder_is_an_entry_of_its_own(
    series_of: SeriesOf, file_bytes: ToBytes
) -> None:
    stray = ("stray", file_bytes(series_of(1, uid="9.9")["001.dcm"]))
    files = [*written(series_of(), file_bytes), stray]

    found = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files])

    assert sorted(len(series.files) for series in found) == [1, 5]


def test_a_slice_whose_modality_or_class_is_damaged_is_still_a_slice(
    series_of: SeriesOf, file_bytes: ToBytes
) -> None:
    slices = series_of()
    slices["004.dcm"].Modality = "CU"
    slices["005.dcm"].SOPClassUID = "1.2.840.10008.5.1.4.1.1.9999"

    assert np.array_equal(grouped_and_read(written(slices, file_bytes)).voxels_zyx, EXPECTED)


def test_a_private_transfer_syntax_is_unsupported(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    slices = series_of()
    for dataset in slices.values():
        dataset.file_meta.TransferSyntaxUID = "1.2.840.113619.5.2"  # GE: implicit, pixels big endian

    with pytest.raises(ScanError) as refused:
        grouped_and_read(written(slices, file_bytes))
    assert refused.value.reason == Reason.UNSUPPORTED


def moved(slices: dict[str, Dataset], places: list[list[float]]) -> dict[str, Dataset]:
    for dataset, place in zip(slices.values(), places, strict=True):
        dataset.ImagePositionPatient = place
    return slices


BOTH = {"resample_tilt": True, "resample_steps": True}


@pytest.mark.parametrize(
    ("places", "warnings"),
    [
        pytest.param([[0, 0, z] for z in (0, 2, 4, 5, 6)], ("resampled_steps",), id="two-zones"),
        pytest.param([[0, 0, z] for z in (0, 2, 4.1, 6, 8)], ("resampled_steps",), id="one-off"),
        pytest.param([[0, 0.6 * i, 2 * i] for i in range(5)], ("gantry_tilt",), id="tilt"),
        pytest.param([[0.09 * i, 0, 2 * i] for i in range(5)], ("gantry_tilt",), id="slow-shear"),
        pytest.param([[0, 0, 2 * i] for i in range(5)], (), id="regular"),
    ],
)
def test_what_may_be_resampled_comes_with_its_places(
    series_of: SeriesOf, file_bytes: ToBytes, places: list[list[float]], warnings: tuple[str, ...]
) -> None:
    files = written(moved(series_of(), places), file_bytes)

    volume = read_series(files, max_voxels=10**6, **BOTH)  # type: ignore[arg-type]

    assert volume.warnings == warnings
    assert np.array_equal(volume.voxels_zyx, EXPECTED)
    if warnings:
        assert volume.slice_origins_lps == pytest.approx(np.array(places))
        with pytest.raises(ScanError):
            read_series(files, max_voxels=10**6)
    else:
        assert volume.slice_origins_lps is None


@pytest.mark.parametrize(
    ("places", "reason"),
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
def test_what_is_missing_or_impossible_stays_refused(
    series_of: SeriesOf, file_bytes: ToBytes, places: list[list[float]], reason: Reason
) -> None:
    with pytest.raises(ScanError) as refused:
        read_series(written(moved(series_of(), places), file_bytes), max_voxels=10**6, **BOTH)  # type: ignore[arg-type]
    assert refused.value.reason == reason


@pytest.mark.parametrize("allowed", ["resample_tilt", "resample_steps"])
def test_allowing_one_does_not_allow_the_other(
    series_of: SeriesOf, file_bytes: ToBytes, allowed: str
) -> None:
    places = [[0, 0.3 * z, z] for z in (0, 2, 4, 5, 6)]
    with pytest.raises(ScanError):
        read_series(written(moved(series_of(), places), file_bytes), max_voxels=10**6, **{allowed: True})  # type: ignore[arg-type]


@pytest.mark.parametrize("tags", [{"RescaleSlope": "1e39"}, {"RescaleIntercept": "-1e300"}])
def test_values_that_would_overflow_are_refused(
    series_of: SeriesOf, file_bytes: ToBytes, tags: dict[str, str]
) -> None:
    with pytest.raises(ScanError) as refused:
        grouped_and_read(written(series_of(**tags), file_bytes))
    assert refused.value.reason == Reason.NON_FINITE
