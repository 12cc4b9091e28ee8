"""NIfTI bytes: what is read, what is refused, and that no header is believed."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable
from itertools import permutations
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct import geometry, regrid
from featray.ct.formats.nifti import read_nifti, read_nifti_pair
from featray.ct.formats.voxel_data import convert_to_shifted_slices
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
    return reason_of(lambda: read(data, max_voxels))


def reason_of(call: Callable[[], Volume]) -> Reason:
    with pytest.raises(ScanError) as refused:
        call()
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


def test_negative_spacing_without_any_code_means_nothing() -> None:
    data = nifti(affine=None, qform_code=0, sform_code=0, pixdim=[1, -0.5, 1, -2, 0, 0, 0, 0])

    volume = read(data)

    assert (volume.orientation, volume.spacing_zyx) == ("RAS", (2.0, 1.0, 0.5))


@pytest.mark.parametrize("step", [0, np.nan, np.inf, 1e-4])
@pytest.mark.parametrize("qform_code", [0, 1])
def test_spacing_that_cannot_be_is_refused_where_it_is_needed(step: float, qform_code: int) -> None:
    data = nifti(affine=None, qform_code=qform_code, sform_code=0, pixdim=[1, 0.5, step, 2, 0, 0, 0, 0])

    assert refusal(data) == Reason.UNREADABLE


@pytest.mark.parametrize("step", [0, -1, np.nan, np.inf])
def test_spacing_that_cannot_be_does_not_matter_beside_an_sform(step: float) -> None:
    data = nifti(sform_code=1, qform_code=0, pixdim=[1, 0.5, step, 2, 0, 0, 0, 0])

    assert read(data).spacing_zyx == (2.0, 1.0, 0.5)


def test_an_sform_that_nobody_filled_in_is_told_by_the_spacing_beside_it() -> None:
    data = nifti(affine=np.eye(4), sform_code=1, qform_code=0, pixdim=[1, 0.7, 0.7, 5, 0, 0, 0, 0])

    assert read(data).warnings == ("sform_qform_differ",)


@pytest.mark.parametrize("qfac", [0, 1, 7])
def test_any_qfac_but_a_negative_one_means_no_flip(qfac: float) -> None:
    image = nib.Nifti1Image(STORED_XYZ, None)
    image.set_qform(RAS_MM, code=1)
    image.set_sform(None, code=0)
    data = bytearray(image.to_bytes())
    data[76:80] = np.float32(qfac).tobytes()

    assert read(bytes(data)).orientation == "RAS"


def test_a_negative_qfac_flips_the_slices() -> None:
    image = nib.Nifti1Image(STORED_XYZ, None)
    image.set_qform(np.diag([0.5, 1.0, -2.0, 1.0]), code=1)
    image.set_sform(None, code=0)

    assert read(image.to_bytes()).orientation == "RAI"


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


def test_metres_become_millimetres() -> None:
    data = nifti(affine=np.diag([0.0005, 0.001, 0.002, 1.0]), xyzt_units=1, sform_code=2)

    assert read(data).spacing_zyx == pytest.approx((2.0, 1.0, 0.5))


def test_metres_that_call_themselves_nothing_are_refused() -> None:
    data = nifti(affine=np.diag([0.0005, 0.001, 0.002, 1.0]), xyzt_units=0, sform_code=2)

    assert refusal(data) == Reason.UNREADABLE


def test_a_trailing_axis_of_one_is_dropped() -> None:
    volume = read_nifti(nifti(STORED_XYZ[..., None, None]), max_voxels=MANY, volume_index=7)

    assert volume.voxels_zyx.shape == (4, 5, 6)
    assert volume.warnings == ()


SERIES_XYZT = np.stack([STORED_XYZ, STORED_XYZ + 1000, -STORED_XYZ], axis=-1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_volume_of_a_series_can_be_chosen_and_is_told(pack: Callable[[bytes], bytes], index: int) -> None:
    volume = read_nifti(pack(nifti(SERIES_XYZT)), max_voxels=MANY, volume_index=index)

    assert (volume.voxels_zyx == SERIES_XYZT[..., index].T).all()
    assert volume.warnings == ("not_a_volume",)
    assert volume.voxels_zyx.base is None, "the others are not kept in memory"


@pytest.mark.parametrize("index", [None, 3, -1])
def test_a_series_without_a_choice_among_its_volumes_is_refused(index: int | None) -> None:
    data = nifti(SERIES_XYZT)

    assert reason_of(lambda: read_nifti(data, max_voxels=MANY, volume_index=index)) == Reason.NOT_A_VOLUME


def test_voxels_of_several_values_are_refused_whatever_is_chosen() -> None:
    data = nifti(SERIES_XYZT[:, :, :, None])

    assert reason_of(lambda: read_nifti(data, max_voxels=MANY, volume_index=0)) == Reason.NOT_A_VOLUME


def test_the_limit_counts_all_volumes_of_a_series() -> None:
    data = nifti(SERIES_XYZT)

    assert reason_of(lambda: read_nifti(data, max_voxels=359, volume_index=0)) == Reason.TOO_LARGE


def test_sheared_axes_can_be_kept_for_someone_who_resamples_them() -> None:
    volume = read_nifti(nifti(affine=SHEARED, sform_code=1), max_voxels=MANY, keep_shear=True)

    assert "gantry_tilt" in volume.warnings
    assert volume.affine_lps[1, 2] == pytest.approx(-0.5)


BALL_LPS = np.array([20.0, 15.0, 30.0])


def ball(affine_lps: NDArray[np.float64], shape_zyx: tuple[int, ...]) -> NDArray[np.float32]:
    """A smooth ball round `BALL_LPS`, as every grid that lies right in space samples it."""
    z, y, x = np.indices(shape_zyx)
    places = np.stack([x, y, z], -1) @ affine_lps[:3, :3].T + affine_lps[:3, 3]
    return (1000 * np.exp(-((places - BALL_LPS) ** 2).sum(-1) / 200) - 500).astype(np.float32)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("step", [2.0, -2.0])
def test_a_tilted_file_can_be_put_upright_whichever_axis_its_slices_run_along(
    order: tuple[int, ...], step: float
) -> None:
    tilted = np.array([[1, 0, 0, -5], [0, 1, 0.6, -10], [0, 0, step, 30 - 15 * step], [0, 0, 0, 1]], float)
    affine = tilted[:, [*order, 3]]
    shape_zyx = tuple((50, 60, 31)[axis] for axis in reversed(order))
    data = nifti(ball(affine, shape_zyx).T, affine=np.diag([-1, -1, 1, 1]) @ affine, sform_code=1)
    volume = read_nifti(data, max_voxels=MANY, keep_shear=True)

    upright = regrid.resample_upright(convert_to_shifted_slices(volume), None)

    assert not geometry.is_sheared(upright.affine_lps)
    expected = ball(upright.affine_lps, upright.voxels_zyx.shape)
    near = expected > 0
    assert near.sum() > 100
    assert np.abs(upright.voxels_zyx - expected)[near].max() < 20


def test_a_file_sheared_along_all_axes_stays_refused() -> None:
    affine = np.array([[1, 0.3, 0.3, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    volume = read_nifti(nifti(affine=affine, sform_code=1), max_voxels=MANY, keep_shear=True)

    assert reason_of(lambda: convert_to_shifted_slices(volume)) == Reason.GANTRY_TILT


def test_a_volume_without_shear_has_no_shifted_slices() -> None:
    volume = read(nifti())

    assert convert_to_shifted_slices(volume) is volume


def pair(kind: type = nib.Nifti1Pair, stored: NDArray[Any] = STORED_XYZ) -> tuple[bytes, bytes]:
    """The .hdr and the .img file that nibabel writes."""
    files = {name: nib.FileHolder(fileobj=io.BytesIO()) for name in ("header", "image")}
    kind(stored, RAS_MM).to_file_map(files)
    return files["header"].fileobj.getvalue(), files["image"].fileobj.getvalue()


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("pack_header", [bytes, gzip.compress])
@pytest.mark.parametrize("pack_image", [bytes, gzip.compress])
def test_a_pair_is_read_like_a_single_file(kind: type, pack_header: Any, pack_image: Any) -> None:
    header, image = pair(kind)

    volume = read_nifti_pair(pack_header(header), pack_image(image), max_voxels=MANY)

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert (volume.spacing_zyx, volume.orientation) == ((2.0, 1.0, 0.5), "RAS")


def test_one_volume_of_a_pair_can_be_chosen() -> None:
    volume = read_nifti_pair(*pair(stored=SERIES_XYZT), max_voxels=MANY, volume_index=1)

    assert (volume.voxels_zyx == STORED_XYZ.T + 1000).all()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda header, image: (b"", image), Reason.EMPTY, id="no-header"),
        pytest.param(lambda header, image: (header, b""), Reason.EMPTY, id="no-image"),
        pytest.param(lambda header, image: (header[:200], image), Reason.TRUNCATED, id="header-cut"),
        pytest.param(lambda header, image: (header, image[:-1]), Reason.TRUNCATED, id="image-cut"),
        pytest.param(lambda header, image: (image, header), Reason.UNREADABLE, id="swapped"),
        pytest.param(lambda header, image: (nifti(), image), Reason.UNREADABLE, id="header-of-a-single-file"),
        pytest.param(
            lambda header, image: (header[:344] + bytes(4), image), Reason.UNSUPPORTED, id="analyze"
        ),
        pytest.param(
            lambda header, image: (gzip.compress(header)[:-4], image), Reason.TRUNCATED, id="gzip-header-cut"
        ),
        pytest.param(
            lambda header, image: (header, image + bytes(60)), Reason.UNREADABLE, id="a-slice-too-many"
        ),
    ],
)
def test_bad_pairs_are_refused_with_their_reason(damage: Any, reason: Reason) -> None:
    assert reason_of(lambda: read_nifti_pair(*damage(*pair()), max_voxels=MANY)) == reason


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
        pytest.param(b"\x1f\x8b", Reason.TRUNCATED, id="two-bytes-of-gzip"),
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


def test_the_limit_counts_voxels() -> None:
    assert read(nifti(), max_voxels=120).voxels_zyx.size == 120
    assert refusal(nifti(), max_voxels=119) == Reason.TOO_LARGE


def test_extensions_before_the_voxels_are_skipped() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))

    assert (read(gzip.compress(image.to_bytes())).voxels_zyx == STORED_XYZ.T).all()


def test_a_deflate_stream_that_is_not_gzip_is_unreadable() -> None:
    assert refusal(zlib.compress(nifti())) == Reason.UNREADABLE
