"""Made-up chest CT with known truth: a seed in, HU voxels, NIfTI files, DICOM series and labels out.

A body of soft tissue in air with two lungs, a spine, at times a table, and one lesion of varying size and
place, under noise; no patient is behind any of it. Millimetres are LPS with the origin in the middle of
the volume. One seed gives the same voxels and files, byte for byte, with one version of the libraries.
Knows no config and no model.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deflate
import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

AIR_HU, LUNG_HU, TISSUE_HU, LESION_HU, TABLE_HU = -1000, -850, 40, 60, -150
SPINE_HU = (500, 700)
"""Discs and vertebrae; the spine swings between them along z, every `_VERTEBRA_MM`."""

STORED_HU = (-1024, 3071)
"""What 12 bits hold with an intercept of -1024, as scanners write it."""

_VERTEBRA_MM = 30.0
_SPINE_RADIUS_MM = 18.0
_LUNG_HALF_HEIGHT_MM = 120.0
_FIELD_OF_VIEW_ZYX_MM = (300.0, 400.0, 400.0)
_EMPTY_TAGS = (
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
)
"""Must be in a CT image, may be empty."""

_Shape = tuple[int, int, int]
_Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class PhantomParameters:
    """What differs from phantom to phantom: the truth that features can be held against."""

    lesion_radius_mm: float
    """Of a ball; its surface is smoothed over one voxel, so that small changes of radius show."""
    lesion_x_mm: float
    """Centre, towards the left of the patient."""
    lesion_y_mm: float
    """Centre, towards the back."""
    lesion_z_mm: float
    """Centre, towards the head."""
    body_width_mm: float
    """Full width of the body's ellipse along x."""
    body_depth_mm: float
    """Full depth along y."""
    lung_size: float
    """Scale of both lungs; 1 is the usual size."""
    noise_hu: float
    """Standard deviation of the white noise on every voxel, air included."""
    table: bool
    """Whether the patient's table is in view."""


@dataclass(frozen=True)
class Phantom:
    """One phantom and its truth.

    Attributes:
        voxels_zyx: HU, int16, within `STORED_HU`; x grows to Left, y to Posterior, z to Superior.
        affine_lps: 4x4; maps a voxel index (x, y, z, 1) to millimetres in LPS.
        parameters: What was drawn.
    """

    voxels_zyx: NDArray[np.int16]
    affine_lps: NDArray[np.float64]
    parameters: PhantomParameters


def make_phantom(
    seed: int | Sequence[int],
    shape_zyx: _Shape = (48, 96, 96),
    spacing_zyx: _Spacing | None = None,
    parameters: PhantomParameters | None = None,
) -> Phantom:
    """Return the phantom of a seed.

    Args:
        seed: Draws the parameters, if none are given, and the noise.
        shape_zyx: Voxels.
        spacing_zyx: Millimetres; None spreads the voxels over 300 x 400 x 400 mm. Where the grid is
            smaller than the body, the body is cut off.
        parameters: A truth to use in place of a drawn one.
    """
    rng = np.random.default_rng(seed)
    drawn = _draw(rng)
    truth = parameters or drawn
    z, y, x = (field / count for field, count in zip(_FIELD_OF_VIEW_ZYX_MM, shape_zyx, strict=True))
    affine = _centred_affine(shape_zyx, spacing_zyx or (z, y, x))
    voxels = np.empty(shape_zyx, np.int16)
    noise = np.empty(shape_zyx[1:], np.float32)
    for slice_out, slice_hu in zip(voxels, _clean_slices(shape_zyx, affine, truth), strict=True):
        rng.standard_normal(out=noise, dtype=np.float32)
        noise *= truth.noise_hu
        noise += slice_hu
        np.clip(np.rint(noise, out=noise), *STORED_HU, out=noise)
        np.copyto(slice_out, noise, casting="unsafe")
    return Phantom(voxels, affine, truth)


def write_nifti(phantom: Phantom, path: str | os.PathLike[str], compresslevel: int = 1) -> None:
    """Write the phantom as int16 NIfTI; gzip of `compresslevel` (1 to 12) when the name ends in .gz.

    Rows run from back to front (orientation LAS), as common DICOM converters store them, so that the
    file differs from the DICOM series in storage order but not in the patient's space.
    """
    # Index y of the file is n - 1 - y of the phantom; NIfTI millimetres are RAS.
    rows = phantom.voxels_zyx.shape[1]
    from_file_index = np.array([[1, 0, 0, 0], [0, -1, 0, rows - 1], [0, 0, 1, 0], [0, 0, 0, 1]], np.float64)
    affine_ras = np.diag([-1.0, -1, 1, 1]) @ phantom.affine_lps @ from_file_index
    stored = np.ascontiguousarray(phantom.voxels_zyx[:, ::-1]).transpose(2, 1, 0)
    image: Any = nib.Nifti1Image(stored, affine_ras)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine_ras, code=1)
    image.set_sform(affine_ras, code=1)
    content = image.to_bytes()
    if str(path).endswith(".gz"):
        content = deflate.gzip_compress(content, compresslevel)
    Path(path).write_bytes(content)


