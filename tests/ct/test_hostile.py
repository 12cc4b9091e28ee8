"""Files that lie or are damaged, in every single-file format: the right volume or a reason, little memory."""

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
"""More than a reader may take for a file that holds next to nothing."""

SHAPE_XYZ = (7, 6, 5)
STORED_XYZ = np.random.default_rng(3).integers(-1000, 1000, SHAPE_XYZ).astype(np.int16)
RAW = STORED_XYZ.tobytes(order="F")


@dataclass(frozen=True)
class Format:
    """How to write a small file that claims a shape, and how to read it."""

    write: Callable[[tuple[int, int, int], bytes], bytes]
    read: Callable[[bytes], Volume]
    compress: Callable[[bytes], bytes] | None = None


def nifti_header(shape_xyz: tuple[int, int, int], kind: type = nib.Nifti1Image) -> bytearray:
    head = bytearray(kind(STORED_XYZ, np.diag([0.5, 1, 2, 1])).to_bytes()[: -len(RAW)])
    if kind is nib.Nifti1Image:
        head[42:48] = struct.pack("<3h", *shape_xyz)
    else:
        head[24:48] = struct.pack("<3q", *shape_xyz)
    return head


def nifti1(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
    return bytes(nifti_header(shape_xyz)) + data


def nifti2(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
    return bytes(nifti_header(shape_xyz, nib.Nifti2Image)) + data


def nrrd(encoding: str) -> Callable[[tuple[int, int, int], bytes], bytes]:
    def write(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
        sizes = " ".join(map(str, shape_xyz))
        return (
            f"NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n"
            "space directions: (0.5,0,0) (0,1,0) (0,0,2)\nkinds: domain domain domain\nendian: little\n"
            f"encoding: {encoding}\nspace origin: (1,2,3)\n\n"
        ).encode() + data

    return write


def metaimage(compressed: bool) -> Callable[[tuple[int, int, int], bytes], bytes]:
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


def gzipped(shape_xyz: tuple[int, int, int], data: bytes) -> bytes:
    return gzip.compress(nifti1(shape_xyz, data))


FORMATS = {
    "nii": Format(nifti1, read_any_nifti),
    "nii-2": Format(nifti2, read_any_nifti),
    "nii-gz": Format(gzipped, read_any_nifti),
    "nrrd-raw": Format(nrrd("raw"), read_any_nrrd),
    "nrrd-gz": Format(nrrd("gzip"), read_any_nrrd, gzip.compress),
    "mha-raw": Format(metaimage(False), read_any_metaimage),
    "mha-zlib": Format(metaimage(True), read_any_metaimage, zlib.compress),
}
every_format = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


def small(kind: Format, shape_xyz: tuple[int, int, int] = SHAPE_XYZ, data: bytes = RAW) -> bytes:
    return kind.write(shape_xyz, kind.compress(data) if kind.compress else data)


def reason_and_peak(kind: Format, data: bytes) -> tuple[Reason, int]:
    """The reason of the refusal, and the most memory that it took."""
    tracemalloc.start()
    try:
        with pytest.raises(ScanError) as refused:
            kind.read(data)
        return refused.value.reason, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@every_format
def test_the_small_file_itself_is_read(kind: Format) -> None:
    assert (kind.read(small(kind)).voxels_zyx == STORED_XYZ.T).all()


@every_format
def test_a_claim_of_30000_cubed_is_too_large_before_anything_is_allocated(kind: Format) -> None:
    data = small(kind, (30_000, 30_000, 30_000))

    reason, peak = reason_and_peak(kind, data)

    assert (reason, peak < SMALL, len(data) < 1200) == (Reason.TOO_LARGE, True, True)


@every_format
def test_a_claim_below_the_limit_that_the_file_cannot_hold_costs_no_memory(kind: Format) -> None:
    reason, peak = reason_and_peak(kind, small(kind, (1200, 1200, 1200)))

    assert (reason, peak < SMALL) == (Reason.TRUNCATED, True)


@every_format
def test_a_bomb_is_not_inflated_beyond_what_its_header_accounts_for(kind: Format) -> None:
    reason, peak = reason_and_peak(kind, small(kind, data=RAW + bytes(2 * 10**7)))

    plain = kind.compress is None and kind.write is not gzipped
    assert reason == Reason.UNREADABLE
    assert plain or peak < SMALL


@every_format
@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_the_first_bytes_alone_are_refused(kind: Format, count: int) -> None:
    with pytest.raises(ScanError) as refused:
        kind.read(small(kind)[:count])

    assert refused.value.reason in (Reason.EMPTY, Reason.TRUNCATED, Reason.UNREADABLE)


@every_format
def test_every_cut_is_refused(kind: Format) -> None:
    data = small(kind)

    for count in range(len(data)):
        with pytest.raises(ScanError):
            kind.read(data[:count])


@every_format
def test_zeros_and_noise_are_no_volume(kind: Format) -> None:
    for data in (bytes(10**5), random.Random(1).randbytes(10**5)):
        assert reason_and_peak(kind, data)[0] == Reason.UNREADABLE


@pytest.mark.parametrize("name", ["nii-gz", "nrrd-gz", "mha-zlib"])
def test_a_wrong_checksum_is_unreadable(name: str) -> None:
    kind = FORMATS[name]
    data = bytearray(small(kind))
    data[-6 if "gz" in name else -2] ^= 1

    assert reason_and_peak(kind, bytes(data))[0] == Reason.UNREADABLE


@pytest.mark.parametrize("name", ["nii-gz", "nrrd-gz", "mha-zlib"])
def test_garbage_behind_the_stream_is_ignored(name: str) -> None:
    data = small(FORMATS[name]) + b"garbage" * 100

    assert (FORMATS[name].read(data).voxels_zyx == STORED_XYZ.T).all()


def test_nrrd_of_several_gzip_members_is_read() -> None:
    kind = FORMATS["nrrd-gz"]
    members = gzip.compress(RAW[:100]) + gzip.compress(b"") + gzip.compress(RAW[100:])

    assert (kind.read(kind.write(SHAPE_XYZ, members)).voxels_zyx == STORED_XYZ.T).all()


def test_thousands_of_empty_gzip_members_cost_no_memory() -> None:
    data = gzip.compress(b"") * 5000

    reason, peak = reason_and_peak(FORMATS["nii-gz"], data)

    assert (reason, peak < SMALL) == (Reason.TRUNCATED, True)


def mutated(chance: random.Random, data: bytes) -> bytes:
    """A few bytes changed, and now and then a piece cut out, doubled or moved to the end."""
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        result[chance.randrange(len(result))] = chance.choice(
            (0, 1, 32, 57, 127, 128, 255, chance.randrange(256))
        )
    start = chance.randrange(len(result))
    piece = result[start : start + chance.randint(1, 40)]
    change = chance.randrange(12)
    if change == 0:
        del result[start:]
    elif change == 1:
        del result[start : start + len(piece)]
    elif change == 2:
        result[start:start] = piece
    elif change == 3:
        result += piece
    return bytes(result)


def assert_sound(volume: Volume) -> None:
    voxels = volume.voxels_zyx
    assert voxels.ndim == 3
    assert min(voxels.shape) > 1
    assert voxels.dtype in (np.int16, np.int32, np.float32)
    assert np.isfinite(voxels).all()
    assert np.isfinite(volume.affine_lps).all()
    assert 0.001 <= min(volume.spacing_zyx) <= max(volume.spacing_zyx) <= 100


@every_format
def test_thousands_of_mutations_end_as_a_sound_volume_or_a_reason_in_little_memory(kind: Format) -> None:
    chance = random.Random(20)
    good = small(kind)
    tracemalloc.start()
    for _ in range(700):
        try:
            assert_sound(kind.read(mutated(chance, good)))
        except ScanError:
            continue
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < SMALL


@pytest.mark.parametrize("name", ["nii-gz", "nrrd-gz", "mha-zlib"])
def test_damage_inside_a_stream_with_a_checksum_never_changes_a_voxel_in_silence(name: str) -> None:
    kind, chance = FORMATS[name], random.Random(21)
    good = small(kind)
    stream = len(kind.compress(RAW)) if kind.compress else len(good) - 10
    for _ in range(500):
        data = bytearray(good)
        data[len(data) - 1 - chance.randrange(stream)] ^= 1 << chance.randrange(8)
        try:
            volume = kind.read(bytes(data))
        except ScanError:
            continue
        assert (volume.voxels_zyx == STORED_XYZ.T).all()


def test_mutated_pairs_end_as_a_sound_volume_or_a_reason() -> None:
    chance = random.Random(22)
    head = nifti_header(SHAPE_XYZ)
    head[108:112], head[344:348] = struct.pack("<f", 0), b"ni1\0"
    assert (read_nifti_pair(bytes(head), RAW, max_voxels=LIMIT).voxels_zyx == STORED_XYZ.T).all()
    for _ in range(700):
        try:
            volume = read_nifti_pair(mutated(chance, bytes(head)), RAW, max_voxels=LIMIT)
        except ScanError:
            continue
        assert_sound(volume)
