"""A compressed frame in, what its own headers say of it out, or why no decoder may see it.

Decoders in C trust these headers: a damaged precision or marker makes GDCM write past its buffers and
takes the process with it. So every marker segment is walked and held against the DICOM header first, and
the coded data must run unbroken to the end marker. Formats: ISO 10918-1 B.2 (JPEG), ISO 14495-1 C.2
(JPEG-LS), ISO 15444-1 A.4 to A.6 (JPEG 2000, HTJ2K). Damage inside coded data keeps its length and
cannot be seen here.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_EOI, _SOS, _DHT, _LSE = 0xD9, 0xDA, 0xC4, 0xF8
_OF_FRAME = {0xC0, 0xC1, 0xC3, 0xF7}  # baseline, extended, lossless, JPEG-LS
_BEFORE_SCAN = _OF_FRAME | {_DHT, _LSE, 0xCC, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)}
_BROKEN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_BROKEN_LS_SCAN = re.compile(rb"\xff[\x80-\xff]")

_SOC_SIZ, _SOT, _EOC = b"\xff\x4f\xff\x51", 0x90, b"\xff\xd9"
_JP2_BOX = b"\0\0\0\x0cjP  "
_MAIN_HEADER = {0x50, 0x52, 0x53, 0x55, 0x56, 0x57, 0x59, 0x5C, 0x5D, 0x5E, 0x5F, 0x60, 0x63, 0x64}

CUT = "the compressed image lacks its end marker"


class BadStreamError(Exception):
    """Why a frame is not decoded; `cut` tells an end that is missing from other damage."""

    def __init__(self, message: str, cut: bool = False) -> None:
        super().__init__(message)
        self.cut = cut


@dataclass(frozen=True)
class CodeStream:
    """What a frame says of itself.

    Attributes:
        process: Which JPEG: the second byte of its frame marker, e.g. 0xC3; 0x51 for JPEG 2000.
        rows: Of the matrix.
        columns: Of the matrix.
        bits: Per value.
    """

    process: int
    rows: int
    columns: int
    bits: int


def parse(encoded: bytes) -> CodeStream:
    """Return what a JPEG, JPEG-LS or JPEG 2000 frame of one component states.

    Raises:
        BadStreamError: It is neither, or its structure is damaged.
    """
    if encoded.startswith(b"\xff\xd8"):
        return _jpeg(encoded)
    start = encoded.find(_SOC_SIZ) if encoded.startswith(_JP2_BOX) else 0
    if start < 0 or not encoded.startswith(_SOC_SIZ, start):
        raise BadStreamError("not in compressed form")
    return _jpeg2000(encoded, start)


def _jpeg(encoded: bytes) -> CodeStream:
    frame, kind_of_frame = b"", 0
    kind, position = 0, 2
    while kind != _SOS:
        kind, segment, position = _segment(encoded, position)
        if kind in _OF_FRAME and not frame:
            frame, kind_of_frame = segment, kind
        elif kind == _DHT:
            _check_huffman(segment)
        elif kind != _SOS and (kind not in _BEFORE_SCAN or kind in _OF_FRAME):
            raise BadStreamError("damaged compressed image")
    if len(frame) != 9 or frame[5] != 1 or len(segment) != 6 or segment[0] != 1 or segment[1] != frame[6]:
        raise BadStreamError("the compressed image has more than one component, or is damaged")
    if kind_of_frame == 0xC3 and (not 1 <= segment[3] <= 7 or segment[5]):
        raise BadStreamError("the compressed image has a predictor that there is not, or is damaged")
    broken = _BROKEN_LS_SCAN if kind_of_frame == 0xF7 else _BROKEN_SCAN
    _check_scan(encoded, position, broken)
    bits, rows, columns = struct.unpack_from(">BHH", frame)
    return CodeStream(kind_of_frame, rows, columns, bits)


def _segment(encoded: bytes, position: int) -> tuple[int, bytes, int]:
    """Return marker, content and end of the marker segment at `position`; fill bytes may come first."""
    while encoded[position : position + 2] == b"\xff\xff":
        position += 1
    if position + 4 > len(encoded):
        raise BadStreamError(CUT, cut=True)
    start, kind, length = struct.unpack_from(">BBH", encoded, position)
    end = position + 2 + length
    if start != 0xFF or length < 2:
        raise BadStreamError("damaged compressed image")
    if end > len(encoded):
        raise BadStreamError(CUT, cut=True)
    return kind, encoded[position + 4 : end], end


def _check_huffman(segment: bytes) -> None:
    """Check that tables fill their segment and that no code is longer than it can be."""
    position = 0
    while position < len(segment):
        counts = segment[position + 1 : position + 17]
        room = sum(count << (16 - bits) for bits, count in enumerate(counts, 1))
        if len(counts) < 16 or room > 2**16 or sum(counts) > 256:
            raise BadStreamError("damaged compressed image")
        position += 17 + sum(counts)
    if position != len(segment):
        raise BadStreamError("damaged compressed image")


def _check_scan(encoded: bytes, start: int, broken: re.Pattern[bytes]) -> None:
    """Check that coded data run without a foreign marker to the end marker and nothing follows."""
    found = broken.search(encoded, start)
    if found is None:
        raise BadStreamError(CUT, cut=True)
    if encoded[found.start() + 1] != _EOI or encoded[found.end() :].strip(b"\0\xff"):
        raise BadStreamError("damaged compressed image")


def _jpeg2000(encoded: bytes, start: int) -> CodeStream:
    kind, size, position = _segment(encoded, start + 2)
    if len(size) != 39:
        raise BadStreamError("the compressed image has more than one component, or is damaged")
    right, bottom, left, top, *tile = struct.unpack_from(">8I", size, 2)
    components, precision, step_x, step_y = struct.unpack_from(">HBBB", size, 34)
    if components != 1 or (step_x, step_y) != (1, 1) or not all(tile[:2]) or left >= right or top >= bottom:
        raise BadStreamError("the compressed image has more than one component, or is damaged")
    while encoded[position + 1 : position + 2] != bytes([_SOT]):
        kind, _, position = _segment(encoded, position)
        if kind not in _MAIN_HEADER:
            raise BadStreamError("damaged compressed image")
    _check_tile_parts(encoded, position)
    return CodeStream(0x51, bottom - top, right - left, (precision & 0x7F) + 1)


def _check_tile_parts(encoded: bytes, position: int) -> None:
    """Check that the lengths of all tile-parts add up to the end marker."""
    while not encoded.startswith(_EOC, position):
        if not encoded[position:].strip(b"\0"):
            raise BadStreamError(CUT, cut=True)
        kind, part, _ = _segment(encoded, position)
        if kind != _SOT or len(part) != 8:
            raise BadStreamError("damaged compressed image")
        length = int.from_bytes(part[2:6], "big")
        if length == 0:  # the last one, up to the end marker
            length = len(encoded.rstrip(b"\0")) - 2 - position
        if length < 14:
            raise BadStreamError("damaged compressed image")
        position += length
        if position + 2 > len(encoded):
            raise BadStreamError(CUT, cut=True)
    if encoded[position + 2 :].strip(b"\0\xff"):
        raise BadStreamError("damaged compressed image")
