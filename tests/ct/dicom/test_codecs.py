"""Every common transfer syntax is decoded to the stored values; inconsistent frames never reach a decoder."""

from __future__ import annotations

import base64
import struct
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import gdcm
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.filebase import DicomBytesIO
from pydicom.sequence import Sequence
from pydicom.uid import JPEG2000, HTJ2KLossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless

from featray.ct.dicom import encapsulation
from featray.ct.dicom.codestream import InvalidCodestreamError, parse_codestream
from featray.ct.dicom.elements import Elements, find_fragments
from featray.ct.dicom.read import read_series
from featray.errors import Reason, ScanError

Files = list[tuple[str, bytes]]
MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]

LOSSLESS_SYNTAXES = [
    "ImplicitVRLittleEndian",
    "ExplicitVRBigEndian",
    "DeflatedExplicitVRLittleEndian",
    "RLELossless",
    "JPEGLosslessProcess14",
    "JPEGLosslessProcess14_1",
    "JPEGLSLossless",
    "JPEGLSNearLossless",
    "JPEG2000Lossless",
    "JPEG2000",
]
"""GDCM's names of transfer syntaxes that preserve the test volume exactly."""

SHAPE = (3, 24, 20)

HTJ2K = base64.b64decode(
    "/0//UQApQAAAAAAEAAAABgAAAAAAAAAAAAAABAAAAAYAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
    "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAEwAAf+TwAAmq/gFB3QAAADAABMARv0DB3QA"
    "wAATQAASgMCBAYt0AOMAh3QAwAAqYAATgEaj8QBCMQJ2AB57/ICCtAD/2Q=="
)
"""Codestream of 6 rows x 4 columns with the values 0, 100, 200 ..., written losslessly by OpenJPH."""


