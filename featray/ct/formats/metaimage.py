"""Read the bytes of one MetaImage (.mha), or of a header (.mhd) and its data files: a checked `Volume`.

The file begins with lines `Key = Value`, of which ElementDataFile is the last. Then the voxels follow, or the
names of files that hold them, uncompressed or as one zlib or gzip stream per file. Conventions:

- ElementDataFile is LOCAL, the name of a file, LIST with one name per line after it, or a pattern such as
  `name%03d.raw 1 40 1` (first, last, step), one file per slice; see `detached`. HeaderSize bytes of a data
  file are skipped; -1 stands for everything before the voxels.
- The data must be binary, as they are without BinaryData, and hold one value per voxel. Other files are
  `unsupported`.
- The last of four axes enumerates volumes, of which the caller may choose one, as in a 4-D NIfTI file.
- MET_LONG has 4 bytes and MET_LONG_LONG 8, as in ITK.
- Offset, TransformMatrix (one voxel axis per row) and ElementSpacing are LPS and mm, as in ITK.
  AnatomicalOrientation repeats the matrix in letters and is not used. Without a matrix the axes are assumed
  to be LPS, with the warning `orientation_unknown`.
- A slope or intercept (ElementToIntensityFunction…) other than 1 and 0 is `unsupported`. ITK ignores both, so
  it is unknown which values were meant.

This module must not know paths or storage.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct.formats.detached import (
    DataFiles,
    check_names,
    expand_pattern,
    join_parts,
    match_data_files,
    parse_list,
    split_pattern,
)
from featray.ct.formats.inflate import GZIP_MAGIC, inflate_gzip, inflate_zlib
from featray.ct.formats.voxel_data import (
    Buffer,
    Layout,
    check_geometry,
    check_layout,
    check_length,
    choose_volume,
    decode_voxels,
)
from featray.ct.geometry import Affine
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode

MAX_HEADER_BYTES = 2**18
"""Largest accepted header; real ones have about 15 lines, and some thousand with a LIST of data files."""

_LAST_LINE = re.compile(rb"\nElementDataFile[ \t]*=[^\n]*(\n|\Z)")
_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_ONLY_VALUES = {"ElementToIntensityFunctionOffset": 0, "ElementToIntensityFunctionSlope": 1}
"""The only supported value of some fields, which is also their default."""

_MATRIX_KEYS = ("TransformMatrix", "Rotation", "Orientation")
_BYTE_ORDER_KEYS = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
_OFFSET_KEYS = ("Offset", "Position", "Origin")

_Header = dict[str, str]


def read_metaimage(
    data: bytes,
    data_files: DataFiles = (),
    *,
    max_voxels: int,
    volume_index: int | None = None,
    keep_shear: bool = False,
) -> Volume:
    """Return the volume of a MetaImage file; `data_files` are the files that ElementDataFile names.

    The voxels, the arguments and the errors are those of `featray.ct.formats.nifti.read_nifti`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header, start = _parse_header(data)
    names = _parse_data_files(header, data[start:MAX_HEADER_BYTES])
    _check_supported(header, is_detached=bool(names))
    layout = choose_volume(_parse_layout(header), volume_index)
    check_layout(layout, max_voxels)
    affine, warnings = _parse_affine(header)
    warnings += check_geometry(affine, keep_shear=keep_shear)
    if layout.volume_count > 1:
        warnings += (Reason.NOT_A_VOLUME.value,)
    parts = match_data_files(names, data_files, ".mhd") if names else [memoryview(data)[start:]]
    content = join_parts(parts, layout, functools.partial(_inflate, header))
    return Volume(decode_voxels(content, layout), affine, warnings=warnings)


