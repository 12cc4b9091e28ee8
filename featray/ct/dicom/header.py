"""Read one DICOM file into a typed header for grouping and reading; keep no patient name, ID or date.

Only the elements in `_TAGS` are read. A hash of PatientID is kept in memory so that two patients who
share a SeriesInstanceUID can be told apart.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from featray.ct.dicom.elements import MAX_HEADER_BYTES, Elements, ParseEnd, decode_text, parse_elements
from featray.ct.dicom.frame_range import FrameRange, find_frame_range
from featray.errors import Reason, ScanError

_TAGS = {
    "MediaStorageSOPClassUID": 0x00020002,
    "ImageType": 0x00080008,
    "SOPClassUID": 0x00080016,
    "SOPInstanceUID": 0x00080018,
    "Modality": 0x00080060,
    "PatientID": 0x00100020,
    "SliceThickness": 0x00180050,
    "KVP": 0x00180060,
    "EchoNumbers": 0x00180086,
    "TriggerTime": 0x00181060,
    "ConvolutionKernel": 0x00181210,
    "StudyInstanceUID": 0x0020000D,
    "SeriesInstanceUID": 0x0020000E,
    "SeriesNumber": 0x00200011,
    "AcquisitionNumber": 0x00200012,
    "InstanceNumber": 0x00200013,
    "ImagePositionPatient": 0x00200032,
    "ImageOrientationPatient": 0x00200037,
    "FrameOfReferenceUID": 0x00200052,
    "TemporalPositionIdentifier": 0x00200100,
    "ConcatenationUID": 0x00209161,
    "InConcatenationTotalNumber": 0x00209163,
    "SamplesPerPixel": 0x00280002,
    "PhotometricInterpretation": 0x00280004,
    "NumberOfFrames": 0x00280008,
    "Rows": 0x00280010,
    "Columns": 0x00280011,
    "PixelSpacing": 0x00280030,
    "BitsAllocated": 0x00280100,
    "BitsStored": 0x00280101,
    "HighBit": 0x00280102,
    "PixelRepresentation": 0x00280103,
    "PixelPaddingValue": 0x00280120,
    "RescaleIntercept": 0x00281052,
    "RescaleSlope": 0x00281053,
    "RescaleType": 0x00281054,
    "ModalityLUTSequence": 0x00283000,
    "PerFrameFunctionalGroupsSequence": 0x52009230,
}
"""Tags of the elements that are read, by DICOM keyword (PS3.6)."""

_TEXT_FIELDS = {
    "sop_class_uid": "SOPClassUID",
    "sop_instance_uid": "SOPInstanceUID",
    "series_uid": "SeriesInstanceUID",
    "series_number": "SeriesNumber",
    "study_uid": "StudyInstanceUID",
    "frame_of_reference_uid": "FrameOfReferenceUID",
    "temporal_position": "TemporalPositionIdentifier",
    "acquisition_number": "AcquisitionNumber",
    "trigger_time": "TriggerTime",
    "convolution_kernel": "ConvolutionKernel",
    "kvp": "KVP",
    "slice_thickness": "SliceThickness",
    "echo_number": "EchoNumbers",
    "concatenation_uid": "ConcatenationUID",
    "photometric_interpretation": "PhotometricInterpretation",
}
"""Fields of `SliceHeader` that hold an element's text unchanged."""

_WANTED = frozenset(_TAGS.values())
_MEDIA_STORAGE_DIRECTORY = "1.2.840.10008.1.3.10"
"""SOP class of a DICOMDIR."""

_MAX_PRIVATE_RATIO = 20
"""Compression by which a private element may hold the pixels; CT is compressed without loss by 2 to 5."""

_READ_SIZES = (2**15, 2**18, 2**21, MAX_HEADER_BYTES)
"""Numbers of bytes from the start of the file that are parsed in turn, until the header is complete."""

_UNFINISHED = (ParseEnd.CUT, ParseEnd.NO_PIXELS)
"""Ends of parsing after which more bytes may complete the header: an element may end at a read size."""

