"""Decode one compressed frame into its stored values, with pydicom and GDCM.

Decoders written in C allocate the memory that the codestream claims, and crash the process if the data do not
fit. Therefore `codestream` parses each frame first, and this module compares it with the DICOM header before
a decoder runs. A warning of a decoder counts as an error.

Wrong bits inside the coded data are accepted if the codec does not notice them, as in uncompressed pixels:
DICOM has no checksum, and neither OpenJPEG nor the JPEG library in GDCM reports them. The JPEG-LS decoder
reports most of them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder

from featray.ct.dicom.codestream import (
    SIZ,
    SOF_BASELINE,
    SOF_EXTENDED,
    SOF_JPEG_LS,
    SOF_LOSSLESS,
    Codestream,
    InvalidCodestreamError,
    parse_codestream,
)
from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason, ScanError

_RLE = "1.2.840.10008.1.2.5"
_JPEG_ROOT = "1.2.840.10008.1.2.4."
_CODINGS = {
    "50": (SOF_BASELINE,),
    "51": (SOF_BASELINE, SOF_EXTENDED),
    "57": (SOF_LOSSLESS,),
    "70": (SOF_LOSSLESS,),
    "80": (SOF_JPEG_LS,),
    "81": (SOF_JPEG_LS,),
    **dict.fromkeys(("90", "91", "201", "202", "203"), (SIZ,)),
}
"""Supported transfer syntaxes below `_JPEG_ROOT`, and the `Codestream.coding` that their frames may have."""

_JPEG_EXTENDED = _JPEG_ROOT + "51"
_HTJ2K = (_JPEG_ROOT + "201", _JPEG_ROOT + "202", _JPEG_ROOT + "203")
"""GDCM decodes HTJ2K, and JPEG of 12 bits, but pydicom's GDCM plug-in does not offer them."""


def check_transfer_syntax(header: SliceHeader) -> None:
    """Raise ScanError (`unsupported`) unless there is a decoder for the transfer syntax."""
    _select_decoder(header)


def decode_frame(header: SliceHeader, encoded: bytes) -> NDArray[Any]:
    """Return the stored values of one compressed frame, axes (y, x).

    The dtype follows from BitsAllocated and PixelRepresentation.

    Args:
        header: Header of the file.
        encoded: The bytes of the frame, with their padding.

    Raises:
        ScanError: `truncated`, `unreadable` or `unsupported`.
    """
    decode = _select_decoder(header)
    encoded = _check_codestream(header, encoded)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = decode(header, encoded)
    except ScanError:
        raise
    except Exception as error:  # decoders raise errors of any type; their texts may quote the file
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: its compressed pixels do not decode ({type(error).__name__})",
        ) from None
    if values.shape != (header.rows, header.columns):
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: decoded to {values.shape}, "
            f"expected (Rows, Columns) = {(header.rows, header.columns)}",
        )
    return values


def _select_decoder(header: SliceHeader) -> Callable[[SliceHeader, bytes], NDArray[Any]]:
    """Return the decoding function for the transfer syntax, or raise `unsupported`."""
    syntax = header.transfer_syntax
    if syntax in _HTJ2K or (syntax == _JPEG_EXTENDED and header.bits_stored > 8):
        return _decode_with_gdcm
    is_known = syntax.startswith(_JPEG_ROOT) and syntax.removeprefix(_JPEG_ROOT) in _CODINGS
    if syntax != _RLE and not is_known:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"{header.file_name}: no decoder for its transfer syntax{_format_syntax(header)}",
        )
    return _decode_with_pydicom


def _decode_with_pydicom(header: SliceHeader, encoded: bytes) -> NDArray[Any]:
    decoder = get_decoder(header.transfer_syntax)
    if not decoder.is_available:
        raise ScanError(
            Reason.UNSUPPORTED, f"{header.file_name}: cannot decode {decoder.UID.name}; install python-gdcm"
        )
    item = encapsulate([encoded], has_bot=False)
    values, _ = decoder.as_array(item, index=0, raw=True, **_make_decoder_options(header))
    return np.asarray(values)


def _decode_with_gdcm(header: SliceHeader, encoded: bytes) -> NDArray[Any]:
    try:
        import gdcm
    except ImportError:
        raise ScanError(Reason.UNSUPPORTED, f"{header.file_name}: install python-gdcm to decode it") from None
    fragment, fragments_of_frame = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(encoded)
    fragments_of_frame.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments_of_frame.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((header.columns, header.rows, 1))
    image.SetDataElement(element)
    gray = gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gray))
    syntax = gdcm.TransferSyntax.GetTSType(header.transfer_syntax)
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    bits = header.bits_stored
    image.SetPixelFormat(gdcm.PixelFormat(1, header.bits_allocated, bits, bits - 1, int(header.is_signed)))
    values = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM returns char* as str
    dtype = f"{'i' if header.is_signed else 'u'}{header.bits_allocated // 8}"
    return np.frombuffer(values, dtype).reshape(header.rows, header.columns)


def _make_decoder_options(header: SliceHeader) -> dict[str, Any]:
    """Return the description of one frame that pydicom's decoders need."""
    return {
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": 1,
        "number_of_frames": 1,
        "bits_allocated": header.bits_allocated,
        "bits_stored": header.bits_stored,
        "pixel_representation": int(header.is_signed),
        "photometric_interpretation": header.photometric_interpretation or "MONOCHROME2",
        "pixel_keyword": "PixelData",
    }


def _format_syntax(header: SliceHeader) -> str:
    """Return a space and the transfer syntax UID, for a message; empty if the UID is not one of DICOM's.

    Other text is not repeated because it may identify the patient.
    """
    uid = header.transfer_syntax
    return f" {uid}" if re.fullmatch(r"1\.2\.840\.10008\.1\.2[.0-9]{0,12}", uid) else ""


def _check_codestream(header: SliceHeader, encoded: bytes) -> bytes:
    """Return the codestream without its padding.

    Raises:
        ScanError: The codestream is incomplete, or does not agree with the DICOM header.
    """
    if header.transfer_syntax == _RLE:
        return encoded  # an RLE frame states neither size nor precision
    try:
        stream = parse_codestream(encoded)
    except InvalidCodestreamError as error:
        reason = Reason.TRUNCATED if error.is_truncated else Reason.UNREADABLE
        raise ScanError(reason, f"{header.file_name}: {error}") from None
    if (stream.rows, stream.columns) != (header.rows, header.columns):
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: the compressed image has (rows, columns) = "
            f"{(stream.rows, stream.columns)}, the header says {(header.rows, header.columns)}",
        )
    if stream.coding not in _CODINGS[header.transfer_syntax.removeprefix(_JPEG_ROOT)]:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: the pixels have another compression than the transfer syntax says",
        )
    _check_precision(header, stream)
    return encoded[: stream.size]


def _check_precision(header: SliceHeader, stream: Codestream) -> None:
    """Raise ScanError if the precision would overrun a decoder's buffer or make signs ambiguous."""
    is_jpeg = SOF_BASELINE <= stream.coding <= SOF_LOSSLESS
    is_wider = stream.precision > header.bits_allocated
    has_other_width = is_jpeg and (stream.precision > 8) != (header.bits_allocated > 8)
    loses_sign = is_jpeg and header.is_signed and stream.precision < header.bits_stored
    if is_wider or has_other_width or loses_sign or header.bits_allocated > 16:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.file_name}: {stream.precision} bits per compressed value, the header says "
            f"BitsStored {header.bits_stored} and BitsAllocated {header.bits_allocated}",
        )
