"""Make synthetic chest CT with known parameters, and write it as NIfTI files, DICOM series and labels.

A phantom is a body of soft tissue in air, with two lungs, a spine, sometimes a table, one lesion of random
size and position, and noise. It contains no patient data. Positions are LPS in mm; the origin is the center
of the volume. With the same versions of the libraries, a seed always gives the same voxels and files, byte
for byte. This module must not know the configuration or models.
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
"""Values of discs and vertebrae. Along z the spine alternates between them with period `_VERTEBRA_MM`."""

STORED_HU = (-1024, 3071)
"""Range of 12-bit values with an intercept of -1024, as scanners store them."""

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
"""Tags that a CT image must contain, but that may be empty."""

_Shape = tuple[int, int, int]
_Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class PhantomParameters:
    """The properties that differ between phantoms, with which extracted features can be compared."""

    lesion_radius_mm: float
    """Radius of the spherical lesion. Its surface is smoothed over one voxel, so small differences show."""
    lesion_x_mm: float
    """Center of the lesion along x, which grows to the left of the patient."""
    lesion_y_mm: float
    """Center of the lesion along y, which grows to the back."""
    lesion_z_mm: float
    """Center of the lesion along z, which grows to the head."""
    body_width_mm: float
    """Full width of the elliptic body along x."""
    body_depth_mm: float
    """Full depth of the elliptic body along y."""
    lung_size: float
    """Scale factor of both lungs; 1 is the usual size."""
    noise_hu: float
    """Standard deviation of the white noise of every voxel, including air."""
    table: bool
    """Whether the table of the scanner is visible."""


@dataclass(frozen=True)
class Phantom:
    """The voxels of a phantom and the parameters they were made from.

    Attributes:
        voxels_zyx: HU, int16, in the range `STORED_HU`. x grows to Left, y to Posterior, z to Superior.
        affine_lps: 4x4 matrix that maps a voxel index (x, y, z, 1) to a position in LPS mm.
        parameters: The parameters of this phantom.
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
        seed: Seed of the noise, and of the parameters if none are given.
        shape_zyx: Number of voxels along each axis.
        spacing_zyx: Voxel spacing in mm. None distributes the voxels over 300 x 400 x 400 mm (z, y, x). A
            body that is larger than the grid is cut off.
        parameters: Parameters to use instead of random ones.
    """
    rng = np.random.default_rng(seed)
    random_parameters = _draw_parameters(rng)
    parameters = parameters or random_parameters
    z, y, x = (field / count for field, count in zip(_FIELD_OF_VIEW_ZYX_MM, shape_zyx, strict=True))
    affine = _make_centered_affine(shape_zyx, spacing_zyx or (z, y, x))
    voxels = np.empty(shape_zyx, np.int16)
    noise = np.empty(shape_zyx[1:], np.float32)
    slices = _render_slices(shape_zyx, affine, parameters)
    for slice_out, slice_hu in zip(voxels, slices, strict=True):
        rng.standard_normal(out=noise, dtype=np.float32)
        noise *= parameters.noise_hu
        noise += slice_hu
        np.clip(np.rint(noise, out=noise), *STORED_HU, out=noise)
        np.copyto(slice_out, noise, casting="unsafe")
    return Phantom(voxels, affine, parameters)


def write_nifti(phantom: Phantom, path: str | os.PathLike[str], compresslevel: int = 1) -> None:
    """Write the phantom as an int16 NIfTI file, which is gzipped if its name ends in .gz.

    The rows are stored from back to front (orientation LAS), as common DICOM converters do. The file
    therefore differs from the DICOM series in the order of the voxels, but not in their positions.

    Args:
        phantom: The phantom to write.
        path: Name of the new file.
        compresslevel: Compression level of gzip, from 1 to 12.
    """
    # Index y of the file is n - 1 - y of the phantom. NIfTI affines are RAS.
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
    """Write the phantom as a CT series of one file per slice, with intercept -1024.

    The order of the file names differs from the order of the slices, which only the headers give. The UIDs
    depend on `name` alone, so each series of a collection needs its own name.

    Args:
        phantom: The phantom to write.
        folder: Folder of the files; it is created if it does not exist.
        name: PatientID, and the seed of the UIDs.
        signed: Whether signed instead of unsigned numbers are stored.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    series = _make_series_dataset(phantom, name, signed=signed)
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
    """Write `count` phantoms and a table of their parameters; return the path of the table.

    FOLDER/nifti/phantom_000.nii.gz …       the first scans, one NIfTI file each
    FOLDER/dicom/phantom_023/IM0001.dcm …   the last `dicom_count` scans, one folder each
    FOLDER/labels.csv                       scan_id (path relative to FOLDER), one column per parameter

    Scan i is the phantom of the seed [`seed`, i]; its voxels do not depend on `count`.

    Args:
        folder: Folder of the collection; it is created if it does not exist.
        count: Number of phantoms.
        shape_zyx: Number of voxels of each phantom along each axis.
        seed: First part of the seed of each phantom.
        dicom_count: Number of phantoms that are written as DICOM series.
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
    return write_labels(root / "labels.csv", rows)


def _draw_parameters(rng: np.random.Generator) -> PhantomParameters:
    """Return random parameters, rounded so that the text of the labels holds them exactly."""
    width = rng.uniform(300, 360)
    depth = width * rng.uniform(0.62, 0.72)
    lung_size = rng.uniform(0.85, 1.1)
    # The lesion is in one of the lungs, and so near to its center that the lung contains the whole lesion.
    direction = rng.standard_normal(3)
    offset = 0.4 * rng.uniform() ** (1 / 3) * direction / np.linalg.norm(direction)
    center, half = _compute_lung(width, depth, lung_size)
    x, y, z = (np.array([center * rng.choice([-1, 1]), 0, 0]) + offset * half).tolist()
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


def _compute_lung(width_mm: float, depth_mm: float, size: float) -> tuple[float, NDArray[np.float64]]:
    """Return the center of the left lung along x, and the half axes (x, y, z) of each lung, in mm."""
    half = np.array([0.18 * width_mm, 0.36 * depth_mm, _LUNG_HALF_HEIGHT_MM]) * size
    return 0.24 * width_mm, half


def _make_centered_affine(shape_zyx: _Shape, spacing_zyx: _Spacing) -> NDArray[np.float64]:
    """Return the affine (LPS mm) that places the center of the volume at the origin."""
    affine = np.diag([*spacing_zyx[::-1], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * s for n, s in zip(shape_zyx[::-1], spacing_zyx[::-1], strict=True)]
    return affine


def _render_slices(
    shape_zyx: _Shape, affine: NDArray[np.float64], parameters: PhantomParameters
) -> Iterator[NDArray[np.float32]]:
    """Yield each slice (y, x) in HU without noise, from feet to head; it is valid until the next slice."""
    z_mm, y_mm, x_mm = (
        affine[axis, 3] + affine[axis, axis] * np.arange(n, dtype=np.float32)
        for axis, n in zip((2, 1, 0), shape_zyx, strict=True)
    )
    body = _render_body(y_mm[:, None], x_mm[None, :], parameters)
    lungs = _compute_lung_distance(y_mm[:, None], x_mm[None, :], parameters)
    spine = x_mm[None, :] ** 2 + (y_mm[:, None] - 0.3 * parameters.body_depth_mm) ** 2 <= _SPINE_RADIUS_MM**2
    half_height = _LUNG_HALF_HEIGHT_MM * parameters.lung_size
    plane = np.empty_like(body)
    for z in z_mm:
        np.copyto(plane, body)
        plane[lungs <= 1 - (z / half_height) ** 2] = LUNG_HU
        plane[spine] = np.mean(SPINE_HU) + np.ptp(SPINE_HU) / 2 * np.cos(2 * np.pi * z / _VERTEBRA_MM)
        _add_lesion(plane, z, y_mm, x_mm, parameters)
        yield plane


def _render_body(
    y_mm: NDArray[np.float32], x_mm: NDArray[np.float32], parameters: PhantomParameters
) -> NDArray[np.float32]:
    """Return a slice (y, x) in HU with the body and the table."""
    half_depth = parameters.body_depth_mm / 2
    body = (2 * x_mm / parameters.body_width_mm) ** 2 + (y_mm / half_depth) ** 2 <= 1
    plane = np.where(body, np.float32(TISSUE_HU), np.float32(AIR_HU))
    if parameters.table:
        below = y_mm - half_depth
        plane[(below > 2) & (below < 14) & (np.abs(x_mm) < 180)] = TABLE_HU
    return plane


def _compute_lung_distance(
    y_mm: NDArray[np.float32], x_mm: NDArray[np.float32], parameters: PhantomParameters
) -> NDArray[np.float32]:
    """Return the squared distance (y, x) to the axis of the nearer lung; 1 is its outline at z = 0."""
    center, half = _compute_lung(parameters.body_width_mm, parameters.body_depth_mm, parameters.lung_size)
    squared: NDArray[np.float32] = ((np.abs(x_mm) - center) / half[0]) ** 2 + (y_mm / half[1]) ** 2
    return squared


def _add_lesion(
    plane: NDArray[np.float32],
    z: float,
    y_mm: NDArray[np.float32],
    x_mm: NDArray[np.float32],
    parameters: PhantomParameters,
) -> None:
    """Add the lesion to a slice (y, x) at `z` mm, with rows at `y_mm` and columns at `x_mm`."""
    step = float(x_mm[1] - x_mm[0]) if len(x_mm) > 1 else 1.0
    reach = parameters.lesion_radius_mm + step
    rows = np.flatnonzero(np.abs(y_mm - parameters.lesion_y_mm) <= reach)
    columns = np.flatnonzero(np.abs(x_mm - parameters.lesion_x_mm) <= reach)
    if abs(z - parameters.lesion_z_mm) > reach or not len(rows) or not len(columns):
        return
    region = plane[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    dy, dx = y_mm[rows, None] - parameters.lesion_y_mm, x_mm[None, columns] - parameters.lesion_x_mm
    distance = np.sqrt(dy**2 + dx**2 + (z - parameters.lesion_z_mm) ** 2)
    fraction = np.clip((parameters.lesion_radius_mm - distance) / step + 0.5, 0, 1)
    region += fraction * (LESION_HU - region)


def _make_series_dataset(phantom: Phantom, name: str, *, signed: bool) -> Dataset:
    """Return a dataset with the tags that all slices of the series share; `_fill_slice` adds the others."""
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
    series.PixelSpacing = [
        format_number_as_ds(float(step)) for step in spacing_xyz[1::-1]
    ]  # row spacing first
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
    """Set the tags and the pixels of slice `z` in the dataset of the series."""
    position = phantom.affine_lps @ [0, 0, z, 1]
    series.ImagePositionPatient = [format_number_as_ds(float(mm)) for mm in position[:3]]
    series.InstanceNumber = z + 1
    series.SOPInstanceUID = generate_uid(entropy_srcs=[name, "slice", str(z)])
    series.file_meta.MediaStorageSOPInstanceUID = series.SOPInstanceUID
    series.file_meta.MediaStorageSOPClassUID = series.SOPClassUID
    # The stored values are not negative, so signed and unsigned numbers have the same bytes.
    series.PixelData = (phantom.voxels_zyx[z] - STORED_HU[0]).astype("<u2").tobytes()


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write one row per phantom, its `scan_id` and its parameters, as CSV; return the path."""
    names = ["scan_id", *(field.name for field in dataclasses.fields(PhantomParameters))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(row | {"table": int(row["table"])} for row in rows)
    return path
