"""Test that a lesion at a known position in mm has the correct voxel index for all orientations.

NIfTI: all 48 orders and directions of the axes. DICOM: all 24 right-handed ones, because a mirrored series
cannot be written, each with its files in both orders. The results are compared with SimpleITK's DICOMOrient
and nibabel's as_closest_canonical.
"""

from __future__ import annotations

import io
from functools import cache
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from featray.config import PreprocessConfig
from featray.ct.dicom.read import read_series
from featray.ct.formats.nifti import read_nifti
from featray.ct.reorient import reorient
from featray.ct.volume import Volume
from featray.stages.preprocess import preprocess
from featray.synthetic.phantom import PhantomParameters, make_phantom

sitk = pytest.importorskip("SimpleITK")

SHAPE_ZYX, SPACING_ZYX = (7, 9, 11), (30.0, 25.0, 20.0)
LESION_MM = (40.0, -25.0, 60.0)
LESION_ZYX = (5, 3, 7)
"""LESION_MM / spacing + (n - 1) / 2 in LPS; the lesion fills only this voxel."""

ORIENTATIONS = ["".join(letters) for pairs in permutations(("LR", "PA", "SI")) for letters in product(*pairs)]
STEP = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
RIGHT_HANDED = [o for o in ORIENTATIONS if np.linalg.det([STEP[letter] for letter in o]) > 0]
TARGETS = ("LPS", "RAS", "LAS", "SPR", "AIL")


@cache
def make_phantom_lps() -> tuple[NDArray[np.int16], NDArray[np.float64]]:
    """Return noisy voxels (LPS) with one bright voxel, the lesion, and their affine."""
    truth = PhantomParameters(1.0, 0.0, 0.0, 0.0, 200.0, 150.0, 0.8, 25.0, True)
    phantom = make_phantom(5, SHAPE_ZYX, SPACING_ZYX, truth)
    voxels = phantom.voxels_zyx.copy()
    voxels[LESION_ZYX] = 2000
    return voxels, phantom.affine_lps


def make_nifti(orientation: str) -> nib.Nifti1Image:
    """Return the phantom as an image whose x, y, z grow along `orientation`, reoriented by nibabel."""
    voxels, affine_lps = make_phantom_lps()
    image = nib.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine_lps)
    turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(orientation))
    return image.as_reoriented(turn)


def find_brightest_index(volume: Volume) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(volume.voxels_zyx.argmax(), volume.voxels_zyx.shape))


def compute_position_mm(volume: Volume, index_zyx: tuple[int, ...]) -> NDArray[np.float64]:
    return np.asarray((volume.affine_lps @ [*index_zyx[::-1], 1])[:3])


def reorient_with_simpleitk(voxels: NDArray[np.generic], affine_lps: NDArray[np.float64], to: str):  # type: ignore[no-untyped-def]
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels))
    spacing = np.linalg.norm(affine_lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine_lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine_lps[:3, 3].tolist())
    return sitk.DICOMOrient(image, to)


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_a_nifti_lesion_has_its_position_for_every_order_of_the_stored_axes(stored: str) -> None:
    volume = read_nifti(make_nifti(stored).to_bytes(), max_voxels=1000)

    reoriented = reorient(volume, "LPS")

    assert volume.orientation == stored
    assert compute_position_mm(volume, find_brightest_index(volume)) == pytest.approx(LESION_MM, abs=1e-3)
    assert find_brightest_index(reoriented) == LESION_ZYX
    assert np.array_equal(reoriented.voxels_zyx, make_phantom_lps()[0])
    assert reoriented.affine_lps == pytest.approx(make_phantom_lps()[1], abs=1e-3)


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_a_reoriented_nifti_file_agrees_with_simpleitk(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "scan.nii"
    nib.save(make_nifti(stored), path)
    volume = read_nifti(path.read_bytes(), max_voxels=1000)
    image = sitk.ReadImage(str(path))

    for wanted in TARGETS:
        actual, reference = reorient(volume, wanted), sitk.DICOMOrient(image, wanted)
        assert np.array_equal(actual.voxels_zyx, sitk.GetArrayViewFromImage(reference))
        assert actual.affine_lps[:3, 3] == pytest.approx(reference.GetOrigin(), abs=1e-3)
        assert actual.spacing_zyx == pytest.approx(reference.GetSpacing()[::-1], abs=1e-4)


@pytest.mark.parametrize("stored", ORIENTATIONS)
def test_a_nifti_file_reoriented_to_ras_agrees_with_nibabel(stored: str) -> None:
    image = make_nifti(stored)
    canonical = nib.as_closest_canonical(image)

    reoriented = reorient(read_nifti(image.to_bytes(), max_voxels=1000), "RAS")

    assert np.array_equal(reoriented.voxels_zyx.T, np.asanyarray(canonical.dataobj))
    assert np.diag([-1, -1, 1, 1]) @ reoriented.affine_lps == pytest.approx(canonical.affine, abs=1e-3)


@pytest.mark.parametrize("wanted", ORIENTATIONS)
def test_the_preprocessed_lesion_has_its_position_for_every_configured_orientation(wanted: str) -> None:
    config = PreprocessConfig(orientation=wanted, window=None, size=None)
    expected = reorient_with_simpleitk(*make_phantom_lps(), wanted)
    index = expected.TransformPhysicalPointToIndex(LESION_MM)

    for stored in ("LPS", "RAS", "LAS", "SAL", "IRP"):
        volume = read_nifti(make_nifti(stored).to_bytes(), max_voxels=1000)
        (tensor,) = preprocess(volume, config).tensor
        assert np.array_equal(tensor, sitk.GetArrayViewFromImage(expected))
        assert tensor[index[::-1]] == 2000


def test_an_oblique_lesion_keeps_its_position_for_all_48_orientations() -> None:
    about = np.radians([20.0, -10.0, 15.0])
    rotation = np.eye(4)
    rotation[:3, :3] = nib.eulerangles.euler2mat(*about)
    image = make_nifti("LPS")
    lesion = (rotation @ [-LESION_MM[0], -LESION_MM[1], LESION_MM[2], 1])[:3] * [-1, -1, 1]
    for stored in ORIENTATIONS:
        turn = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(stored))
        affine = rotation @ image.affine @ inv_ornt_aff(turn, image.shape)
        reoriented = nib.Nifti1Image(make_nifti(stored).dataobj, affine)

        volume = reorient(read_nifti(reoriented.to_bytes(), max_voxels=1000), "LPS")

        assert find_brightest_index(volume) == LESION_ZYX
        assert compute_position_mm(volume, LESION_ZYX) == pytest.approx(lesion, abs=1e-3)
        assert volume.warnings == ("oblique",)


