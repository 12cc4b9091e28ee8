"""One slice's header and bytes in, its stored pixel values out; knows nothing of HU or other slices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.elements import BIG_ENDIAN, DEFLATED, Elements
from featray.ct.dicom.header import SliceHeader
from featray.ct.formats.inflate import MAX_RATIO
from featray.errors import Reason, ScanError

NATIVE = frozenset({"", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN})

MOST_PACKED, ALWAYS_HELD = 10_000, 2**20
"""Decoded bytes for each compressed one, and for any file: a blank image compresses by 1000."""

_LOSSY = (".4.50", ".4.51", ".4.81", ".4.91", ".4.203")


def check_format(header: SliceHeader) -> None:
    """Raise ScanError (`unsupported`, `unreadable`) unless pixels are plain grey numbers with a place.

    MONOCHROME1 is accepted: it turns the display around, not the stored values.
    """
    if header.rows < 2 or header.columns < 2:
        raise ScanError(Reason.UNREADABLE, f"{header.base}: {header.rows} rows x {header.columns} columns")
    grey = header.photometric in ("", "MONOCHROME1", "MONOCHROME2") and header.samples == 1
    if not grey or header.bits_allocated not in (8, 16, 32):
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{header.base}: {header.samples} sample(s) of {header.bits_allocated} bits, "
            "expected grey of 8, 16 or 32",
        )
    if not 1 <= header.bits_stored <= header.bits_allocated or header.high_bit != header.bits_stored - 1:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{header.base}: {header.bits_stored} bits stored up to bit {header.high_bit} "
            f"of {header.bits_allocated}",
        )
    if header.frames > 1 and not header.functional_groups:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{header.base}: {header.frames} frames without positions; split it into slices",
        )
    if header.modality_lut:
        raise ScanError(Reason.UNSUPPORTED, f"{header.base}: a table instead of slope and intercept")


def check_size(header: SliceHeader, elements: Elements, file_size: int) -> None:
    """Raise ScanError unless the file can hold the pixels its header claims; allocates nothing."""
    expected = header.rows * header.columns * header.frames * header.bits_allocated // 8
    length = elements.pixel_length
    if header.transfer_syntax not in NATIVE:
        if expected > file_size * MOST_PACKED + ALWAYS_HELD:
            raise ScanError(
                Reason.UNREADABLE, f"{header.base}: {file_size} bytes cannot hold the {expected} it claims"
            )
        return
    if length is None:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: the pixels are in compressed form, the transfer syntax says they are not",
        )
    deflated = header.transfer_syntax == DEFLATED
    held = file_size * MAX_RATIO if deflated else len(elements.data) - elements.pixel_start
    if min(length, held) < expected or (length > held and not deflated):
        raise ScanError(
            Reason.TRUNCATED,
            f"{header.base}: expected {expected} bytes of pixels, got {min(length, held)}; "
            "copy the file again",
        )


def stored_values(header: SliceHeader, elements: Elements, frame: int = 0) -> NDArray[Any]:
    """Return the stored values of one frame, axes (y, x), before slope and intercept.

    The dtype is the file's (8, 16 or 32 bit, signed or not, either byte order); bits above `bits_stored`
    are cleared or, for signed values, filled with the sign. May be a read-only view.

    Padding that careless software wrote as a negative number where all are unsigned (63536 for -2000)
    keeps the meaning it had, in a signed type: as it stands it would be the brightest of all.

    Raises:
        ScanError: `truncated`, `unreadable` or `unsupported`.
    """
    if header.transfer_syntax in NATIVE:
        raw = _native(header, elements, frame)
        values = _without_unused_bits(raw, header)
    else:
        from featray.ct.dicom.decompress import decoded  # pydicom takes 0.3 s to import; most CT needs none

        raw = decoded(header, elements, frame)
        values = _within_bits(raw, header)
    return _with_padding(values, raw, header)


def _native(header: SliceHeader, elements: Elements, frame: int) -> NDArray[Any]:
    order, kind = "<" if elements.little_endian else ">", "i" if header.signed else "u"
    dtype = np.dtype(f"{order}{kind}{header.bits_allocated // 8}")
    pixels = header.rows * header.columns
    start = elements.pixel_start + frame * pixels * dtype.itemsize
    if start + pixels * dtype.itemsize > len(elements.data):
        raise ScanError(Reason.TRUNCATED, f"{header.base}: the pixels end too early; copy the file again")
    unaccounted = (elements.pixel_length or 0) - pixels * header.frames * dtype.itemsize
    if unaccounted >= header.columns * dtype.itemsize:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: {unaccounted} bytes of pixels more than rows and columns account for",
        )
    return np.frombuffer(elements.data, dtype, pixels, start).reshape(header.rows, header.columns)


def _without_unused_bits(values: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    unused = header.bits_allocated - header.bits_stored
    if not unused:
        return values
    if header.signed:
        return (values << unused) >> unused
    highest = 2**header.bits_stored - 1
    return values & values.dtype.type(highest) if values.max() > highest else values


def _within_bits(values: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    """Return decoded values with their sign; codecs keep no overlays, so what needs more bits is wrong.

    Lossy ones may overshoot a little and are clipped. Codecs without signs give negative values as
    large ones.
    """
    unused = 8 * values.itemsize - header.bits_stored
    highest, lowest = 2**header.bits_stored - 1, -(2 ** (header.bits_stored - 1)) if header.signed else 0
    if unused <= 0 or (values.min() >= lowest and values.max() <= highest):
        return (values << unused) >> unused if header.signed and unused > 0 else values
    if header.transfer_syntax.endswith(_LOSSY):
        clipped: NDArray[Any] = np.clip(values, lowest, highest >> int(header.signed))
        return clipped
    if header.padding is not None and header.padding > highest:
        return _without_unused_bits(values, header)
    raise ScanError(
        Reason.UNREADABLE,
        f"{header.base}: decoded values need more than {header.bits_stored} bits (damaged?)",
    )


def _with_padding(values: NDArray[Any], raw: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    """Return the values with padding that only makes sense as a negative number made one."""
    padding = header.padding
    if padding is None or header.signed or raw.itemsize != 2 or padding < 2**15:
        return values
    padded = raw == padding
    if not padded.any():
        return values
    return np.where(padded, padding - 2**16, values.astype(np.int32))
