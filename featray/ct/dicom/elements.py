"""Parse the bytes of a DICOM file: the raw values of requested elements and the position of the pixel data.

Interprets neither values nor images. The encoding rules are those of DICOM PS3.5 section 7 (data elements)
and PS3.10 section 7.1 (file meta information).

pydicom is not used for this step. It reports no error when a length in the header runs past the end of the
file, and it takes several times as long. This parser compares every length with the bytes available before
using it, copies only the requested values, and returns the reason why parsing ended. pydicom still handles
compressed frames, functional groups and text with a character set.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

from featray.ct.formats.inflate import inflate_raw

DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax UID: the data set after the file meta information is one raw deflate stream."""

BIG_ENDIAN = "1.2.840.10008.1.2.2"
"""Transfer syntax UID of Explicit VR Big Endian (retired, still found in archives)."""

PIXEL_DATA = 0x7FE00010
TRANSFER_SYNTAX = 0x00020010

MAX_HEADER_BYTES = 2**25
"""Limit of the bytes before the pixel data. Headers take a few kB, in large multi-frame files a few MB."""

_UNDEFINED_LENGTH = 0xFFFFFFFF
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_DELIMITER_GROUP = 0xFFFE
_META_GROUP = 2
_ODD_GROUP = 1 << 16
_LONG_FORM_VRS = frozenset(
    {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
)
"""Value representations with a 32-bit length after two reserved bytes (PS3.5 section 7.1.2)."""

_SHORT_FORM_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # fmt: skip
_MAX_SEQUENCE_DEPTH = 16


class ParseEnd(Enum):
    """Why parsing of a file ended."""

    PIXELS = "reached PixelData"
    FLOAT_PIXELS = "reached FloatPixelData or DoubleFloatPixelData"
    NO_PIXELS = "reached the end of the file, exactly after an element"
    CUT = "an element runs past the end of the available bytes"
    MALFORMED = "found no valid element where one must begin"
    NOT_DICOM = "found neither the DICM prefix nor bytes that look like DICOM elements"


_PIXEL_ENDS = {
    PIXEL_DATA: ParseEnd.PIXELS,
    0x7FE00008: ParseEnd.FLOAT_PIXELS,
    0x7FE00009: ParseEnd.FLOAT_PIXELS,
}


@dataclass(frozen=True, slots=True)
class Elements:
    """The requested elements of one file and the position of its pixel data.

    Attributes:
        values: Raw value bytes by tag (group << 16 | element) of the requested elements that are present.
        transfer_syntax: TransferSyntaxUID from the file meta information; empty if it is missing.
        little_endian: Byte order of `values` and of uncompressed pixels.
        end: Why parsing ended.
        data: The bytes into which `pixel_start` is an offset: those of the file, or the inflated data set.
        pixel_start: Offset of the first byte of the pixel data value.
        pixel_length: Length of the pixel data as the header claims it; None for undefined length, which
            means encapsulated (compressed) frames.
        private_tag: Tag of the longest private element, 0 without one.
        private_length: Bytes of that element.
    """

    values: dict[int, bytes]
    transfer_syntax: str
    little_endian: bool
    end: ParseEnd
    data: bytes
    pixel_start: int = 0
    pixel_length: int | None = None
    private_tag: int = 0
    private_length: int = 0


def parse_elements(data: bytes, wanted: frozenset[int], max_inflated: int = MAX_HEADER_BYTES) -> Elements:
    """Return the requested top-level elements of a DICOM file, up to its pixel data.

    Args:
        data: The content of the file, or its beginning. `ParseEnd.CUT` says that more bytes are needed.
        wanted: Tags (group << 16 | element) whose values are returned.
        max_inflated: Bytes to inflate at most if the data set is deflated. The pixel data may continue
            after them.

    Raises:
        ScanError: `unreadable` if the deflate stream is damaged. Other damage is reported in `Elements.end`.
    """
    start = 132 if data[128:132] == b"DICM" else 0
    if start == 0 and not _looks_like_dicom(data):
        return Elements({}, "", little_endian=True, end=ParseEnd.NOT_DICOM, data=data)
    values: dict[int, bytes] = {}
    meta = _ElementParser(data, "<", explicit=True)
    start, end = meta.parse(start, wanted | {TRANSFER_SYNTAX}, values, only_group=_META_GROUP)
    syntax = decode_text(values.get(TRANSFER_SYNTAX, b""))
    is_little = syntax != BIG_ENDIAN
    if end is not ParseEnd.NO_PIXELS:
        return Elements(values, syntax, is_little, end, data)
    if syntax == DEFLATED:
        data, start = inflate_raw(data, start, max_inflated), 0
    body = _ElementParser(data, "<" if is_little else ">", explicit=_has_explicit_vr(data, start))
    start, end = body.parse(start, wanted, values)
    private_length, private_tag = body.longest_private
    return Elements(
        values, syntax, is_little, end, data, start, body.pixel_length, private_tag, private_length
    )


def decode_text(value: bytes) -> str:
    """Return a value of plain ASCII (UID, code string or number) without its padding."""
    return value.decode("ascii", "replace").strip(" \0\t\r\n")


def find_fragments(elements: Elements) -> list[tuple[int, int]]:
    """Return offset and length of each item of encapsulated pixel data; the first is the offset table.

    The list is empty if the sequence delimitation item is missing because the data are cut or damaged
    (PS3.5 section A.4).
    """
    data, position = elements.data, elements.pixel_start
    fragments: list[tuple[int, int]] = []
    while position + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, position)
        position += 8
        tag = group << 16 | element
        if tag == _SEQUENCE_END:
            return fragments
        if tag != _ITEM or position + length > len(data):
            return []
        fragments.append((position, length))
        position += length
    return []


