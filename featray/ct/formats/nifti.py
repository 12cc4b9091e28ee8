"""The bytes of one NIfTI file or .hdr/.img pair in, a checked Volume out; knows no paths and no storage.

Order of work: header, sizes, geometry, and only then memory for voxels. Nothing in the header is
believed before it is compared with the limit and with the bytes at hand. Decisions:

- Compression is recognised by content, not by name. ANALYZE headers, without NIfTI's magic, are
  refused (`unsupported`): nothing in them says which side is left.
- Of a file with several volumes the caller chooses one, or it is refused (`not_a_volume`). Further
  axes (vectors, matrices) are always refused.
- Geometry is the sform's if its code is above 0, else the qform's (as nibabel). With neither code,
  NIfTI-1's "method 1": axes along RAS+, spacing from pixdim, and the warning `orientation_unknown`,
  since nothing in the file says which side is left.
- `sform_qform_differ`: two affines that disagree, or one code whose affine is unusable, or an sform
  whose spacing is not that of pixdim.
- Spatial units of meters or micrometres are converted to mm; unset counts as mm.
- scl_slope of 0, NaN or infinity means no scaling at all; its scl_inter is then ignored too (as
  nibabel; SimpleITK adds it).
- A volume of one value holds no image: `not_a_volume`.
- Content longer than the header accounts for is ignored as padding below the size of one slice;
  from there on header and data contradict each other: `unreadable`.
"""

from __future__ import annotations

import math
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from featray.ct import geometry
from featray.ct.formats.inflate import GZIP_MAGIC, inflate_gzip, inflate_gzip_head
from featray.ct.formats.voxel_data import (
    Buffer,
    Layout,
    check_geometry,
    check_layout,
    decode_voxels,
    plain,
)
from featray.ct.geometry import Affine
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode

MAX_EXTENSION_BYTES = 2**26
"""Header extensions before the voxels; real ones are a few kB."""

DIFFERENT_MM, DIFFERENT_DEGREES = 0.1, 0.1
"""sform and qform further apart than this, at any corner, earn `sform_qform_differ`."""

_HEADERS = {348: (nib.Nifti1Header, b"n+1", b"ni1"), 540: (nib.Nifti2Header, b"n+2", b"ni2")}
_MM_PER_UNIT = {1: 1e3, 3: 1e-3}


