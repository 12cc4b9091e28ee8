"""Read the bytes of one NRRD file, or of a detached header (.nhdr) and its data files: a checked `Volume`.

pynrrd parses the header. The data are inflated here, and never beyond the size that the header states.
Conventions:

- The encodings are raw and gzip; others are `unsupported`.
- A detached header names one data file, a LIST or a pattern (`data file: name%03d.raw 1 40 1`), with line
  skip and byte skip; see `detached`. In a .nrrd file, skips are `unsupported`.
- The spaces RAS, LAS and LPS are converted to LPS. Other spaces, or a missing space, do not relate the axes
  to the patient; the axes are then assumed to be LPS, as in ITK, with the warning `orientation_unknown`.
- Without `space directions`, `spacings` are the steps along the axes of the space, in `units`.
- An axis does not lie in space if its direction is `none`, its spacing NaN, or its kind one such as time,
  list or vector. It is dropped if it has one sample. If one such axis has more samples and is the first or
  the last axis, the caller may choose one of the volumes, as in a 4-D NIfTI file, unless the kind says that
  the samples are parts of one value (a color, a vector). Other files are `not_a_volume`.
- NRRD has no slope and no intercept: the stored values are assumed to be HU.

This module must not know paths or storage.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import nrrd
import numpy as np
from nrrd.errors import NRRDError
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
from featray.ct.formats.inflate import inflate_gzip
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
from featray.ct.geometry import Affine, compute_spacing_zyx
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
_INT64 = ("int64", "int64_t")
_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "signed long long int", *_INT64),
    "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
"""Names of the types in NRRD, by NumPy's code."""

_SPACE_KINDS = ("domain", "space", "none", "???", "")
"""Kinds of axes that may lie in space; the kind of an axis may also be unknown."""

_VOLUME_KINDS = ("time", "list", "none", "???", "", "stub", "scalar")
"""Kinds of axes outside of space along which whole volumes follow each other."""

_SKIPS = (("line skip", "lineskip"), ("byte skip", "byteskip"))
_DATA_FILE = re.compile(rb"^data ?file:(?!=)[ \t]*([^\r\n]*)(?:\r?\n)?", re.MULTILINE)


def read_nrrd(
    data: bytes,
    data_files: DataFiles = (),
    *,
    max_voxels: int,
    volume_index: int | None = None,
    keep_shear: bool = False,
) -> Volume:
    """Return the volume of an NRRD file; `data_files` are the files that a detached header names.

    The voxels, the arguments and the errors are those of `featray.ct.formats.nifti.read_nifti`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    header, names, start = _parse_header(data)
    sizes = _parse_sizes(header)
    axes = _find_space_axes(header, sizes)
    layout = choose_volume(_make_layout(header, sizes, axes), volume_index)
    check_layout(layout, max_voxels)
    affine, warnings = _parse_affine(header, axes)
    with np.errstate(all="ignore"):  # check_geometry reports values that are not finite
        spacing = compute_spacing_zyx(affine)
    check_units(spacing, layout.shape_zyx, _parse_mm_per_unit(header, axes), "space units")
    warnings += check_geometry(affine, keep_shear=keep_shear)
    if layout.volume_count > 1:
        warnings += (Reason.NOT_A_VOLUME.value,)
    parts = match_data_files(names, data_files, ".nhdr") if names else [memoryview(data)[start:]]
    skips = _parse_skips(header) if names else (0, 0)
    content = join_parts(parts, layout, functools.partial(_inflate, header, skips))
    return Volume(decode_voxels(content, layout), affine, warnings=warnings)


def list_nrrd_data_files(data: bytes) -> tuple[str, ...]:
    """Return the names of the data files that a header names; none if the file holds its data itself.

    Args:
        data: Content of the file, or its first `MAX_HEADER_BYTES`.

    Raises:
        ScanError: The header is damaged, or names files that must not be read.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    return _parse_header(data)[1]


def _parse_header(data: bytes) -> tuple[dict[str, Any], tuple[str, ...], int]:
    """Return the fields, as pynrrd converts them, the data files, and the position of the data."""
    if not data.startswith(b"NRRD"):
        raise ScanError(Reason.UNREADABLE, "not NRRD: the file does not begin with NRRD")
    end = re.compile(rb"\r?\n\r?\n").search(data, 0, MAX_HEADER_BYTES)
    text = data[: MAX_HEADER_BYTES if end is None else end.start()]
    data_file = _DATA_FILE.search(text)
    if end is None and data_file is None:  # a detached header needs no blank line at its end
        raise ScanError(Reason.TRUNCATED, "the NRRD header has no end; copy the file again")
    names: tuple[str, ...] = ()
    if data_file is not None:
        rest = text[data_file.end() :]
        names = _parse_data_files(data_file[1].decode("utf-8", "surrogateescape").strip(), rest)
        is_list = data_file[1].startswith(b"LIST")  # the list is the end of the header
        text = text[: data_file.start()] + (b"" if is_list else rest)
    lines = [line.decode("latin-1") for line in text.splitlines()]
    try:
        with np.errstate(all="raise"):
            header = dict(nrrd.read_header(lines))
    except (NRRDError, ValueError, IndexError, ArithmeticError) as error:
        raise ScanError(
            Reason.UNREADABLE, f"the NRRD header cannot be parsed ({type(error).__name__})"
        ) from None
    _check_supported(header, is_detached=bool(names))
    return header, names, 0 if end is None else end.end()


