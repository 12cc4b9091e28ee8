"""One compressed frame in, its stored values out, by pydicom and its plug-ins (GDCM).

C decoders allocate what the code stream says and may crash the process on what does not fit, so
the size inside the stream is compared with the header before a decoder sees it. A stream must end
with its end marker, and a decoder's warning counts as an error. Wrong bits that a codec does not
notice pass, as they do in uncompressed pixels: DICOM has no checksum.
"""

from __future__ import annotations

import struct
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from featray.ct.dicom_elements import Elements, fragments
from featray.ct.dicom_headers import SliceHeader
from featray.errors import Reason, ScanError

_RLE = "1.2.840.10008.1.2.5"
_END_OF_IMAGE = b"\xff\xd9"  # EOI of JPEG and JPEG-LS, EOC of JPEG 2000
_JPEG_12_BIT = "1.2.840.10008.1.2.4.51"


def decoded(header: SliceHeader, elements: Elements, frame: int) -> NDArray[Any]:
    """Return the stored values of one compressed frame, axes (y, x), dtype as the header says.

    Raises:
        ScanError: `truncated`, `unreadable` or `unsupported`.
    """
    _check_encapsulated(header, elements)
    decoder = _decoder(header)
    encoded = elements.data[elements.pixel_start :]
    try:
        _check_code_stream(header, get_frame(encoded, frame, number_of_frames=header.frames))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values, _ = decoder.as_array(encoded, index=frame, raw=True, **_options(header))
    except ScanError:
        raise
    except Exception as error:  # decoders raise nearly anything; their texts may quote the file
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: {decoder.UID.name} pixels do not decode ({type(error).__name__})",
        ) from None
    if values.shape != (header.rows, header.columns):
        raise ScanError(Reason.UNREADABLE, f"{header.base}: decoded to {values.shape}, not rows x columns")
    return np.asarray(values)


def _options(header: SliceHeader) -> dict[str, Any]:
    """Return what pydicom's decoders want to know of the image."""
    return {
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": 1,
        "number_of_frames": header.frames,
        "bits_allocated": header.bits_allocated,
        "bits_stored": header.bits_stored,
        "pixel_representation": int(header.signed),
        "photometric_interpretation": header.photometric or "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }


def _check_encapsulated(header: SliceHeader, elements: Elements) -> None:
    if elements.pixel_length is not None:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: the transfer syntax says compressed, the pixels are not in compressed form",
        )
    if len(fragments(elements)) < 1 + header.frames:
        raise ScanError(
            Reason.TRUNCATED,
            f"{header.base}: the compressed pixels are cut or incomplete; copy the file again",
        )


def _decoder(header: SliceHeader) -> Any:
    try:
        decoder = get_decoder(header.transfer_syntax)
    except NotImplementedError:
        raise ScanError(
            Reason.UNSUPPORTED, f"{header.base}: no decoder for its transfer syntax{_shown(header)}"
        ) from None
    too_deep = header.transfer_syntax == _JPEG_12_BIT and header.bits_stored > 8  # GDCM's limit
    if too_deep or not decoder.is_available:
        raise ScanError(
            Reason.UNSUPPORTED, f"{header.base}: cannot decode {decoder.UID.name}; is python-gdcm installed?"
        )
    return decoder


def _shown(header: SliceHeader) -> str:
    """Return the UID for a message; anything that is none might say who the patient is."""
    uid = header.transfer_syntax
    return f" {uid}" if set(uid) <= set("0123456789.") else ""


def _check_code_stream(header: SliceHeader, encoded: bytes) -> None:
    if header.transfer_syntax == _RLE:
        return  # has neither size nor end marker
    size = _code_stream_size(encoded)
    if size != (header.rows, header.columns):
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: the compressed image is {size}, the header says {(header.rows, header.columns)}",
        )
    if not encoded.rstrip(b"\0").endswith(_END_OF_IMAGE):
        raise ScanError(Reason.TRUNCATED, f"{header.base}: the compressed image lacks its end marker")


def _code_stream_size(encoded: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) stated in a JPEG, JPEG-LS or JPEG 2000 stream, None if it is neither.

    JPEG 2000: the SIZ marker right after SOC (ISO 15444-1 A.5.1). JPEG: the first frame header,
    SOF0 to SOF15 or SOF55 for JPEG-LS (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2).
    """
    start = encoded.find(b"\xff\x4f\xff\x51")
    if start >= 0 and not encoded.startswith(b"\xff\xd8"):
        if len(encoded) < start + 24:
            return None
        right, bottom, left, top = struct.unpack_from(">4I", encoded, start + 8)
        return bottom - top, right - left
    position = 2
    while encoded.startswith(b"\xff\xd8") and position + 9 <= len(encoded) and encoded[position] == 0xFF:
        marker, length = encoded[position + 1], int.from_bytes(encoded[position + 2 : position + 4])
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">2H", encoded, position + 5)
        position += 2 + length
    return None