def write_dicom_series(
    phantom: Phantom, folder: str | os.PathLike[str], *, name: str = "phantom", signed: bool = False
) -> None:
    """Write the phantom as CT Image Storage, one file per slice, intercept -1024.

    File names follow no order in space; only the position in each header does. UIDs follow from `name`
    alone, so two series in one collection need two names.

    Args:
        phantom: What to write.
        folder: Made if missing.
        name: Becomes PatientID, and the seed of the UIDs.
        signed: Store signed instead of unsigned numbers.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    series = _dicom_series(phantom, name, signed)
    count = len(phantom.voxels_zyx)
    for z, number in enumerate(np.random.default_rng(count).permutation(count)):
        _fill_slice(series, phantom, z, name)
        series.save_as(target / f"IM{number + 1:04d}.dcm", enforce_file_format=True)


def make_collection(
    folder: str | os.PathLike[str],
    count: int,
    *,
    shape_zyx: _Shape = (48, 96, 96),
    seed: int = 0,
    dicom_count: int = 1,
) -> Path:
    """Write `count` phantoms and their truth; return the path of the labels.

    FOLDER/nifti/phantom_000.nii.gz …   all but the last `dicom_count` scans
    FOLDER/dicom/phantom_023/IM0001.dcm …   the last ones, a folder each
    FOLDER/labels.csv   scan_id (the path below FOLDER) and one column for each of `PhantomParameters`

    Scan i is the phantom of seed [seed, i], whatever `count` is.
    """
    root = Path(folder)
    (root / "nifti").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        phantom = make_phantom([seed, index], shape_zyx)
        name = f"phantom_{index:03d}"
        if index < count - dicom_count:
            scan_id = f"nifti/{name}.nii.gz"
            write_nifti(phantom, root / scan_id)
        else:
            scan_id = f"dicom/{name}"
            write_dicom_series(phantom, root / scan_id, name=f"{name}-{seed}")
        rows.append({"scan_id": scan_id} | dataclasses.asdict(phantom.parameters))
    return _write_labels(root / "labels.csv", rows)


def _draw(rng: np.random.Generator) -> PhantomParameters:
    """Draw a truth; rounded, so that the labels' text holds it exactly."""
    width = rng.uniform(300, 360)
    depth = width * rng.uniform(0.62, 0.72)
    lung_size = rng.uniform(0.85, 1.1)
    # In either lung, and near enough to its middle that the whole lesion lies inside.
    towards = rng.standard_normal(3)
    place = 0.4 * rng.uniform() ** (1 / 3) * towards / np.linalg.norm(towards)
    centre, half = _lung(width, depth, lung_size)
    x, y, z = (np.array([centre * rng.choice([-1, 1]), 0, 0]) + place * half).tolist()
    return PhantomParameters(
        lesion_radius_mm=round(rng.uniform(6, 24), 3),
        lesion_x_mm=round(x, 3),
        lesion_y_mm=round(y, 3),
        lesion_z_mm=round(z, 3),
        body_width_mm=round(width, 3),
        body_depth_mm=round(depth, 3),
        lung_size=round(lung_size, 3),
        noise_hu=round(rng.uniform(10, 25), 3),
        table=bool(rng.integers(2)),
    )


def _lung(width_mm: float, depth_mm: float, size: float) -> tuple[float, NDArray[np.float64]]:
    """Return the left lung's centre along x and the half axes (x, y, z) of either, in mm."""
    half = np.array([0.18 * width_mm, 0.36 * depth_mm, _LUNG_HALF_HEIGHT_MM]) * size
    return 0.24 * width_mm, half


def _centred_affine(shape_zyx: _Shape, spacing_zyx: _Spacing) -> NDArray[np.float64]:
    affine = np.diag([*spacing_zyx[::-1], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape_zyx[::-1], spacing_zyx[::-1], strict=True)]
    return affine


def _clean_slices(
    shape_zyx: _Shape, affine: NDArray[np.float64], truth: PhantomParameters
) -> Iterator[NDArray[np.float32]]:
    """Yield each slice (y, x) in HU without noise, feet to head; valid until the next one."""
    z_mm, y_mm, x_mm = (
        affine[axis, 3] + affine[axis, axis] * np.arange(n, dtype=np.float32)
        for axis, n in zip((2, 1, 0), shape_zyx, strict=True)
    )
    body = _body(y_mm[:, None], x_mm[None, :], truth)
    lungs = _lungs_squared(y_mm[:, None], x_mm[None, :], truth)
    spine = x_mm[None, :] ** 2 + (y_mm[:, None] - 0.3 * truth.body_depth_mm) ** 2 <= _SPINE_RADIUS_MM**2
    half_height = _LUNG_HALF_HEIGHT_MM * truth.lung_size
    plane = np.empty_like(body)
    for z in z_mm:
        np.copyto(plane, body)
        plane[lungs <= 1 - (z / half_height) ** 2] = LUNG_HU
        plane[spine] = np.mean(SPINE_HU) + np.ptp(SPINE_HU) / 2 * np.cos(2 * np.pi * z / _VERTEBRA_MM)
        _add_lesion(plane, z, y_mm, x_mm, truth)
        yield plane