_PROBLEMS = {
    ParseEnd.CUT: (
        Reason.TRUNCATED,
        "an element runs past the end of the file (file cut, or length damaged)",
    ),
    ParseEnd.MALFORMED: (Reason.UNREADABLE, "damaged DICOM header"),
    ParseEnd.NOT_DICOM: (Reason.UNREADABLE, "not DICOM"),
    ParseEnd.FLOAT_PIXELS: (Reason.UNSUPPORTED, "floating-point pixel data (a parametric map?)"),
}


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """The header of one DICOM file, or of one frame of a multi-frame file, without its pixels.

    A file that cannot be used has a `problem` and a `message`, and the fields that could be read before the
    damage. Missing numbers are None or the default; missing texts are empty. Instances are small, hashable
    and can be pickled.

    Attributes:
        name: Path below the collection root, with `/`, as given by the caller.
        problem: Why the file cannot be used, or None.
        message: The problem in words, for users.
        is_dicom: Whether the file is DICOM. Without DICM prefix, the elements must describe an image.
        has_pixels: Whether the header ends at pixel data.
        is_directory: Whether the file is a DICOMDIR, an index of other files.
        transfer_syntax: TransferSyntaxUID.
        patient_hash: Hash of PatientID; empty without PatientID.
        temporal_position: TemporalPositionIdentifier, or TemporalPositionIndex of an enhanced frame.
        stack_id: StackID of an enhanced frame: the stack of frames that it belongs to.
        frame_labels: Values of an enhanced frame that tell volumes in one file apart, such as its energy and
            cardiac phase.
        concatenation_uid: ConcatenationUID, shared by the files that one multi-frame image was split into.
        concatenation_total: InConcatenationTotalNumber: how many files these are; 0 if unknown.
        image_type: Values of ImageType, e.g. ("ORIGINAL", "PRIMARY", "LOCALIZER").
        instance_number: InstanceNumber; of an enhanced frame its place in the stack or in the file. It
            explains gaps, shows passes that overlap, and never decides the order of slices.
        position: ImagePositionPatient: center of the first pixel, LPS mm (PS3.3 C.7.6.2).
        orientation: ImageOrientationPatient: direction cosines along a row (growing column index), then
            along a column (growing row index).
        spacing_yx: PixelSpacing: mm between rows (y), then between columns (x).
        slope: RescaleSlope, None if the file has none.
        intercept: RescaleIntercept, None if the file has none.
        number_of_frames: NumberOfFrames; 1 if missing.
        is_signed: Whether PixelRepresentation is 1 (two's complement).
        padding_value: The 16 bits of PixelPaddingValue as an unsigned number.
        has_functional_groups: Whether geometry is stored per frame (enhanced multi-frame).
        frame_range: Range and orientation of the frames of an enhanced multi-frame file, if known.
        has_modality_lut: Whether a ModalityLUTSequence replaces slope and intercept (PS3.3 C.11.1).

    The other fields hold the DICOM attribute of the same name.
    """

    name: str
    problem: Reason | None = None
    message: str = ""
    is_dicom: bool = True
    has_pixels: bool = False
    is_directory: bool = False
    transfer_syntax: str = ""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    series_uid: str = ""
    series_number: str = ""
    study_uid: str = ""
    frame_of_reference_uid: str = ""
    patient_hash: str = ""
    temporal_position: str = ""
    acquisition_number: str = ""
    trigger_time: str = ""
    convolution_kernel: str = ""
    kvp: str = ""
    slice_thickness: str = ""
    echo_number: str = ""
    stack_id: str = ""
    frame_labels: str = ""
    concatenation_uid: str = ""
    concatenation_total: int = 0
    modality: str = ""
    image_type: tuple[str, ...] = ()
    photometric_interpretation: str = ""
    rescale_type: str = ""
    instance_number: int | None = None
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    spacing_yx: tuple[float, ...] | None = None
    slope: float | None = None
    intercept: float | None = None
    number_of_frames: int = 1
    rows: int = 0
    columns: int = 0
    samples_per_pixel: int = 1
    bits_allocated: int = 0
    bits_stored: int = 0
    high_bit: int = 0
    is_signed: bool = False
    padding_value: int | None = None
    has_functional_groups: bool = False
    has_modality_lut: bool = False
    frame_range: FrameRange | None = None

    @property
    def folder(self) -> str:
        """Path of the folder, empty for the collection root."""
        return self.name.rpartition("/")[0]

    @property
    def file_name(self) -> str:
        """File name without its folder. Messages may contain this, never the folder."""
        return self.name.rpartition("/")[2]


