"""One DICOM file in, what grouping and reading need of its header out; never a name, id or date.

Only the tags listed in `_TAGS` are ever looked at. Of the patient's ID a hash is kept in memory, to tell
two patients apart who share a SeriesInstanceUID.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from featray.ct.dicom.elements import MAX_HEADER_BYTES, Elements, End, text, walk
from featray.errors import Reason, ScanError

_TAGS = {
    "storage_class": 0x00020002,
    "image_type": 0x00080008,
    "sop_class": 0x00080016,
    "sop_uid": 0x00080018,
    "modality": 0x00080060,
    "patient": 0x00100020,
    "thickness": 0x00180050,
    "trigger": 0x00181060,
    "kernel": 0x00181210,
    "study_uid": 0x0020000D,
    "series_uid": 0x0020000E,
    "series_number": 0x00200011,
    "acquisition": 0x00200012,
    "number": 0x00200013,
    "position": 0x00200032,
    "orientation": 0x00200037,
    "frame_uid": 0x00200052,
    "temporal": 0x00200100,
    "concatenation": 0x00209161,
    "parts": 0x00209163,
    "samples": 0x00280002,
    "photometric": 0x00280004,
    "frames": 0x00280008,
    "rows": 0x00280010,
    "columns": 0x00280011,
    "spacing_yx": 0x00280030,
    "bits_allocated": 0x00280100,
    "bits_stored": 0x00280101,
    "high_bit": 0x00280102,
    "signed": 0x00280103,
    "padding": 0x00280120,
    "intercept": 0x00281052,
    "slope": 0x00281053,
    "rescale_type": 0x00281054,
    "modality_lut": 0x00283000,
    "functional_groups": 0x52009230,
}
_PLAIN_TEXTS = (
    *("sop_class", "sop_uid", "series_uid", "series_number", "study_uid", "frame_uid", "temporal"),
    *("acquisition", "trigger", "kernel", "thickness", "concatenation", "photometric"),
)
_WANTED = frozenset(_TAGS.values())
_DIRECTORY = "1.2.840.10008.1.3.10"
_READ_SIZES = (2**15, 2**18, 2**21, MAX_HEADER_BYTES)

_WHY = {
    End.CUT: (Reason.TRUNCATED, "an element runs past the end of the file (cut, or a damaged length)"),
    End.MALFORMED: (Reason.UNREADABLE, "damaged DICOM header"),
    End.NOT_DICOM: (Reason.UNREADABLE, "not DICOM"),
    End.FLOAT_PIXELS: (Reason.UNSUPPORTED, "floating point pixel data (a parametric map?)"),
}


@dataclass(frozen=True, slots=True)
class SliceHeader:
    """What is known of one file without its pixels. Small, hashable, picklable.

    A file that cannot be used has a `problem` and a `message`, and whatever could be read before.
    Missing numbers are None, missing texts empty.

    Attributes:
        name: As given: the path below the collection root, with `/`.
        problem: Why the file is of no use, or None.
        message: The problem in words.
        is_dicom: Whether it is DICOM at all; without the DICM mark only if its tags make sense.
        has_pixels: Whether the header ends at pixel data.
        is_directory: A DICOMDIR: an index of files, no scan.
        image_type: E.g. ("ORIGINAL", "PRIMARY", "LOCALIZER").
        patient: Hash of the PatientID; empty if there is none.
        temporal: Which time point: TemporalPositionIdentifier, or the frame's index in an enhanced file.
        acquisition: AcquisitionNumber.
        trigger: TriggerTime.
        kernel: ConvolutionKernel.
        thickness: SliceThickness.
        stack_id: Which stack of an enhanced file a frame is in.
        concatenation: What the files of one divided multi-frame image share.
        parts: How many files that are; 0 if unknown.
        padding: PixelPaddingValue as an unsigned number.
        number: InstanceNumber; used to explain gaps, never to sort.
        position: ImagePositionPatient: LPS mm of the centre of the first pixel.
        orientation: ImageOrientationPatient: direction of growing column, then of growing row.
        frame_uid: FrameOfReferenceUID.
        spacing_yx: PixelSpacing, mm between rows (y), between columns (x).
        slope: RescaleSlope, None if the file has none.
        intercept: RescaleIntercept, None if the file has none.
        functional_groups: Whether geometry is stored per frame (enhanced multi-frame).
        modality_lut: Whether a table replaces slope and intercept.
    """

    name: str
    problem: Reason | None = None
    message: str = ""
    is_dicom: bool = True
    has_pixels: bool = False
    is_directory: bool = False
    transfer_syntax: str = ""
    sop_class: str = ""
    sop_uid: str = ""
    series_uid: str = ""
    series_number: str = ""
    study_uid: str = ""
    frame_uid: str = ""
    patient: str = ""
    temporal: str = ""
    acquisition: str = ""
    trigger: str = ""
    kernel: str = ""
    thickness: str = ""
    stack_id: str = ""
    concatenation: str = ""
    parts: int = 0
    modality: str = ""
    image_type: tuple[str, ...] = ()
    photometric: str = ""
    rescale_type: str = ""
    number: int | None = None
    position: tuple[float, ...] | None = None
    orientation: tuple[float, ...] | None = None
    spacing_yx: tuple[float, ...] | None = None
    slope: float | None = None
    intercept: float | None = None
    frames: int = 1
    rows: int = 0
    columns: int = 0
    samples: int = 1
    bits_allocated: int = 0
    bits_stored: int = 0
    high_bit: int = 0
    signed: bool = False
    padding: int | None = None
    functional_groups: bool = False
    modality_lut: bool = False

    @property
    def folder(self) -> str:
        """The path of the folder, empty for the root."""
        return self.name.rpartition("/")[0]

    @property
    def base(self) -> str:
        """The file name alone, which is all that may stand in messages."""
        return self.name.rpartition("/")[2]


def read_header(file: BinaryIO, name: str) -> SliceHeader:
    """Return the header of an open file, reading as little as it takes (mostly 32 kB).

    Any file may be given: one that is not DICOM comes back with `is_dicom` false, an empty or
    damaged one with its `problem`. A file without preamble and DICM mark counts as DICOM if its
    elements lead to pixel data of a known modality or class. Errors of `file.read` pass through.
    """
    data = b""
    for size in _READ_SIZES:
        data += _read(file, size - len(data))
        if not data:
            return SliceHeader(name, Reason.EMPTY, "the file has no bytes", is_dicom=False)
        try:
            elements = walk(data, _WANTED)
        except ScanError as error:
            return SliceHeader(name, error.reason, str(error))
        if elements.end is not End.CUT or len(data) < size:
            break
    return slice_header(elements, name, data[128:132] == b"DICM")


def make_unreadable_header(name: str, error: ScanError) -> SliceHeader:
    """Return the header of a file that could not even be opened, for grouping to place."""
    return SliceHeader(name, error.reason, str(error), is_dicom=False)


def parse_slice(data: bytes, name: str, most: int = MAX_HEADER_BYTES) -> tuple[SliceHeader, Elements]:
    """Return header and elements of a whole file in memory; `most` as in `walk`.

    Raises:
        ScanError: The header's problem, or `truncated` if there are no pixels.
    """
    if not data:
        raise ScanError(Reason.EMPTY, f"{name.rpartition('/')[2]}: the file has no bytes")
    elements = walk(data, _WANTED, most)
    header = slice_header(elements, name, data[128:132] == b"DICM")
    if header.problem:
        raise ScanError(header.problem, f"{header.base}: {header.message}")
    if not header.has_pixels:
        raise ScanError(Reason.TRUNCATED, f"{header.base}: the file ends before its pixel data")
    return header, elements


def slice_header(elements: Elements, name: str, marked: bool) -> SliceHeader:
    """Return the typed header; `marked` says whether the file has the DICM mark."""
    header = _texts(elements, name)
    try:
        header = _numbers(elements, header)
    except ValueError as error:
        header = replace(header, problem=Reason.UNREADABLE, message=str(error))
    if elements.end in _WHY:
        problem, message = _WHY[elements.end]
        header = replace(header, problem=problem, message=message)
    known = header.has_pixels and header.rows > 0 and bool(header.sop_class or header.modality)
    if marked or (known and not header.problem):
        return header
    return SliceHeader(name, Reason.UNREADABLE, "not DICOM", is_dicom=False)


def _read(file: BinaryIO, count: int) -> bytes:
    """Return `count` bytes, or fewer only at the end of the file."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _texts(elements: Elements, name: str) -> SliceHeader:
    def value(field: str) -> str:
        return text(elements.values.get(_TAGS[field], b""))

    plain: dict[str, Any] = {field: value(field) for field in _PLAIN_TEXTS}
    return SliceHeader(
        name,
        has_pixels=elements.end is End.PIXELS,
        is_directory=value("storage_class") == _DIRECTORY,
        transfer_syntax=elements.transfer_syntax,
        patient=_digest(elements.values.get(_TAGS["patient"], b"")),
        modality=value("modality").upper(),
        image_type=tuple(part.strip().upper() for part in value("image_type").split("\\")),
        rescale_type=value("rescale_type").upper(),
        functional_groups=_TAGS["functional_groups"] in elements.values,
        modality_lut=_TAGS["modality_lut"] in elements.values,
        **plain,
    )