def list_metaimage_data_files(data: bytes) -> tuple[str, ...]:
    """Return the names of the data files of a header; none if the file holds its data itself.

    Args:
        data: Content of the file, or its first `MAX_HEADER_BYTES`.

    Raises:
        ScanError: The header is damaged, or names files that must not be read.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header, start = _parse_header(data)
    return _parse_data_files(header, data[start:MAX_HEADER_BYTES])


def _parse_header(data: bytes) -> tuple[_Header, int]:
    """Return the fields by key, and the position of the first byte of the data."""
    text = data[:MAX_HEADER_BYTES]
    if not text.startswith((b"ObjectType", b"Comment", b"NDims")):
        raise ScanError(Reason.UNREADABLE, "not MetaImage: the file does not begin with ObjectType")
    last = _LAST_LINE.search(text)
    if last is None:
        raise ScanError(Reason.TRUNCATED, "the MetaImage header has no end; copy the file again")
    header: _Header = {}
    for line in text[: last.end()].rstrip(b"\n").decode("utf-8", "surrogateescape").split("\n"):
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals or key in header:
            raise ScanError(
                Reason.UNREADABLE, "a line of the MetaImage header is not Key = Value, or repeats a key"
            )
        header[key] = value
    return header, last.end()


def _parse_data_files(header: _Header, rest: bytes) -> tuple[str, ...]:
    """Return the names of the data files; none for LOCAL. `rest` is the text after the header."""
    value = header["ElementDataFile"]
    if value.upper() == "LOCAL":
        return ()
    listed = parse_list(value, rest)
    if listed is not None:
        return listed
    pattern, numbers = split_pattern(value)
    if not pattern or len(numbers) > 3:
        return check_names([value])
    count = int(_parse_numbers(header, "DimSize")[-1])
    first, last, step = numbers + [1, (numbers or [1])[0] + count - 1, 1][len(numbers) :]
    return check_names(expand_pattern(pattern, first, last, step))


def _check_supported(header: _Header, *, is_detached: bool) -> None:
    unsupported = [] if header.get("ElementNumberOfChannels", "1") == "1" else ["ElementNumberOfChannels"]
    unsupported += [key for key, value in _ONLY_VALUES.items() if _parse_number(header, key, value) != value]
    header_size = _parse_number(header, "HeaderSize", 0)
    is_skip_possible = is_detached and not _parse_flag(header, "CompressedData") and header_size >= -1
    if header_size != 0 and not (is_skip_possible and header_size.is_integer()):
        unsupported.append("HeaderSize")
    if header.get("DistanceUnits", "mm") not in ("mm", "?"):
        unsupported.append("DistanceUnits")
    if header.get("ObjectType", "Image").lower() != "image":
        unsupported.append("ObjectType")
    if not _parse_flag(header, "BinaryData", default=True):
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
    if len(sizes) < 3 or math.prod(sizes[4:]) != 1:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"DimSize is {sizes}, expected three sizes; split a series of volumes into files",
        )
    code = _TYPES.get(header.get("ElementType", ""))
    if code is None:
        raise ScanError(Reason.UNSUPPORTED, "ElementType is not one of " + ", ".join(_TYPES))
    orders = {_parse_flag(header, key) for key in _BYTE_ORDER_KEYS if key in header}
    if len(orders) > 1:
        raise ScanError(Reason.UNREADABLE, f"{' and '.join(_BYTE_ORDER_KEYS)} contradict each other")
    big = orders == {True}
    shape_zyx = tuple(int(size) for size in sizes[2::-1])
    return Layout(np.dtype((">" if big else "<") + code), shape_zyx, volume_count=int(math.prod(sizes[3:4])))


def _parse_affine(header: _Header) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in LPS mm, and a warning code if the orientation is an assumption."""
    count = int(_parse_number(header, "NDims"))
    is_size_alone = "ElementSize" in header and "ElementSpacing" not in header
    spacing = _parse_numbers(header, "ElementSize" if is_size_alone else "ElementSpacing", count)
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


def _inflate(header: _Header, data: memoryview, least: int, most: int) -> Buffer:
    """Return the uncompressed voxels of one file, whose number of bytes is checked."""
    if _parse_flag(header, "CompressedData"):
        inflate = inflate_gzip if bytes(data[:2]) == GZIP_MAGIC else inflate_zlib
        return inflate(data, least, most)
    skip = int(_parse_number(header, "HeaderSize", 0))
    if skip == -1:
        skip = max(0, len(data) - least)
    data = data[skip:]
    check_length(data, least, most)
    return data


def _parse_flag(header: _Header, key: str, *, default: bool = False) -> bool:
    """Return the value of a True or False field; `default` if it is missing."""
    value = header.get(key, str(default)).lower()
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
    if not len(numbers) or len(numbers) != (count or len(numbers)) or not np.isfinite(numbers).all():
        expected = "one or more" if count is None else count
        raise ScanError(
            Reason.UNREADABLE,
            f"{key} holds {len(numbers)} numbers, expected {expected}, all of them finite",
        )
    return numbers
