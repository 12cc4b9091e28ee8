"""NIfTI bytes: what is read, what is refused, and that no header is believed."""

from __future__ import annotations

import gzip
import random
import tracemalloc
import zlib
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct.nifti import read_nifti
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

MANY = 10**6
STORED_XYZ = np.arange(-60, 60, dtype=np.int16).reshape(6, 5, 4, order="F")
"""Counts up along x, then y, then z; so voxel (z, y, x) is -60 + x + 6 y + 30 z."""

RAS_MM = np.diag([0.5, 1.0, 2.0, 1.0])


def nifti(stored: NDArray[Any] = STORED_XYZ, affine: NDArray[Any] | None = RAS_MM, **fields: Any) -> bytes:
    """A .nii file made by nibabel; header fields are overwritten last, valid or not."""
    image = nib.Nifti1Image(stored, affine, dtype=stored.dtype)
    data = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    return bytes(data)


def claiming(edge: int) -> bytes:
    """A tiny file whose header claims a cube."""
    return nifti(dim=[3, edge, edge, edge, 1, 1, 1, 1])


def read(data: bytes, max_voxels: int = MANY) -> Volume:
    return read_nifti(data, max_voxels=max_voxels)


def refusal(data: bytes, max_voxels: int = MANY) -> Reason:
    with pytest.raises(ScanError) as refused:
        read(data, max_voxels)
    return refused.value.reason


def test_voxels_come_as_z_y_x_with_the_affine_in_lps() -> None:
    volume = read(nifti())

    assert volume.voxels_zyx.shape == (4, 5, 6)
    assert volume.voxels_zyx[3, 2, 1] == -60 + 1 + 6 * 2 + 30 * 3
    assert volume.voxels_zyx.dtype == np.int16
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)
    assert volume.orientation == "RAS"
    assert (volume.slope, volume.intercept, volume.warnings) == (1.0, 0.0, ())


def test_plain_int16_is_not_copied() -> None:
    data = nifti()

    assert np.shares_memory(read(data).voxels_zyx, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]), id="two-members"),
        pytest.param(lambda data: b"".join(gzip.compress(bytes([b])) for b in data), id="member-per-byte"),
        pytest.param(lambda data: gzip.compress(data) + b"\0" * 512, id="zero-padding-behind"),
        pytest.param(lambda data: gzip.compress(data) + b"garbage" * 99, id="garbage-behind"),
        pytest.param(lambda data: gzip.compress(data + b"\0" * 16), id="padding-inside"),
        pytest.param(lambda data: gzip.compress(data, compresslevel=0), id="stored"),
    ],
)
def test_every_way_to_gzip_gives_the_same_voxels(pack: Any) -> None:
    assert (read(pack(nifti())).voxels_zyx == STORED_XYZ.T).all()


def test_gzip_is_told_by_content_with_long_file_names_in_its_header() -> None:
    plain = gzip.compress(nifti())
    named = plain[:3] + b"\x08" + plain[4:10] + b"n" * 70_000 + b"\0" + plain[10:]

    assert (read(named).voxels_zyx == STORED_XYZ.T).all()


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_number_type_and_byte_order_gives_the_same_values(dtype: str, order: str) -> None:
    stored = (STORED_XYZ + 60).astype(dtype)
    image = nib.Nifti1Image(stored, RAS_MM, dtype=dtype, header=nib.Nifti1Header(endianness=order))

    voxels = read(image.to_bytes()).voxels_zyx

    assert (voxels == stored.T).all()
    assert voxels.dtype == (np.float32 if "f" in dtype else np.int16)
    assert voxels.dtype.isnative


def test_nifti2_is_read() -> None:
    image = nib.Nifti2Image(STORED_XYZ, RAS_MM, dtype=np.int16)

    assert (read(image.to_bytes()).voxels_zyx == STORED_XYZ.T).all()


@pytest.mark.parametrize(
    ("dtype", "slope", "intercept", "expected"),
    [
        (np.int16, 1, -1024, np.int16),
        (np.uint16, 1, -1024, np.int16),
        (np.int16, 2, 5, np.int16),
        (np.int16, 1000, 0, np.int32),
        (np.int16, 1, 40_000, np.int32),
        (np.uint8, 2.2086, 0, np.float32),
        (np.int16, 1, 0.5, np.float32),
        (np.float32, 2, -1024, np.float32),
        (np.int16, -1, 0, np.int16),
    ],
)
def test_slope_and_intercept_are_applied_once(
    dtype: type, slope: float, intercept: float, expected: type
) -> None:
    stored = (STORED_XYZ + 60).astype(dtype)

    volume = read(nifti(stored, scl_slope=slope, scl_inter=intercept))

    assert volume.voxels_zyx.dtype == expected
    assert volume.voxels_zyx == pytest.approx(stored.T * np.float64(slope) + intercept, rel=1e-6)
    assert (volume.slope, volume.intercept) == pytest.approx((slope, intercept))


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_a_slope_that_is_none_switches_the_intercept_off_too(slope: float) -> None:
    volume = read(nifti(scl_slope=slope, scl_inter=5))

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert (volume.slope, volume.intercept) == (1.0, 0.0)


