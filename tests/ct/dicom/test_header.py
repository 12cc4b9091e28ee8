"""DICOM elements and the header made of them agree with pydicom; damaged headers are reported."""

from __future__ import annotations

import io
import pickle
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from featray.ct.dicom.elements import ParseEnd, decode_text, find_fragments, parse_elements
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import SliceHeader, parse_file, read_header
from featray.errors import Reason, ScanError

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

MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]


class CountingFile(io.BytesIO):
    """A file that counts the bytes read from it."""

    bytes_read = 0

    def read(self, size: int | None = -1) -> bytes:
        part = super().read(size)
        self.bytes_read += len(part)
        return part


@pytest.fixture
def dataset(make_series: MakeSeries) -> Dataset:
    return make_series(1)["001.dcm"]


def read_header_of(data: bytes) -> SliceHeader:
    return read_header(io.BytesIO(data), "folder/001.dcm")


def test_a_header_has_the_values_of_the_file(dataset: Dataset, encode_file: EncodeFile) -> None:
    header = read_header_of(encode_file(dataset))

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
        expected = pydicom.dcmread(path, force=True)
        for keyword, tag in TAGS.items():
            assert (tag in elements.values) == (keyword in expected), (path, keyword)
            if expected.get(keyword) and tag and expected[keyword].VR == "UI":
                assert decode_text(elements.values[tag]) == expected[keyword].value
        start, length = elements.pixel_start, elements.pixel_length
        assert length is None or elements.data[start : start + length] == expected.PixelData
        assert length is not None or len(find_fragments(elements)) >= 2


def test_only_the_beginning_of_a_file_is_read(dataset: Dataset, encode_file: EncodeFile) -> None:
    dataset.Rows, dataset.Columns = 1024, 1024
    dataset.PixelData = bytes(2 * 2**20)
    file = CountingFile(encode_file(dataset))

    assert read_header(file, "x").rows == 1024
    assert file.bytes_read == 2**15


def test_more_is_read_when_the_header_is_long(dataset: Dataset, encode_file: EncodeFile) -> None:
    dataset.add_new(0x00091001, "OB", bytes(300_000))
    file = CountingFile(encode_file(dataset) + bytes(10**7))

    assert read_header(file, "x").rows == 6
    assert file.bytes_read == 2**21


def test_nested_sequences_of_undefined_length_are_skipped(dataset: Dataset, encode_file: EncodeFile) -> None:
    inner, outer = Dataset(), Dataset()
    inner.Rows = 999
    outer.RequestAttributesSequence = Sequence([inner, inner])
    dataset.ReferencedStudySequence = Sequence([outer])
    for element in (dataset["ReferencedStudySequence"], outer["RequestAttributesSequence"]):
        element.is_undefined_length = True
    inner.is_undefined_length_sequence_item = outer.is_undefined_length_sequence_item = True

    assert read_header_of(encode_file(dataset)).rows == 6


def test_a_file_without_preamble_is_dicom_if_its_elements_describe_an_image(
    dataset: Dataset, encode_file: EncodeFile
) -> None:
    header = read_header_of(encode_file(dataset)[132:])

    assert header.is_dicom
    assert header.series_uid == "1.2.3"


@pytest.mark.parametrize(
    "data", [b"text " * 99, b"\x08\0\x05\0CS\x0a\0ISO_IR 100", b"\x02\0\0\0" * 99, bytes(2000), b"\x08"]
)
def test_other_files_are_not_dicom(data: bytes) -> None:
    header = read_header_of(data)

    assert not header.is_dicom
    assert header.problem == Reason.UNREADABLE


def test_an_empty_file_has_the_problem_empty() -> None:
    assert read_header_of(b"").problem == Reason.EMPTY


def test_a_length_beyond_the_end_of_the_file_is_reported_as_truncated(
    dataset: Dataset, encode_file: EncodeFile
) -> None:
    data = bytearray(encode_file(dataset))
    offset = data.index(b"\x28\x00\x10\x00US")
    data[offset + 4 : offset + 12] = b"UN\0\0" + struct.pack("<I", 2**31)

    header = read_header_of(bytes(data))

    assert header.problem == Reason.TRUNCATED
    assert header.series_uid == "1.2.3"


def test_an_invalid_number_is_unreadable(dataset: Dataset, encode_file: EncodeFile) -> None:
    data = encode_file(dataset).replace(b"-1024", b"-10x4")

    assert read_header_of(data).problem == Reason.UNREADABLE


@pytest.mark.parametrize("size", [140, 400, 600])
def test_a_cut_header_is_reported_as_truncated(dataset: Dataset, encode_file: EncodeFile, size: int) -> None:
    assert read_header_of(encode_file(dataset)[:size]).problem == Reason.TRUNCATED


def test_headers_are_small_and_picklable_and_do_not_identify_the_patient(
    dataset: Dataset, encode_file: EncodeFile, identifying_values: tuple[str, ...]
) -> None:
    header = read_header_of(encode_file(dataset))
    pickled = pickle.dumps(header)

    assert pickle.loads(pickled) == header
    assert len(pickled) < 1500
    assert not [value for value in identifying_values if value.encode() in pickled or value in repr(header)]


