"""Test damaged files and false headers in all single-file formats.

Each file must give the correct volume or a reason, and a reader must not allocate much memory.
"""

from __future__ import annotations

import gzip
import random
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import nibabel as nib
import numpy as np
import pytest

from featray.ct.formats.metaimage import read_metaimage
from featray.ct.formats.nifti import read_nifti, read_nifti_pair
from featray.ct.formats.nrrd import read_nrrd
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

LIMIT = 2 * 10**9
SMALL = 4 * 2**20
"""Limit of the memory that a reader may allocate for a file of about 1 kB."""

SHAPE_XYZ = (7, 6, 5)
STORED_XYZ = np.random.default_rng(3).integers(-1000, 1000, SHAPE_XYZ).astype(np.int16)
RAW = STORED_XYZ.tobytes(order="F")


@dataclass(frozen=True)
class Format:
    """Functions of one format.

    Attributes:
        write: Returns a file from the shape (x, y, z) that its header claims and the bytes of its data.
        read: Reads a file.
        compress: Compresses the data, if `write` does not do so.
    """

    write: Callable[[tuple[int, int, int], bytes], bytes]
    read: Callable[[bytes], Volume]
    compress: Callable[[bytes], bytes] | None = None


def make_nifti_header(shape_xyz: tuple[int, int, int], kind: type = nib.Nifti1Image) -> bytearray:
    head = bytearray(kind(STORED_XYZ, np.diag([0.5, 1, 2, 1])).to_bytes()[: -len(RAW)])
    if kind is nib.Nifti1Image:
        head[42:48] = struct.pack("<3h", *shape_xyz)
    else:
        head[24:48] = struct.pack("<3q", *shape_xyz)
    return head


