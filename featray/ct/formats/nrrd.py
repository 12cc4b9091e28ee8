"""Read the bytes of one .nrrd file and return a checked `Volume`.

pynrrd parses the header. The data are inflated here, and never beyond the size that the header states.
Conventions:

- The data must be in the file, in encoding raw or gzip. Detached headers (.nhdr) and other encodings are
  `unsupported`.
- The spaces RAS, LAS and LPS are converted to LPS. Other spaces, or a missing space, do not relate the axes
  to the patient; the axes are then assumed to be LPS, as in ITK, with the warning `orientation_unknown`.
- Without `space directions`, `spacings` are the steps along the axes of the space.
- An axis that has no direction in space is dropped if it has one sample. A file in which such an axis has
  more samples is `not_a_volume`.
- NRRD has no slope and no intercept: the stored values are assumed to be HU.

This module must not know paths or storage.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import nrrd
import numpy as np
from nrrd.errors import NRRDError
from numpy.typing import NDArray

from featray.ct.formats.inflate import inflate_gzip
from featray.ct.formats.voxel_data import (
    Buffer,
    Layout,
    check_geometry,
    check_layout,
    check_length,
    decode_voxels,
)
from featray.ct.geometry import Affine
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode

MAX_HEADER_BYTES = 2**22
"""Largest accepted header; one with a whole DICOM header as key/value pairs has some 100 kB."""

_SPACE_TO_LPS = {
    "left-posterior-superior": (1.0, 1.0, 1.0),
    "lps": (1.0, 1.0, 1.0),
    "right-anterior-superior": (-1.0, -1.0, 1.0),
    "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0),
    "las": (1.0, -1.0, 1.0),
}
"""Signs that convert x, y and z of a space to LPS."""

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
"""Names of the types in NRRD, by NumPy's code. 64-bit integers are missing, because CT does not need them."""


def read_nrrd(data: bytes, *, max_voxels: int, keep_shear: bool = False) -> Volume:
    """Return the volume of an NRRD file that contains its data, raw or gzip.

    The voxels, the arguments and the errors are those of `featray.ct.formats.nifti.read_nifti`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header, start = _parse_header(data)
    layout = _parse_layout(header)
    check_layout(layout, max_voxels)
    affine, warnings = _parse_affine(header)
    warnings += check_geometry(affine, keep_shear=keep_shear)
    voxels = decode_voxels(_inflate(memoryview(data)[start:], header, layout), layout)
    return Volume(voxels, affine, warnings=warnings)


def _parse_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the fields, as pynrrd converts them, and the position of the first byte of the data."""
    if not data.startswith(b"NRRD"):
        raise ScanError(Reason.UNREADABLE, "not NRRD: the file does not begin with NRRD")
    end = re.compile(rb"\r?\n\r?\n").search(data, 0, MAX_HEADER_BYTES)
    if end is None:
        raise _make_missing_end_error(data)
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


def _make_missing_end_error(data: bytes) -> ScanError:
    """Return the error for a header without a blank line at its end; a detached header needs no such line."""
    if re.search(rb"\ndata ?file:", data[:MAX_HEADER_BYTES]):
        return _make_detached_error()
    return ScanError(Reason.TRUNCATED, "the NRRD header has no end; copy the file again")


def _make_detached_error() -> ScanError:
    return ScanError(
        Reason.UNSUPPORTED, "the voxels are in another file; write header and data into one .nrrd file"
    )


def _check_supported(header: Mapping[str, Any]) -> None:
    missing = [name for name in ("type", "dimension", "sizes", "encoding") if name not in header]
    if missing:
        raise ScanError(Reason.UNREADABLE, f"the NRRD header lacks {', '.join(missing)}")
    if {"data file", "datafile"} & header.keys():
        raise _make_detached_error()
    skips = [header.get(name, 0) for name in ("line skip", "lineskip", "byte skip", "byteskip")]
    if any(skips):
        raise ScanError(
            Reason.UNSUPPORTED, "NRRD with line skip or byte skip; write the file again without them"
        )