def test_sform_wins_and_a_different_qform_is_told() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.set_sform(RAS_MM, code=1)
    moved = RAS_MM.copy()
    moved[0, 3] = 0.2
    image.set_qform(moved, code=1)

    volume = read(image.to_bytes())

    assert volume.warnings == ("sform_qform_differ",)
    assert volume.affine_lps[0, 3] == 0


def test_a_difference_below_a_tenth_of_a_millimetre_is_not_told() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.set_sform(RAS_MM, code=1)
    moved = RAS_MM.copy()
    moved[0, 3] = 0.05
    image.set_qform(moved, code=1)

    assert read(image.to_bytes()).warnings == ()


def test_qform_alone_is_used_and_told() -> None:
    image = nib.Nifti1Image(STORED_XYZ, None)
    image.set_qform(np.diag([-0.5, -1.0, 2.0, 1.0]), code=1)
    image.set_sform(None, code=0)

    volume = read(image.to_bytes())

    assert (volume.orientation, volume.warnings) == ("LPS", ("qform_only",))


def test_without_any_code_spacing_is_kept_and_the_guess_is_told() -> None:
    data = nifti(affine=None, qform_code=0, sform_code=0, pixdim=[1, 0.5, 1, 2, 0, 0, 0, 0])

    volume = read(data)

    assert (volume.orientation, volume.warnings) == ("RAS", ("orientation_unknown",))
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)


def test_an_unusable_sform_gives_way_to_the_qform() -> None:
    data = nifti(sform_code=1, qform_code=1, srow_x=[0, 0, 0, 0])

    assert read(data).warnings == ("sform_qform_differ",)


def test_a_rotated_affine_is_kept_and_told() -> None:
    angle = np.radians(16.5)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]

    volume = read(nifti(affine=affine))

    assert volume.warnings == ("oblique",)
    assert volume.affine_lps[2, 1] == pytest.approx(np.sin(angle), abs=1e-6)


def test_micrometres_become_millimetres() -> None:
    data = nifti(affine=np.diag([500.0, 1000.0, 2000.0, 1.0]), xyzt_units=3, sform_code=2)

    assert read(data).spacing_zyx == (2.0, 1.0, 0.5)


def test_a_trailing_axis_of_one_is_dropped() -> None:
    assert read(nifti(STORED_XYZ[..., None, None])).voxels_zyx.shape == (4, 5, 6)


