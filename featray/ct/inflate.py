"""Deflate streams in, never more bytes out than the caller allows; knows neither NIfTI nor DICOM.

libdeflate is the fastest inflater on offer but sees one gzip member, wants the exact size and does
not say why it failed. So it is tried first, and whatever it cannot vouch for goes the careful way,
through zlib in bounded pieces, which also finds the reason.
"""

from __future__ import annotations

import zlib

import deflate

from featray.errors import Reason, ScanError

GZIP_MAGIC = b"\x1f\x8b"

MAX_RATIO = 1032
"""Deflate cannot expand further (258 bytes from 2 bits), so a smaller file cannot hold the claim."""

_PIECE = 2**18
_LIBDEFLATE_LIMIT = 2**32  # `deflate` takes the size as a C unsigned int and wraps silently


def gzip_head(data: bytes, count: int) -> bytes:
    """Return the first `count` inflated bytes, or fewer if the stream ends or is cut before.

    Raises:
        ScanError: `unreadable` if this is not a deflate stream.
    """
    return bytes(_inflate_members(data, count)[0])


def gunzip(data: bytes, expected: int, most: int) -> bytearray:
    """Return the inflated bytes of all gzip members: at least `expected`, at most `most`.

    Checksums are always verified. Bytes after the last member that are not gzip are ignored, as
    gzip itself does: what was asked for is there and verified.

    Raises:
        ScanError: `truncated` if the stream is cut or holds less than `expected`; `unreadable` if
            it is damaged, its checksum is wrong, or it holds more than `most`.
    """
    if expected > MAX_RATIO * len(data):
        raise ScanError(
            Reason.TRUNCATED,
            f"the header claims {expected} bytes, a gzip file of {len(data)} bytes cannot hold them",
        )
    whole = _at_once(data, expected)
    return whole if whole is not None else _by_members(data, expected, most)


def inflate_raw(data: bytes, start: int, most: int) -> bytes:
    """Return at most `most` bytes inflated from a raw deflate stream at `start`, cut or not.

    Raises:
        ScanError: `unreadable` if this is not a deflate stream.
    """
    return _pieces(zlib.decompressobj(wbits=-15), data[start:], most)


def _at_once(data: bytes, expected: int) -> bytearray | None:
    if not 0 < expected < _LIBDEFLATE_LIMIT:
        return None
    try:
        inflated: bytearray = deflate.gzip_decompress(data, expected)
    except deflate.DeflateError:
        return None  # cut, damaged, larger, or several members: the careful way tells
    ends_here = int.from_bytes(data[-4:], "little") == len(inflated)
    return inflated if ends_here and len(inflated) == expected else None


def _by_members(data: bytes, expected: int, most: int) -> bytearray:
    inflated, ended = _inflate_members(data, most + 1)
    if len(inflated) > most:
        raise ScanError(
            Reason.UNREADABLE, f"the gzip stream holds more than the {expected} bytes its header accounts for"
        )
    if not ended or len(inflated) < expected:
        raise ScanError(
            Reason.TRUNCATED,
            f"expected {expected} inflated bytes, got {len(inflated)}; copy the file again",
        )
    return inflated


def _inflate_members(data: bytes, most: int) -> tuple[bytearray, bool]:
    """Return at most `most` bytes of all gzip members, and whether every member came to its end."""
    inflated = bytearray()
    rest = memoryview(data)
    while bytes(rest[:2]) == GZIP_MAGIC:
        used = _append_member(rest, inflated, most)
        if used is None:
            return inflated, False
        rest = rest[used:]
    return inflated, True


def _append_member(data: memoryview, inflated: bytearray, most: int) -> int | None:
    """Inflate one member onto `inflated`; return the bytes of `data` it took, None if it did not end."""
    inflater = zlib.decompressobj(wbits=31)
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        inflated += _pieces(inflater, piece, most - len(inflated))
        if inflater.eof:
            return start + len(piece) - len(inflater.unused_data)
        if len(inflated) >= most:
            return None
    return None


def _pieces(inflater: zlib._Decompress, data: bytes | memoryview, most: int) -> bytes:
    """Return what `data` inflates to, at most `most` bytes (0 or fewer: nothing)."""
    if most <= 0:
        return b""
    try:
        return inflater.decompress(data, most)
    except zlib.error as error:
        raise ScanError(Reason.UNREADABLE, f"damaged compressed data ({error})") from None
