"""Deflate streams in, never more bytes out than the caller allows; knows neither NIfTI nor DICOM.

libdeflate is the fastest inflater on offer but sees one gzip member, wants the exact size and does
not say why it failed. So it is tried first, and whatever it cannot vouch for goes the careful way,
through zlib in bounded pieces, which also finds the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import deflate

from featray.errors import Reason, ScanError

GZIP_MAGIC = b"\x1f\x8b"

MAX_RATIO = 1032
"""Deflate cannot expand further (258 bytes from 2 bits), so a smaller file cannot hold the claim."""

_FIRST_PIECE, _PIECE = 2**10, 2**18
"""Small at first, for what lies behind the end of a short member is copied with it."""

_LIBDEFLATE_LIMIT = 2**32
"""`deflate` takes the size as a C unsigned int and wraps silently."""

Buffer = bytes | memoryview


def inflate_gzip_head(data: bytes, count: int) -> bytes:
    """Return the first `count` inflated bytes, or fewer if the stream ends or is cut before.

    Raises:
        ScanError: `unreadable` if this is not a deflate stream.
    """
    return bytes(_inflate_members(data, count)[0])


def inflate_gzip(data: Buffer, expected: int, most: int) -> bytearray:
    """Return the inflated bytes of all gzip members: at least `expected`, at most `most`.

    Checksums are always verified. Bytes after the last member that are not gzip are ignored, as
    gzip itself does: what was asked for is there and verified.

    Raises:
        ScanError: `truncated` if the stream is cut or holds less than `expected`; `unreadable` if
            it is damaged, its checksum is wrong, or it holds more than `most`.
    """
    _check_claim(data, expected)
    whole = _at_once(deflate.gzip_decompress, data, expected)
    if whole is not None and int.from_bytes(data[-4:], "little") == expected:
        return whole  # the one member's size field ends the data: nothing comes behind it
    return _fitting(*_inflate_members(data, most + 1), expected, most)


def inflate_zlib(data: Buffer, expected: int, most: int) -> bytearray:
    """Return the inflated bytes of one zlib stream, otherwise as `inflate_gzip`."""
    _check_claim(data, expected)
    whole = _at_once(deflate.zlib_decompress, data, expected)
    if whole is not None:
        return whole
    inflated = bytearray()
    used = _append_stream(memoryview(data), inflated, most + 1, zlib.MAX_WBITS)
    return _fitting(inflated, used is not None, expected, most)


def inflate_raw(data: bytes, start: int, most: int) -> bytes:
    """Return at most `most` bytes inflated from a raw deflate stream at `start`, cut or not.

    Raises:
        ScanError: `unreadable` if this is not a deflate stream.
    """
    return _pieces(zlib.decompressobj(wbits=-15), data[start:], most)


def _check_claim(data: Buffer, expected: int) -> None:
    if expected > MAX_RATIO * len(data):
        raise ScanError(
            Reason.TRUNCATED,
            f"the header claims {expected} bytes, {len(data)} compressed bytes cannot hold them",
        )


def _at_once(inflate: Callable[[Buffer, int], bytearray], data: Buffer, expected: int) -> bytearray | None:
    if not 0 < expected < _LIBDEFLATE_LIMIT:
        return None
    try:
        inflated = inflate(data, expected)
    except deflate.DeflateError:
        return None  # cut, damaged, larger, or several members: the careful way tells
    return inflated if len(inflated) == expected else None


def _fitting(inflated: bytearray, ended: bool, expected: int, most: int) -> bytearray:
    if len(inflated) > most:
        raise ScanError(
            Reason.UNREADABLE,
            f"the compressed data hold more than the {expected} bytes that the header accounts for",
        )
    if not ended or len(inflated) < expected:
        raise ScanError(
            Reason.TRUNCATED,
            f"expected {expected} inflated bytes, got {len(inflated)}; copy the file again",
        )
    return inflated


def _inflate_members(data: Buffer, most: int) -> tuple[bytearray, bool]:
    """Return at most `most` bytes of all gzip members, and whether every member came to its end."""
    inflated = bytearray()
    rest = memoryview(data)
    while bytes(rest[:2]) == GZIP_MAGIC:
        used = _append_stream(rest, inflated, most, zlib.MAX_WBITS | 16)
        if used is None:
            return inflated, False
        rest = rest[used:]
    return inflated, True


def _append_stream(data: memoryview, inflated: bytearray, most: int, wbits: int) -> int | None:
    """Inflate one stream onto `inflated`; return the bytes of `data` it took, None if it did not end."""
    inflater = zlib.decompressobj(wbits)
    for start, piece in _growing_pieces(data):
        inflated += _pieces(inflater, piece, most - len(inflated))
        if inflater.eof:
            return start + len(piece) - len(inflater.unused_data)
        if len(inflated) >= most:
            return None
    return None


def _growing_pieces(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    start, size = 0, _FIRST_PIECE
    while start < len(data):
        yield start, data[start : start + size]
        start, size = start + size, min(2 * size, _PIECE)


def _pieces(inflater: zlib._Decompress, data: bytes | memoryview, most: int) -> bytes:
    """Return what `data` inflates to, at most `most` bytes (0 or fewer: nothing)."""
    if most <= 0:
        return b""
    try:
        return inflater.decompress(data, most)
    except zlib.error as error:
        raise ScanError(Reason.UNREADABLE, f"damaged compressed data ({error})") from None