def write_nifti1(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
    return bytes(make_nifti_header(shape_xyz)) + data


def write_nifti2(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
    return bytes(make_nifti_header(shape_xyz, nib.Nifti2Image)) + data


def make_nrrd_writer(encoding: str) -> Callable[[tuple[int, int, int], bytes], bytes]:
    def write(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
        sizes = " ".join(map(str, shape_xyz))
        return (
            f"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n"
            "space directions: (0.5,0,0) (0,1,0) (0,0,2)\nkinds: domain domain domain\nendian: little\n"
            f"encoding: {encoding}\nspace origin: (1,2,3)\n\n"
        ).encode() + data

    return write


def make_metaimage_writer(*, compressed: bool) -> Callable[[tuple[int, int, int], bytes], bytes]:
    def write(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
        sizes = " ".join(map(str, shape_xyz))
        return (
            f"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
            f"CompressedData = {compressed}\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 1 2 3\n"
            f"ElementSpacing = 0.5 1 2\nDimSize = {sizes}\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        ).encode() + data

    return write


def read_any_nifti(data: bytes) -> Volume:
    return read_nifti(data, max_voxels=LIMIT)


def read_any_nrrd(data: bytes) -> Volume:
    return read_nrrd(data, max_voxels=LIMIT)


def read_any_metaimage(data: bytes) -> Volume:
    return read_metaimage(data, max_voxels=LIMIT)


def write_gzipped_nifti(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
    return gzip.compress(write_nifti1(shape_xyz, data))


FORMATS = {
    "nii": Format(write_nifti1, read_any_nifti),
    "nii-2": Format(write_nifti2, read_any_nifti),
    "nii-gz": Format(write_gzipped_nifti, read_any_nifti),
    "nrrd-raw": Format(make_nrrd_writer("raw"), read_any_nrrd),
    "nrrd-gz": Format(make_nrrd_writer("gzip"), read_any_nrrd, gzip.compress),
    "mha-raw": Format(make_metaimage_writer(compressed=False), read_any_metaimage),
    "mha-zlib": Format(make_metaimage_writer(compressed=True), read_any_metaimage, zlib.compress),
}
for_every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


def write_file(kind: Format, shape_xyz: tuple[int, int, int] = SHAPE_XYZ, data: bytes = RAW) -> bytes:
    return kind.write(shape_xyz, kind.compress(data) if kind.compress else data)


def measure_error(kind: Format, data: bytes) -> tuple[Reason, int]:
    """Return the reason of the error and the largest amount of memory that was allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(ScanError) as caught:
            kind.read(data)
        return caught.value.reason, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@for_every_format
def test_the_undamaged_file_is_read(kind: Format) -> None:
    assert (kind.read(write_file(kind)).voxels_zyx == STORED_XYZ.T).all()


@for_every_format
def test_a_claimed_shape_of_30000_cubed_is_too_large_and_allocates_no_memory(kind: Format) -> None:
    data = write_file(kind, (30_000, 30_000, 30_000))

    reason, peak = measure_error(kind, data)

    assert (reason, peak < SMALL, len(data) < 1200) == (Reason.TOO_LARGE, True, True)


@for_every_format
def test_a_claimed_shape_that_the_file_cannot_hold_allocates_no_memory(kind: Format) -> None:
    reason, peak = measure_error(kind, write_file(kind, (1200, 1200, 1200)))

    assert (reason, peak < SMALL) == (Reason.TRUNCATED, True)


@for_every_format
def test_data_are_not_inflated_beyond_the_size_in_the_header(kind: Format) -> None:
    reason, peak = measure_error(kind, write_file(kind, data=RAW + bytes(2 * 10**7)))

    plain = kind.compress is None and kind.write is not write_gzipped_nifti
    assert reason == Reason.UNREADABLE
    assert plain or peak < SMALL


@for_every_format
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_a_file_of_the_first_bytes_only_is_rejected(kind: Format, count: int) -> None:
    with pytest.raises(ScanError) as caught:
        kind.read(write_file(kind)[:count])

    assert caught.value.reason in (Reason.EMPTY, Reason.TRUNCATED, Reason.UNREADABLE)


@for_every_format
def test_a_file_cut_at_any_byte_is_rejected(kind: Format) -> None:
    data = write_file(kind)

    for count in range(len(data)):
        with pytest.raises(ScanError):
            kind.read(data[:count])


@for_every_format
def test_zeros_and_random_bytes_are_unreadable(kind: Format) -> None:
    for data in (bytes(10**5), random.Random(1).randbytes(10**5)):
        assert measure_error(kind, data)[0] == Reason.UNREADABLE


@pytest.mark.parametrize("name", ["nii-gz", "nrrd-gz", "mha-zlib"])
def test_a_wrong_checksum_is_unreadable(name: str) -> None:
    kind = FORMATS[name]
    data = bytearray(write_file(kind))
    data[-6 if "gz" in name else -2] ^= 1

    assert measure_error(kind, bytes(data))[0] == Reason.UNREADABLE


@pytest.mark.parametrize("name", ["nii-gz", "nrrd-gz", "mha-zlib"])
def test_bytes_after_the_compressed_stream_are_ignored(name: str) -> None:
    data = write_file(FORMATS[name]) + b"garbage" * 100

    assert (FORMATS[name].read(data).voxels_zyx == STORED_XYZ.T).all()


def test_an_nrrd_file_with_several_gzip_members_is_read() -> None:
    kind = FORMATS["nrrd-gz"]
    members = gzip.compress(RAW[:100]) + gzip.compress(b"") + gzip.compress(RAW[100:])

    assert (kind.read(kind.write(SHAPE_XYZ, members)).voxels_zyx == STORED_XYZ.T).all()


def test_thousands_of_empty_gzip_members_allocate_no_memory() -> None:
    data = gzip.compress(b"") * 5000

    reason, peak = measure_error(FORMATS["nii-gz"], data)

    assert (reason, peak < SMALL) == (Reason.TRUNCATED, True)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Return the data with a few bytes changed and, in one of three cases, a piece removed or repeated."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        result[rng.randrange(len(result))] = rng.choice((0, 1, 32, 57, 127, 128, 255, rng.randrange(256)))
    start = rng.randrange(len(result))
    piece = result[start : start + rng.randint(1, 40)]
    change = rng.randrange(12)
    if change == 0:
        del result[start:]
    elif change == 1:
        del result[start : start + len(piece)]
    elif change == 2:
        result[start:start] = piece
    elif change == 3:
        result += piece
    return bytes(result)


def assert_is_valid(volume: Volume) -> None:
    voxels = volume.voxels_zyx
    assert voxels.ndim == 3
    assert min(voxels.shape) > 1
    assert voxels.dtype in (np.int16, np.int32, np.float32)
    assert np.isfinite(voxels).all()
    assert np.isfinite(volume.affine_lps).all()
    assert 0.001 <= min(volume.spacing_zyx) <= max(volume.spacing_zyx) <= 100


@pytest.mark.slow
@for_every_format
def test_mutated_files_give_a_valid_volume_or_a_reason_and_allocate_little_memory(kind: Format) -> None:
    rng = random.Random(20)
    good = write_file(kind)
    tracemalloc.start()
    for _ in range(700):
        try:
            assert_is_valid(kind.read(mutate(rng, good)))
        except ScanError:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < SMALL


@pytest.mark.parametrize("name", ["nii-gz", "nrrd-gz", "mha-zlib"])
def test_damage_in_a_stream_with_a_checksum_never_changes_a_voxel(name: str) -> None:
    kind, rng = FORMATS[name], random.Random(21)
    good = write_file(kind)
    stream = len(kind.compress(RAW)) if kind.compress else len(good) - 10
    for _ in range(500):
        data = bytearray(good)
        data[len(data) - 1 - rng.randrange(stream)] ^= 1 << rng.randrange(8)
        try:
            volume = kind.read(bytes(data))
        except ScanError:
            continue
        assert (volume.voxels_zyx == STORED_XYZ.T).all()


def test_mutated_pairs_give_a_valid_volume_or_a_reason() -> None:
    rng = random.Random(22)
    head = make_nifti_header(SHAPE_XYZ)
    head[108:112], head[344:348] = struct.pack("<f", 0), b"ni1\0"
    assert (read_nifti_pair(bytes(head), RAW, max_voxels=LIMIT).voxels_zyx == STORED_XYZ.T).all()
    for _ in range(700):
        try:
            volume = read_nifti_pair(mutate(rng, bytes(head)), RAW, max_voxels=LIMIT)
        except ScanError:
            continue
        assert_is_valid(volume)