def _parse_data_files(value: str, rest: bytes) -> tuple[str, ...]:
    """Return the names in the field `data file`; `rest` is the text of the header after it."""
    listed = parse_list(value, rest)
    if listed is not None:
        return listed
    pattern, numbers = split_pattern(value)
    if pattern and len(numbers) in (3, 4):  # the fourth is the number of axes of each file
        return check_names(expand_pattern(pattern, *numbers[:3]))
    return check_names([value])


def _check_supported(header: Mapping[str, Any], *, is_detached: bool) -> None:
    missing = [name for name in ("type", "dimension", "sizes", "encoding") if name not in header]
    if missing:
        raise ScanError(Reason.UNREADABLE, f"the NRRD header lacks {', '.join(missing)}")
    if any(_parse_skips(header)) and not is_detached:
        raise ScanError(
            Reason.UNSUPPORTED, "NRRD with line skip or byte skip; write the file again without them"
        )
    space = str(header.get("space", "")).lower()
    if space in ("rast", "last", "lpst") or space.endswith("-time"):
        raise ScanError(
            Reason.NOT_A_VOLUME, "the space of the file has a time axis; split the series into files"
        )


def _parse_skips(header: Mapping[str, Any]) -> tuple[int, int]:
    """Return line skip and byte skip."""
    lines, count = (next((int(header[name]) for name in names if name in header), 0) for names in _SKIPS)
    if lines < 0 or count < -1:
        raise ScanError(Reason.UNREADABLE, f"line skip is {lines}, byte skip {count}")
    return lines, count


def _parse_sizes(header: Mapping[str, Any]) -> list[int]:
    sizes = [int(size) for size in header["sizes"]]
    if header["dimension"] != len(sizes) or min(sizes) < 1:
        raise ScanError(Reason.UNREADABLE, f"dimension is {header['dimension']}, sizes are {sizes}")
    return sizes


def _make_layout(header: Mapping[str, Any], sizes: list[int], axes: list[int]) -> Layout:
    """Return the layout of all volumes; `axes` are the indices of the axes in space."""
    others = [axis for axis, size in enumerate(sizes) if size > 1 and axis not in axes]
    kinds = _get_kinds(header, len(sizes))
    is_series = len(axes) == 3 and len(others) == 1 and kinds[others[0]] in _VOLUME_KINDS
    is_first, is_last = is_series and others[0] < min(axes), is_series and others[0] > max(axes)
    if len(axes) != 3 or (others and not (is_first or is_last)):
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"sizes are {sizes}, of which {len(axes)} axes lie in space{_describe_kinds(header)}; expected "
            "three, and at most one further axis (time, list), which must be the first or the last",
        )
    shape_zyx = tuple(sizes[axis] for axis in reversed(axes))
    count = math.prod(sizes[axis] for axis in others)
    return Layout(_parse_dtype(header), shape_zyx, volume_count=count, is_interleaved=is_first)


def _describe_kinds(header: Mapping[str, Any]) -> str:
    kinds = [kind for kind in header.get("kinds", []) if re.fullmatch(r"[A-Za-z0-9?-]{1,20}", kind)]
    return f" (kinds {' '.join(kinds[:8])})" if kinds else ""


def _get_kinds(header: Mapping[str, Any], count: int) -> list[str]:
    """Return the kind of each axis in lower case; empty texts if the header does not state all kinds."""
    kinds = [str(kind).lower() for kind in header.get("kinds", [])]
    return kinds if len(kinds) == count else [""] * count


def _find_space_axes(header: Mapping[str, Any], sizes: list[int]) -> list[int]:
    """Return the indices of the axes that lie in space.

    Further axes with one sample are left out if the header does not say which three axes lie in space.
    """
    kinds = _get_kinds(header, len(sizes))
    directions, spacings = header.get("space directions"), header.get("spacings", ())
    axes = [axis for axis, kind in enumerate(kinds) if kind in _SPACE_KINDS]
    if directions is not None and len(directions) == len(sizes):
        axes = [axis for axis in axes if not _is_outside_space(directions[axis])]
    elif directions is None and len(spacings) == len(sizes):
        axes = [axis for axis in axes if math.isfinite(spacings[axis])]
    return [axis for number, axis in enumerate(axes) if number < 3 or sizes[axis] > 1]