def read_header(file: BinaryIO, name: str) -> SliceHeader:
    """Return the header of an open file; read no more of the file than necessary (mostly 32 kB).

    Any file may be given. A file that is not DICOM has `is_dicom` false in its header, and an empty or
    damaged file has a `problem`. A file without preamble and DICM prefix counts as DICOM if its elements
    lead to pixel data and name a modality or SOP class. Errors of `file.read` are not caught.
    """
    data = b""
    for size in _READ_SIZES:
        data += _read_bytes(file, size - len(data))
        if not data:
            return SliceHeader(name, Reason.EMPTY, "the file has no bytes", is_dicom=False)
        try:
            elements = parse_elements(data, _WANTED)
        except ScanError as error:
            return SliceHeader(name, error.reason, str(error))
        if elements.end not in _UNFINISHED or len(data) < size:
            break
    return _make_header(elements, name, has_prefix=_has_dicm_prefix(data))


def make_unreadable_header(name: str, error: ScanError) -> SliceHeader:
    """Return a header for a file that could not be opened, so that grouping can assign it to a scan."""
    return SliceHeader(name, error.reason, str(error), is_dicom=False)


def parse_file(data: bytes, name: str, max_inflated: int = MAX_HEADER_BYTES) -> tuple[SliceHeader, Elements]:
    """Return header and elements of a whole file in memory; `max_inflated` as in `parse_elements`.

    Raises:
        ScanError: The problem of the header, or `truncated` without pixel data.
    """
    if not data:
        raise ScanError(Reason.EMPTY, f"{name.rpartition('/')[2]}: the file has no bytes")
    elements = parse_elements(data, _WANTED, max_inflated)
    header = _make_header(elements, name, has_prefix=_has_dicm_prefix(data))
    if header.problem:
        raise ScanError(header.problem, f"{header.file_name}: {header.message}")
    if not header.has_pixels:
        raise _make_no_pixels_error(header, elements)
    return header, elements


def _make_no_pixels_error(header: SliceHeader, elements: Elements) -> ScanError:
    """Return the error for a file without PixelData: a private element may hold the pixels, or it is cut."""
    claimed = header.rows * header.columns * header.bits_allocated // 8
    if not 0 < claimed <= elements.private_length * _MAX_PRIVATE_RATIO:
        return ScanError(Reason.TRUNCATED, f"{header.file_name}: the file ends before its pixel data")
    return ScanError(
        Reason.UNSUPPORTED,
        f"{header.file_name}: the pixels seem to be in the private element "
        f"{_format_tag(elements.private_tag)} instead of PixelData, where only software of the vendor finds "
        "them; export the series with standard pixel data",
    )


def _has_dicm_prefix(data: bytes) -> bool:
    """Return whether the DICM prefix follows the preamble of 128 bytes (PS3.10 section 7.1)."""
    return data[128:132] == b"DICM"


def _make_header(elements: Elements, name: str, *, has_prefix: bool) -> SliceHeader:
    """Return the typed header; without DICM prefix only an image counts as DICOM."""
    header = _make_text_header(elements, name)
    try:
        header = _add_numbers(elements, header)
    except ValueError as error:
        header = replace(header, problem=Reason.UNREADABLE, message=str(error))
    if elements.end in _PROBLEMS:
        problem, message = _PROBLEMS[elements.end]
        header = replace(header, problem=problem, message=message)
    if header.has_functional_groups and header.number_of_frames > 1 and header.has_pixels:
        found = find_frame_range(elements.data, elements.pixel_start, header.number_of_frames)
        header = replace(header, frame_range=found)
    is_image = header.has_pixels and header.rows > 0 and bool(header.sop_class_uid or header.modality)
    if has_prefix or (is_image and not header.problem):
        return header
    return SliceHeader(name, Reason.UNREADABLE, "not DICOM", is_dicom=False)


