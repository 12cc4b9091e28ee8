"""Read the bytes of one NIfTI file, or of a .hdr/.img pair, and return a checked `Volume`.

Header, sizes and geometry are checked before memory is allocated for voxels: every size that the header
claims is compared with the limit and with the number of bytes in the file. Conventions:

- Compression is detected from the content, not from the file name. ANALYZE headers, which lack the NIfTI
  magic, are `unsupported`, because they do not state which side is left.
- If a file holds several volumes, the caller chooses one; without a choice the file is `not_a_volume`. Files
  with further axes (vectors, matrices) are always `not_a_volume`.
- The affine is the sform if its code is above 0, otherwise the qform, as in nibabel. If only the qform has a
  code, the file gets the warning `qform_only`. If both codes are 0, "method 1" of NIfTI-1 applies: axes along
  RAS+, spacing from pixdim. This causes the warning `orientation_unknown`, because the file does not state
  which side is left.
- An affine that is not usable counts as missing; if a code is above 0 but neither affine is usable, the file
  is `unreadable`.
- The warning `sform_qform_differ` means that sform and qform disagree, that one has a code but an unusable
  affine, or that the spacing of the sform differs from pixdim.
- pixdim is used without its sign, as in `nibabel.load`. If the affine is a qform whose pixdim has a negative
  step, the file gets the warning `orientation_unknown`, because ITK would mirror that axis. The sign of
  pixdim[0] flips z of the qform.
- A quaternion a little longer than 1 (`MAX_QUATERNION_NORM`) is normalized, as in niftilib.
- Spatial units of meters or micrometers are converted to mm; unknown units count as mm. If the numbers are
  plausible only in mm, the file is `unreadable`, because it is unknown which of the two is wrong.
- A scl_slope of 0, NaN or infinity means that values are not scaled. scl_inter is then ignored as well, as in
  nibabel; SimpleITK would add it.
- A volume with the same value in all voxels is `not_a_volume`.
- Content after the last voxel is ignored as padding if it is smaller than one slice. Otherwise header and
  data contradict each other, and the file is `unreadable`.

This module must not know paths or storage.
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
    check_length,
    check_units,
    choose_volume,
    decode_voxels,
)
from featray.ct.geometry import Affine
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode

MAX_EXTENSION_BYTES = 2**26
"""Largest accepted size of the header extensions before the voxels; real ones have a few kB."""

DIFFERENT_MM, DIFFERENT_DEGREES = 0.1, 0.1
"""Difference between sform and qform, at a corner or of an axis, that causes `sform_qform_differ`."""

MAX_QUATERNION_NORM = 1.001
"""Largest accepted length of (quatern_b, quatern_c, quatern_d).

Rounding makes the length of a rotation by 180 degrees a little larger than 1.
"""

_HEADER_TYPES = {348: (nib.Nifti1Header, b"n+1", b"ni1"), 540: (nib.Nifti2Header, b"n+2", b"ni2")}
"""nibabel's header class, the magic of a single file and the magic of a pair, by the size of the header."""

_MM_PER_UNIT = {1: 1e3, 3: 1e-3}


