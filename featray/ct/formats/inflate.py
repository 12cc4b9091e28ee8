"""Inflate gzip, zlib and raw deflate streams, and never return more bytes than the caller allows.

libdeflate is the fastest library, but it reads only one gzip member, needs the exact inflated size in advance
and does not report why it failed. It is therefore tried first. If it does not return exactly the expected
bytes, zlib inflates the data again in bounded pieces and finds the reason. This module must not know any
image format.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import deflate

from featray.errors import Reason, ScanError

GZIP_MAGIC = b"\x1f\x8b"

MAX_RATIO = 1032
"""Largest ratio of inflated to compressed size: deflate encodes at most 258 bytes in 2 bits.

A header that claims more bytes than that is wrong, or the file is cut off.
"""

_FIRST_PIECE, _MAX_PIECE = 2**10, 2**18
"""Bytes passed to zlib in the first step and, later, at most in one step.

The first step is small because zlib copies all bytes that follow the end of a member.
"""

_LIBDEFLATE_LIMIT = 2**32
"""Sizes from here on are not supported: the `deflate` package passes the size as a C unsigned int."""

Buffer = bytes | memoryview


def inflate_gzip_head(data: bytes, count: int) -> bytes:
    """Return the first `count` inflated bytes of a gzip file, or fewer if the stream ends or is cut earlier.

    Raises:
        ScanError: `unreadable`, if the stream is damaged within these bytes.
    """
    return bytes(_inflate_members(data, count)[0])


def inflate_gzip(data: Buffer, expected: int, most: int) -> bytearray:
    """Return the inflated bytes of all members of a gzip file.

    All checksums are verified. Bytes after the last member that are not gzip are ignored, as in the gzip
    program.

    Args:
        data: The whole gzip file.
        expected: Smallest accepted number of inflated bytes.
        most: Largest accepted number of inflated bytes.

    Raises:
        ScanError: `truncated`, if the stream is cut or holds fewer than `expected` bytes; `unreadable`, if it
            is damaged, a checksum is wrong, or it holds more than `most` bytes.
    """
    _check_expected_size(data, expected)
    whole = _try_libdeflate(deflate.gzip_decompress, data, expected)
    if whole is not None and int.from_bytes(data[-4:], "little") == expected:
        return whole  # the data end with the size field of the first member, so no member follows
    inflated, is_complete = _inflate_members(data, most + 1)
    _check_size(inflated, expected, most, is_complete=is_complete)
    return inflated


def inflate_zlib(data: Buffer, expected: int, most: int) -> bytearray:
    """Return the inflated bytes of one zlib stream; arguments and errors are those of `inflate_gzip`."""
    _check_expected_size(data, expected)
    whole = _try_libdeflate(deflate.zlib_decompress, data, expected)
    if whole is not None:
        return whole
    inflated = bytearray()
    used = _append_stream(memoryview(data), inflated, most + 1, zlib.MAX_WBITS)
    _check_size(inflated, expected, most, is_complete=used is not None)
    return inflated


def inflate_raw(data: bytes, start: int, most: int) -> bytes:
    """Return at most `most` bytes, inflated from the raw deflate stream that begins at byte `start`.

    A stream that is cut off is not an error.

    Raises:
        ScanError: `unreadable`, if the stream is damaged within these bytes.
    """
    return _inflate_piece(zlib.decompressobj(wbits=-15), data[start:], most)


def _check_expected_size(data: Buffer, expected: int) -> None:
    if expected > MAX_RATIO * len(data):
        raise ScanError(
            Reason.TRUNCATED,
            f"the header claims {expected} bytes, but {len(data)} compressed bytes cannot hold them; "
            "copy the file again",
        )


def _try_libdeflate(
    inflate: Callable[[Buffer, int], bytearray], data: Buffer, expected: int
) -> bytearray | None:
    """Return the inflated bytes; None if libdeflate fails or does not return exactly `expected` bytes."""
    if not 0 < expected < _LIBDEFLATE_LIMIT:
        return None
    try:
        inflated = inflate(data, expected)
    except deflate.DeflateError:
        return None  # cut, damaged, larger than expected, or several members: zlib finds the reason
    return inflated if len(inflated) == expected else None


def _check_size(inflated: bytearray, expected: int, most: int, *, is_complete: bool) -> None:
    """Raise a ScanError unless the stream is complete and holds `expected` to `most` bytes."""
    if len(inflated) > most:
        raise ScanError(
            Reason.UNREADABLE,
            f"the compressed data hold more than the {expected} bytes that the header accounts for",
        )
    if not is_complete or len(inflated) < expected:
        raise ScanError(
            Reason.TRUNCATED,
            f"expected {expected} inflated bytes, got {len(inflated)}; copy the file again",
        )


def _inflate_members(data: Buffer, most: int) -> tuple[bytearray, bool]:
    """Return at most `most` inflated bytes of all gzip members, and whether every member is complete."""
    inflated = bytearray()
    rest = memoryview(data)
    while bytes(rest[:2]) == GZIP_MAGIC:
        used = _append_stream(rest, inflated, most, zlib.MAX_WBITS | 16)
        if used is None:
            return inflated, False
        rest = rest[used:]
    return inflated, True


def _append_stream(data: memoryview, inflated: bytearray, most: int, wbits: int) -> int | None:
    """Inflate one stream and append it to `inflated`, which grows to at most `most` bytes.

    Return the number of bytes of `data` that belong to the stream, or None if its end was not reached.
    `wbits` selects gzip or zlib as in `zlib.decompressobj`.
    """
    inflater = zlib.decompressobj(wbits)
    for start, piece in _split(data):
        inflated += _inflate_piece(inflater, piece, most - len(inflated))
        if inflater.eof:
            return start + len(piece) - len(inflater.unused_data)
        if len(inflated) >= most:
            return None
    return None


def _split(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the position and the bytes of pieces whose size doubles up to `_MAX_PIECE`."""
    start, size = 0, _FIRST_PIECE
    while start < len(data):
        yield start, data[start : start + size]
        start, size = start + size, min(2 * size, _MAX_PIECE)


def _inflate_piece(inflater: zlib._Decompress, data: bytes | memoryview, most: int) -> bytes:
    """Return the inflated bytes of `data`, at most `most`; no bytes if `most` is 0 or negative."""
    if most <= 0:
        return b""
    try:
        return inflater.decompress(data, most)
    except zlib.error as error:
        raise ScanError(Reason.UNREADABLE, f"damaged compressed data ({error})") from None
