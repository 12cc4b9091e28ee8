"""Read the bytes of one MetaImage (.mha) file and return a checked `Volume`.

The file begins with lines `Key = Value`, of which ElementDataFile is the last. Then the voxels follow,
uncompressed or as one zlib stream. Conventions:

- The data must be in the file (`ElementDataFile = LOCAL`), be binary and hold one value per voxel. Other
  files are `unsupported`.
- Offset, TransformMatrix (one voxel axis per row) and ElementSpacing are LPS and mm, as in ITK.
  AnatomicalOrientation repeats the matrix in letters and is not used. Without a matrix the axes are assumed
  to be LPS, with the warning `orientation_unknown`.
- A slope or intercept (ElementToIntensityFunction…) other than 1 and 0 is `unsupported`. ITK ignores both, so
  it is unknown which values were meant.

This module must not know paths or storage.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct.formats.inflate import inflate_zlib
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

MAX_HEADER_BYTES = 2**16
"""Largest accepted header; real ones have about 15 lines."""

_LAST_LINE = re.compile(rb"\nElementDataFile[ \t]*=[^\n]*\n")
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_ONLY_VALUES = {"HeaderSize": 0, "ElementToIntensityFunctionOffset": 0, "ElementToIntensityFunctionSlope": 1}
"""The only supported value of some fields, which is also their default."""

_MATRIX_KEYS = ("TransformMatrix", "Rotation", "Orientation")
_OFFSET_KEYS = ("Offset", "Position", "Origin")

_Header = dict[str, str]


def read_metaimage(data: bytes, *, max_voxels: int, keep_shear: bool = False) -> Volume:
    """Return the volume of a MetaImage file that contains its data.

    The voxels, the arguments and the errors are those of `featray.ct.formats.nifti.read_nifti`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header, start = _parse_header(data)
    _check_supported(header)
    layout = _parse_layout(header)
    check_layout(layout, max_voxels)
    affine, warnings = _parse_affine(header)
    warnings += check_geometry(affine, keep_shear=keep_shear)
    voxels = decode_voxels(_inflate(memoryview(data)[start:], header, layout), layout)
    return Volume(voxels, affine, warnings=warnings)


def _parse_header(data: bytes) -> tuple[_Header, int]:
    """Return the fields by key, and the position of the first byte of the data."""
    text = data[:MAX_HEADER_BYTES]
    if not text.startswith((b"ObjectType", b"Comment", b"NDims")):
        raise ScanError(Reason.UNREADABLE, "not MetaImage: the file does not begin with ObjectType")
    last = _LAST_LINE.search(text)
    if last is None:
        raise ScanError(Reason.TRUNCATED, "the MetaImage header has no end; copy the file again")
    header: _Header = {}
    for line in text[: last.end() - 1].decode("latin-1").split("\n"):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key in header:
            raise ScanError(
                Reason.UNREADABLE, "a line of the MetaImage header is not Key = Value, or repeats a key"
            )
        header[key] = value
    return header, last.end()


def _check_supported(header: _Header) -> None:
    if header["ElementDataFile"].upper() != "LOCAL":
        raise ScanError(
            Reason.UNSUPPORTED, "the voxels are in another file; write header and data into one .mha file"
        )
    unsupported = [] if header.get("ElementNumberOfChannels", "1") == "1" else ["ElementNumberOfChannels"]
    unsupported += [key for key, value in _ONLY_VALUES.items() if _parse_number(header, key, value) != value]
    if header.get("DistanceUnits", "mm") not in ("mm", "?"):
        unsupported.append("DistanceUnits")
    if header.get("ObjectType", "Image").lower() != "image":
        unsupported.append("ObjectType")
    if not _parse_flag(header, "BinaryData"):
        unsupported.append("BinaryData")
    if unsupported:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"a MetaImage with an unsupported value of {', '.join(unsupported)}; write the file again",
        )


def _parse_layout(header: _Header) -> Layout:
    dimensions, sizes = _parse_number(header, "NDims"), _parse_numbers(header, "DimSize").tolist()
    if dimensions != len(sizes) or not all(size >= 1 and size == int(size) for size in sizes):
        raise ScanError(Reason.UNREADABLE, f"NDims is {dimensions:g}, DimSize {sizes}")
    if len(sizes) < 3 or math.prod(sizes[3:]) != 1:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"DimSize is {sizes}, expected three sizes; split a series of volumes into files",
        )
    code = _TYPES.get(header.get("ElementType", ""))
    if code is None:
        raise ScanError(Reason.UNSUPPORTED, "ElementType is not one of " + ", ".join(_TYPES))
    big = _parse_flag(header, "BinaryDataByteOrderMSB") or _parse_flag(header, "ElementByteOrderMSB")
    return Layout(np.dtype((">" if big else "<") + code), tuple(int(size) for size in sizes[2::-1]))


def _parse_affine(header: _Header) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in LPS mm, and a warning code if the orientation is an assumption."""
    count = int(_parse_number(header, "NDims"))
    spacing = _parse_numbers(header, "ElementSpacing" if "ElementSpacing" in header else "ElementSize", count)
    offset_key = next((key for key in _OFFSET_KEYS if key in header), None)
    matrix_key = next((key for key in _MATRIX_KEYS if key in header), None)
    affine = np.eye(4)
    if offset_key is not None:
        affine[:3, 3] = _parse_numbers(header, offset_key, count)[:3]
    if matrix_key is not None:
        affine[:3, :3] = _parse_numbers(header, matrix_key, count * count).reshape(count, count)[:3, :3].T
    if spacing[:3].min() <= 0 or np.abs(np.linalg.norm(affine[:3, :3], axis=0) - 1).max() > 1e-3:
        raise ScanError(
            Reason.UNREADABLE, "the spacing is not above 0, or a row of the matrix is not a unit vector"
        )
    affine[:, :3] *= spacing[:3]
    return affine, () if matrix_key is not None else (WarningCode.ORIENTATION_UNKNOWN.value,)


def _inflate(data: memoryview, header: _Header, layout: Layout) -> Buffer:
    """Return the uncompressed voxels, whose length is checked against the layout."""
    if _parse_flag(header, "CompressedData"):
        return inflate_zlib(data, layout.min_bytes, layout.max_bytes)
    check_length(data, layout)
    return data


def _parse_flag(header: _Header, key: str) -> bool:
    """Return the value of a True or False field; False if it is missing."""
    value = header.get(key, "False").lower()
    if value not in ("true", "false"):
        raise ScanError(Reason.UNREADABLE, f"{key} is neither True nor False")
    return value == "true"


def _parse_number(header: _Header, key: str, default: float | None = None) -> float:
    """Return the number in a field; `default` if the field is missing."""
    if key not in header and default is not None:
        return default
    return float(_parse_numbers(header, key, 1)[0])


def _parse_numbers(header: _Header, key: str, count: int | None = None) -> NDArray[Any]:
    """Return the finite numbers (count,) in a field; None accepts any count."""
    try:
        numbers = np.array([float(word) for word in header[key].split()], np.float64)
    except KeyError:
        raise ScanError(Reason.UNREADABLE, f"the MetaImage header lacks {key}") from None
    except ValueError:
        raise ScanError(Reason.UNREADABLE, f"{key} holds a value that is not a number") from None
    if len(numbers) != (count or len(numbers)) or not np.isfinite(numbers).all():
        raise ScanError(
            Reason.UNREADABLE, f"{key} holds {len(numbers)} numbers, expected {count} finite ones"
        )
    return numbers