def read_nifti(
    data: bytes, *, max_voxels: int, volume_index: int | None = None, keep_shear: bool = False
) -> Volume:
    """Return the volume of a NIfTI-1 or NIfTI-2 file, plain or gzipped.

    Voxels have axes (z, y, x), dtype int16, int32 or float32, and native byte order. If no value had to be
    changed, they share memory with `data`, or with its inflated copy, and may be read-only. Slope and
    intercept are applied once: in integer arithmetic if the stored values are integers, both are whole
    numbers and the result fits int32, else in float32. The affine is LPS in mm.

    Args:
        data: Content of the file.
        max_voxels: Largest accepted number of voxels in all volumes of the file together.
        volume_index: Index, from 0, of the volume to read from a file that holds several; the result then has
            the warning `not_a_volume`. None rejects such files. Ignored if the file holds one volume.
        keep_shear: Whether a volume with sheared axes is returned, with its true affine and the warning
            `gantry_tilt`, instead of rejected. `voxel_data.convert_to_shifted_slices` prepares such a volume
            for `regrid.resample_upright`.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume`,
            `gantry_tilt` (sheared axes) or `non_finite`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header = _parse_header(inflate_gzip_head(data, 540) if data[:2] == GZIP_MAGIC else data[:540])
    if not _is_single_file(header):
        raise ScanError(Reason.UNSUPPORTED, "the header of a .hdr/.img pair; its voxels are in the .img file")
    layout = choose_volume(_parse_layout(header), volume_index)
    return _read_volume(header, layout, data, max_voxels=max_voxels, keep_shear=keep_shear)


def read_nifti_pair(
    header: bytes, image: bytes, *, max_voxels: int, volume_index: int | None = None, keep_shear: bool = False
) -> Volume:
    """Return the volume of a .hdr file and an .img file, each plain or gzipped.

    `header` and `image` are the contents of the two files. All else is as in `read_nifti`.
    """
    for name, data in ((".hdr", header), (".img", image)):
        if not data:
            raise ScanError(Reason.EMPTY, f"the {name} file has no bytes")
    if header[:2] == GZIP_MAGIC:
        header = bytes(inflate_gzip(header, min(_HEADER_TYPES), MAX_EXTENSION_BYTES))
    parsed = _parse_header(header[:540])
    if _is_single_file(parsed):
        raise ScanError(
            Reason.UNREADABLE, "the .hdr file says that it holds the voxels itself; rename it to .nii"
        )
    layout = choose_volume(_parse_layout(parsed), volume_index)
    return _read_volume(parsed, layout, image, max_voxels=max_voxels, keep_shear=keep_shear)


def _read_volume(header: Any, layout: Layout, data: bytes, *, max_voxels: int, keep_shear: bool) -> Volume:
    """Return the volume of a parsed header; `data` is the content of the file that holds the voxels."""
    check_layout(layout, max_voxels)
    _check_units(header, layout)
    affine_ras, warnings = _choose_affine(header, layout.shape_zyx)
    affine = geometry.convert_ras_to_lps(affine_ras)
    warnings += check_geometry(affine, keep_shear=keep_shear)
    if layout.volume_count > 1:
        warnings += (Reason.NOT_A_VOLUME.value,)
    slope, intercept = _parse_scaling(header)
    voxels = decode_voxels(_inflate(data, layout), layout, slope, intercept)
    return Volume(voxels, affine, slope, intercept, warnings)


def _parse_header(head: bytes) -> Any:
    """Return the first bytes of a file as a nibabel header.

    The version of NIfTI and the byte order follow from the first field, the size of the header.
    """
    if len(head) < 4:
        raise ScanError(Reason.TRUNCATED, f"header of {len(head)} bytes, expected {min(_HEADER_TYPES)}")
    for size, (kind, single, pair) in _HEADER_TYPES.items():
        for endian, name in (("<", "little"), (">", "big")):
            if int.from_bytes(head[:4], name) != size:  # type: ignore[arg-type]
                continue
            if len(head) < size:
                raise ScanError(Reason.TRUNCATED, f"header of {len(head)} bytes, expected {size}")
            header = kind(head[:size], endianness=endian, check=False)
            if not bytes(header["magic"]).startswith((single, pair)):
                raise ScanError(
                    Reason.UNSUPPORTED,
                    "the header has no NIfTI magic (ANALYZE 7.5?), so the orientation is unknown; "
                    "convert the file to NIfTI",
                )
            return header
    raise ScanError(
        Reason.UNREADABLE, "not NIfTI: the header (inflated if gzipped) begins with neither 348 nor 540"
    )


def _is_single_file(header: Any) -> bool:
    """Return whether the file with this header holds the voxels, too."""
    return bytes(header["magic"])[1:2] == b"+"


def _parse_layout(header: Any) -> Layout:
    shape_zyx, volume_count = _parse_shape([int(n) for n in header["dim"]])
    offset = float(header["vox_offset"])
    min_offset = int(header["sizeof_hdr"]) + 4 if _is_single_file(header) else 0
    if not min_offset <= offset <= MAX_EXTENSION_BYTES:
        raise ScanError(
            Reason.UNREADABLE, f"vox_offset is {offset:g}, expected {min_offset} to {MAX_EXTENSION_BYTES}"
        )
    dtype = _parse_dtype(header)
    return Layout(dtype, shape_zyx, int(offset), volume_count)


def _parse_dtype(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except KeyError:
        raise ScanError(Reason.UNREADABLE, f"datatype code {code} does not exist in NIfTI") from None
    return dtype


def _parse_shape(dim: list[int]) -> tuple[tuple[int, ...], int]:
    """Return the shape (z, y, x) of one volume and the number of volumes."""
    axes = dim[0]
    if not 1 <= axes <= 7 or min(dim[1 : axes + 1]) < 1:
        raise ScanError(Reason.UNREADABLE, f"impossible dimensions {dim}")
    shape = dim[1 : axes + 1] + [1] * (7 - axes)
    if max(shape[4:]) > 1:
        raise ScanError(
            Reason.NOT_A_VOLUME, f"dimensions are {shape[:axes]}: each voxel holds several values"
        )
    return (shape[2], shape[1], shape[0]), shape[3]


def _inflate(data: bytes, layout: Layout) -> Buffer:
    """Return the uncompressed content of the file, whose length is checked against the layout."""
    if data[:2] == GZIP_MAGIC:
        return inflate_gzip(data, layout.min_bytes, layout.max_bytes)
    check_length(data, layout.min_bytes, layout.max_bytes)
    return data


def _choose_affine(header: Any, shape_zyx: tuple[int, ...]) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in RAS mm, and the warning codes that concern its source."""
    sform, qform = _parse_sform(header), _parse_qform(header)
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if sform is None and qform is None:
        if has_sform or has_qform:
            raise ScanError(Reason.UNREADABLE, "neither sform nor qform holds a usable affine")
        return np.diag([*_parse_pixdim_mm(header), 1.0]), (WarningCode.ORIENTATION_UNKNOWN.value,)
    if sform is None:
        assert qform is not None
        code = WarningCode.SFORM_QFORM_DIFFER if has_sform else WarningCode.QFORM_ONLY
        is_mirrored = (header["pixdim"][1:4] < 0).any()
        return qform, (code.value, *([WarningCode.ORIENTATION_UNKNOWN.value] if is_mirrored else []))
    differs = has_qform and (qform is None or _is_different(sform, qform, shape_zyx))
    differs = differs or _has_other_spacing(header, sform, shape_zyx)
    return sform, (WarningCode.SFORM_QFORM_DIFFER.value,) if differs else ()