def _is_outside_space(direction: Any) -> bool:
    """Return whether the header states that an axis with this `space directions` entry has no direction."""
    return direction is None or bool(np.isnan(direction).all())


def _parse_dtype(header: Mapping[str, Any]) -> np.dtype[Any]:
    code = next((code for code, names in _TYPES.items() if header["type"].lower() in names), None)
    if code is None:
        raise ScanError(Reason.UNSUPPORTED, f"NRRD type {header['type']!r:.40}, expected numbers")
    orders = {"little": "<", "big": ">"}
    if code[1] != "1" and header.get("endian") not in orders:
        raise ScanError(Reason.UNREADABLE, "the NRRD header lacks endian")
    return np.dtype(orders.get(header.get("endian", "little"), "<") + code)


def _parse_affine(header: Mapping[str, Any], axes: list[int]) -> tuple[Affine, tuple[str, ...]]:
    """Return the affine in LPS mm of the axes in space, and a warning code if the frame is an assumption."""
    to_lps = _SPACE_TO_LPS.get(str(header.get("space", "")).lower())
    affine = np.eye(4)
    affine[:3, :3] = _parse_directions(header, axes).T
    affine[:3, 3] = _convert_vectors([header.get("space origin", np.zeros(3))], 1)[0]
    affine[:3] *= _parse_mm_per_unit(header, axes)
    if to_lps is None:
        return affine, (WarningCode.ORIENTATION_UNKNOWN.value,)
    affine[:3] *= np.array(to_lps)[:, None]
    return affine, ()


def _parse_directions(header: Mapping[str, Any], axes: list[int]) -> NDArray[np.float64]:
    """Return the steps (3, 3) from voxel to voxel in the space of the file, one row per axis in space."""
    directions = header.get("space directions")
    if directions is not None:
        if len(directions) == header["dimension"]:
            directions = [directions[axis] for axis in axes]
        return _convert_vectors([item for item in directions if not _is_outside_space(item)], 3)
    spacings = list(header.get("spacings", ()))
    if len(spacings) == header["dimension"]:
        spacings = [spacings[axis] for axis in axes]
    if len(spacings) != 3 or not np.isfinite(spacings).all():
        raise ScanError(Reason.UNREADABLE, "the NRRD header has neither space directions nor three spacings")
    return np.diag(np.abs(np.array(spacings, np.float64)))


def _convert_vectors(vectors: list[Any], count: int) -> NDArray[np.float64]:
    """Return `count` vectors as an array (count, 3)."""
    if len(vectors) != count or any(np.shape(vector) != (3,) for vector in vectors):
        raise ScanError(Reason.UNREADABLE, f"expected {count} vectors of three numbers in space")
    return np.array(vectors, np.float64)


def _parse_mm_per_unit(header: Mapping[str, Any], axes: list[int]) -> float:
    """Return the number of mm in a unit of the file's space; mm if the header names no unit.

    `space units` belong to `space directions`, and `units`, one per axis, to `spacings`.
    """
    units = header.get("space units", [])
    if "space directions" not in header and not units:
        units = header.get("units", [])
        units = [units[axis] for axis in axes] if len(units) == header["dimension"] else units
    known = {unit.lower() for unit in units if unit} or {""}
    unit = known.pop()
    if known or unit not in _MM_PER_UNIT:
        raise ScanError(Reason.UNSUPPORTED, "unknown space units; write the file again in mm")
    return _MM_PER_UNIT[unit]


def _inflate(
    header: Mapping[str, Any], skips: tuple[int, int], data: memoryview, least: int, most: int
) -> Buffer:
    """Return the uncompressed voxels of one file, whose number of bytes is checked.

    Line skip counts lines of the file, byte skip counts bytes of the uncompressed data after these lines; -1
    stands for everything before the last `least` bytes, and belongs to raw data only.
    """
    encoding = header["encoding"].lower()
    lines, count = skips
    data = data[_find_line(bytes(data), lines) :] if lines else data
    if encoding in ("gzip", "gz") and count >= 0:
        return memoryview(inflate_gzip(data, count + least, count + most))[count:]
    if encoding != "raw":
        raise ScanError(
            Reason.UNSUPPORTED, f"NRRD encoding {encoding!r:.40}, expected raw or gzip (without byte skip -1)"
        )
    if count == -1:
        count = max(0, len(data) - least)
    data = data[count:]
    check_length(data, least, most)
    return data


def _find_line(data: bytes, lines: int) -> int:
    """Return the position after a number of lines."""
    position = 0
    for _ in range(lines):
        position = data.find(b"\n", position) + 1
        if not position:
            raise ScanError(Reason.TRUNCATED, f"the data file has fewer lines than line skip ({lines})")
    return position
