"""The bytes of one .nrrd file in, a checked Volume out; knows no paths and no storage.

pynrrd parses the header; the data are inflated here, within what the header accounts for. Decisions:

- Data must be attached, raw or gzip. A detached header (.nhdr) and other encodings are `unsupported`.
- `space` RAS, LAS or LPS is brought to LPS. Any other, or none, says nothing about the patient: axes
  are taken as LPS, as ITK does, with the warning `orientation_unknown`.
- Without `space directions`, `spacings` are the steps along the axes of the space.
- An axis of one sample that lies in no space (a list of one) is dropped; longer ones are refused.
- NRRD has no slope and no intercept: values count as HU as they stand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import nrrd
import numpy as np
from nrrd.errors import NRRDError

from featray.ct.formats.inflate import inflate_gzip
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

MAX_HEADER_BYTES = 2**22
"""Text before the data; with a whole DICOM header as key/value pairs it is some 100 kB."""

_TO_LPS = {
    "left-posterior-superior": (1.0, 1.0, 1.0),
    "lps": (1.0, 1.0, 1.0),
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
    "las": (1.0, -1.0, 1.0),
}
_MM_PER_UNIT = {"": 1.0, "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1e3, "um": 1e-3}
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "f4": ("float",),
    "f8": ("double",),
}
"""NumPy's code of each name NRRD has for a type, but for 64-bit integers, which no CT needs."""


def read_nrrd(data: bytes, *, max_voxels: int, keep_shear: bool = False) -> Volume:
    """Return the volume in an NRRD file with attached data, raw or gzip.

    Voxels, arguments and errors are those of `featray.ct.formats.nifti.read_nifti`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header, start = _header(data)
    layout = check_layout(_layout(header), max_voxels)
    affine, warnings = _affine(header)
    warnings += check_geometry(affine, keep_shear=keep_shear)
    voxels = decode_voxels(_content(memoryview(data)[start:], header, layout), layout)
    return Volume(voxels, affine, warnings=warnings)


def _header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the fields as pynrrd types them, and where the data begin."""
    if not data.startswith(b"NRRD"):
        raise ScanError(Reason.UNREADABLE, "not NRRD: the file does not begin with NRRD")
    end = re.compile(rb"\r?\n\r?\n").search(data, 0, MAX_HEADER_BYTES)
    if end is None:
        raise _without_end(data)
    lines = [line.decode("latin-1") for line in data[: end.start()].splitlines()]
    try:
        with np.errstate(all="raise"):
            header = dict(nrrd.read_header(lines))
    except (NRRDError, ValueError, IndexError, ArithmeticError) as error:
        raise ScanError(
            Reason.UNREADABLE, f"the NRRD header cannot be parsed ({type(error).__name__})"
        ) from None
    _check_supported(header)
    return header, end.end()


def _without_end(data: bytes) -> ScanError:
    if re.search(rb"\ndata ?file:", data[:MAX_HEADER_BYTES]):
        return _detached()
    return ScanError(Reason.TRUNCATED, "the NRRD header has no end; copy the file again")


def _detached() -> ScanError:
    return ScanError(
        Reason.UNSUPPORTED, "the voxels are in another file; write header and data into one .nrrd file"
    )


def _check_supported(header: Mapping[str, Any]) -> None:
    missing = [name for name in ("type", "dimension", "sizes", "encoding") if name not in header]
    if missing:
        raise ScanError(Reason.UNREADABLE, f"the NRRD header lacks {', '.join(missing)}")
    if {"data file", "datafile"} & header.keys():
        raise _detached()
    skips = [header.get(name, 0) for name in ("line skip", "lineskip", "byte skip", "byteskip")]
    if any(skips):
        raise ScanError(Reason.UNSUPPORTED, "line skip and byte skip; write the file anew without them")