def _looks_like_dicom(data: bytes) -> bool:
    """Return whether a file without DICM prefix starts with an element of group 2 (file meta) or group 8."""
    if len(data) < 8:
        return False
    group, element, length = struct.unpack_from("<HHI", data)
    return group in (2, 8) and element <= 0x1030 and (_has_explicit_vr(data, 0) or length <= 256)


def _has_explicit_vr(data: bytes, start: int) -> bool:
    """Return whether the element at `start` names its value representation (VR).

    The element itself is checked because the transfer syntax may be missing or wrong.
    """
    vr = data[start + 4 : start + 6]
    return vr in _SHORT_FORM_VRS or vr in _LONG_FORM_VRS


class _ParseEndError(Exception):
    """End parsing from inside nested loops; `_ElementParser.parse` catches it."""

    def __init__(self, end: ParseEnd) -> None:
        self.end = end


class _ElementParser:
    """Steps from element to element through one data set.

    Holds the bytes and their encoding. After `parse` it also holds the claimed length of the pixel data, and
    the length and tag of the longest private element (of an odd group).
    """

    def __init__(self, data: bytes, byte_order: str, *, explicit: bool) -> None:
        self._data = data
        self._size = len(data)
        self._explicit = explicit
        self._unpack_short = struct.Struct(byte_order + "HH2sH").unpack_from
        self._unpack_length = struct.Struct(byte_order + "I").unpack_from
        self.pixel_length: int | None = None
        self.longest_private = (0, 0)

    def parse(
        self, start: int, wanted: frozenset[int], values: dict[int, bytes], only_group: int | None = None
    ) -> tuple[int, ParseEnd]:
        """Store the wanted values in `values`; return the offset at which parsing ended, and why.

        With `only_group`, `ParseEnd.NO_PIXELS` also means that an element of another group follows.
        """
        position = start
        try:
            while position < self._size:
                tag, value, length, explicit = self._read_element_header(position, explicit=self._explicit)
                if only_group is not None and tag >> 16 != only_group:
                    break
                if tag in _PIXEL_ENDS:
                    self.pixel_length = None if length == _UNDEFINED_LENGTH else length
                    return value, _PIXEL_ENDS[tag]
                if tag >> 16 == _DELIMITER_GROUP:
                    raise _ParseEndError(ParseEnd.MALFORMED)
                position = self._skip_value(value, length, 0, explicit=explicit)
                if tag & _ODD_GROUP and position - value > self.longest_private[0]:
                    self.longest_private = position - value, tag
                if tag in wanted and length != _UNDEFINED_LENGTH:
                    values[tag] = self._data[value:position]
                elif tag in wanted:
                    values[tag] = b""
        except _ParseEndError as ended:
            return position, ended.end
        return position, ParseEnd.NO_PIXELS

    def _read_element_header(self, position: int, *, explicit: bool) -> tuple[int, int, int, bool]:
        """Return tag, offset of the value, its length, and whether elements inside it have explicit VR."""
        if position + 8 > self._size:
            raise _ParseEndError(ParseEnd.CUT)
        group, element, vr, length = self._unpack_short(self._data, position)
        tag = group << 16 | element
        if explicit and vr in _LONG_FORM_VRS:
            if position + 12 > self._size:
                raise _ParseEndError(ParseEnd.CUT)
            return tag, position + 12, self._unpack_length(self._data, position + 8)[0], vr != b"UN"
        if explicit and vr.isalpha() and vr.isupper():
            return tag, position + 8, length, True
        return tag, position + 8, self._unpack_length(self._data, position + 4)[0], explicit

    def _skip_value(self, value: int, length: int, depth: int, *, explicit: bool) -> int:
        """Return the offset after a value that starts at `value`; its length may be undefined."""
        if length == _UNDEFINED_LENGTH:
            return self._skip_sequence(value, depth + 1, explicit=explicit)
        if value + length > self._size:
            raise _ParseEndError(ParseEnd.CUT)
        return value + length

    def _skip_sequence(self, position: int, depth: int, *, explicit: bool) -> int:
        """Return the offset after a sequence of undefined length whose first item is at `position`."""
        while True:
            tag, position, length, _ = self._read_element_header(position, explicit=False)
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM or depth > _MAX_SEQUENCE_DEPTH:
                raise _ParseEndError(ParseEnd.MALFORMED)
            if length == _UNDEFINED_LENGTH:
                position = self._skip_item(position, depth, explicit=explicit)
            else:
                position = self._skip_value(position, length, depth, explicit=explicit)

    def _skip_item(self, position: int, depth: int, *, explicit: bool) -> int:
        """Return the offset after an item of undefined length whose first element is at `position`."""
        while True:
            tag, position, length, is_explicit = self._read_element_header(position, explicit=explicit)
            if tag == _ITEM_END:
                return position
            position = self._skip_value(position, length, depth, explicit=is_explicit)
