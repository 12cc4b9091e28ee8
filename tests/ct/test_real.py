"""Test real CT with known properties: all scans of the collection, all twins, all unusual cases."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from featray.ct import hu_statistics
from featray.ct.dicom.dicom_scan import DicomScan
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import read_header
from featray.ct.dicom.read import read_series
from featray.ct.formats.nifti import read_nifti
from featray.ct.volume import Volume
from featray.errors import ScanError

LIMIT = 2 * 10**9

COLLECTION = (
    [f"collection/nifti/{name}.nii.gz" for name in ("CRLM-CT-1004", "STS_002", "STS_019", "STS_042")]
    + ["collection/nifti/example_ct.nii.gz", "collection/nifti/example_ct_sm.nii.gz"]
    + [f"collection/dicom/{name}" for name in ("CRLM-CT-1004", "STS_002", "ct-64")]
)
ENCODINGS = ("rle", "jpeg-lossless", "jpeg-ls", "jpeg2000", "big-endian", "deflated")
TWINS = {
    "collection/dicom/STS_002": "collection/nifti/STS_002.nii.gz",
    "collection/dicom/CRLM-CT-1004": "collection/nifti/CRLM-CT-1004.nii.gz",
    "collection/dicom/ct-64": "twins/ct-64.nii.gz",
} | {f"encodings/STS_002-{name}": "collection/nifti/STS_002.nii.gz" for name in ENCODINGS}

OK = "ok"
ODD: dict[str, dict[str, set[str]]] = {
    "gantry-tilt-variable-step": {"01.dcm": {"gantry_tilt", "irregular_spacing"}},
    "jpeg2000-empty-uids": {"CT.": {OK}},
    "duplicate-positions-missing-slices": {"CT2.dcm": {"missing_slices", "duplicate_slices"}},
    "multiframe-and-singles-one-uid": {"slice1.dcm": {OK}, "volume.dcm": {"duplicate_slices"}},
    "bolus-tracking-one-position": {"001.dcm": {"not_a_volume", "duplicate_slices"}},
    "localizer-only": {"I10": {"not_a_volume", "not_ct"}},
    "dose-report-tagged-ct": {"I10": {"not_ct", "not_a_volume"}},
    "wrong-transfer-syntax": {"000000.dcm": {"unreadable", "unsupported"}},
    "slice-truncated": {"000000.dcm": {"truncated", "unreadable", "missing_slices"}},
    "slice-unparsable": {"000000.dcm": {"unreadable", "truncated", "missing_slices"}},
    "slice-without-preamble": {"000000.dcm": {OK}},
}
"""Acceptable outcomes (cases.csv) by case and by the beginning of the first file name of a scan."""


def group_files(folder: Path) -> list[DicomScan]:
    headers = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            headers.append(read_header(file, path.relative_to(folder).as_posix()))
    return group_into_scans(headers)


def read_dicom_scan(folder: Path, series: DicomScan) -> Volume:
    files = [(name, (folder / name).read_bytes()) for name in series.files]
    return read_series(files, max_voxels=LIMIT)


def read_scan(path: Path) -> Volume:
    if path.is_file():
        return read_nifti(path.read_bytes(), max_voxels=LIMIT)
    (series,) = group_files(path)
    return read_dicom_scan(path, series)


def find_outcome(folder: Path, series: DicomScan) -> str:
    if series.reason:
        return series.reason.value
    try:
        read_dicom_scan(folder, series)
    except ScanError as error:
        return error.reason.value
    return OK


@pytest.fixture(scope="session")
def facts(shared_ct: Path) -> dict[str, dict[str, str]]:
    with (shared_ct / "collection" / "facts.csv").open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("item", COLLECTION)
def test_every_scan_of_the_collection_has_its_known_properties(
    shared_ct: Path, facts: dict[str, dict[str, str]], item: str
) -> None:
    fact = facts[item]
    volume = read_scan(shared_ct / item)
    statistics = hu_statistics.compute_statistics(volume.voxels_zyx)

    assert list(volume.voxels_zyx.shape) == [int(n) for n in fact["shape_zyx"].split()]
    assert volume.spacing_zyx == pytest.approx([float(mm) for mm in fact["spacing_zyx"].split()], abs=1e-4)
    assert volume.orientation == fact["orientation"]
    assert (statistics.minimum, statistics.maximum) == (float(fact["hu_min"]), float(fact["hu_max"]))
    percentiles = [float(fact[name]) for name in ("hu_p01", "hu_p50", "hu_p99")]
    assert [statistics.p01, statistics.p50, statistics.p99] == pytest.approx(percentiles, abs=1)
    assert ("qform_only" in volume.warnings) == ("nifti/STS" in item)
    assert hu_statistics.find_hu_warnings(statistics) == (("padding_value",) if "CRLM" in item else ())


def test_every_scan_with_known_properties_is_tested(facts: dict[str, dict[str, str]]) -> None:
    assert set(facts) == set(COLLECTION)


@pytest.mark.slow
@pytest.mark.parametrize("folder", TWINS)
def test_dicom_and_nifti_twins_have_the_same_voxels_and_positions(shared_ct: Path, folder: str) -> None:
    dicom, nifti = read_scan(shared_ct / folder), read_scan(shared_ct / TWINS[folder])

    assert np.array_equal(dicom.voxels_zyx, nifti.voxels_zyx)
    assert dicom.affine_lps == pytest.approx(nifti.affine_lps, abs=1e-3)


def test_a_dicom_series_agrees_with_its_nrrd_twin_in_simpleitk(shared_ct: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(shared_ct / "twins" / "ct-64.nrrd"))

    volume = read_scan(shared_ct / "collection/dicom/ct-64")

    assert np.array_equal(volume.voxels_zyx, sitk.GetArrayFromImage(image))
    assert volume.spacing_zyx == pytest.approx(image.GetSpacing()[::-1], abs=0.01)
    last = [n - 1 for n in image.GetSize()]
    position = (volume.affine_lps @ (*last, 1))[:3]
    assert position == pytest.approx(image.TransformIndexToPhysicalPoint(last), abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("case", ODD)
def test_every_unusual_series_has_an_acceptable_outcome(shared_ct: Path, case: str) -> None:
    folder = shared_ct / "odd" / case
    scans = group_files(folder)

    assert len(scans) == len(ODD[case])
    for scan, (first, acceptable) in zip(scans, ODD[case].items(), strict=True):
        assert scan.files[0].startswith(first)
        assert find_outcome(folder, scan) in acceptable


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "shape", "spacing", "extremes"),
    [
        ("jpeg2000-empty-uids", (20, 512, 512), (2.0, 0.9766, 0.9766), (-1024, 1839)),
        ("multiframe-and-singles-one-uid", (7, 512, 512), (4.0, 0.5117, 0.5117), (-1024, 334)),
        ("slice-without-preamble", (48, 143, 161), (3.27, 0.9766, 0.9766), (-1000, 1156)),
    ],
)
def test_unusual_series_that_are_read_have_their_known_properties(
    shared_ct: Path, case: str, shape: tuple[int, ...], spacing: tuple[float, ...], extremes: tuple[int, int]
) -> None:
    folder = shared_ct / "odd" / case
    volume = read_dicom_scan(folder, group_files(folder)[0])

    assert volume.voxels_zyx.shape == shape
    assert volume.spacing_zyx == pytest.approx(spacing, abs=1e-3)
    assert (volume.voxels_zyx.min(), volume.voxels_zyx.max()) == extremes


@pytest.mark.parametrize("encoding", ["jpeg-lossless", "jpeg-ls", "jpeg2000"])
def test_a_compressed_slice_without_its_end_marker_is_rejected(shared_ct: Path, encoding: str) -> None:
    paths = sorted((shared_ct / "encodings" / f"STS_002-{encoding}").iterdir())[:3]
    files = [(path.name, path.read_bytes()) for path in paths]
    end = files[1][1].rindex(b"\xff\xd9")
    files[1] = ("cut", files[1][1][:end] + b"\0\0" + files[1][1][end + 2 :])

    with pytest.raises(ScanError, match="end marker"):
        read_series(files, max_voxels=LIMIT)


def test_single_frames_and_their_multiframe_copy_give_the_same_volume(shared_ct: Path) -> None:
    folder = shared_ct / "odd" / "multiframe-and-singles-one-uid"
    singles, copy = (read_dicom_scan(folder, series) for series in group_files(folder))

    assert np.array_equal(singles.voxels_zyx, copy.voxels_zyx)
    assert singles.affine_lps == pytest.approx(copy.affine_lps, abs=1e-4)


def test_a_slice_without_preamble_is_read(shared_ct: Path) -> None:
    folder = shared_ct / "odd" / "slice-without-preamble"
    volume = read_dicom_scan(folder, group_files(folder)[0])

    assert np.array_equal(
        volume.voxels_zyx, read_scan(shared_ct / "collection/nifti/STS_002.nii.gz").voxels_zyx
    )


def test_an_8_bit_file_with_a_slope_is_scaled_once_and_causes_a_warning(shared_ct: Path) -> None:
    volume = read_scan(shared_ct / "odd/uint8-slope/STS_019_uint8.nii.gz")
    statistics = hu_statistics.compute_statistics(volume.voxels_zyx)

    assert (statistics.minimum, statistics.maximum) == pytest.approx((0, 563.19), abs=0.01)
    assert hu_statistics.find_hu_warnings(statistics) == ("not_hu",)


def test_a_windowed_oblique_file_causes_two_warnings(shared_ct: Path) -> None:
    volume = read_scan(shared_ct / "odd/oblique-8bit-windowed/CT_pitch.nii.gz")

    assert volume.warnings == ("oblique",)
    assert volume.orientation == "RAS"
    assert hu_statistics.find_hu_warnings(hu_statistics.compute_statistics(volume.voxels_zyx)) == ("not_hu",)


@pytest.mark.slow
def test_all_files_together_form_the_same_scans_as_each_folder_alone(shared_ct: Path) -> None:
    folders = [
        *shared_ct.glob("collection/dicom/*"),
        *shared_ct.glob("encodings/*"),
        *shared_ct.glob("odd/*"),
    ]
    counts = [len(series.files) for folder in folders for series in group_files(folder)]

    assert sorted(len(series.files) for series in group_files(shared_ct)) == sorted(counts)
