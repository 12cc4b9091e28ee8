"""DICOM bytes in, the raw values of a few elements and the place of the pixels out; knows no medicine.

Why not pydicom for this step: it returns without an error when a length in the header runs past
the end of the file, and takes several times as long. Here every length is compared with the bytes
at hand before it is used, nothing is copied but the values asked for, and why the walk ended is
part of the answer. Compressed frames, functional groups and text with a character set stay
pydicom's work. The encoding rules are those of DICOM PS3.5 section 7 and PS3.10 section 7.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from featray.ct.formats.inflate import inflate_raw

DEFLATED = "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"

PIXEL_DATA = 0x7FE00010
TRANSFER_SYNTAX = 0x00020010

MAX_HEADER_BYTES = 2**25
"""Bytes before the pixels; headers have some kB, those of large multi-frame files some MB."""

_UNDEFINED = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG_FORM = frozenset(
    {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
)
_SHORT_FORM = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # fmt: skip
_DEEPEST = 16


class End(Enum):
    """Why the walk through a file ended."""

    PIXELS = "pixel data"
    FLOAT_PIXELS = "pixel data of another kind: float or double"
    NO_PIXELS = "end of the file, exactly after an element"
    CUT = "an element runs past the end of the bytes at hand"
    MALFORMED = "no valid element where one must be"
    NOT_DICOM = "neither the DICM mark nor anything like DICOM elements"


_PIXELS = {PIXEL_DATA: End.PIXELS, 0x7FE00008: End.FLOAT_PIXELS, 0x7FE00009: End.FLOAT_PIXELS}


@dataclass(frozen=True, slots=True)
class Elements:
    """What a walk found.

    Attributes:
        values: Raw value bytes by tag (group << 16 | element), of the wanted tags that are there.
        transfer_syntax: UID from the file meta group; empty if there is none.
        little_endian: Byte order of `values` and of uncompressed pixels.
        end: Why the walk ended.
        data: The bytes that `pixel_start` counts in: the file's own, or the inflated data set.
        pixel_start: First byte of the pixel data's value.
        pixel_length: Its claimed length; None for undefined (encapsulated frames).
    """

    values: dict[int, bytes]
    transfer_syntax: str
    little_endian: bool
    end: End
    data: bytes
    pixel_start: int = 0
    pixel_length: int | None = None


def walk(data: bytes, wanted: frozenset[int], most: int = MAX_HEADER_BYTES) -> Elements:
    """Return the wanted top-level elements of a DICOM file, up to its pixel data.

    `data` may be the beginning of a file: then `End.CUT` says that more is needed. A deflated data
    set is inflated up to `most` bytes; its pixels may go on beyond. Never raises on bad bytes,
    except for a damaged deflate stream (`ScanError`, `unreadable`).
    """
    start = 132 if data[128:132] == b"DICM" else 0
    if start == 0 and not _looks_like_elements(data):
        return Elements({}, "", True, End.NOT_DICOM, data)
    values: dict[int, bytes] = {}
    meta = _Walk(data, "<", explicit=True)
    start, end = meta.run(start, wanted | {TRANSFER_SYNTAX}, values, only_group=2)
    syntax = text(values.get(TRANSFER_SYNTAX, b""))
    little = syntax != BIG_ENDIAN
    if end is not End.NO_PIXELS:
        return Elements(values, syntax, little, end, data)
    if syntax == DEFLATED:
        data, start = inflate_raw(data, start, most), 0
    body = _Walk(data, "<" if little else ">", _is_explicit(data, start))
    start, end = body.run(start, wanted, values)
    return Elements(values, syntax, little, end, data, start, body.pixel_length)


def text(value: bytes) -> str:
    """Return a value of plain characters (UID, code string, number) without its padding."""
    return value.decode("ascii", "replace").strip(" \0\t\r\n")


def fragments(elements: Elements) -> list[tuple[int, int]]:
    """Return start and length of each fragment of encapsulated pixels, the offset table first.

    Empty if the items do not end with their delimiter inside the data: cut or damaged.
    """
    data, position = elements.data, elements.pixel_start
    found: list[tuple[int, int]] = []
    while position + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, position)
        position += 8
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            return found
        if tag != _ITEM or position + length > len(data):
            return []
        found.append((position, length))
        position += length
    return []


def _looks_like_elements(data: bytes) -> bool:
    """Tell a file that lost its preamble: it starts with group 2 (file meta) or group 8."""
    if len(data) < 8:
        return False
    group, element, length = struct.unpack_from("<HHI", data)
    return group in (2, 8) and element <= 0x1030 and (_is_explicit(data, 0) or length <= 256)


def _is_explicit(data: bytes, start: int) -> bool:
    """Tell by the first element: right even where the transfer syntax is missing or wrong."""
    kind = data[start + 4 : start + 6]
    return kind in _SHORT_FORM or kind in _LONG_FORM


class _EndedError(Exception):
    """Leaves the nested loops of a walk; never leaves this module."""

    def __init__(self, end: End) -> None:
        self.end = end


class _Walk:
    """The loops over elements; state is the bytes, how to read them, and the pixel length found."""

    def __init__(self, data: bytes, order: str, explicit: bool) -> None:
        self._data = data
        self._size = len(data)
        self._explicit = explicit
        self._typed = struct.Struct(order + "HH2sH").unpack_from
        self._long = struct.Struct(order + "I").unpack_from
        self.pixel_length: int | None = None

    def run(
        self, start: int, wanted: frozenset[int], values: dict[int, bytes], only_group: int | None = None
    ) -> tuple[int, End]:
        """Fill `values` and return where and why the walk ended; `NO_PIXELS` also ends a group."""
        position = start
        try:
            while position < self._size:
                tag, value, length, explicit = self._element(position, self._explicit)
                if only_group is not None and tag >> 16 != only_group:
                    break
                if tag in _PIXELS:
                    self.pixel_length = None if length == _UNDEFINED else length
                    return value, _PIXELS[tag]
                if tag >> 16 == 0xFFFE:
                    raise _EndedError(End.MALFORMED)
                position = self._after(value, length, explicit, 0)
                if tag in wanted and length != _UNDEFINED:
                    values[tag] = self._data[value:position]
                elif tag in wanted:
                    values[tag] = b""
        except _EndedError as ended:
            return position, ended.end
        return position, End.NO_PIXELS

    def _element(self, position: int, explicit: bool) -> tuple[int, int, int, bool]:
        """Return tag, start of the value, its length, and whether what it holds is explicit."""
        if position + 8 > self._size:
            raise _EndedError(End.CUT)
        group, element, kind, length = self._typed(self._data, position)
        tag = group << 16 | element
        if explicit and kind in _LONG_FORM:
            if position + 12 > self._size:
                raise _EndedError(End.CUT)
            return tag, position + 12, self._long(self._data, position + 8)[0], kind != b"UN"
        if explicit and kind.isalpha() and kind.isupper():
            return tag, position + 8, length, True
        return tag, position + 8, self._long(self._data, position + 4)[0], explicit

    def _after(self, value: int, length: int, explicit: bool, depth: int) -> int:
        """Return the position after a value of `length`, which may be an undefined one."""
        if length == _UNDEFINED:
            return self._after_sequence(value, explicit, depth + 1)
        if value + length > self._size:
            raise _EndedError(End.CUT)
        return value + length

    def _after_sequence(self, position: int, explicit: bool, depth: int) -> int:
        while True:
            tag, position, length, _ = self._element(position, explicit=False)
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM or depth > _DEEPEST:
                raise _EndedError(End.MALFORMED)
            if length == _UNDEFINED:
                position = self._after_item(position, explicit, depth)
            else:
                position = self._after(position, length, explicit, depth)

    def _after_item(self, position: int, explicit: bool, depth: int) -> int:
        while True:
            tag, position, length, inside = self._element(position, explicit)
            if tag == _ITEM_END:
                return position
            position = self._after(position, length, inside, depth)