def _check_units(header: Any, layout: Layout) -> None:
    """Check that the spatial unit of the header is plausible for its spacing."""
    spacing = _parse_pixdim_mm(header)
    if int(header["sform_code"]) > 0:
        with np.errstate(all="ignore"):
            spacing = np.linalg.norm(_convert_to_mm(header, header.get_sform())[:3, :3], axis=0)
    factor = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    check_units(spacing[::-1].tolist(), layout.shape_zyx, factor, "xyzt_units")


def _parse_sform(header: Any) -> Affine | None:
    """Return the sform in RAS mm, or None if its code is 0 or it is unusable."""
    if int(header["sform_code"]) <= 0:
        return None
    with np.errstate(all="ignore"):  # find_affine_problem reports values that are not finite
        affine = _convert_to_mm(header, header.get_sform())
    return None if geometry.find_affine_problem(affine) else affine


def _parse_qform(header: Any) -> Affine | None:
    """Return the qform in RAS mm, or None if its code is 0 or it is unusable."""
    if int(header["qform_code"]) <= 0:
        return None
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 and other values mean 1, as in niftilib
    header["pixdim"][1:4] = np.abs(header["pixdim"][1:4])
    quaternion = np.array([header[f"quatern_{letter}"] for letter in "bcd"], np.float64)
    norm = math.hypot(*quaternion)  # infinite if it is too large, without a warning
    if 1 < norm <= MAX_QUATERNION_NORM:  # rounded: the fourth number is 0
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = quaternion / norm
    try:
        with np.errstate(all="ignore"):
            affine = _convert_to_mm(header, header.get_qform())
    except (ValueError, HeaderDataError):
        return None  # the quaternion is not a rotation
    return None if geometry.find_affine_problem(affine) else affine


def _convert_to_mm(header: Any, affine: Affine) -> Affine:
    """Return the affine in mm, from the spatial units of the header."""
    factor = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    # A matrix product would turn infinities into NaN.
    return affine.astype(np.float64) * [[factor], [factor], [factor], [1.0]]


def _is_different(first: Affine, second: Affine, shape_zyx: tuple[int, ...]) -> bool:
    """Return whether two affines place a corner of the volume, or direct a voxel axis, differently."""
    z, y, x = shape_zyx
    corners = np.array([(i, j, k, 1.0) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    distance = np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max()
    cosines = geometry.compute_directions(first) * geometry.compute_directions(second)
    angle = np.degrees(np.arccos(np.clip(cosines.sum(axis=0), -1, 1))).max()
    return bool(distance > DIFFERENT_MM or angle > DIFFERENT_DEGREES)


def _has_other_spacing(header: Any, sform: Affine, shape_zyx: tuple[int, ...]) -> bool:
    """Return whether the spacings of sform and pixdim differ by `DIFFERENT_MM` over the length of an axis.

    Some programs leave the identity matrix in the sform and write the true spacing to pixdim only.
    """
    pixdim = _parse_pixdim_mm(header)
    known = np.isfinite(pixdim) & (pixdim > 0)
    steps = np.array(shape_zyx[::-1]) - 1
    difference = np.abs(pixdim - np.linalg.norm(sform[:3, :3], axis=0))
    return bool((difference[known] > DIFFERENT_MM / steps[known]).any())


def _parse_pixdim_mm(header: Any) -> Affine:
    """Return the spacing along x, y and z in mm, without its sign, which has no meaning in NIfTI."""
    with np.errstate(all="ignore"):
        affine = _convert_to_mm(header, np.diag([*header["pixdim"][1:4], 1.0]))
    return np.abs(affine.diagonal()[:3])


def _parse_scaling(header: Any) -> tuple[float, float]:
    """Return slope and intercept; 1 and 0 if the header requests no scaling."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        raise ScanError(Reason.UNREADABLE, f"scl_slope is {slope:g} but scl_inter is {intercept}")
    return slope, intercept