def read_nifti(
    data: bytes, *, max_voxels: int, volume_index: int | None = None, keep_shear: bool = False
) -> Volume:
    """Return the volume in a NIfTI-1 or NIfTI-2 file, plain or gzipped.

    Voxels have axes (z, y, x) and dtype int16, int32 or float32, native byte order; they share
    memory with `data` (then read-only) or its inflated copy where nothing had to be changed.
    Slope and intercept are applied exactly once: in integers if both are whole numbers and the
    result fits int32, else in float32.

    Args:
        data: The whole file.
        max_voxels: More are refused, all volumes of the file counted.
        volume_index: Which volume to take, from 0, of a file that holds several (warning
            `not_a_volume`); None refuses such files. A file with one volume has no choice.
        keep_shear: Return sheared axes, with their true affine and the warning `gantry_tilt`, instead
            of refusing them; `voxel_data.convert_to_shifted_slices` prepares such a volume for
            `regrid.resample_upright`.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume`,
            `gantry_tilt` (sheared axes) or `non_finite`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header = _header(inflate_gzip_head(data, 540) if data[:2] == GZIP_MAGIC else data[:540])
    if not _is_single(header):
        raise ScanError(Reason.UNSUPPORTED, "the header of a pair, its voxels are in an .img file beside it")
    return _read(header, data, max_voxels, volume_index, keep_shear)


def read_nifti_pair(
    header: bytes, image: bytes, *, max_voxels: int, volume_index: int | None = None, keep_shear: bool = False
) -> Volume:
    """Return the volume of a .hdr and an .img file, each plain or gzipped; otherwise as `read_nifti`."""
    for name, data in ((".hdr", header), (".img", image)):
        if not data:
            raise ScanError(Reason.EMPTY, f"the {name} file has no bytes")
    if header[:2] == GZIP_MAGIC:
        header = bytes(inflate_gzip(header, min(_HEADERS), MAX_EXTENSION_BYTES))
    parsed = _header(header[:540])
    if _is_single(parsed):
        raise ScanError(
            Reason.UNREADABLE, "the .hdr file says that it holds the voxels itself; rename it to .nii"
        )
    return _read(parsed, image, max_voxels, volume_index, keep_shear)


def _read(header: Any, data: bytes, max_voxels: int, volume: int | None, keep_shear: bool) -> Volume:
    """Return the volume whose voxels are in `data`, behind vox_offset."""
    layout = check_layout(_layout(header, volume), max_voxels)
    affine_ras, warnings = _chosen_affine(header, layout.shape_zyx)
    affine = geometry.convert_ras_to_lps(affine_ras)
    warnings += check_geometry(affine, keep_shear=keep_shear)
    if layout.volumes > 1:
        warnings += (Reason.NOT_A_VOLUME.value,)
    slope, intercept = _scaling(header)
    voxels = decode_voxels(_content(data, layout), layout, slope, intercept)
    return Volume(voxels, affine, slope, intercept, warnings)


def _header(head: bytes) -> Any:
    """Return the nibabel header; its size field tells version and byte order."""
    if len(head) < 4:
        raise ScanError(Reason.TRUNCATED, f"header of {len(head)} bytes, expected {min(_HEADERS)}")
    for size, (kind, single, pair) in _HEADERS.items():
        for endian, name in (("<", "little"), (">", "big")):
            if int.from_bytes(head[:4], name) != size:  # type: ignore[arg-type]
                continue
            if len(head) < size:
                raise ScanError(Reason.TRUNCATED, f"header of {len(head)} bytes, expected {size}")
            header = kind(head[:size], endianness=endian, check=False)
            if not bytes(header["magic"]).startswith((single, pair)):
                raise ScanError(
                    Reason.UNSUPPORTED,
                    "no NIfTI magic (ANALYZE 7.5?), so no orientation; convert it to NIfTI",
                )
            return header
    raise ScanError(
        Reason.UNREADABLE, "not NIfTI: the first field is neither 348 nor 540, nor gzip around it"
    )


def _is_single(header: Any) -> bool:
    return bytes(header["magic"])[1:2] == b"+"


def _layout(header: Any, volume: int | None) -> Layout:
    shape_zyx, volumes = _shape([int(n) for n in header["dim"]])
    offset = float(header["vox_offset"])
    least = int(header["sizeof_hdr"]) + 4 if _is_single(header) else 0
    if not least <= offset <= MAX_EXTENSION_BYTES:
        raise ScanError(
            Reason.UNREADABLE, f"vox_offset is {offset:g}, expected {least} to {MAX_EXTENSION_BYTES}"
        )
    return Layout(_dtype(header), shape_zyx, int(offset), volumes, _choice(volumes, volume))


def _dtype(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except KeyError:
        raise ScanError(Reason.UNREADABLE, f"datatype code {code} does not exist in NIfTI") from None
    return dtype


def _shape(dim: list[int]) -> tuple[tuple[int, ...], int]:
    """Return the shape (z, y, x) of a volume, and how many there are."""
    axes = dim[0]
    if not 1 <= axes <= 7 or min(dim[1 : axes + 1]) < 1:
        raise ScanError(Reason.UNREADABLE, f"impossible dimensions {dim}")
    shape = dim[1 : axes + 1] + [1] * (7 - axes)
    if max(shape[4:]) > 1:
        raise ScanError(
            Reason.NOT_A_VOLUME, f"dimensions are {shape[:axes]}: each voxel holds several values"
        )
    return (shape[2], shape[1], shape[0]), shape[3]


def _choice(volumes: int, volume: int | None) -> int:
    if volumes == 1:
        return 0
    if volume is None:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"the file holds {volumes} volumes; set source.volume to take one, or split it",
        )
    if not 0 <= volume < volumes:
        raise ScanError(Reason.NOT_A_VOLUME, f"source.volume is {volume}, the file holds 0 to {volumes - 1}")
    return volume


def _content(data: bytes, layout: Layout) -> Buffer:
    if data[:2] == GZIP_MAGIC:
        return inflate_gzip(data, layout.least, layout.most)
    return plain(data, layout)


def _chosen_affine(header: Any, shape_zyx: tuple[int, ...]) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in RAS mm and what its source makes worth a warning."""
    sform, qform = _sform(header), _qform(header)
    coded = (int(header["sform_code"]) > 0, int(header["qform_code"]) > 0)
    if sform is None and qform is None:
        if any(coded):
            raise ScanError(Reason.UNREADABLE, "neither sform nor qform holds a usable affine")
        return np.diag([*_pixdim_mm(header), 1.0]), (WarningCode.ORIENTATION_UNKNOWN.value,)
    if sform is None:
        assert qform is not None
        code = WarningCode.SFORM_QFORM_DIFFER if coded[0] else WarningCode.QFORM_ONLY
        return qform, (code.value,)
    differ = coded[1] and (qform is None or _differ(sform, qform, shape_zyx))
    differ = differ or _spacing_differs(header, sform, shape_zyx)
    return sform, (WarningCode.SFORM_QFORM_DIFFER.value,) if differ else ()