def make_dicom_files(stored: str) -> list[tuple[str, bytes]]:
    """Return the files of a series with columns, rows and slices along the three letters of `stored`."""
    voxels, affine_lps = make_phantom_lps()
    reoriented = reorient(Volume(voxels, affine_lps), stored)
    affine = reoriented.affine_lps
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    slice_ = Dataset()
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = CTImageStorage
    slice_.Modality, slice_.SeriesInstanceUID = "CT", "1.2.3"
    slice_.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    slice_.ImageOrientationPatient = (affine[:3, :2] / spacing[:2]).T.ravel().round(6).tolist()
    slice_.PixelSpacing = [spacing[1], spacing[0]]
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
    slice_.Rows, slice_.Columns = reoriented.voxels_zyx.shape[1:]
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 1
    slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
    files = []
    for k, plane in enumerate(reoriented.voxels_zyx):
        slice_.ImagePositionPatient = (affine @ [0, 0, k, 1])[:3].round(6).tolist()
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
        slice_.InstanceNumber = k + 1
        slice_.PixelData = np.ascontiguousarray(plane, "<i2").tobytes()
        content = io.BytesIO()
        slice_.save_as(content, enforce_file_format=True)
        files.append((f"{k + 1:02d}.dcm", content.getvalue()))
    return files


def test_half_of_all_orientations_are_right_handed() -> None:
    assert len(RIGHT_HANDED) == 24


@pytest.mark.parametrize("backwards", [False, True], ids=["in-order", "backwards"])
@pytest.mark.parametrize("stored", RIGHT_HANDED)
def test_a_dicom_lesion_has_its_position_for_every_orientation_and_file_order(
    stored: str, backwards: bool
) -> None:
    files = make_dicom_files(stored)[:: -1 if backwards else 1]

    volume = read_series(files, max_voxels=1000)

    assert compute_position_mm(volume, find_brightest_index(volume)) == pytest.approx(LESION_MM, abs=1e-3)
    for wanted in TARGETS:
        expected = reorient_with_simpleitk(*make_phantom_lps(), wanted)
        config = PreprocessConfig(orientation=wanted, window=None, size=None)
        (tensor,) = preprocess(volume, config).tensor
        assert np.array_equal(tensor, sitk.GetArrayViewFromImage(expected))
        assert tensor[expected.TransformPhysicalPointToIndex(LESION_MM)[::-1]] == 2000


@pytest.mark.parametrize("stored", RIGHT_HANDED)
def test_a_reoriented_dicom_series_agrees_with_simpleitk(stored: str, tmp_path: Path) -> None:
    files = make_dicom_files(stored)
    for name, content in files:
        (tmp_path / name).write_bytes(content)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(tmp_path)))
    reference = sitk.DICOMOrient(reader.Execute(), "LPS")

    actual = reorient(read_series(files, max_voxels=1000), "LPS")

    assert np.array_equal(actual.voxels_zyx, sitk.GetArrayViewFromImage(reference))
    assert actual.affine_lps[:3, 3] == pytest.approx(reference.GetOrigin(), abs=1e-3)
