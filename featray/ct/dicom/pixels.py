"""Read the stored pixel values of the frames of one file, before rescale slope and intercept.

In: header, elements and bytes of one file. Knows neither Hounsfield units nor other slices.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.elements import BIG_ENDIAN, DEFLATED, Elements
from featray.ct.dicom.encapsulation import EncapsulatedFrames
from featray.ct.dicom.header import SliceHeader
from featray.ct.formats.inflate import MAX_RATIO
from featray.errors import Reason, ScanError

NATIVE_SYNTAXES = frozenset({"", "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", DEFLATED, BIG_ENDIAN})
"""Transfer syntaxes with uncompressed pixels ("native format", PS3.5 section 8.2); "" is a missing UID."""

MAX_COMPRESSION_RATIO, COMPRESSION_ALLOWANCE_BYTES = 10_000, 2**20
"""A file may decode to `MAX_COMPRESSION_RATIO` times its size plus the allowance.

Larger claims are rejected. A blank image compresses by a factor of about 1000.
"""

_LOSSY_SUFFIXES = (".4.50", ".4.51", ".4.81", ".4.91", ".4.203")


def check_format(header: SliceHeader) -> None:
    """Raise ScanError (`unsupported`, `unreadable`) unless this package can read the pixels.

    They must be grayscale integers without a modality lookup table. If a file holds several frames, each must
    have its own position. MONOCHROME1 is accepted: it inverts the display, not the stored values.
    """
    name = header.file_name
    if header.rows < 2 or header.columns < 2:
        raise ScanError(Reason.UNREADABLE, f"{name}: {header.rows} rows x {header.columns} columns")
    is_monochrome = header.photometric_interpretation in ("", "MONOCHROME1", "MONOCHROME2")
    is_gray = is_monochrome and header.samples_per_pixel == 1
    if not is_gray or header.bits_allocated not in (8, 16, 32):
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{name}: {header.samples_per_pixel} sample(s) per pixel of {header.bits_allocated} bits, "
            "expected grayscale of 8, 16 or 32 bits",
        )
    if not 1 <= header.bits_stored <= header.bits_allocated or header.high_bit != header.bits_stored - 1:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{name}: BitsStored {header.bits_stored}, HighBit {header.high_bit} and "
            f"BitsAllocated {header.bits_allocated} do not fit together",
        )
    if header.number_of_frames > 1 and not header.has_functional_groups:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{name}: {header.number_of_frames} frames without positions; split it into slices",
        )
    if header.has_modality_lut:
        raise ScanError(
            Reason.UNSUPPORTED, f"{name}: a modality lookup table instead of rescale slope and intercept"
        )


def check_size(header: SliceHeader, elements: Elements, file_size: int) -> None:
    """Raise ScanError (`unreadable`, `truncated`) unless the file can hold the pixels that its header claims.

    Nothing is allocated. `file_size` is in bytes.
    """
    claimed = header.rows * header.columns * header.number_of_frames * header.bits_allocated // 8
    length = elements.pixel_length
    if header.transfer_syntax not in NATIVE_SYNTAXES:
        if claimed > file_size * MAX_COMPRESSION_RATIO + COMPRESSION_ALLOWANCE_BYTES:
            raise ScanError(
                Reason.UNREADABLE,
                f"{header.file_name}: {file_size} bytes cannot hold the {claimed} that the header claims",
            )
        return
    if length is None:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: the pixel data are compressed, but the transfer syntax says they are not",
        )
    is_deflated = header.transfer_syntax == DEFLATED
    available = file_size * MAX_RATIO if is_deflated else len(elements.data) - elements.pixel_start
    if min(length, available) < claimed or (length > available and not is_deflated):
        raise ScanError(
            Reason.TRUNCATED,
            f"{header.file_name}: expected {claimed} bytes of pixels, got {min(length, available)}; "
            "copy the file again",
        )


class PixelSource:
    """The pixel data of one file, from which frames are read in any order."""

    def __init__(self, header: SliceHeader, elements: Elements) -> None:
        """Keep header and elements of a file that has passed `check_format` and `check_size`."""
        self._header, self._elements = header, elements

    def read_stored_values(self, frame: int = 0) -> NDArray[Any]:
        """Return the stored values of frame number `frame` (from 0), axes (y, x), before slope and intercept.

        The dtype is that of the file: 8, 16 or 32 bits, signed or unsigned, either byte order. Bits above
        BitsStored are cleared, or filled with the sign bit if values are signed. The array may be a read-only
        view.

        Some software writes a negative PixelPaddingValue into unsigned pixels (63536 for -2000). Such padding
        becomes negative again in a wider signed type; as stored, it would be the brightest value of the
        image.

        Raises:
            ScanError: `truncated`, `unreadable` or `unsupported`.
        """
        header = self._header
        if header.transfer_syntax in NATIVE_SYNTAXES:
            raw = _read_native_frame(header, self._elements, frame)
            values = _clear_unused_bits(raw, header)
        else:
            from featray.ct.dicom.decompress import decode_frame  # imports pydicom, see below

            raw = decode_frame(header, self._compressed_frames.get_frame(frame))
            values = _fit_to_bits_stored(raw, header)
        return _restore_negative_padding(values, raw, header)

    @functools.cached_property
    def _compressed_frames(self) -> EncapsulatedFrames:
        """The compressed frames, which are searched for once per file."""
        # Import pydicom (0.3 s) only for compressed files; most CT files are not compressed.
        from featray.ct.dicom.decompress import check_transfer_syntax

        check_transfer_syntax(self._header)
        return EncapsulatedFrames(self._header, self._elements)


def _read_native_frame(header: SliceHeader, elements: Elements, frame: int) -> NDArray[Any]:
    """Return an uncompressed frame as a view of the file's bytes."""
    byte_order, kind = "<" if elements.little_endian else ">", "i" if header.is_signed else "u"
    dtype = np.dtype(f"{byte_order}{kind}{header.bits_allocated // 8}")
    pixels = header.rows * header.columns
    start = elements.pixel_start + frame * pixels * dtype.itemsize
    if start + pixels * dtype.itemsize > len(elements.data):
        raise ScanError(
            Reason.TRUNCATED, f"{header.file_name}: the pixel data end too early; copy the file again"
        )
    excess = (elements.pixel_length or 0) - pixels * header.number_of_frames * dtype.itemsize
    if excess >= header.columns * dtype.itemsize:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: the pixel data have {excess} bytes more than Rows and Columns require",
        )
    return np.frombuffer(elements.data, dtype, pixels, start).reshape(header.rows, header.columns)


