"""The walk through DICOM elements and the header made of it, compared with pydicom and with lies."""

from __future__ import annotations

import io
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from featray.ct.dicom.elements import ParseEnd, decode_text, find_fragments, parse_elements
from featray.ct.dicom.header import SliceHeader, read_header
from featray.errors import Reason

KEYWORDS = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "Modality", "Rows", "Columns", "BitsStored"]
KEYWORDS += [
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "InstanceNumber",
]
TAGS = {keyword: pydicom.datadict.tag_for_keyword(keyword) for keyword in KEYWORDS}
WANTED = frozenset(tag for tag in TAGS.values() if tag is not None)

Slices = Callable[..., dict[str, Dataset]]
ToBytes = Callable[[Dataset], bytes]


class CountingFile(io.BytesIO):
    """A file that knows how much of it was read."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.taken += len(part)
        return part


@pytest.fixture
def one(series_of: Slices) -> Dataset:
    return series_of(1)["001.dcm"]


def header_of(data: bytes) -> SliceHeader:
    return read_header(io.BytesIO(data), "folder/001.dcm")


def test_a_header_holds_what_was_written(one: Dataset, file_bytes: ToBytes) -> None:
    header = header_of(file_bytes(one))

    assert (header.folder, header.file_name, header.problem) == ("folder", "001.dcm", None)
    assert (header.series_uid, header.sop_instance_uid, header.modality) == ("1.2.3", "1.2.3.0", "CT")
    assert (header.rows, header.columns, header.number_of_frames, header.is_signed) == (6, 4, 1, True)
    assert header.position == (-10.0, -20.0, 0.0)
    assert header.orientation == (1, 0, 0, 0, 1, 0)
    assert (header.spacing_yx, header.slope, header.intercept) == ((0.5, 0.25), 1.0, -1024.0)


def test_every_real_header_agrees_with_pydicom(shared_ct: Path) -> None:
    for path in [path for folder in shared_ct.glob("*/*") for path in sorted(folder.rglob("*"))[:60:6]]:
        elements = parse_elements(path.read_bytes(), WANTED) if path.is_file() else None
        if elements is None or elements.end is not ParseEnd.PIXELS:
            continue
        theirs = pydicom.dcmread(path, force=True)
        for keyword, tag in TAGS.items():
            assert (tag in elements.values) == (keyword in theirs), (path, keyword)
            if theirs.get(keyword) and tag and theirs[keyword].VR == "UI":
                assert decode_text(elements.values[tag]) == theirs[keyword].value
        start, length = elements.pixel_start, elements.pixel_length
        assert length is None or elements.data[start : start + length] == theirs.PixelData
        assert length is not None or len(find_fragments(elements)) >= 2


def test_only_the_beginning_of_a_file_is_read(one: Dataset, file_bytes: ToBytes) -> None:
    one.Rows, one.Columns = 1024, 1024
    one.PixelData = bytes(2 * 2**20)
    file = CountingFile(file_bytes(one))

    assert read_header(file, "x").rows == 1024
    assert file.taken == 2**15


def test_more_is_read_when_the_header_is_long(one: Dataset, file_bytes: ToBytes) -> None:
    one.add_new(0x00091001, "OB", bytes(300_000))
    file = CountingFile(file_bytes(one) + bytes(10**7))

    assert read_header(file, "x").rows == 6
    assert file.taken == 2**21


def test_nested_sequences_of_unknown_length_are_stepped_over(one: Dataset, file_bytes: ToBytes) -> None:
    inner, outer = Dataset(), Dataset()
    inner.Rows = 999
    outer.RequestAttributesSequence = Sequence([inner, inner])
    one.ReferencedStudySequence = Sequence([outer])
    for dataset in (one["ReferencedStudySequence"], outer["RequestAttributesSequence"]):
        dataset.is_undefined_length = True
    inner.is_undefined_length_sequence_item = outer.is_undefined_length_sequence_item = True

    assert header_of(file_bytes(one)).rows == 6


def test_a_file_without_preamble_counts_if_it_makes_sense(one: Dataset, file_bytes: ToBytes) -> None:
    header = header_of(file_bytes(one)[132:])

    assert header.is_dicom
    assert header.series_uid == "1.2.3"


@pytest.mark.parametrize(
    "data", [b"text " * 99, b"\x08\0\x05\0CS\x0a\0ISO_IR 100", b"\x02\0\0\0" * 99, bytes(2000), b"\x08"]
)
def test_other_files_are_not_dicom(data: bytes) -> None:
    header = header_of(data)

    assert not header.is_dicom
    assert header.problem == Reason.UNREADABLE


def test_an_empty_file_is_empty() -> None:
    assert header_of(b"").problem == Reason.EMPTY


def test_a_length_that_lies_is_found_out_and_costs_no_memory(one: Dataset, file_bytes: ToBytes) -> None:
    data = bytearray(file_bytes(one))
    place = data.index(b"\x28\x00\x10\x00US")
    data[place + 4 : place + 12] = b"UN\0\0" + struct.pack("<I", 2**31)

    header = header_of(bytes(data))

    assert header.problem == Reason.TRUNCATED
    assert header.series_uid == "1.2.3"


def test_a_number_that_is_none_is_a_problem(one: Dataset, file_bytes: ToBytes) -> None:
    data = file_bytes(one).replace(b"-1024", b"-10x4")

    assert header_of(data).problem == Reason.UNREADABLE


@pytest.mark.parametrize("size", [140, 400, 600])
def test_a_cut_header_keeps_what_it_has(one: Dataset, file_bytes: ToBytes, size: int) -> None:
    assert header_of(file_bytes(one)[:size]).problem == Reason.TRUNCATED


def test_headers_are_small_and_picklable_and_hold_no_identity(
    one: Dataset, file_bytes: ToBytes, planted: tuple[str, ...]
) -> None:
    header = header_of(file_bytes(one))
    pickled = pickle.dumps(header)

    assert pickle.loads(pickled) == header
    assert len(pickled) < 1500
    assert not [value for value in planted if value.encode() in pickled or value in repr(header)]


def test_damaged_files_never_raise(one: Dataset, file_bytes: ToBytes) -> None:
    chance = random.Random(2)
    good = file_bytes(one)
    for _ in range(1500):
        data = bytearray(good[: chance.choice((None, None, chance.randrange(len(good))))])
        for _ in range(chance.randint(1, 6)):
            if data:
                data[chance.randrange(len(data))] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        header_of(bytes(data))
