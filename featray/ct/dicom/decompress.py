"""One compressed frame in, its stored values out, by pydicom and GDCM.

C decoders allocate what the code stream says and crash the process on what does not fit, so
`dicom_codestream` walks each stream and what it says is held against the header before a decoder sees
it. A decoder's warning counts as an error. Wrong bits inside the coded data that a codec does not notice
pass, as they do in uncompressed pixels: DICOM has no checksum, and neither OpenJPEG nor the JPEG library
in GDCM tells (JPEG-LS notices most).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder

from featray.ct.dicom.codestream import BadStreamError, CodeStream, parse
from featray.ct.dicom.elements import Elements, fragments
from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason, ScanError

_RLE = "1.2.840.10008.1.2.5"
_PREFIX = "1.2.840.10008.1.2.4."
_PROCESSES = {
    "50": (0xC0,),
    "51": (0xC0, 0xC1),
    "57": (0xC3,),
    "70": (0xC3,),
    "80": (0xF7,),
    "81": (0xF7,),
    **dict.fromkeys(("90", "91", "201", "202", "203"), (0x51,)),
}
"""Transfer syntaxes that are decoded, by their last number, and what their frames must be."""

_PAST_PYDICOM = (_PREFIX + "51", _PREFIX + "201", _PREFIX + "202", _PREFIX + "203")
"""12-bit JPEG and HTJ2K: GDCM decodes them, pydicom's plug-in for it does not say so."""


def decoded(header: SliceHeader, elements: Elements, frame: int) -> NDArray[Any]:
    """Return the stored values of one compressed frame, axes (y, x), dtype as the header says.

    Raises:
        ScanError: `truncated`, `unreadable` or `unsupported`.
    """
    decode = _decoder(header)
    _check_encapsulated(header, elements)
    encoded = elements.data[elements.pixel_start :]
    try:
        _check_code_stream(header, get_frame(encoded, frame, number_of_frames=header.frames))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values = decode(header, encoded, frame)
    except ScanError:
        raise
    except Exception as error:  # decoders raise nearly anything; their texts may quote the file
        raise ScanError(
            Reason.UNREADABLE, f"{header.base}: its compressed pixels do not decode ({type(error).__name__})"
        ) from None
    if values.shape != (header.rows, header.columns):
        raise ScanError(Reason.UNREADABLE, f"{header.base}: decoded to {values.shape}, not rows x columns")
    return values


def _decoder(header: SliceHeader) -> Callable[[SliceHeader, bytes, int], NDArray[Any]]:
    syntax = header.transfer_syntax
    if syntax in _PAST_PYDICOM and header.bits_stored > 8:
        return _by_gdcm
    if syntax != _RLE and (not syntax.startswith(_PREFIX) or syntax.removeprefix(_PREFIX) not in _PROCESSES):
        raise ScanError(
            Reason.UNSUPPORTED, f"{header.base}: no decoder for its transfer syntax{_shown(header)}"
        )
    return _by_pydicom


def _by_pydicom(header: SliceHeader, encoded: bytes, frame: int) -> NDArray[Any]:
    decoder = get_decoder(header.transfer_syntax)
    if not decoder.is_available:
        raise ScanError(
            Reason.UNSUPPORTED, f"{header.base}: cannot decode {decoder.UID.name}; install python-gdcm"
        )
    values, _ = decoder.as_array(encoded, index=frame, raw=True, **_options(header))
    return np.asarray(values)


def _by_gdcm(header: SliceHeader, encoded: bytes, frame: int) -> NDArray[Any]:
    try:
        import gdcm
    except ImportError:
        raise ScanError(Reason.UNSUPPORTED, f"{header.base}: install python-gdcm to decode it") from None
    fragment, fragments_of_frame = gdcm.Fragment(), gdcm.SequenceOfFragments.New()
    fragment.SetByteStringValue(get_frame(encoded, frame, number_of_frames=header.frames))
    fragments_of_frame.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments_of_frame.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((header.columns, header.rows, 1))
    image.SetDataElement(element)
    grey = gdcm.PhotometricInterpretation.MONOCHROME2
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(grey))
    syntax = gdcm.TransferSyntax.GetTSType(header.transfer_syntax)
    image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    bits = header.bits_stored
    image.SetPixelFormat(gdcm.PixelFormat(1, header.bits_allocated, bits, bits - 1, int(header.signed)))
    values = image.GetBuffer().encode("utf-8", "surrogateescape")  # GDCM gives char* as str
    dtype = f"{'i' if header.signed else 'u'}{header.bits_allocated // 8}"
    return np.frombuffer(values, dtype).reshape(header.rows, header.columns)


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


def _shown(header: SliceHeader) -> str:
    """Return the UID for a message if it is one of DICOM's; anything else might say who the patient is."""
    uid = header.transfer_syntax
    return f" {uid}" if re.fullmatch(r"1\.2\.840\.10008\.1\.2[.0-9]{0,12}", uid) else ""


def _check_code_stream(header: SliceHeader, encoded: bytes) -> None:
    """Raise ScanError unless the stream is whole and says what the header says."""
    if header.transfer_syntax == _RLE:
        return  # says nothing of itself
    try:
        stream = parse(encoded)
    except BadStreamError as error:
        reason = Reason.TRUNCATED if error.cut else Reason.UNREADABLE
        raise ScanError(reason, f"{header.base}: {error}") from None
    if (stream.rows, stream.columns) != (header.rows, header.columns):
        size = (stream.rows, stream.columns)
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: the compressed image is {size}, the header says {(header.rows, header.columns)}",
        )
    if stream.process not in _PROCESSES[header.transfer_syntax.removeprefix(_PREFIX)]:
        raise ScanError(
            Reason.UNREADABLE, f"{header.base}: the pixels are compressed otherwise than its header says"
        )
    _check_bits(header, stream)


def _check_bits(header: SliceHeader, stream: CodeStream) -> None:
    """Refuse what would overrun a decoder's buffer, or leave the sign of values open."""
    jpeg = 0xC0 <= stream.process <= 0xC3
    wider = stream.bits > header.bits_allocated
    other_width = jpeg and (stream.bits > 8) != (header.bits_allocated > 8)
    sign_lost = jpeg and header.signed and stream.bits < header.bits_stored
    if wider or other_width or sign_lost or header.bits_allocated > 16:
        raise ScanError(
            Reason.UNREADABLE,
            f"{header.base}: {stream.bits} bits per compressed value, the header says "
            f"{header.bits_stored} of {header.bits_allocated}",
        )