def _parse_layout(header: Mapping[str, Any]) -> Layout:
    sizes = [int(size) for size in header["sizes"]]
    if header["dimension"] != len(sizes) or min(sizes) < 1:
        raise ScanError(Reason.UNREADABLE, f"dimension is {header['dimension']}, sizes are {sizes}")
    shape_xyz = [sizes[axis] for axis in _find_space_axes(header, sizes)]
    if math.prod(shape_xyz) != math.prod(sizes) or len(shape_xyz) != 3:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"sizes are {sizes}, expected three axes; split a series of volumes into files",
        )
    return Layout(_parse_dtype(header), tuple(reversed(shape_xyz)))


def _find_space_axes(header: Mapping[str, Any], sizes: list[int]) -> list[int]:
    """Return the indices of the axes that lie in space.

    If the header does not state them, these are the first three axes and all further ones with more than one
    sample.
    """
    directions = header.get("space directions")
    if directions is not None and len(directions) == len(sizes) > 3:
        return [axis for axis, direction in enumerate(directions) if not _is_outside_space(direction)]
    return [axis for axis, size in enumerate(sizes) if axis < 3 or size > 1]


def _is_outside_space(direction: Any) -> bool:
    """Return whether the header states that an axis with this `space directions` entry has no direction."""
    return direction is None or bool(np.isnan(direction).all())


def _parse_dtype(header: Mapping[str, Any]) -> np.dtype[Any]:
    code = next((code for code, names in _TYPES.items() if header["type"] in names), None)
    if code is None:
        raise ScanError(Reason.UNSUPPORTED, f"NRRD type {header['type']!r:.40}, expected numbers")
    orders = {"little": "<", "big": ">"}
    if code[1] != "1" and header.get("endian") not in orders:
        raise ScanError(Reason.UNREADABLE, "the NRRD header lacks endian")
    return np.dtype(orders.get(header.get("endian", "little"), "<") + code)


def _parse_affine(header: Mapping[str, Any]) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in LPS mm, and a warning code if the frame is an assumption."""
    to_lps = _SPACE_TO_LPS.get(str(header.get("space", "")).lower())
    affine = np.eye(4)
    affine[:3, :3] = _parse_directions(header).T
    affine[:3, 3] = _convert_vectors([header.get("space origin", np.zeros(3))], 1)[0]
    affine[:3] *= _parse_mm_per_unit(header)
    if to_lps is None:
        return affine, (WarningCode.ORIENTATION_UNKNOWN.value,)
    affine[:3] *= np.array(to_lps)[:, None]
    return affine, ()


def _parse_directions(header: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return the steps (3, 3) from voxel to voxel in the space of the file, one row per voxel axis."""
    directions = header.get("space directions")
    if directions is not None:
        return _convert_vectors(
            [direction for direction in directions if not _is_outside_space(direction)], 3
        )
    spacings = [step for step in header.get("spacings", ()) if math.isfinite(step)]
    if len(spacings) != 3:
        raise ScanError(Reason.UNREADABLE, "the NRRD header has neither space directions nor three spacings")
    return np.diag(np.abs(np.array(spacings, np.float64)))


def _convert_vectors(vectors: list[Any], count: int) -> NDArray[np.float64]:
    """Return `count` vectors as an array (count, 3)."""
    if len(vectors) != count or any(np.shape(vector) != (3,) for vector in vectors):
        raise ScanError(Reason.UNREADABLE, f"expected {count} vectors of three numbers in space")
    return np.array(vectors, np.float64)


def _parse_mm_per_unit(header: Mapping[str, Any]) -> float:
    """Return the number of mm in a unit of the file's space; mm if the header names no unit."""
    units = {unit.lower() for unit in header.get("space units", [""])}
    unit = units.pop()
    if units or unit not in _MM_PER_UNIT:
        raise ScanError(Reason.UNSUPPORTED, "unknown space units; write the file again in mm")
    return _MM_PER_UNIT[unit]


def _inflate(data: memoryview, header: Mapping[str, Any], layout: Layout) -> Buffer:
    """Return the uncompressed voxels, whose length is checked against the layout."""
    encoding = header["encoding"].lower()
    if encoding in ("gzip", "gz"):
        return inflate_gzip(data, layout.min_bytes, layout.max_bytes)
    if encoding != "raw":
        raise ScanError(Reason.UNSUPPORTED, f"NRRD encoding {encoding!r:.40}, expected raw or gzip")
    check_length(data, layout)
    return data
