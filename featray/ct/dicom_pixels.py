"""One slice's header and bytes in, its stored pixel values out; knows nothing of HU or other slices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom_elements import BIG_ENDIAN, DEFLATED, Elements
from featray.ct.dicom_headers import SliceHeader
from featray.errors import Reason, ScanError

NATIVE = frozenset({"", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN})


def check_format(header: SliceHeader) -> None:
    """Raise ScanError (`unsupported`, `unreadable`) unless the pixels are plain grey numbers.

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
    if header.modality_lut:
        raise ScanError(Reason.UNSUPPORTED, f"{header.base}: a table instead of slope and intercept")


def stored_values(header: SliceHeader, elements: Elements, frame: int = 0) -> NDArray[Any]:
    """Return the stored values of one frame, axes (y, x), before slope and intercept.

    The dtype is the file's (8, 16 or 32 bit, signed or not, either byte order); bits above
    `bits_stored` are cleared or, for signed values, filled with the sign. May be a read-only view.

    Raises:
        ScanError: `truncated`, `unreadable` or `unsupported`.
    """
    if header.transfer_syntax in NATIVE:
        return _without_unused_bits(_native(header, elements, frame), header)
    from featray.ct.dicom_compressed import decoded  # pydicom takes 0.3 s to import; most CT needs none

    return _without_unused_bits(decoded(header, elements, frame), header)


def _native(header: SliceHeader, elements: Elements, frame: int) -> NDArray[Any]:
    order, kind = "<" if elements.little_endian else ">", "i" if header.signed else "u"
    dtype = np.dtype(f"{order}{kind}{header.bits_allocated // 8}")
    pixels = header.rows * header.columns
    expected = pixels * header.frames * dtype.itemsize
    length = elements.pixel_length
    if length is None:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: the pixels are in compressed form, the transfer syntax says they are not",
        )
    if elements.pixel_start + length > len(elements.data) or length < expected:
        present = min(length, len(elements.data) - elements.pixel_start)
        raise ScanError(
            Reason.TRUNCATED,
            f"{header.base}: expected {expected} bytes of pixels, got {present}; copy the file again",
        )
    if length - expected >= header.columns * dtype.itemsize:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: {length} bytes of pixels, rows and columns account for {expected}",
        )
    start = elements.pixel_start + frame * pixels * dtype.itemsize
    return np.frombuffer(elements.data, dtype, pixels, start).reshape(header.rows, header.columns)


def _without_unused_bits(values: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    unused = header.bits_allocated - header.bits_stored
    if not unused:
        return values
    if header.signed:
        return (values << unused) >> unused
    highest = 2**header.bits_stored - 1
    return values & values.dtype.type(highest) if values.max() > highest else values