def _layout(header: Mapping[str, Any]) -> Layout:
    sizes = [int(size) for size in header["sizes"]]
    if header["dimension"] != len(sizes) or min(sizes) < 1:
        raise ScanError(Reason.UNREADABLE, f"dimension is {header['dimension']}, sizes are {sizes}")
    shape_xyz = [sizes[axis] for axis in _space_axes(header, sizes)]
    if math.prod(shape_xyz) != math.prod(sizes) or len(shape_xyz) != 3:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"sizes are {sizes}, expected three axes; split a series of volumes into files",
        )
    return Layout(_dtype(header), tuple(reversed(shape_xyz)))


def _space_axes(header: Mapping[str, Any], sizes: list[int]) -> list[int]:
    """Return the axes that lie in space; where nothing tells, the first three and all longer than one."""
    directions = header.get("space directions")
    if directions is not None and len(directions) == len(sizes) > 3:
        return [axis for axis, direction in enumerate(directions) if not _is_none(direction)]
    return [axis for axis, size in enumerate(sizes) if axis < 3 or size > 1]


def _is_none(direction: Any) -> bool:
    return direction is None or bool(np.isnan(direction).all())


def _dtype(header: Mapping[str, Any]) -> np.dtype[Any]:
    code = next((code for code, names in _TYPES.items() if header["type"] in names), None)
    if code is None:
        raise ScanError(Reason.UNSUPPORTED, f"NRRD type {header['type']!r:.40}, expected numbers")
    orders = {"little": "<", "big": ">"}
    if code[1] != "1" and header.get("endian") not in orders:
        raise ScanError(Reason.UNREADABLE, "the NRRD header lacks endian")
    return np.dtype(orders.get(header.get("endian", "little"), "<") + code)


def _affine(header: Mapping[str, Any]) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in LPS mm, and the warning where nothing says that it is."""
    to_lps = _TO_LPS.get(str(header.get("space", "")).lower())
    affine = np.eye(4)
    affine[:3, :3] = _directions(header).T
    affine[:3, 3] = _vectors([header.get("space origin", np.zeros(3))], 1)[0]
    affine[:3] *= _mm_per_unit(header)
    if to_lps is None:
        return affine, (WarningCode.ORIENTATION_UNKNOWN.value,)
    affine[:3] *= np.array(to_lps)[:, None]
    return affine, ()


def _directions(header: Mapping[str, Any]) -> Affine:
    """Return for each voxel axis (row) its step in space."""
    directions = header.get("space directions")
    if directions is not None:
        return _vectors([direction for direction in directions if not _is_none(direction)], 3)
    spacings = [step for step in header.get("spacings", ()) if math.isfinite(step)]
    if len(spacings) != 3:
        raise ScanError(Reason.UNREADABLE, "the NRRD header has neither space directions nor three spacings")
    return np.diag(np.abs(np.array(spacings, np.float64)))


def _vectors(vectors: list[Any], count: int) -> Affine:
    if len(vectors) != count or any(np.shape(vector) != (3,) for vector in vectors):
        raise ScanError(Reason.UNREADABLE, f"expected {count} vectors of three numbers in space")
    return np.array(vectors, np.float64)


def _mm_per_unit(header: Mapping[str, Any]) -> float:
    units = {unit.lower() for unit in header.get("space units", [""])}
    unit = units.pop()
    if units or unit not in _MM_PER_UNIT:
        raise ScanError(Reason.UNSUPPORTED, "space units are not millimetres; write the file anew in mm")
    return _MM_PER_UNIT[unit]


def _content(data: memoryview, header: Mapping[str, Any], layout: Layout) -> Buffer:
    encoding = header["encoding"].lower()
    if encoding in ("gzip", "gz"):
        return inflate_gzip(data, layout.least, layout.most)
    if encoding != "raw":
        raise ScanError(Reason.UNSUPPORTED, f"NRRD encoding {encoding!r:.40}, expected raw or gzip")
    return plain(data, layout)
