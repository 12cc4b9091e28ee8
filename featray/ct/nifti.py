"""The bytes of one .nii or .nii.gz file in, a checked Volume out; knows no paths and no storage.

Order of work: header, sizes, geometry, and only then memory for voxels. Nothing in the header is
believed before it is compared with the limit and with the bytes at hand. Decisions:

- Compression is recognised by content, not by name. Magic `ni1` (a .hdr/.img pair) and ANALYZE
  headers are refused: `unsupported`.
- Geometry is the sform's if its code is above 0, else the qform's (as nibabel). With neither code,
  NIfTI-1's "method 1": axes along RAS+, spacing from pixdim, and the warning `orientation_unknown`,
  since nothing in the file says which side is left.
- Spatial units of meters or micrometres are converted to mm; unset counts as mm.
- scl_slope of 0, NaN or infinity means no scaling at all; its scl_inter is then ignored too (as
  nibabel; SimpleITK adds it).
- A volume of one value holds no image: `not_a_volume`.
- Content longer than the header accounts for is ignored as padding below the size of one slice;
  from there on header and data contradict each other: `unreadable`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.geometry import Affine
from featray.ct.inflate import GZIP_MAGIC, gunzip, gzip_head
from featray.ct.rescale import extremes, rescale, result_dtype
from featray.ct.volume import Volume
from featray.errors import Oddity, Reason, ScanError

MAX_EXTENSION_BYTES = 2**26
"""Header extensions before the voxels; real ones are a few kB."""

DIFFERENT_MM, DIFFERENT_DEGREES = 0.1, 0.1
"""sform and qform further apart than this, at any corner, earn `sform_qform_differ`."""

_HEADERS = {348: (nib.Nifti1Header, b"n+1", b"ni1"), 540: (nib.Nifti2Header, b"n+2", b"ni2")}
_MM_PER_UNIT = {1: 1e3, 3: 1e-3}


def read_nifti(data: bytes, *, max_voxels: int) -> Volume:
    """Return the volume in a NIfTI-1 or NIfTI-2 file, plain or gzipped.

    Voxels have axes (z, y, x) and dtype int16, int32 or float32, native byte order; they share
    memory with `data` (then read-only) or its inflated copy where nothing had to be changed.
    Slope and intercept are applied exactly once: in integers if both are whole numbers and the
    result fits int32, else in float32.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume`,
            `gantry_tilt` (sheared axes) or `non_finite`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header = _header(data)
    layout = _layout(header, max_voxels)
    affine, warnings = _geometry(header, layout.shape_zyx)
    content = _content(data, layout)
    stored = np.frombuffer(content, layout.dtype, math.prod(layout.shape_zyx), layout.offset)
    slope, intercept = _scaling(header)
    voxels = _scaled(stored.reshape(layout.shape_zyx), slope, intercept)
    return Volume(voxels, affine, slope, intercept, warnings)


@dataclass(frozen=True)
class _Layout:
    """Where the voxels lie in the inflated file, and what they are."""

    dtype: np.dtype[Any]
    shape_zyx: tuple[int, ...]
    offset: int

    @property
    def slice_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape_zyx[1:])

    @property
    def end(self) -> int:
        return self.offset + self.shape_zyx[0] * self.slice_bytes


def _header(data: bytes) -> Any:
    """Return the nibabel header; its size field tells version and byte order."""
    head = gzip_head(data, 540) if data[:2] == GZIP_MAGIC else data[:540]
    for size, (kind, single, pair) in _HEADERS.items():
        for endian, name in (("<", "little"), (">", "big")):
            if int.from_bytes(head[:4], name) != size:  # type: ignore[arg-type]
                continue
            if len(head) < size:
                raise ScanError(Reason.TRUNCATED, f"header of {len(head)} bytes, expected {size}")
            header = kind(head[:size], endianness=endian, check=False)
            _check_magic(bytes(header["magic"]), single, pair)
            return header
    raise ScanError(
        Reason.UNREADABLE, "not NIfTI: the first field is neither 348 nor 540, nor gzip around it"
    )


def _check_magic(magic: bytes, single: bytes, pair: bytes) -> None:
    if magic.startswith(pair):
        raise ScanError(Reason.UNSUPPORTED, "a .hdr/.img pair; convert it to one .nii or .nii.gz file")
    if not magic.startswith(single):
        raise ScanError(
            Reason.UNSUPPORTED, "no NIfTI magic (ANALYZE 7.5?), so no orientation; convert it to NIfTI"
        )


def _layout(header: Any, max_voxels: int) -> _Layout:
    dtype = _dtype(header)
    shape_zyx = _shape_zyx([int(n) for n in header["dim"]])
    voxels = math.prod(shape_zyx)
    if voxels > max_voxels:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the header claims {voxels} voxels, more than limits.max_voxels ({max_voxels})",
        )
    offset = float(header["vox_offset"])
    least = int(header["sizeof_hdr"]) + 4
    if not least <= offset <= MAX_EXTENSION_BYTES:
        raise ScanError(
            Reason.UNREADABLE, f"vox_offset is {offset:g}, expected {least} to {MAX_EXTENSION_BYTES}"
        )
    return _Layout(dtype, shape_zyx, int(offset))


def _dtype(header: Any) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except KeyError:
        raise ScanError(Reason.UNREADABLE, f"datatype code {code} does not exist in NIfTI") from None
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanError(
            Reason.UNSUPPORTED, f"datatype code {code} (colour, complex or exotic); expected plain numbers"
        )
    return dtype


def _shape_zyx(dim: list[int]) -> tuple[int, ...]:
    axes = dim[0]
    if not 1 <= axes <= 7 or min(dim[1 : axes + 1]) < 1:
        raise ScanError(Reason.UNREADABLE, f"impossible dimensions {dim}")
    shape = dim[1 : axes + 1]
    if axes < 3 or min(shape[:3]) < 2 or max(shape[3:], default=1) > 1:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"dimensions (x, y, z, …) are {shape}, expected three of 2 or more and no further; "
            "split a series of volumes into files",
        )
    return tuple(reversed(shape[:3]))


def _content(data: bytes, layout: _Layout) -> bytes | bytearray:
    most = layout.end + layout.slice_bytes - 1
    if data[:2] == GZIP_MAGIC:
        return gunzip(data, layout.end, most)
    if len(data) < layout.end:
        raise ScanError(
            Reason.TRUNCATED, f"expected {layout.end} bytes, got {len(data)}; copy the file again"
        )
    if len(data) > most:
        raise ScanError(
            Reason.UNREADABLE, f"the header accounts for {layout.end} bytes, the file has {len(data)}"
        )
    return data


def _geometry(header: Any, shape_zyx: tuple[int, ...]) -> tuple[Affine, tuple[str, ...]]:
    affine_ras, warnings = _chosen_affine(header, shape_zyx)
    affine = geometry.ras_to_lps(affine_ras)
    wrong = geometry.problem(affine)
    if wrong:
        raise ScanError(Reason.UNREADABLE, wrong)
    if geometry.is_sheared(affine):
        raise ScanError(
            Reason.GANTRY_TILT,
            "the voxel axes are not at right angles (tilted gantry?); resample the scan to an upright grid",
        )
    return affine, warnings + geometry.oddities(affine)


def _chosen_affine(header: Any, shape_zyx: tuple[int, ...]) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in RAS mm and what its source makes worth a warning."""
    sform, qform = _sform(header), _qform(header)
    coded = (int(header["sform_code"]) > 0, int(header["qform_code"]) > 0)
    if sform is None and qform is None:
        if any(coded):
            raise ScanError(Reason.UNREADABLE, "neither sform nor qform holds a usable affine")
        return _in_mm(header, np.diag([*header["pixdim"][1:4].astype(float), 1.0])), (
            Oddity.ORIENTATION_UNKNOWN,
        )
    if sform is None:
        assert qform is not None
        code = Oddity.SFORM_QFORM_DIFFER if coded[0] else Oddity.QFORM_ONLY
        return qform, (code.value,)
    differ = coded[1] and (qform is None or _differ(sform, qform, shape_zyx))
    return sform, (Oddity.SFORM_QFORM_DIFFER.value,) if differ else ()


def _sform(header: Any) -> Affine | None:
    if int(header["sform_code"]) <= 0:
        return None
    affine = _in_mm(header, header.get_sform())
    return None if geometry.problem(affine) else affine


def _qform(header: Any) -> Affine | None:
    if int(header["qform_code"]) <= 0:
        return None
    header = header.copy()
    header["pixdim"][0] = -1 if header["pixdim"][0] < 0 else 1  # 0 and other values mean 1, as niftilib
    try:
        affine = _in_mm(header, header.get_qform())
    except (ValueError, HeaderDataError):
        return None  # not a rotation, or negative spacing
    return None if geometry.problem(affine) else affine


def _in_mm(header: Any, affine: Affine) -> Affine:
    factor = _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, 1.0)
    return np.diag([factor, factor, factor, 1.0]) @ affine.astype(np.float64)


def _differ(first: Affine, second: Affine, shape_zyx: tuple[int, ...]) -> bool:
    z, y, x = shape_zyx
    corners = np.array([(i, j, k, 1.0) for i in (0, x - 1) for j in (0, y - 1) for k in (0, z - 1)])
    apart = np.linalg.norm((corners @ (first - second).T)[:, :3], axis=1).max()
    cosines = _unit_columns(first) * _unit_columns(second)
    angle = np.degrees(np.arccos(np.clip(cosines.sum(axis=0), -1, 1))).max()
    return bool(apart > DIFFERENT_MM or angle > DIFFERENT_DEGREES)


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


def _scaled(stored: NDArray[Any], slope: float, intercept: float) -> NDArray[Any]:
    low, high = extremes(stored)
    if low == high:
        raise ScanError(Reason.NOT_A_VOLUME, f"every voxel is {low * slope + intercept:g}")
    ends = (low * slope + intercept, high * slope + intercept)
    if not max(abs(ends[0]), abs(ends[1])) <= float(np.finfo(np.float32).max):
        raise ScanError(Reason.NON_FINITE, "voxels are NaN, infinite or beyond float32")
    return rescale(stored, slope, intercept, result_dtype(stored.dtype, low, high, slope, intercept))
