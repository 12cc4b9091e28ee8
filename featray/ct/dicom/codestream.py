"""Read size and precision from the headers of one compressed frame; reject a frame with damaged structure.

Decoders written in C trust these headers. A damaged precision or marker makes GDCM write past its buffers,
which crashes the process. Therefore this module checks every marker segment before a decoder runs, and checks
that the coded data continue without interruption to the end marker. Damage inside the coded data that does
not change their length cannot be detected here.

Formats: ISO 10918-1 B.2 (JPEG), ISO 14495-1 C.2 (JPEG-LS), ISO 15444-1 A.4 to A.6 (JPEG 2000, HTJ2K).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

SOF_BASELINE, SOF_EXTENDED, SOF_LOSSLESS, SOF_JPEG_LS = 0xC0, 0xC1, 0xC3, 0xF7
"""Second byte of the start-of-frame (SOF) marker; it names the coding process of a JPEG or JPEG-LS frame."""

SIZ = 0x51
"""Second byte of the SIZ marker, the first segment of a JPEG 2000 or HTJ2K codestream."""

_EOI, _SOS, _DHT, _LSE = 0xD9, 0xDA, 0xC4, 0xF8
_SOF_MARKERS = {SOF_BASELINE, SOF_EXTENDED, SOF_LOSSLESS, SOF_JPEG_LS}
_MARKERS_BEFORE_SCAN = _SOF_MARKERS | {_DHT, _LSE, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""In coded JPEG data a byte FF may only be followed by a stuffed 00, a restart marker or a fill byte FF."""

_MARKER_IN_LS_SCAN = re.compile(rb"\xff[\x80-\xff]")
"""In coded JPEG-LS data a byte FF is followed by a byte whose highest bit is 0."""

_SOC_SIZ, _SOT, _EOC = b"\xff\x4f\xff\x51", 0x90, b"\xff\xd9"
_JP2_SIGNATURE_BOX = b"\0\0\0\x0cjP  "
_J2K_MAIN_HEADER_MARKERS = {
    *(0x50, 0x52, 0x53, 0x55, 0x56, 0x57, 0x59),
    *(0x5C, 0x5D, 0x5E, 0x5F, 0x60, 0x63, 0x64),
}

_TRUNCATED = "the compressed image has no end marker"
_DAMAGED = "damaged compressed image"
_SEVERAL_COMPONENTS = "the compressed image has more than one component, or is damaged"


class InvalidCodestreamError(Exception):
    """A frame must not be passed to a decoder.

    `is_truncated` is true if the end of the frame is missing, false for other damage.
    """

    def __init__(self, message: str, *, is_truncated: bool = False) -> None:
        super().__init__(message)
        self.is_truncated = is_truncated


@dataclass(frozen=True)
class Codestream:
    """Properties of a frame according to its own headers.

    Attributes:
        coding: Coding process: second byte of the SOF marker (JPEG, JPEG-LS), or `SIZ` (JPEG 2000, HTJ2K).
        rows: Number of rows.
        columns: Number of columns.
        precision: Bits per value.
        size: Bytes from the start of the frame to the end of its end marker, without padding.
    """

    coding: int
    rows: int
    columns: int
    precision: int
    size: int


def parse_codestream(encoded: bytes) -> Codestream:
    """Return the properties of a JPEG, JPEG-LS, JPEG 2000 or HTJ2K frame with one component.

    Raises:
        InvalidCodestreamError: The frame has none of these formats, or its structure is damaged.
    """
    if encoded.startswith(b"\xff\xd8"):
        return _parse_jpeg(encoded)
    start = encoded.find(_SOC_SIZ) if encoded.startswith(_JP2_SIGNATURE_BOX) else 0
    if start < 0 or not encoded.startswith(_SOC_SIZ, start):
        raise InvalidCodestreamError("the compressed image is not JPEG, JPEG-LS or JPEG 2000, or is damaged")
    return _parse_jpeg2000(encoded, start)


def _parse_jpeg(encoded: bytes) -> Codestream:
    frame, coding = b"", 0
    marker, position = 0, 2
    while marker != _SOS:
        marker, segment, position = _read_segment(encoded, position)
        if marker in _SOF_MARKERS and not frame:
            frame, coding = segment, marker
        elif marker == _DHT:
            _check_huffman_tables(segment)
        elif marker != _SOS and (marker not in _MARKERS_BEFORE_SCAN or marker in _SOF_MARKERS):
            raise InvalidCodestreamError(_DAMAGED)
    if len(frame) != 9 or frame[5] != 1 or len(segment) != 6 or segment[0] != 1 or segment[1] != frame[6]:
        raise InvalidCodestreamError(_SEVERAL_COMPONENTS)
    if coding == SOF_LOSSLESS and (not 1 <= segment[3] <= 7 or segment[5]):
        raise InvalidCodestreamError("the compressed image has an undefined predictor, or is damaged")
    size = _check_scan(encoded, position, _MARKER_IN_LS_SCAN if coding == SOF_JPEG_LS else _MARKER_IN_SCAN)
    precision, rows, columns = struct.unpack_from(">BHH", frame)
    return Codestream(coding, rows, columns, precision, size)