def test_reading_the_header_of_a_damaged_file_never_raises(dataset: Dataset, encode_file: EncodeFile) -> None:
    rng = random.Random(2)
    good = encode_file(dataset)
    for _ in range(1500):
        data = bytearray(good[: rng.choice((None, None, rng.randrange(len(good))))])
        for _ in range(rng.randint(1, 6)):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        read_header_of(bytes(data))


@pytest.mark.parametrize("tag", [0x00091010, 0x7FD10010], ids=["before-the-geometry", "before-the-pixels"])
@pytest.mark.parametrize("boundary", [2**15, 2**18])
def test_an_element_that_ends_exactly_at_a_read_size_does_not_end_the_header(
    dataset: Dataset, encode_file: EncodeFile, tag: int, boundary: int
) -> None:
    dataset.add_new(tag, "OB", b"")
    end = encode_file(dataset).index(struct.pack("<HH", tag >> 16, tag & 0xFFFF)) + 12
    dataset[tag].value = bytes(boundary - end)
    data = encode_file(dataset)

    header = read_header_of(data)

    assert parse_elements(data[:boundary], WANTED).end is ParseEnd.NO_PIXELS
    assert (header.problem, header.has_pixels, header.rows) == (None, True, 6)
    assert header == read_header_of(data + bytes(2))


def replace_value(data: bytes, keyword: str, raw: bytes) -> bytes:
    """Return the file with another value of an element that has a short length."""
    tag = pydicom.datadict.tag_for_keyword(keyword)
    assert tag is not None
    start = data.index(struct.pack("<HH", tag >> 16, tag & 0xFFFF), 132)
    (length,) = struct.unpack_from("<H", data, start + 6)
    head = data[start : start + 6] + struct.pack("<H", len(raw))
    return data[:start] + head + raw + data[start + 8 + length :]


@pytest.mark.parametrize(
    ("keyword", "raw", "message"),
    [
        ("PixelSpacing", b"0.8,0.8 ", r"PixelSpacing \(0028,0030\) separates its values by a comma"),
        ("PixelSpacing", b"0,8\\0,8 ", r"PixelSpacing \(0028,0030\) has a comma as decimal sign"),
        ("RescaleSlope", b"1,0 ", r"RescaleSlope \(0028,1053\) has a comma as decimal sign"),
        ("RescaleIntercept", b"-1024,", r"RescaleIntercept \(0028,1052\) has a comma as decimal sign"),
        ("ImagePositionPatient", b"1,2,3 ", r"\(0020,0032\) separates its values by a comma"),
        ("ImagePositionPatient", b"1\\2 ", r"ImagePositionPatient \(0020,0032\) has 2 value"),
        ("PixelSpacing", b"nan\\1 ", r"PixelSpacing \(0028,0030\) has 2 value\(s\), expected 2 finite"),
        ("PixelSpacing", b"Mr. X, Y", r"PixelSpacing \(0028,0030\) is not a number"),
        ("Rows", b"6", r"Rows \(0028,0010\) has 1 bytes, expected 2 or 4"),
    ],
)
def test_a_wrong_value_is_reported_with_its_tag_and_without_its_text(
    dataset: Dataset, encode_file: EncodeFile, keyword: str, raw: bytes, message: str
) -> None:
    header = read_header_of(replace_value(encode_file(dataset), keyword, raw))

    assert header.problem is Reason.UNREADABLE
    assert re.match(rf".*{message}.*; correct the header$", header.message)
    assert "Mr" not in header.message


def test_a_copy_is_only_advised_for_a_file_that_is_cut_or_damaged(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    def find_message(edit: Callable[[bytes], bytes]) -> str:
        files = {name: encode_file(dataset) for name, dataset in make_series(3).items()}
        files["002.dcm"] = edit(files["002.dcm"])
        (scan,) = group_into_scans([read_header(io.BytesIO(data), name) for name, data in files.items()])
        assert scan.reason is not None
        return scan.message

    for edit in (
        lambda data: data.replace(b"0.5\\0.25", b"0,5\\0.25"),
        lambda data: data.replace(b"\xe0\x7f\x10\0OW", b"\xe0\x7f\x08\0OF"),
    ):
        assert "copy" not in find_message(edit)
        assert "remove the file if it does not belong to this scan" in find_message(edit)
    assert "copy the file again, or remove the file" in find_message(lambda data: data[:400])


@pytest.mark.parametrize(
    ("size", "reason"), [(30, Reason.UNSUPPORTED), (48, Reason.UNSUPPORTED), (2, Reason.TRUNCATED)]
)
def test_pixels_in_a_private_element_are_unsupported_and_not_truncated(
    dataset: Dataset, encode_file: EncodeFile, size: int, reason: Reason
) -> None:
    del dataset.PixelData
    dataset.add_new(0x07A10010, "LO", "E")
    dataset.add_new(0x07A1100A, "OB", bytes(size))

    with pytest.raises(ScanError) as caught:
        parse_file(encode_file(dataset), "x.dcm")
    assert caught.value.reason is reason
    assert ("(07A1,100A)" in str(caught.value)) == (reason is Reason.UNSUPPORTED)