SHEARED = RAS_MM.copy()
SHEARED[1, 2] = 0.5
WITH_NAN = STORED_XYZ.astype(np.float32)
WITH_NAN[2, 2, 2] = np.nan
WITH_INF = STORED_XYZ.astype(np.float64)
WITH_INF[2, 2, 2] = 1e300
RGB = np.zeros((6, 5, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Reason.EMPTY, id="empty"),
        pytest.param(b"\0" * 400, Reason.UNREADABLE, id="zeros"),
        pytest.param(b"hello, world" * 99, Reason.UNREADABLE, id="text"),
        pytest.param(gzip.compress(b"hello, world" * 99), Reason.UNREADABLE, id="gzipped-text"),
        pytest.param(b"\x1f\x8b", Reason.UNREADABLE, id="two-bytes-of-gzip"),
        pytest.param(nifti()[:200], Reason.TRUNCATED, id="cut-in-the-header"),
        pytest.param(nifti()[:-1], Reason.TRUNCATED, id="one-byte-short"),
        pytest.param(nifti() + bytes(60), Reason.UNREADABLE, id="a-slice-too-many"),
        pytest.param(gzip.compress(nifti())[:-9], Reason.TRUNCATED, id="gzip-cut"),
        pytest.param(gzip.compress(nifti())[:-4], Reason.TRUNCATED, id="gzip-cut-in-its-trailer"),
        pytest.param(gzip.compress(nifti()[:-1]), Reason.TRUNCATED, id="gzip-of-a-cut-file"),
        pytest.param(gzip.compress(nifti() + bytes(60)), Reason.UNREADABLE, id="gzip-of-too-much"),
        pytest.param(nifti(magic=b"ni1"), Reason.UNSUPPORTED, id="pair"),
        pytest.param(nifti(magic=b""), Reason.UNSUPPORTED, id="analyze"),
        pytest.param(nifti(dim=[2, 6, 20, 1, 1, 1, 1, 1]), Reason.NOT_A_VOLUME, id="an-image"),
        pytest.param(nifti(dim=[3, 6, 20, 1, 1, 1, 1, 1]), Reason.NOT_A_VOLUME, id="one-slice"),
        pytest.param(nifti(dim=[4, 6, 5, 2, 2, 1, 1, 1]), Reason.NOT_A_VOLUME, id="two-volumes"),
        pytest.param(nifti(dim=[3, 0, 5, 4, 1, 1, 1, 1]), Reason.UNREADABLE, id="zero-dimension"),
        pytest.param(nifti(dim=[3, -6, 5, 4, 1, 1, 1, 1]), Reason.UNREADABLE, id="negative-dimension"),
        pytest.param(nifti(dim=[9, 6, 5, 4, 1, 1, 1, 1]), Reason.UNREADABLE, id="nine-axes"),
        pytest.param(claiming(30_000), Reason.TOO_LARGE, id="claims-30000-cubed"),
        pytest.param(claiming(90), Reason.TRUNCATED, id="claims-90-cubed"),
        pytest.param(gzip.compress(claiming(99)), Reason.TRUNCATED, id="gzip-claims-99-cubed"),
        pytest.param(nifti(datatype=9999), Reason.UNREADABLE, id="no-such-type"),
        pytest.param(nifti(datatype=0), Reason.UNSUPPORTED, id="type-unknown"),
        pytest.param(nifti(datatype=1536), Reason.UNSUPPORTED, id="float128"),
        pytest.param(nifti(STORED_XYZ.astype(np.complex64)), Reason.UNSUPPORTED, id="complex"),
        pytest.param(nib.Nifti1Image(RGB, RAS_MM).to_bytes(), Reason.UNSUPPORTED, id="rgb"),
        pytest.param(nifti(vox_offset=np.nan), Reason.UNREADABLE, id="offset-nan"),
        pytest.param(nifti(vox_offset=-352), Reason.UNREADABLE, id="offset-negative"),
        pytest.param(nifti(vox_offset=1e30), Reason.UNREADABLE, id="offset-huge"),
        pytest.param(nifti(vox_offset=4000), Reason.TRUNCATED, id="offset-behind-the-end"),
        pytest.param(nifti(srow_x=[np.nan] * 4), Reason.UNREADABLE, id="sform-nan"),
        pytest.param(nifti(srow_x=[500, 0, 0, 0]), Reason.UNREADABLE, id="spacing-500-mm"),
        pytest.param(nifti(scl_slope=1, scl_inter=np.inf), Reason.UNREADABLE, id="intercept-infinite"),
        pytest.param(nifti(affine=SHEARED, sform_code=1), Reason.GANTRY_TILT, id="sheared"),
        pytest.param(nifti(WITH_NAN), Reason.NON_FINITE, id="nan"),
        pytest.param(nifti(WITH_INF), Reason.NON_FINITE, id="beyond-float32"),
        pytest.param(nifti(scl_slope=3e38), Reason.NON_FINITE, id="slope-overflows"),
        pytest.param(nifti(np.full((6, 5, 4), 7, np.int16)), Reason.NOT_A_VOLUME, id="constant"),
    ],
)  # fmt: skip
def test_bad_files_are_refused_with_their_reason(data: bytes, reason: Reason) -> None:
    assert refusal(data) == reason


def test_a_wrong_checksum_is_unreadable() -> None:
    data = bytearray(gzip.compress(nifti()))
    data[-6] ^= 1

    assert refusal(bytes(data)) == Reason.UNREADABLE


def test_the_limit_counts_voxels() -> None:
    assert read(nifti(), max_voxels=120).voxels_zyx.size == 120
    assert refusal(nifti(), max_voxels=119) == Reason.TOO_LARGE


@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param(gzip.compress(nifti() + bytes(10**8)), id="more-than-claimed"),
        pytest.param(gzip.compress(claiming(999)), id="less-than-claimed"),
        pytest.param(claiming(999), id="plain"),
    ],
)
def test_lies_about_the_size_cost_no_memory(bomb: bytes) -> None:
    tracemalloc.start()
    refusal(bomb, max_voxels=2 * 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * 2**20


def test_thousands_of_damaged_files_end_as_the_right_volume_or_a_reason() -> None:
    chance = random.Random(1)
    good = [nifti(), gzip.compress(nifti())]
    for _ in range(1500):
        data = bytearray(chance.choice(good))
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        try:
            volume = read(bytes(data[: chance.choice((None, None, chance.randrange(len(data))))]))
        except ScanError:
            continue
        assert volume.voxels_zyx.ndim == 3
        assert np.isfinite(volume.affine_lps).all()
        assert np.isfinite(volume.voxels_zyx).all()


def test_extensions_before_the_voxels_are_skipped() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))

    assert (read(gzip.compress(image.to_bytes())).voxels_zyx == STORED_XYZ.T).all()


def test_a_deflate_stream_that_is_not_gzip_is_unreadable() -> None:
    assert refusal(zlib.compress(nifti())) == Reason.UNREADABLE