def _body(
    y_mm: NDArray[np.float32], x_mm: NDArray[np.float32], truth: PhantomParameters
) -> NDArray[np.float32]:
    half_depth = truth.body_depth_mm / 2
    body = (2 * x_mm / truth.body_width_mm) ** 2 + (y_mm / half_depth) ** 2 <= 1
    plane = np.where(body, np.float32(TISSUE_HU), np.float32(AIR_HU))
    if truth.table:
        below = y_mm - half_depth
        plane[(below > 2) & (below < 14) & (np.abs(x_mm) < 180)] = TABLE_HU
    return plane


def _lungs_squared(
    y_mm: NDArray[np.float32], x_mm: NDArray[np.float32], truth: PhantomParameters
) -> NDArray[np.float32]:
    """Return the squared distance to the nearer lung's axis, 1 on its outline at z = 0."""
    centre, half = _lung(truth.body_width_mm, truth.body_depth_mm, truth.lung_size)
    squared: NDArray[np.float32] = ((np.abs(x_mm) - centre) / half[0]) ** 2 + (y_mm / half[1]) ** 2
    return squared


def _add_lesion(
    plane: NDArray[np.float32],
    z: float,
    y_mm: NDArray[np.float32],
    x_mm: NDArray[np.float32],
    truth: PhantomParameters,
) -> None:
    step = float(x_mm[1] - x_mm[0]) if len(x_mm) > 1 else 1.0
    reach = truth.lesion_radius_mm + step
    rows = np.flatnonzero(np.abs(y_mm - truth.lesion_y_mm) <= reach)
    columns = np.flatnonzero(np.abs(x_mm - truth.lesion_x_mm) <= reach)
    if abs(z - truth.lesion_z_mm) > reach or not len(rows) or not len(columns):
        return
    near = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    across = (y_mm[rows, None] - truth.lesion_y_mm) ** 2 + (x_mm[None, columns] - truth.lesion_x_mm) ** 2
    distance = np.sqrt(across + (z - truth.lesion_z_mm) ** 2)
    share = np.clip((truth.lesion_radius_mm - distance) / step + 0.5, 0, 1)
    near += share * (LESION_HU - near)


def _dicom_series(phantom: Phantom, name: str, signed: bool) -> Dataset:
    """Return what all slices of the series share; `_fill_slice` adds the rest."""
    spacing_xyz = np.diag(phantom.affine_lps)[:3]
    series = Dataset()
    series.file_meta = FileMetaDataset()
    series.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for tag in _EMPTY_TAGS:
        setattr(series, tag, "")
    series.SOPClassUID = CTImageStorage
    series.Modality = "CT"
    series.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    series.Manufacturer = "phantom"
    series.PatientName = "Phantom^Synthetic"
    series.PatientID = name
    for uid in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(series, uid, generate_uid(entropy_srcs=[name, uid]))
    series.SeriesNumber = series.AcquisitionNumber = 1
    series.KVP = "120"
    series.SliceThickness = format_number_as_ds(float(spacing_xyz[2]))
    series.PixelSpacing = [format_number_as_ds(float(step)) for step in spacing_xyz[1::-1]]  # rows first
    series.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    series.SamplesPerPixel = 1
    series.PhotometricInterpretation = "MONOCHROME2"
    series.Rows, series.Columns = phantom.voxels_zyx.shape[1:]
    series.BitsAllocated = series.BitsStored = 16
    series.HighBit = 15
    series.PixelRepresentation = int(signed)
    series.RescaleIntercept, series.RescaleSlope, series.RescaleType = STORED_HU[0], 1, "HU"
    return series


def _fill_slice(series: Dataset, phantom: Phantom, z: int, name: str) -> None:
    position = phantom.affine_lps @ [0, 0, z, 1]
    series.ImagePositionPatient = [format_number_as_ds(float(millimetres)) for millimetres in position[:3]]
    series.InstanceNumber = z + 1
    series.SOPInstanceUID = generate_uid(entropy_srcs=[name, "slice", str(z)])
    series.file_meta.MediaStorageSOPInstanceUID = series.SOPInstanceUID
    series.file_meta.MediaStorageSOPClassUID = series.SOPClassUID
    # Non-negative after the intercept, so signed and unsigned numbers have the same bytes.
    series.PixelData = (phantom.voxels_zyx[z] - STORED_HU[0]).astype("<u2").tobytes()


def _write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = ["scan_id", *(field.name for field in dataclasses.fields(PhantomParameters))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(row | {"table": int(row["table"])} for row in rows)
    return path
