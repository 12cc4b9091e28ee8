"""Test that phantoms are reproducible, resemble CT, and agree with their labels."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - the name its users know

from featray.synthetic.phantom import (
    LESION_HU,
    Phantom,
    PhantomParameters,
    make_collection,
    make_phantom,
    write_dicom_series,
    write_nifti,
)

PARAMETERS = PhantomParameters(
    lesion_radius_mm=20,
    lesion_x_mm=80,
    lesion_y_mm=-12,
    lesion_z_mm=30,
    body_width_mm=340,
    body_depth_mm=230,
    lung_size=1,
    noise_hu=12,
    table=True,
)


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(0, (24, 40, 48), parameters=PARAMETERS)


def find_index(phantom: Phantom, *xyz_mm: float) -> tuple[int, ...]:
    """Return the voxel index (z, y, x) nearest to a position in LPS mm."""
    x, y, z, _ = np.rint(np.linalg.inv(phantom.affine_lps) @ [*xyz_mm, 1]).astype(int)
    return z, y, x


def test_equal_seeds_give_equal_phantoms() -> None:
    first, second = make_phantom(5, (6, 12, 12)), make_phantom(5, (6, 12, 12))
    assert first.parameters == second.parameters
    np.testing.assert_array_equal(first.voxels_zyx, second.voxels_zyx)


def test_different_seeds_give_different_phantoms() -> None:
    first, second = make_phantom(5, (6, 12, 12)), make_phantom(6, (6, 12, 12))
    assert first.parameters != second.parameters
    assert (first.voxels_zyx != second.voxels_zyx).any()


@pytest.mark.parametrize(
    ("tissue", "xyz_mm", "low", "high"),
    [
        ("air", (-190, -190, 0), -1024, -980),
        ("lung", (-82, 0, 0), -870, -830),
        ("soft tissue", (0, -60, 0), 20, 60),
        ("spine", (0, 69, 0), 480, 720),
        ("table", (0, 123, 0), -170, -130),
        ("lesion", (80, -12, 30), 40, 80),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_tissue_has_its_position_and_hu(
    phantom: Phantom, tissue: str, xyz_mm: tuple[float, ...], low: float, high: float
) -> None:
    z, y, x = find_index(phantom, *xyz_mm)
    line = phantom.voxels_zyx[z, y, x - 1 : x + 2]
    assert low <= np.mean(line) <= high, tissue


def test_the_voxels_are_12_bit_values(phantom: Phantom) -> None:
    assert phantom.voxels_zyx.dtype == np.int16
    assert phantom.voxels_zyx.min() >= -1024
    assert phantom.voxels_zyx.max() <= 3071


def test_the_lesion_has_the_volume_of_its_radius() -> None:
    spacing = (4.0, 4.0, 4.0)
    quiet = dataclasses.replace(PARAMETERS, noise_hu=0)
    with_lesion = make_phantom(0, (40, 64, 64), spacing, quiet).voxels_zyx.astype(float)
    without = make_phantom(
        0, (40, 64, 64), spacing, dataclasses.replace(quiet, lesion_x_mm=1000)
    ).voxels_zyx.astype(float)
    filled = (with_lesion - without).sum() / (LESION_HU + 850) * np.prod(spacing)
    assert filled == pytest.approx(4 / 3 * np.pi * PARAMETERS.lesion_radius_mm**3, rel=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_a_lung_contains_the_whole_random_lesion(seed: int) -> None:
    parameters = make_phantom(seed, (1, 1, 1)).parameters
    half = (
        np.array([0.18 * parameters.body_width_mm, 0.36 * parameters.body_depth_mm, 120])
        * parameters.lung_size
    )
    offset = np.array(
        [
            abs(parameters.lesion_x_mm) - 0.24 * parameters.body_width_mm,
            parameters.lesion_y_mm,
            parameters.lesion_z_mm,
        ]
    )
    assert np.linalg.norm(offset / half) + parameters.lesion_radius_mm / half.min() < 1


def read_series(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


@pytest.mark.parametrize("signed", [False, True])
def test_simpleitk_reads_the_voxels_and_positions_of_the_series(
    tmp_path: Path, phantom: Phantom, signed: bool
) -> None:
    write_dicom_series(phantom, tmp_path / "series", signed=signed)
    image = read_series(tmp_path / "series")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), phantom.voxels_zyx)
    np.testing.assert_allclose(image.GetOrigin(), phantom.affine_lps[:3, 3], atol=1e-4)
    np.testing.assert_allclose(image.GetSpacing(), np.diag(phantom.affine_lps)[:3], atol=1e-4)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_nifti_file_and_series_have_the_same_voxels_and_positions(
    tmp_path: Path, phantom: Phantom, name: str
) -> None:
    write_nifti(phantom, tmp_path / name)
    write_dicom_series(phantom, tmp_path / "series")
    nifti = sitk.ReadImage(str(tmp_path / name))
    reoriented, series = sitk.DICOMOrient(nifti, "LPS"), read_series(tmp_path / "series")
    assert nifti.GetDirection()[4] == -1  # rows stored from back to front, as by DICOM converters
    np.testing.assert_array_equal(sitk.GetArrayFromImage(reoriented), sitk.GetArrayFromImage(series))
    np.testing.assert_allclose(reoriented.GetOrigin(), series.GetOrigin(), atol=1e-4)


def test_the_file_names_of_a_series_have_another_order_than_its_slices(
    tmp_path: Path, phantom: Phantom
) -> None:
    write_dicom_series(phantom, tmp_path)
    heights = [pydicom.dcmread(path).ImagePositionPatient[2] for path in sorted(tmp_path.iterdir())]
    assert len(heights) == 24
    assert heights not in (sorted(heights), sorted(heights, reverse=True))


def test_a_series_is_ct_image_storage_with_a_synthetic_identity(tmp_path: Path, phantom: Phantom) -> None:
    write_dicom_series(phantom, tmp_path, name="phantom_007")
    header = pydicom.dcmread(tmp_path / "IM0001.dcm")
    assert header.SOPClassUID.name == "CT Image Storage"
    assert (header.PatientName, header.PatientID) == ("Phantom^Synthetic", "phantom_007")
    assert not any(header[tag].value for tag in ("StudyDate", "AccessionNumber", "PatientBirthDate"))


def test_slices_share_the_series_uid_and_have_different_instance_uids(
    tmp_path: Path, phantom: Phantom
) -> None:
    write_dicom_series(phantom, tmp_path)
    headers = [pydicom.dcmread(path) for path in tmp_path.iterdir()]
    assert len({header.SeriesInstanceUID for header in headers}) == 1
    assert len({header.SOPInstanceUID for header in headers}) == 24


def test_gzip_halves_the_size_as_for_real_scans(tmp_path: Path) -> None:
    phantom = make_phantom(0, (4, 256, 256))
    write_nifti(phantom, tmp_path / "a.nii.gz")
    assert 0.4 < (tmp_path / "a.nii.gz").stat().st_size / phantom.voxels_zyx.nbytes < 0.65


def test_a_collection_has_a_row_of_labels_for_each_scan(tmp_path: Path) -> None:
    labels = make_collection(tmp_path, 4, shape_zyx=(3, 8, 8), seed=9)
    rows = list(csv.DictReader(labels.read_text(encoding="utf-8").splitlines()))
    assert labels == tmp_path / "labels.csv"
    assert [row["scan_id"] for row in rows] == [
        "nifti/phantom_000.nii.gz",
        "nifti/phantom_001.nii.gz",
        "nifti/phantom_002.nii.gz",
        "dicom/phantom_003",
    ]
    assert all((tmp_path / row["scan_id"]).exists() for row in rows)
    assert len(list((tmp_path / "dicom" / "phantom_003").iterdir())) == 3


def test_the_labels_are_exactly_the_parameters(tmp_path: Path) -> None:
    labels = make_collection(tmp_path, 2, shape_zyx=(3, 8, 8), seed=9)
    row = list(csv.DictReader(labels.read_text(encoding="utf-8").splitlines()))[1]
    parameters = dataclasses.asdict(make_phantom([9, 1], (1, 1, 1)).parameters)
    assert {name: float(row[name]) for name in parameters} == parameters


def test_a_collection_is_reproducible_byte_for_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_collection(tmp_path / name, 2, shape_zyx=(3, 8, 8))
    first, second = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second