def _clear_unused_bits(values: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    """Return the values without the bits above BitsStored, which may hold overlays (PS3.5 section 8.1.1)."""
    unused = header.bits_allocated - header.bits_stored
    if not unused:
        return values
    if header.is_signed:
        return (values << unused) >> unused
    highest = 2**header.bits_stored - 1
    return values & values.dtype.type(highest) if values.max() > highest else values


def _fit_to_bits_stored(values: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    """Return decoded values with the correct sign; raise ScanError if a value needs more than BitsStored.

    Codecs keep no overlays in the unused bits, so larger values mean damage. Lossy codecs may exceed the
    range slightly; their values are clipped. Codecs without signed types return negative values as large
    positive ones, which become negative again here. If PixelPaddingValue itself needs more than BitsStored,
    the unused bits of all values are cleared.
    """
    unused = 8 * values.itemsize - header.bits_stored
    lowest = -(2 ** (header.bits_stored - 1)) if header.is_signed else 0
    highest = 2**header.bits_stored - 1
    if unused <= 0 or (values.min() >= lowest and values.max() <= highest):
        return (values << unused) >> unused if header.is_signed and unused > 0 else values
    if header.transfer_syntax.endswith(_LOSSY_SUFFIXES):
        clipped: NDArray[Any] = np.clip(values, lowest, highest >> int(header.is_signed))
        return clipped
    if header.padding_value is not None and header.padding_value > highest:
        return _clear_unused_bits(values, header)
    raise ScanError(
        Reason.UNREADABLE,
        f"{header.file_name}: decoded values need more than BitsStored ({header.bits_stored}) (damaged?)",
    )


def _restore_negative_padding(values: NDArray[Any], raw: NDArray[Any], header: SliceHeader) -> NDArray[Any]:
    """Return the values as int32 if unsigned padding stands for a negative number (its value - 2**16).

    `raw` holds the stored values with all their bits, `values` those without unused bits.
    """
    padding = header.padding_value
    if padding is None or header.is_signed or raw.itemsize != 2 or padding < 2**15:
        return values
    is_padding = raw == padding
    if not is_padding.any():
        return values
    return np.where(is_padding, padding - 2**16, values.astype(np.int32))
