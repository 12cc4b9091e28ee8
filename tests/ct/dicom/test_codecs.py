"""Every common transfer syntax gives the stored values back, and no frame that lies reaches a decoder."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable
from pathlib import Path

import gdcm
import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000, HTJ2KLossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless

from featray.ct.dicom.codestream import InvalidCodestreamError, parse_codestream
from featray.ct.dicom.read import read_series
from featray.errors import Reason, ScanError

Files = list[tuple[str, bytes]]
SeriesOf = Callable[..., dict[str, Dataset]]
ToBytes = Callable[[Dataset], bytes]

LOSSLESS = ["ImplicitVRLittleEndian", "ExplicitVRBigEndian", "DeflatedExplicitVRLittleEndian", "RLELossless"]
LOSSLESS += ["JPEGLosslessProcess14", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEGLSNearLossless"]
LOSSLESS += ["JPEG2000Lossless", "JPEG2000"]
SHAPE = (3, 24, 20)

HTJ2K = base64.b64decode(
    "/0//UQApQAAAAAAEAAAABgAAAAAAAAAAAAAABAAAAAYAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
    "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAEwAAf+TwAAmq/gFB3QAAADAABMARv0DB3QA"
    "wAATQAASgMCBAYt0AOMAh3QAwAAqYAATgEaj8QBCMQJ2AB57/ICCtAD/2Q=="
)
"""6 rows x 4 columns counting up by 100 from 0, reversible, by OpenJPH."""


def transcoded(dataset: Dataset, syntax: str) -> bytes:
    """The slice in another transfer syntax, named as GDCM does, written by GDCM."""
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


def values(bits: int, signed: bool) -> NDArray[np.int64]:
    """A smooth volume that uses all bits, negative numbers included."""
    z, y, x = np.indices(SHAPE)
    wave = np.sin(x / 5 + z) * np.cos(y / 7)
    lowest = -(2 ** (bits - 1)) if signed else 0
    return np.asarray(np.rint((wave + 1) / 2 * (2**bits - 1)) + lowest, dtype=np.int64)


def made(series_of: SeriesOf, stored: NDArray[np.int64], bits: int, signed: bool) -> dict[str, Dataset]:
    wide = 16 if bits > 8 else 8
    slices = series_of(
        SHAPE[0],
        Rows=SHAPE[1],
        Columns=SHAPE[2],
        BitsAllocated=wide,
        BitsStored=bits,
        HighBit=bits - 1,
        PixelRepresentation=int(signed),
        RescaleIntercept=0,
    )
    for dataset, plane in zip(slices.values(), stored, strict=True):
        dataset.PixelData = plane.astype(f"{'i' if signed else 'u'}{wide // 8}").tobytes()
    return slices


def read(files: Files) -> NDArray[np.generic]:
    return read_series(files, max_voxels=10**7).voxels_zyx


def refusal(files: Files) -> Reason:
    with pytest.raises(ScanError) as refused:
        read(files)
    return refused.value.reason


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize(("bits", "signed"), [(12, False), (16, False), (16, True), (12, True), (8, False)])
def test_lossless_syntaxes_give_every_value_back(
    series_of: SeriesOf, syntax: str, bits: int, signed: bool
) -> None:
    stored = values(bits, signed)
    slices = made(series_of, stored, bits, signed)

    assert np.array_equal(read([(name, transcoded(d, syntax)) for name, d in slices.items()]), stored)


@pytest.mark.parametrize(("syntax", "bits"), [("JPEGBaselineProcess1", 8), ("JPEGExtendedProcess2_4", 12)])
def test_lossy_jpeg_gives_nearly_every_value_back(series_of: SeriesOf, syntax: str, bits: int) -> None:
    stored = values(bits, signed=False)
    slices = made(series_of, stored, bits, signed=False)
    found = read([(name, transcoded(d, syntax)) for name, d in slices.items()])

    assert np.abs(found.astype(int) - stored).max() <= 2


def compressed(
    series_of: SeriesOf, to_bytes: ToBytes, syntax: str, stream: bytes, pieces: int = 1, **tags: object
) -> Files:
    """Two slices of which the second holds zeros, natively; the first has the given code stream."""
    slices = series_of(2, PixelRepresentation=0, RescaleIntercept=0, **tags)
    first, second = slices.values()
    second.PixelData = bytes(len(second.PixelData))
    first.file_meta.TransferSyntaxUID = syntax
    first.PixelData = encapsulate([stream], fragments_per_frame=pieces)
    first["PixelData"].is_undefined_length = True
    return [(name, to_bytes(dataset)) for name, dataset in slices.items()]


def frame(series_of: SeriesOf, syntax: str, bits: int = 12, signed: bool = False) -> bytes:
    """One code stream of `SHAPE`."""
    from pydicom import dcmread
    from pydicom.encaps import get_frame
    from pydicom.filebase import DicomBytesIO

    slices = made(series_of, values(bits, signed), bits, signed)
    return get_frame(
        dcmread(DicomBytesIO(transcoded(slices["001.dcm"], syntax))).PixelData, 0, number_of_frames=1
    )


def test_htj2k_is_decoded(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    found = read(compressed(series_of, file_bytes, HTJ2KLossless, HTJ2K))

    assert found[0].tolist() == (100 * np.arange(24).reshape(6, 4)).tolist()


def test_a_frame_in_several_fragments_is_joined(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    stream = frame(series_of, "JPEG2000Lossless")
    files = compressed(series_of, file_bytes, JPEG2000Lossless, stream, pieces=5, Rows=24, Columns=20,
                       PixelData=bytes(960), BitsStored=12, HighBit=11)  # fmt: skip

    assert np.array_equal(read(files)[0], values(12, signed=False)[0])


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_a_stream_says_what_it_holds(series_of: SeriesOf, name: str) -> None:
    stream = parse_codestream(frame(series_of, name))

    assert (stream.rows, stream.columns, stream.precision) == (24, 20, 16)


@pytest.mark.parametrize("name", ["JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"])
def test_a_stream_cut_anywhere_is_found_out(series_of: SeriesOf, name: str) -> None:
    stream = frame(series_of, name)
    for length in range(0, len(stream) - 1, 7):
        with pytest.raises(InvalidCodestreamError):
            parse_codestream(stream[:length])


def test_a_stream_with_another_marker_in_its_data_is_damaged(series_of: SeriesOf) -> None:
    stream = bytearray(frame(series_of, "JPEGLosslessProcess14_1"))
    stream[-20:-18] = b"\xff\xda"

    with pytest.raises(InvalidCodestreamError, match="damaged"):
        parse_codestream(bytes(stream))


@pytest.mark.parametrize("bits", [24, 48, 8, 0])
def test_a_precision_that_would_overrun_the_decoder_is_refused(
    series_of: SeriesOf, file_bytes: ToBytes, bits: int
) -> None:
    stream = bytearray(frame(series_of, "JPEGLosslessProcess14_1"))
    stream[stream.index(b"\xff\xc3") + 4] = bits
    files = compressed(series_of, file_bytes, JPEGLosslessSV1, bytes(stream), Rows=24, Columns=20,
                       PixelData=bytes(960))  # fmt: skip

    assert refusal(files) == Reason.UNREADABLE


def test_another_compression_than_the_header_says_is_refused(
    series_of: SeriesOf, file_bytes: ToBytes
) -> None:
    stream = frame(series_of, "JPEGLosslessProcess14_1")
    files = compressed(
        series_of, file_bytes, JPEGLSLossless, stream, Rows=24, Columns=20, PixelData=bytes(960)
    )

    assert refusal(files) == Reason.UNREADABLE


@pytest.mark.parametrize(("syntax", "highest"), [(JPEG2000Lossless, None), (JPEG2000, 1023)])
def test_decoded_values_beyond_the_stored_bits_are_refused_or_clipped_if_lossy(
    series_of: SeriesOf, file_bytes: ToBytes, syntax: str, highest: int | None
) -> None:
    stream = frame(series_of, "JPEG2000Lossless")
    files = compressed(series_of, file_bytes, syntax, stream, Rows=24, Columns=20, PixelData=bytes(960),
                       BitsStored=10, HighBit=9)  # fmt: skip

    if highest is None:
        assert refusal(files) == Reason.UNREADABLE
    else:
        assert read(files)[0].max() == highest


def test_a_tiny_stream_that_claims_gigabytes_is_refused_before_anything_is_allocated(
    series_of: SeriesOf, file_bytes: ToBytes
) -> None:
    files = compressed(series_of, file_bytes, JPEG2000Lossless, HTJ2K, Rows=40_000, Columns=40_000,
                       PixelData=bytes(48))  # fmt: skip

    with pytest.raises(ScanError, match="cannot hold") as refused:
        read_series(files[:1], max_voxels=2 * 10**9)
    assert refused.value.reason == Reason.UNREADABLE


@pytest.mark.parametrize(("bits", "padding"), [(16, 63_536), (12, 63_536)])
def test_padding_that_only_makes_sense_as_a_negative_number_is_one(
    series_of: SeriesOf, file_bytes: ToBytes, bits: int, padding: int
) -> None:
    slices = series_of(3, PixelRepresentation=0, BitsStored=bits, HighBit=bits - 1)
    for dataset in slices.values():
        dataset.add_new(0x00280120, "US", padding)
        dataset.PixelData = np.array([padding, 4095] + [5] * 22, np.uint16).tobytes()

    found = read([(name, file_bytes(dataset)) for name, dataset in slices.items()])

    assert found[1].ravel()[:3].tolist() == [-3024, 3071, 5 - 1024]


def test_padding_that_fits_is_a_value_like_others(series_of: SeriesOf, file_bytes: ToBytes) -> None:
    slices = series_of(3, PixelRepresentation=0, BitsStored=12, HighBit=11)
    for dataset in slices.values():
        dataset.add_new(0x00280120, "US", 4000)
        dataset.PixelData = np.array([4000] + [5] * 23, np.uint16).tobytes()

    assert read([(name, file_bytes(d)) for name, d in slices.items()])[0, 0, 0] == 4000 - 1024