def _read_bytes(file: BinaryIO, count: int) -> bytes:
    """Return `count` bytes, or fewer only at the end of the file."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _make_text_header(elements: Elements, name: str) -> SliceHeader:
    """Return a header with all fields that do not hold numbers."""
    texts: dict[str, Any] = {field: _get_text(elements, keyword) for field, keyword in _TEXT_FIELDS.items()}
    image_type = _get_text(elements, "ImageType").split("\\")
    return SliceHeader(
        name,
        has_pixels=elements.end is ParseEnd.PIXELS,
        is_directory=_get_text(elements, "MediaStorageSOPClassUID") == _MEDIA_STORAGE_DIRECTORY,
        transfer_syntax=elements.transfer_syntax,
        patient_hash=_hash_value(_get_bytes(elements, "PatientID")),
        modality=_get_text(elements, "Modality").upper(),
        image_type=tuple(part.strip().upper() for part in image_type),
        rescale_type=_get_text(elements, "RescaleType").upper(),
        has_functional_groups=_TAGS["PerFrameFunctionalGroupsSequence"] in elements.values,
        has_modality_lut=_TAGS["ModalityLUTSequence"] in elements.values,
        **texts,
    )


def _add_numbers(elements: Elements, header: SliceHeader) -> SliceHeader:
    """Return the header with its numbers.

    Raises:
        ValueError: An element is present but its value is not a valid number.
    """
    slope = _parse_floats(elements, "RescaleSlope", 1)
    intercept = _parse_floats(elements, "RescaleIntercept", 1)
    frames = _parse_floats(elements, "NumberOfFrames", 1) or (1.0,)
    return replace(
        header,
        instance_number=_parse_instance_number(elements),
        position=_parse_floats(elements, "ImagePositionPatient", 3),
        orientation=_parse_floats(elements, "ImageOrientationPatient", 6),
        spacing_yx=_parse_floats(elements, "PixelSpacing", 2),
        slope=slope[0] if slope else None,
        intercept=intercept[0] if intercept else None,
        number_of_frames=max(1, int(frames[0])),
        rows=_parse_unsigned(elements, "Rows", 0),
        columns=_parse_unsigned(elements, "Columns", 0),
        samples_per_pixel=_parse_unsigned(elements, "SamplesPerPixel", 1),
        bits_allocated=(allocated := _parse_unsigned(elements, "BitsAllocated", 0)),
        bits_stored=(stored := _parse_unsigned(elements, "BitsStored", allocated)),
        high_bit=_parse_unsigned(elements, "HighBit", stored - 1),
        is_signed=_parse_unsigned(elements, "PixelRepresentation", 0) == 1,
        padding_value=_parse_padding_value(elements),
        concatenation_total=_parse_unsigned(elements, "InConcatenationTotalNumber", 0),
    )


def _get_bytes(elements: Elements, keyword: str) -> bytes:
    return elements.values.get(_TAGS[keyword], b"")


def _get_text(elements: Elements, keyword: str) -> str:
    return decode_text(_get_bytes(elements, keyword))


def _hash_value(value: bytes) -> str:
    stripped = value.strip(b" \0")
    return hashlib.blake2b(stripped, digest_size=8).hexdigest() if stripped else ""


def _parse_padding_value(elements: Elements) -> int | None:
    """Return PixelPaddingValue as an unsigned number, also if its value representation is SS (signed)."""
    raw = _get_bytes(elements, "PixelPaddingValue")
    return int.from_bytes(raw, "little" if elements.little_endian else "big") if len(raw) == 2 else None


def _parse_floats(elements: Elements, keyword: str, count: int) -> tuple[float, ...] | None:
    """Return `count` finite numbers of a decimal or integer string, or None if the element is empty."""
    raw = _get_text(elements, keyword)
    if not raw:
        return None
    try:
        values = tuple(float(part) for part in raw.split("\\"))
    except ValueError:
        values = ()
    if len(values) != count or not all(map(math.isfinite, values)):
        problem = _describe_bad_numbers(raw, values, count)
        raise ValueError(f"{keyword} {_format_tag(_TAGS[keyword])} {problem}; correct the header")
    return values


def _describe_bad_numbers(raw: str, values: tuple[float, ...], count: int) -> str:
    """Describe the fault in the text of `count` numbers; `values` are the numbers, or empty."""
    if values:
        return f"has {len(values)} value(s), expected {count} finite value(s)"
    if not re.fullmatch(r"[-+0-9.eE,\\ ]*,[-+0-9.eE,\\ ]*", raw):
        return "is not a number"
    if count > 1 and "\\" not in raw and raw.count(",") == count - 1:
        return "separates its values by a comma, DICOM requires a backslash"
    return "has a comma as decimal sign, DICOM requires a point"


def _format_tag(tag: int) -> str:
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def _parse_instance_number(elements: Elements) -> int | None:
    """Return InstanceNumber, or None if it is missing or not a number."""
    raw = _get_text(elements, "InstanceNumber")
    return int(raw) if raw.lstrip("-").isdecimal() and len(raw) < 12 else None


def _parse_unsigned(elements: Elements, keyword: str, default: int) -> int:
    raw = _get_bytes(elements, keyword)
    if not raw:
        return default
    if len(raw) not in (2, 4):
        place = f"{keyword} {_format_tag(_TAGS[keyword])}"
        raise ValueError(f"{place} has {len(raw)} bytes, expected 2 or 4; correct the header")
    return int.from_bytes(raw, "little" if elements.little_endian else "big")