def transcode(dataset: Dataset, syntax: str) -> bytes:
    """Return the file content after GDCM has changed the transfer syntax; `syntax` is GDCM's name for it."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/source", f"{folder}/target"
        dataset.save_as(source)
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(source)
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, syntax)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(target)
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return Path(target).read_bytes()


def make_values(bits: int, *, signed: bool) -> NDArray[np.int64]:
    """Return a smooth volume that uses the whole range of `bits`, with negative values if `signed`."""
    z, y, x = np.indices(SHAPE)
    wave = np.sin(x / 5 + z) * np.cos(y / 7)
    lowest = -(2 ** (bits - 1)) if signed else 0
    return np.asarray(np.rint((wave + 1) / 2 * (2**bits - 1)) + lowest, dtype=np.int64)


def make_slices(
    make_series: MakeSeries, stored: NDArray[np.int64], bits: int, *, signed: bool
) -> dict[str, Dataset]:
    allocated = 16 if bits > 8 else 8
    slices = make_series(
        SHAPE[0],
        Rows=SHAPE[1],
        Columns=SHAPE[2],
        BitsAllocated=allocated,
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(signed),
        RescaleIntercept=0,
    )
    for dataset, plane in zip(slices.values(), stored, strict=True):
        dataset.PixelData = plane.astype(f"{'i' if signed else 'u'}{allocated // 8}").tobytes()
    return slices


def read(files: Files) -> NDArray[np.generic]:
    return read_series(files, max_voxels=10**7).voxels_zyx


def read_refusal_reason(files: Files) -> Reason:
    with pytest.raises(ScanError) as caught:
        read(files)
    return caught.value.reason


@pytest.mark.parametrize("syntax", LOSSLESS_SYNTAXES)
@pytest.mark.parametrize(("bits", "signed"), [(12, False), (16, False), (16, True), (12, True), (8, False)])
def test_lossless_transfer_syntaxes_preserve_every_value(
    make_series: MakeSeries, syntax: str, bits: int, signed: bool
) -> None:
    stored = make_values(bits, signed=signed)
    slices = make_slices(make_series, stored, bits, signed=signed)

    assert np.array_equal(read([(name, transcode(d, syntax)) for name, d in slices.items()]), stored)


@pytest.mark.parametrize(("syntax", "bits"), [("JPEGBaselineProcess1", 8), ("JPEGExtendedProcess2_4", 12)])
def test_lossy_jpeg_changes_values_by_at_most_two(make_series: MakeSeries, syntax: str, bits: int) -> None:
    stored = make_values(bits, signed=False)
    slices = make_slices(make_series, stored, bits, signed=False)
    voxels = read([(name, transcode(d, syntax)) for name, d in slices.items()])

    assert np.abs(voxels.astype(int) - stored).max() <= 2


def make_compressed_files(
    make_series: MakeSeries,
    encode_file: EncodeFile,
    syntax: str,
    stream: bytes,
    fragments: int = 1,
    **tags: object,
) -> Files:
    """Return the files of two slices: the first has the given codestream, the second uncompressed zeros.

    `fragments` is the number of fragments, `tags` are attributes of both slices.
    """
    slices = make_series(2, PixelRepresentation=0, RescaleIntercept=0, **tags)
    first, second = slices.values()
    second.PixelData = bytes(len(second.PixelData))
    first.file_meta.TransferSyntaxUID = syntax
    first.PixelData = encapsulate([stream], fragments_per_frame=fragments)
    first["PixelData"].is_undefined_length = True
    return [(name, encode_file(dataset)) for name, dataset in slices.items()]


def make_frame(make_series: MakeSeries, syntax: str) -> bytes:
    """Return the codestream of one unsigned 12-bit slice of `SHAPE`."""
    slices = make_slices(make_series, make_values(12, signed=False), 12, signed=False)
    return get_frame(
        dcmread(DicomBytesIO(transcode(slices["001.dcm"], syntax))).PixelData, 0, number_of_frames=1
    )


def test_htj2k_is_decoded(make_series: MakeSeries, encode_file: EncodeFile) -> None:
    voxels = read(make_compressed_files(make_series, encode_file, HTJ2KLossless, HTJ2K))

    assert voxels[0].tolist() == (100 * np.arange(24).reshape(6, 4)).tolist()


def test_a_frame_in_several_fragments_is_joined(make_series: MakeSeries, encode_file: EncodeFile) -> None:
    stream = make_frame(make_series, "JPEG2000Lossless")
    files = make_compressed_files(
        make_series,
        encode_file,
        JPEG2000Lossless,
        stream,
        fragments=5,
        Rows=24,
        Columns=20,
        PixelData=bytes(960),
        BitsStored=12,
        HighBit=11,
    )

    assert np.array_equal(read(files)[0], make_values(12, signed=False)[0])


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_a_codestream_states_its_size_and_precision(make_series: MakeSeries, name: str) -> None:
    stream = parse_codestream(make_frame(make_series, name))

    assert (stream.rows, stream.columns, stream.precision) == (24, 20, 16)


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_a_codestream_cut_anywhere_is_rejected(make_series: MakeSeries, name: str) -> None:
    stream = make_frame(make_series, name)
    for length in range(0, len(stream) - 1, 7):
        with pytest.raises(InvalidCodestreamError):
            parse_codestream(stream[:length])


def test_a_codestream_with_a_marker_inside_its_coded_data_is_damaged(make_series: MakeSeries) -> None:
    stream = bytearray(make_frame(make_series, "JPEGLosslessProcess14_1"))
    stream[-20:-18] = b"\xff\xda"

    with pytest.raises(InvalidCodestreamError, match="damaged"):
        parse_codestream(bytes(stream))


@pytest.mark.parametrize("bits", [24, 48, 8, 0])
def test_a_precision_that_would_overrun_the_decoder_is_unreadable(
    make_series: MakeSeries, encode_file: EncodeFile, bits: int
) -> None:
    stream = bytearray(make_frame(make_series, "JPEGLosslessProcess14_1"))
    stream[stream.index(b"\xff\xc3") + 4] = bits
    files = make_compressed_files(
        make_series, encode_file, JPEGLosslessSV1, bytes(stream), Rows=24, Columns=20, PixelData=bytes(960)
    )

    assert read_refusal_reason(files) == Reason.UNREADABLE


def test_a_frame_in_another_compression_than_its_transfer_syntax_is_unreadable(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    stream = make_frame(make_series, "JPEGLosslessProcess14_1")
    files = make_compressed_files(
        make_series, encode_file, JPEGLSLossless, stream, Rows=24, Columns=20, PixelData=bytes(960)
    )

    assert read_refusal_reason(files) == Reason.UNREADABLE


@pytest.mark.parametrize(("syntax", "highest"), [(JPEG2000Lossless, None), (JPEG2000, 1023)])
def test_decoded_values_beyond_bits_stored_are_unreadable_or_clipped_if_lossy(
    make_series: MakeSeries, encode_file: EncodeFile, syntax: str, highest: int | None
) -> None:
    stream = make_frame(make_series, "JPEG2000Lossless")
    files = make_compressed_files(
        make_series,
        encode_file,
        syntax,
        stream,
        Rows=24,
        Columns=20,
        PixelData=bytes(960),
        BitsStored=10,
        HighBit=9,
    )

    if highest is None:
        assert read_refusal_reason(files) == Reason.UNREADABLE
    else:
        assert read(files)[0].max() == highest


def test_a_tiny_codestream_that_claims_gigabytes_is_rejected_before_allocation(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    files = make_compressed_files(
        make_series, encode_file, JPEG2000Lossless, HTJ2K, Rows=40_000, Columns=40_000, PixelData=bytes(48)
    )

    with pytest.raises(ScanError, match="cannot hold") as caught:
        read_series(files[:1], max_voxels=2 * 10**9)
    assert caught.value.reason == Reason.UNREADABLE


@pytest.mark.parametrize(("bits", "padding"), [(16, 63_536), (12, 63_536)])
def test_padding_written_as_a_large_unsigned_number_becomes_negative(
    make_series: MakeSeries, encode_file: EncodeFile, bits: int, padding: int
) -> None:
    slices = make_series(3, PixelRepresentation=0, BitsStored=bits, HighBit=bits - 1)
    for dataset in slices.values():
        dataset.add_new(0x00280120, "US", padding)
        dataset.PixelData = np.array([padding, 4095] + [5] * 22, np.uint16).tobytes()

    voxels = read([(name, encode_file(dataset)) for name, dataset in slices.items()])

    assert voxels[1].ravel()[:3].tolist() == [-3024, 3071, 5 - 1024]


def test_padding_within_the_stored_range_is_an_ordinary_value(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    slices = make_series(3, PixelRepresentation=0, BitsStored=12, HighBit=11)
    for dataset in slices.values():
        dataset.add_new(0x00280120, "US", 4000)
        dataset.PixelData = np.array([4000] + [5] * 23, np.uint16).tobytes()

    assert read([(name, encode_file(d)) for name, d in slices.items()])[0, 0, 0] == 4000 - 1024


HTJ2K_8_BITS = base64.b64decode(
    "/0//UQApQAAAAAAEAAAABgAAAAAAAAAAAAAABAAAAAYAAAAAAAAAAAABBwEB/1AACAACAAAAAv9SAAwAAgABAAUEBEAB/1wAEyBI"
    "UFBQUFBQUFBQUFBQSEhI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAEAAAf+TwCXBAId0AAAAwBKAUgGHdADAE0AS"
    "gCz7AAt0APkAR3QAwCeATCLyAyPCdQBO54AitAD/2Q=="
)
"""Like `HTJ2K`, with 8 bits and the values 0, 10, 20 ..."""


def test_htj2k_of_eight_bits_is_decoded(make_series: MakeSeries, encode_file: EncodeFile) -> None:
    files = make_compressed_files(
        make_series,
        encode_file,
        HTJ2KLossless,
        HTJ2K_8_BITS,
        BitsAllocated=8,
        BitsStored=8,
        HighBit=7,
        PixelData=bytes(24),
    )

    assert read(files)[0].tolist() == (10 * np.arange(24).reshape(6, 4)).tolist()


STREAMS = ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"]
SYNTAXES = {
    "JPEGLosslessProcess14_1": JPEGLosslessSV1,
    "JPEGLSLossless": JPEGLSLossless,
    "JPEG2000Lossless": JPEG2000Lossless,
}
TAGS = {"Rows": 24, "Columns": 20, "PixelData": bytes(960), "BitsStored": 12, "HighBit": 11}


def strip_padding(stream: bytes) -> bytes:
    return stream[: stream.rindex(b"\xff\xd9") + 2]


@pytest.mark.parametrize("padding", [b"\x20", b"\x01", b"\xd9", b"\xff", b"\0", b"\x47\0", b"\0\0\0"])
@pytest.mark.parametrize("name", STREAMS)
def test_padding_after_the_end_marker_changes_nothing(
    make_series: MakeSeries, encode_file: EncodeFile, name: str, padding: bytes
) -> None:
    stream = strip_padding(make_frame(make_series, name)) + padding
    files = make_compressed_files(make_series, encode_file, SYNTAXES[name], stream, **TAGS)

    assert np.array_equal(read(files)[0], make_values(12, signed=False)[0])


def test_a_last_tile_part_of_open_length_ends_before_the_padding(make_series: MakeSeries) -> None:
    stream = bytearray(strip_padding(make_frame(make_series, "JPEG2000Lossless")))
    tile = stream.index(b"\xff\x90")
    stream[tile + 6 : tile + 10] = bytes(4)

    for padding in (b"", b"\0", b"\x20"):
        assert parse_codestream(bytes(stream) + padding).size == len(stream)
    with pytest.raises(InvalidCodestreamError) as caught:
        parse_codestream(bytes(stream[:-2]))
    assert caught.value.is_truncated


@pytest.mark.parametrize("name", STREAMS)
def test_more_than_one_byte_of_other_data_after_the_end_marker_is_damage(
    make_series: MakeSeries, name: str
) -> None:
    stream = strip_padding(make_frame(make_series, name))

    for rest in (b"\x20\x20", b"\0\x20", b"\x20\0\x20"):
        with pytest.raises(InvalidCodestreamError, match="damaged"):
            parse_codestream(stream + rest)


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_whose_end_marker_is_replaced_by_padding_is_truncated(
    make_series: MakeSeries, name: str
) -> None:
    stream = strip_padding(make_frame(make_series, name))

    for rest in (b"", b"\x20", b"\xff", b"\0\0"):
        with pytest.raises(InvalidCodestreamError) as caught:
            parse_codestream(stream[:-2] + rest)
        assert caught.value.is_truncated


EncodeFrames = Callable[..., Files]


@pytest.fixture
def encode_frames(make_series: MakeSeries, encode_file: EncodeFile) -> EncodeFrames:
    """Return a function that makes an enhanced JPEG 2000 file of 12-bit frames of `SHAPE`.

    Its arguments are the fragments of each frame and the Basic Offset Table, None for the right one.
    """

    def encode(frames: list[list[bytes]], table: list[int] | None = None) -> Files:
        (dataset,) = make_series(1, PixelRepresentation=0, RescaleIntercept=0, **TAGS).values()
        dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
        dataset.NumberOfFrames = len(frames)
        dataset.PerFrameFunctionalGroupsSequence = Sequence(map(make_plane_group, range(len(frames))))
        starts = np.cumsum([0, *(sum(len(fragment) + 8 for fragment in frame) for frame in frames)])
        offsets = starts[:-1].tolist() if table is None else table
        items = [struct.pack(f"<{len(offsets)}I", *offsets), *(part for frame in frames for part in frame)]
        dataset.PixelData = b"".join(
            b"\xfe\xff\0\xe0" + struct.pack("<I", len(item)) + item for item in items
        )
        dataset["PixelData"].is_undefined_length = True
        dataset["PixelData"].VR = "OB"
        return [("v.dcm", encode_file(dataset))]

    return encode


def make_plane_group(z: int) -> Dataset:
    """Return the functional groups of a frame at `z` mm."""
    plane, group = Dataset(), Dataset()
    plane.ImagePositionPatient = [0, 0, z]
    group.PlanePositionSequence = Sequence([plane])
    return group


@pytest.fixture
def frame_streams(make_series: MakeSeries) -> list[bytes]:
    """Return one JPEG 2000 stream of even length per slice of `make_values(12)`."""
    slices = make_slices(make_series, make_values(12, signed=False), 12, signed=False)
    streams = []
    for dataset in slices.values():
        decoded = dcmread(DicomBytesIO(transcode(dataset, "JPEG2000Lossless")))
        streams.append(get_frame(decoded.PixelData, 0, number_of_frames=1))
    return streams


def cut(stream: bytes, *places: int) -> list[bytes]:
    """Return the fragments of a stream that is cut at the given places."""
    edges = [0, *places, len(stream)]
    return [stream[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize(
    ("places", "table"),
    [
        pytest.param([(), (), ()], None, id="one-fragment-per-frame"),
        pytest.param([(), (), ()], [], id="no-table"),
        pytest.param([(), (), ()], [0, 4, 8], id="wrong-table"),
        pytest.param([(), (), ()], [0], id="table-of-one-frame"),
        pytest.param([(20,), (), (10, 40)], None, id="several-fragments"),
        pytest.param([(20,), (), (10, 40)], [], id="several-fragments-without-table"),
        pytest.param([(20,), (), (10, 40)], [0, 4, 8], id="several-fragments-with-wrong-table"),
    ],
)
def test_frames_are_found_among_their_fragments(
    encode_frames: EncodeFrames,
    frame_streams: list[bytes],
    places: list[tuple[int, ...]],
    table: list[int] | None,
) -> None:
    frames = [cut(stream, *cuts) for stream, cuts in zip(frame_streams, places, strict=True)]

    assert np.array_equal(read(encode_frames(frames, table)), make_values(12, signed=False))


def test_frames_that_no_table_and_no_end_marker_separate_are_unreadable(
    encode_frames: EncodeFrames, frame_streams: list[bytes]
) -> None:
    frames = [cut(stream, 20) for stream in frame_streams]
    frames[1][1] = frames[1][1][:-12]

    assert read_refusal_reason(encode_frames(frames, [])) == Reason.UNREADABLE


def test_fewer_fragments_than_frames_are_truncated(
    encode_frames: EncodeFrames, frame_streams: list[bytes]
) -> None:
    frames = [[frame_streams[0]], [frame_streams[1]], []]

    assert read_refusal_reason(encode_frames(frames, [])) == Reason.TRUNCATED


def test_the_fragments_of_a_file_are_searched_for_once_and_not_copied_together(
    encode_frames: EncodeFrames, frame_streams: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []

    def search(elements: Elements) -> list[tuple[int, int]]:
        searches.append(len(elements.data))
        return find_fragments(elements)

    monkeypatch.setattr(encapsulation, "find_fragments", search)
    streams = frame_streams * 20
    files = encode_frames([[stream] for stream in streams])

    voxels = read(files)

    assert np.array_equal(voxels, np.tile(make_values(12, signed=False), (20, 1, 1)))
    assert searches == [len(files[0][1])]