def _sform(header: Any) -> Affine | None:
    if int(header["sform_code"]) <= 0:
        return None
    with np.errstate(all="ignore"):  # what is not finite is found below
        affine = _in_mm(header, header.get_sform())
    return None if geometry.find_affine_problem(affine) else affine


def _qform(header: Any) -> Affine | None:
    if int(header["qform_code"]) <= 0:
        return None
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 and other values mean 1, as niftilib
    try:
        with np.errstate(all="ignore"):
            affine = _in_mm(header, header.get_qform())
    except (ValueError, HeaderDataError):
        return None  # not a rotation, or negative spacing
    return None if geometry.find_affine_problem(affine) else affine


def _in_mm(header: Any, affine: Affine) -> Affine:
    factor = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine.astype(np.float64) * [[factor], [factor], [factor], [1.0]]  # matmul would spread infinities


def _differ(first: Affine, second: Affine, shape_zyx: tuple[int, ...]) -> bool:
    z, y, x = shape_zyx
    corners = np.array([(i, j, k, 1.0) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    apart = np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max()
    cosines = _unit_columns(first) * _unit_columns(second)
    angle = np.degrees(np.arccos(np.clip(cosines.sum(axis=0), -1, 1))).max()
    return bool(apart > DIFFERENT_MM or angle > DIFFERENT_DEGREES)


def _spacing_differs(header: Any, sform: Affine, shape_zyx: tuple[int, ...]) -> bool:
    """Tell an sform that nobody filled in: identity, with the true spacing in pixdim alone."""
    pixdim = _pixdim_mm(header)
    known = np.isfinite(pixdim) & (pixdim > 0)
    steps = np.array(shape_zyx[::-1]) - 1
    apart = np.abs(pixdim - np.linalg.norm(sform[:3, :3], axis=0))
    return bool((apart[known] > DIFFERENT_MM / steps[known]).any())


def _pixdim_mm(header: Any) -> Affine:
    """Return the spacing along x, y and z; negative ones mean nothing in NIfTI."""
    with np.errstate(all="ignore"):
        affine = _in_mm(header, np.diag([*header["pixdim"][1:4], 1.0]))
    return np.abs(affine.diagonal()[:3])


def _unit_columns(affine: Affine) -> Affine:
    columns = affine[:3, :3]
    return np.asarray(columns / np.linalg.norm(columns, axis=0))


def _scaling(header: Any) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise ScanError(Reason.UNREADABLE, f"scl_slope is {slope:g} but scl_inter is {intercept}")
    return slope, intercept