def _read_segment(encoded: bytes, position: int) -> tuple[int, bytes, int]:
    """Return marker, content and end offset of the marker segment at `position`, after any fill bytes."""
    while encoded[position : position + 2] == b"\xff\xff":
        position += 1
    if position + 4 > len(encoded):
        raise InvalidCodestreamError(_TRUNCATED, is_truncated=True)
    start, marker, length = struct.unpack_from(">BBH", encoded, position)
    end = position + 2 + length
    if start != 0xFF or length < 2:
        raise InvalidCodestreamError(_DAMAGED)
    if end > len(encoded):
        raise InvalidCodestreamError(_TRUNCATED, is_truncated=True)
    return marker, encoded[position + 4 : end], end


def _check_huffman_tables(segment: bytes) -> None:
    """Raise unless the tables fill their segment exactly and each table is a valid prefix code."""
    position = 0
    while position < len(segment):
        code_counts = segment[position + 1 : position + 17]
        code_space = sum(count << (16 - bits) for bits, count in enumerate(code_counts, 1))
        if len(code_counts) < 16 or code_space > 2**16 or sum(code_counts) > 256:
            raise InvalidCodestreamError(_DAMAGED)
        position += 17 + sum(code_counts)
    if position != len(segment):
        raise InvalidCodestreamError(_DAMAGED)


def _check_scan(encoded: bytes, start: int, marker: re.Pattern[bytes]) -> int:
    """Return the end of the end marker; raise unless it is the first marker and only padding follows it."""
    match = marker.search(encoded, start)
    if match is None:
        raise InvalidCodestreamError(_TRUNCATED, is_truncated=True)
    if encoded[match.start() + 1] != _EOI or not _is_padding(encoded[match.end() :]):
        raise InvalidCodestreamError(_DAMAGED)
    return match.end()


def _is_padding(rest: bytes) -> bool:
    """Return whether bytes after an end marker are padding: 00 and FF, after at most one byte of any value.

    Frames have an even length. Some archives take the byte that makes them even from other memory.
    """
    return not rest[1:].strip(b"\0\xff")


def _parse_jpeg2000(encoded: bytes, start: int) -> Codestream:
    _, size, position = _read_segment(encoded, start + 2)
    if len(size) != 39:
        raise InvalidCodestreamError(_SEVERAL_COMPONENTS)
    right, bottom, left, top, *tile = struct.unpack_from(">8I", size, 2)
    components, precision, step_x, step_y = struct.unpack_from(">HBBB", size, 34)
    if components != 1 or (step_x, step_y) != (1, 1) or not all(tile[:2]) or left >= right or top >= bottom:
        raise InvalidCodestreamError(_SEVERAL_COMPONENTS)
    while encoded[position + 1 : position + 2] != bytes([_SOT]):
        marker, _, position = _read_segment(encoded, position)
        if marker not in _J2K_MAIN_HEADER_MARKERS:
            raise InvalidCodestreamError(_DAMAGED)
    end = _check_tile_parts(encoded, position)
    return Codestream(SIZ, bottom - top, right - left, (precision & 0x7F) + 1, end)


def _check_tile_parts(encoded: bytes, position: int) -> int:
    """Return the end of the end marker; raise unless the lengths of all tile-parts add up to its position."""
    while not encoded.startswith(_EOC, position):
        if not encoded[position:].strip(b"\0"):
            raise InvalidCodestreamError(_TRUNCATED, is_truncated=True)
        marker, tile_part, _ = _read_segment(encoded, position)
        if marker != _SOT or len(tile_part) != 8:
            raise InvalidCodestreamError(_DAMAGED)
        length = int.from_bytes(tile_part[2:6], "big")
        if length == 0:  # allowed for the last tile-part, which extends to the end marker
            length = _find_last_end_marker(encoded) - position
        if length < 14:
            raise InvalidCodestreamError(_DAMAGED)
        position += length
        if position + 2 > len(encoded):
            raise InvalidCodestreamError(_TRUNCATED, is_truncated=True)
    if not _is_padding(encoded[position + 2 :]):
        raise InvalidCodestreamError(_DAMAGED)
    return position + 2


def _find_last_end_marker(encoded: bytes) -> int:
    """Return the offset of the end marker, before any padding; raise if it is missing."""
    end = len(encoded.rstrip(b"\0"))
    start = encoded.rfind(_EOC, max(0, end - 3), end)
    if start < 0:
        raise InvalidCodestreamError(_TRUNCATED, is_truncated=True)
    return start