def _numbers(elements: Elements, header: SliceHeader) -> SliceHeader:
    """Fill in the numbers; raises ValueError for one that is there but is none."""
    slope, intercept = _floats(elements, "slope", 1), _floats(elements, "intercept", 1)
    frames = _floats(elements, "frames", 1) or (1.0,)
    return replace(
        header,
        number=_instance_number(elements),
        position=_floats(elements, "position", 3),
        orientation=_floats(elements, "orientation", 6),
        spacing_yx=_floats(elements, "spacing_yx", 2),
        slope=slope[0] if slope else None,
        intercept=intercept[0] if intercept else None,
        frames=max(1, int(frames[0])),
        rows=_unsigned(elements, "rows", 0),
        columns=_unsigned(elements, "columns", 0),
        samples=_unsigned(elements, "samples", 1),
        bits_allocated=(allocated := _unsigned(elements, "bits_allocated", 0)),
        bits_stored=(stored := _unsigned(elements, "bits_stored", allocated)),
        high_bit=_unsigned(elements, "high_bit", stored - 1),
        signed=_unsigned(elements, "signed", 0) == 1,
        padding=_padding(elements),
        parts=_unsigned(elements, "parts", 0),
    )


def _digest(value: bytes) -> str:
    stripped = value.strip(b" \0")
    return hashlib.blake2b(stripped, digest_size=8).hexdigest() if stripped else ""


def _padding(elements: Elements) -> int | None:
    raw = elements.values.get(_TAGS["padding"], b"")
    return int.from_bytes(raw, "little" if elements.little_endian else "big") if len(raw) == 2 else None


def _floats(elements: Elements, field: str, count: int) -> tuple[float, ...] | None:
    raw = text(elements.values.get(_TAGS[field], b""))
    if not raw:
        return None
    parts = raw.split("\\")
    try:
        values = tuple(float(part) for part in parts)
    except ValueError:
        raise ValueError(f"{field} is not a number") from None
    if len(values) != count or not all(map(math.isfinite, values)):
        raise ValueError(f"{field} has {len(values)} values, expected {count} finite ones")
    return values


def _instance_number(elements: Elements) -> int | None:
    raw = text(elements.values.get(_TAGS["number"], b""))
    return int(raw) if raw.lstrip("-").isdecimal() and len(raw) < 12 else None


def _unsigned(elements: Elements, field: str, default: int) -> int:
    raw = elements.values.get(_TAGS[field], b"")
    if not raw:
        return default
    if len(raw) not in (2, 4):
        raise ValueError(f"{field} has {len(raw)} bytes, expected 2")
    return int.from_bytes(raw, "little" if elements.little_endian else "big")
