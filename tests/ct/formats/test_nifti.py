"""Test the NIfTI reader: voxels, geometry, rejected files, and the check of everything a header claims."""

from __future__ import annotations

import gzip
import io
import struct
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
"""Voxel (z, y, x) has the value -60 + x + 6 y + 30 z."""

RAS_MM = np.diag([0.5, 1.0, 2.0, 1.0])


def make_nifti(
    stored: NDArray[Any] = STORED_XYZ, affine: NDArray[Any] | None = RAS_MM, **fields: Any
) -> bytes:
    """Return a .nii file of nibabel in which the given header fields are overwritten, valid or not."""
    image = nib.Nifti1Image(stored, affine, dtype=stored.dtype)
    data = bytearray(image.to_bytes())
    header = nib.Nifti1Header(bytes(data[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    data[:348] = header.binaryblock
    return bytes(data)


def make_nifti_claiming(edge: int) -> bytes:
    """Return a tiny file whose header claims a cube with this edge in voxels."""
    return make_nifti(dim=[3, edge, edge, edge, 1, 1, 1, 1])


def read(data: bytes, max_voxels: int = MANY) -> Volume:
    return read_nifti(data, max_voxels=max_voxels)


def read_reason(data: bytes, max_voxels: int = MANY) -> Reason:
    return catch_reason(lambda: read(data, max_voxels))


def catch_reason(call: Callable[[], Volume]) -> Reason:
    with pytest.raises(ScanError) as caught:
        call()
    return caught.value.reason


def test_voxels_have_axes_z_y_x_and_the_affine_is_lps() -> None:
    volume = read(make_nifti())

    assert volume.voxels_zyx.shape == (4, 5, 6)
    assert volume.voxels_zyx[3, 2, 1] == -60 + 1 + 6 * 2 + 30 * 3
    assert volume.voxels_zyx.dtype == np.int16
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)
    assert volume.orientation == "RAS"
    assert (volume.slope, volume.intercept, volume.warnings) == (1.0, 0.0, ())


def test_plain_int16_is_not_copied() -> None:
    data = make_nifti()

    assert np.shares_memory(read(data).voxels_zyx, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(lambda data: gzip.compress(data[:100]) + gzip.compress(data[100:]), id="two-members"),
        pytest.param(lambda data: b"".join(gzip.compress(bytes([b])) for b in data), id="member-per-byte"),
        pytest.param(lambda data: gzip.compress(data) + b"\0" * 512, id="zeros-after-the-end"),
        pytest.param(lambda data: gzip.compress(data) + b"garbage" * 99, id="garbage-after-the-end"),
        pytest.param(lambda data: gzip.compress(data + b"\0" * 16), id="padding-inside"),
        pytest.param(lambda data: gzip.compress(data, compresslevel=0), id="stored"),
    ],
)
def test_every_kind_of_gzip_file_gives_the_same_voxels(pack: Any) -> None:
    assert (read(pack(make_nifti())).voxels_zyx == STORED_XYZ.T).all()


def test_a_gzip_header_with_a_long_file_name_is_read() -> None:
    plain = gzip.compress(make_nifti())
    named = plain[:3] + b"\x08" + plain[4:10] + b"n" * 70_000 + b"\0" + plain[10:]

    assert (read(named).voxels_zyx == STORED_XYZ.T).all()


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_dtype_and_byte_order_gives_the_same_values(dtype: str, order: str) -> None:
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

    volume = read(make_nifti(stored, scl_slope=slope, scl_inter=intercept))

    assert volume.voxels_zyx.dtype == expected
    assert volume.voxels_zyx == pytest.approx(stored.T * np.float64(slope) + intercept, rel=1e-6)
    assert (volume.slope, volume.intercept) == pytest.approx((slope, intercept))


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_an_invalid_slope_disables_the_intercept_as_well(slope: float) -> None:
    volume = read(make_nifti(scl_slope=slope, scl_inter=5))

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert (volume.slope, volume.intercept) == (1.0, 0.0)


def test_the_sform_is_used_and_a_different_qform_causes_a_warning() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.set_sform(RAS_MM, code=1)
    moved = RAS_MM.copy()
    moved[0, 3] = 0.2
    image.set_qform(moved, code=1)

    volume = read(image.to_bytes())

    assert volume.warnings == ("sform_qform_differ",)
    assert volume.affine_lps[0, 3] == 0


def test_a_difference_below_a_tenth_of_a_mm_causes_no_warning() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.set_sform(RAS_MM, code=1)
    moved = RAS_MM.copy()
    moved[0, 3] = 0.05
    image.set_qform(moved, code=1)

    assert read(image.to_bytes()).warnings == ()


def test_a_qform_without_sform_is_used_and_causes_a_warning() -> None:
    image = nib.Nifti1Image(STORED_XYZ, None)
    image.set_qform(np.diag([-0.5, -1.0, 2.0, 1.0]), code=1)
    image.set_sform(None, code=0)

    volume = read(image.to_bytes())

    assert (volume.orientation, volume.warnings) == ("LPS", ("qform_only",))


def test_a_header_without_affine_has_its_spacing_and_an_unknown_orientation() -> None:
    data = make_nifti(affine=None, qform_code=0, sform_code=0, pixdim=[1, 0.5, 1, 2, 0, 0, 0, 0])

    volume = read(data)

    assert (volume.orientation, volume.warnings) == ("RAS", ("orientation_unknown",))
    assert volume.spacing_zyx == (2.0, 1.0, 0.5)


def test_the_sign_of_the_spacing_has_no_meaning_without_affine() -> None:
    data = make_nifti(affine=None, qform_code=0, sform_code=0, pixdim=[1, -0.5, 1, -2, 0, 0, 0, 0])

    volume = read(data)

    assert (volume.orientation, volume.spacing_zyx) == ("RAS", (2.0, 1.0, 0.5))


@pytest.mark.parametrize("step", [0, np.nan, np.inf, 1e-4])
@pytest.mark.parametrize("qform_code", [0, 1])
def test_an_impossible_spacing_is_rejected_if_it_is_needed(step: float, qform_code: int) -> None:
    data = make_nifti(affine=None, qform_code=qform_code, sform_code=0, pixdim=[1, 0.5, step, 2, 0, 0, 0, 0])

    assert read_reason(data) == Reason.UNREADABLE


@pytest.mark.parametrize("step", [0, -1, np.nan, np.inf])
def test_an_impossible_spacing_is_ignored_if_there_is_an_sform(step: float) -> None:
    data = make_nifti(sform_code=1, qform_code=0, pixdim=[1, 0.5, step, 2, 0, 0, 0, 0])

    assert read(data).spacing_zyx == (2.0, 1.0, 0.5)


def test_an_identity_sform_with_another_spacing_in_pixdim_causes_a_warning() -> None:
    data = make_nifti(affine=np.eye(4), sform_code=1, qform_code=0, pixdim=[1, 0.7, 0.7, 5, 0, 0, 0, 0])

    assert read(data).warnings == ("sform_qform_differ",)


@pytest.mark.parametrize("qfac", [0, 1, 7])
def test_a_qfac_that_is_not_negative_flips_nothing(qfac: float) -> None:
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


def test_the_qform_is_used_if_the_sform_is_unusable() -> None:
    data = make_nifti(sform_code=1, qform_code=1, srow_x=[0, 0, 0, 0])

    assert read(data).warnings == ("sform_qform_differ",)


def make_qform_file(quaternion: Any, pixdim: Any = (1, 0.5, 1, 2, 0, 0, 0, 0), **fields: Any) -> bytes:
    """Return a file with a qform alone."""
    parts = dict(zip(("quatern_b", "quatern_c", "quatern_d"), quaternion, strict=True))
    return make_nifti(affine=None, qform_code=1, sform_code=0, pixdim=pixdim, **parts, **fields)


@pytest.mark.parametrize("length", [1 + 1e-6, 1.0001, 1.0009])
def test_a_quaternion_that_rounding_made_longer_than_1_is_normalized(length: float) -> None:
    exact = np.array([0.36, 0.48, 0.8])
    volume = read(make_qform_file(exact * length))
    expected = nib.quaternions.quat2mat([0, *exact]) @ np.diag([0.5, 1, 2])

    assert volume.affine_lps[:3, :3] == pytest.approx(np.diag([-1, -1, 1]) @ expected, abs=1e-6)
    assert "qform_only" in volume.warnings


def test_a_quaternion_that_is_no_rotation_is_refused() -> None:
    assert read_reason(make_qform_file([0.6, 0.6, 0.6])) == Reason.UNREADABLE


def test_a_quaternion_of_huge_numbers_is_refused_without_a_numpy_warning() -> None:
    image = nib.Nifti2Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_sform(None, code=0)
    image.header["qform_code"] = 1
    data = bytearray(image.to_bytes())
    struct.pack_into("<d", data, 352, 1e200)  # quatern_b of NIfTI-2
    assert read_reason(bytes(data)) == Reason.UNREADABLE


@pytest.mark.parametrize("qfac", [1.0, -1.0])
@pytest.mark.parametrize("signs", [(-1, 1, 1), (1, 1, -1), (-1, -1, -1)])
def test_negative_steps_count_without_sign_as_in_nibabel(signs: tuple[int, ...], qfac: float) -> None:
    steps = [a * b for a, b in zip(signs, (0.5, 1, 2), strict=True)]
    data = make_qform_file([0.36, 0.48, 0.5], [qfac, *steps, 0, 0, 0, 0])
    volume = read(data)

    expected = np.diag([-1, -1, 1, 1]) @ nib.Nifti1Image.from_bytes(data).affine
    assert volume.affine_lps == pytest.approx(expected, abs=1e-6)
    assert {"qform_only", "orientation_unknown"} <= set(volume.warnings)


def test_the_sign_of_a_step_has_no_meaning_beside_an_sform() -> None:
    data = make_nifti(pixdim=[1, -0.5, 1, 2, 0, 0, 0, 0], sform_code=1, qform_code=1)

    assert read(data).warnings == ()


def test_a_rotated_affine_is_kept_and_causes_a_warning() -> None:
    angle = np.radians(16.5)
    affine = np.eye(4)
    affine[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]

    volume = read(make_nifti(affine=affine))

    assert volume.warnings == ("oblique",)
    assert volume.affine_lps[2, 1] == pytest.approx(np.sin(angle), abs=1e-6)


def test_micrometers_are_converted_to_mm() -> None:
    data = make_nifti(affine=np.diag([500.0, 1000.0, 2000.0, 1.0]), xyzt_units=3, sform_code=2)

    assert read(data).spacing_zyx == (2.0, 1.0, 0.5)


def test_meters_are_converted_to_mm() -> None:
    data = make_nifti(affine=np.diag([0.0005, 0.001, 0.002, 1.0]), xyzt_units=1, sform_code=2)

    assert read(data).spacing_zyx == pytest.approx((2.0, 1.0, 0.5))


def test_meters_without_a_unit_are_rejected() -> None:
    data = make_nifti(affine=np.diag([0.0005, 0.001, 0.002, 1.0]), xyzt_units=0, sform_code=2)

    assert read_reason(data) == Reason.UNREADABLE


@pytest.mark.parametrize(
    ("unit", "numbers", "is_plausible"),
    [
        pytest.param(1, 0.7, False, id="mm-called-meter"),
        pytest.param(1, 0.0007, True, id="meter"),
        pytest.param(3, 0.7, False, id="mm-called-micrometer"),
        pytest.param(3, 700, True, id="micrometer"),
        pytest.param(3, 9, True, id="micro-ct"),
        pytest.param(2, 0.7, True, id="mm"),
        pytest.param(0, 0.7, True, id="unknown"),
    ],
)
@pytest.mark.parametrize("code", ["sform_code", "qform_code", ""])
def test_a_unit_that_cannot_be_right_is_named(
    unit: int, numbers: float, is_plausible: bool, code: str
) -> None:
    stored = np.zeros((300, 300, 4), np.int16, "F")
    stored[0] = 1
    codes = {"sform_code": 0, "qform_code": 0} | ({code: 1} if code else {})
    data = make_nifti(stored, np.diag([numbers] * 3 + [1]), xyzt_units=unit, **codes)

    if is_plausible:
        assert read(data).spacing_zyx == pytest.approx([numbers * {1: 1e3, 3: 1e-3}.get(unit, 1)] * 3)
    else:
        with pytest.raises(ScanError, match="xyzt_units") as caught:
            read(data)
        assert caught.value.reason == Reason.UNREADABLE


@pytest.mark.parametrize("shape", [(1, 6, 5, 4), (6, 5, 1, 4), (6, 1, 5, 4)])
@pytest.mark.parametrize("index", [None, 0])
def test_an_axis_of_one_before_the_last_gives_no_advice_that_fails(
    shape: tuple[int, ...], index: int | None
) -> None:
    data = make_nifti(np.arange(120, dtype=np.int16).reshape(shape))

    with pytest.raises(ScanError, match="three axes of the volume first") as caught:
        read_nifti(data, max_voxels=MANY, volume_index=index)
    assert caught.value.reason == Reason.NOT_A_VOLUME
    assert "source.volume" not in str(caught.value)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_64_bit_integers_are_exact_or_refused(dtype: type[np.generic]) -> None:
    stored = (STORED_XYZ.astype(np.int64) + 100).astype(dtype)
    assert (read(make_nifti(stored)).voxels_zyx == stored.T).all()
    assert read(make_nifti(stored)).voxels_zyx.dtype == np.int16

    stored[0, 0, 0] = 2**33
    assert read_reason(make_nifti(stored)) == Reason.UNSUPPORTED


def test_a_trailing_axis_of_one_is_dropped() -> None:
    volume = read_nifti(make_nifti(STORED_XYZ[..., None, None]), max_voxels=MANY, volume_index=7)

    assert volume.voxels_zyx.shape == (4, 5, 6)
    assert volume.warnings == ()


SERIES_XYZT = np.stack([STORED_XYZ, STORED_XYZ + 1000, -STORED_XYZ], axis=-1)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_of_several_volumes_can_be_chosen_and_causes_a_warning(
    pack: Callable[[bytes], bytes], index: int
) -> None:
    volume = read_nifti(pack(make_nifti(SERIES_XYZT)), max_voxels=MANY, volume_index=index)

    assert (volume.voxels_zyx == SERIES_XYZT[..., index].T).all()
    assert volume.warnings == ("not_a_volume",)
    assert volume.voxels_zyx.base is None, "the other volumes must not stay in memory"


@pytest.mark.parametrize("index", [None, 3, -1])
def test_several_volumes_without_a_valid_choice_are_rejected(index: int | None) -> None:
    data = make_nifti(SERIES_XYZT)

    assert catch_reason(lambda: read_nifti(data, max_voxels=MANY, volume_index=index)) == Reason.NOT_A_VOLUME


def test_voxels_with_several_values_are_rejected() -> None:
    data = make_nifti(SERIES_XYZT[:, :, :, None])

    assert catch_reason(lambda: read_nifti(data, max_voxels=MANY, volume_index=0)) == Reason.NOT_A_VOLUME


def test_the_limit_applies_to_all_volumes_together() -> None:
    data = make_nifti(SERIES_XYZT)

    assert catch_reason(lambda: read_nifti(data, max_voxels=359, volume_index=0)) == Reason.TOO_LARGE


def test_sheared_axes_are_kept_if_requested() -> None:
    volume = read_nifti(make_nifti(affine=SHEARED, sform_code=1), max_voxels=MANY, keep_shear=True)

    assert "gantry_tilt" in volume.warnings
    assert volume.affine_lps[1, 2] == pytest.approx(-0.5)


BALL_LPS = np.array([20.0, 15.0, 30.0])


def make_ball(affine_lps: NDArray[np.float64], shape_zyx: tuple[int, ...]) -> NDArray[np.float32]:
    """Return a smooth sphere around `BALL_LPS`, sampled on the given grid."""
    z, y, x = np.indices(shape_zyx)
    positions_lps = np.stack([x, y, z], -1) @ affine_lps[:3, :3].T + affine_lps[:3, 3]
    return (1000 * np.exp(-((positions_lps - BALL_LPS) ** 2).sum(-1) / 200) - 500).astype(np.float32)


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("step", [2.0, -2.0])
def test_a_tilted_file_can_be_resampled_for_every_order_of_its_axes(
    order: tuple[int, ...], step: float
) -> None:
    tilted = np.array([[1, 0, 0, -5], [0, 1, 0.6, -10], [0, 0, step, 30 - 15 * step], [0, 0, 0, 1]], float)
    affine = tilted[:, [*order, 3]]
    shape_zyx = tuple((50, 60, 31)[axis] for axis in reversed(order))
    data = make_nifti(make_ball(affine, shape_zyx).T, affine=np.diag([-1, -1, 1, 1]) @ affine, sform_code=1)
    volume = read_nifti(data, max_voxels=MANY, keep_shear=True)

    upright = regrid.resample_upright(convert_to_shifted_slices(volume), None)

    assert not geometry.is_sheared(upright.affine_lps)
    expected = make_ball(upright.affine_lps, upright.voxels_zyx.shape)
    near = expected > 0
    assert near.sum() > 100
    assert np.abs(upright.voxels_zyx - expected)[near].max() < 20


def test_a_file_sheared_along_all_axes_is_rejected() -> None:
    affine = np.array([[1, 0.3, 0.3, 0], [0, 1, 0.3, 0], [0, 0, 1, 0], [0, 0, 0, 1]], float)
    volume = read_nifti(make_nifti(affine=affine, sform_code=1), max_voxels=MANY, keep_shear=True)

    assert catch_reason(lambda: convert_to_shifted_slices(volume)) == Reason.GANTRY_TILT


def test_the_policy_is_only_advised_for_a_shear_that_it_accepts() -> None:
    everywhere = np.array([[1, 0.3, 0.3, 0], [0.3, 1, 0.3, 0], [0, 0.3, 1, 0], [0, 0, 0, 1.0]])

    for affine, is_advised in ((SHEARED, True), (everywhere, False)):
        with pytest.raises(ScanError) as caught:
            read_nifti(make_nifti(affine=affine, sform_code=1), max_voxels=MANY)
        assert caught.value.reason == Reason.GANTRY_TILT
        assert ("set policy.gantry_tilt: resample" in str(caught.value)) == is_advised


def test_a_volume_without_shear_is_not_converted_to_shifted_slices() -> None:
    volume = read(make_nifti())

    assert convert_to_shifted_slices(volume) is volume


def make_pair(kind: type = nib.Nifti1Pair, stored: NDArray[Any] = STORED_XYZ) -> tuple[bytes, bytes]:
    """Return the .hdr and the .img file that nibabel writes."""
    files = {name: nib.FileHolder(fileobj=io.BytesIO()) for name in ("header", "image")}
    kind(stored, RAS_MM).to_file_map(files)
    return files["header"].fileobj.getvalue(), files["image"].fileobj.getvalue()


@pytest.mark.parametrize("kind", [nib.Nifti1Pair, nib.Nifti2Pair])
@pytest.mark.parametrize("pack_header", [bytes, gzip.compress])
@pytest.mark.parametrize("pack_image", [bytes, gzip.compress])
def test_a_pair_gives_the_same_volume_as_a_single_file(kind: type, pack_header: Any, pack_image: Any) -> None:
    header, image = make_pair(kind)

    volume = read_nifti_pair(pack_header(header), pack_image(image), max_voxels=MANY)

    assert (volume.voxels_zyx == STORED_XYZ.T).all()
    assert (volume.spacing_zyx, volume.orientation) == ((2.0, 1.0, 0.5), "RAS")


def test_one_volume_of_a_pair_can_be_chosen() -> None:
    volume = read_nifti_pair(*make_pair(stored=SERIES_XYZT), max_voxels=MANY, volume_index=1)

    assert (volume.voxels_zyx == STORED_XYZ.T + 1000).all()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda header, image: (b"", image), Reason.EMPTY, id="no-header"),
        pytest.param(lambda header, image: (header, b""), Reason.EMPTY, id="no-image"),
        pytest.param(lambda header, image: (header[:200], image), Reason.TRUNCATED, id="header-cut"),
        pytest.param(lambda header, image: (header, image[:-1]), Reason.TRUNCATED, id="image-cut"),
        pytest.param(lambda header, image: (image, header), Reason.UNREADABLE, id="swapped"),
        pytest.param(
            lambda header, image: (make_nifti(), image), Reason.UNREADABLE, id="header-of-a-single-file"
        ),
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
def test_invalid_pairs_are_rejected_with_their_reason(damage: Any, reason: Reason) -> None:
    assert catch_reason(lambda: read_nifti_pair(*damage(*make_pair()), max_voxels=MANY)) == reason


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
        pytest.param(make_nifti()[:200], Reason.TRUNCATED, id="cut-in-the-header"),
        pytest.param(make_nifti()[:-1], Reason.TRUNCATED, id="one-byte-short"),
        pytest.param(make_nifti() + bytes(60), Reason.UNREADABLE, id="a-slice-too-many"),
        pytest.param(gzip.compress(make_nifti())[:-9], Reason.TRUNCATED, id="gzip-cut"),
        pytest.param(gzip.compress(make_nifti())[:-4], Reason.TRUNCATED, id="gzip-cut-in-its-trailer"),
        pytest.param(gzip.compress(make_nifti()[:-1]), Reason.TRUNCATED, id="gzip-of-a-cut-file"),
        pytest.param(gzip.compress(make_nifti() + bytes(60)), Reason.UNREADABLE, id="gzip-of-too-much"),
        pytest.param(make_nifti(magic=b"ni1"), Reason.UNSUPPORTED, id="pair"),
        pytest.param(make_nifti(magic=b""), Reason.UNSUPPORTED, id="analyze"),
        pytest.param(make_nifti(dim=[2, 6, 20, 1, 1, 1, 1, 1]), Reason.NOT_A_VOLUME, id="an-image"),
        pytest.param(make_nifti(dim=[3, 6, 20, 1, 1, 1, 1, 1]), Reason.NOT_A_VOLUME, id="one-slice"),
        pytest.param(make_nifti(dim=[4, 6, 5, 2, 2, 1, 1, 1]), Reason.NOT_A_VOLUME, id="two-volumes"),
        pytest.param(make_nifti(dim=[3, 0, 5, 4, 1, 1, 1, 1]), Reason.UNREADABLE, id="zero-dimension"),
        pytest.param(make_nifti(dim=[3, -6, 5, 4, 1, 1, 1, 1]), Reason.UNREADABLE, id="negative-dimension"),
        pytest.param(make_nifti(dim=[9, 6, 5, 4, 1, 1, 1, 1]), Reason.UNREADABLE, id="nine-axes"),
        pytest.param(make_nifti_claiming(30_000), Reason.TOO_LARGE, id="claims-30000-cubed"),
        pytest.param(make_nifti_claiming(90), Reason.TRUNCATED, id="claims-90-cubed"),
        pytest.param(gzip.compress(make_nifti_claiming(99)), Reason.TRUNCATED, id="gzip-claims-99-cubed"),
        pytest.param(make_nifti(datatype=9999), Reason.UNREADABLE, id="no-such-type"),
        pytest.param(make_nifti(datatype=0), Reason.UNSUPPORTED, id="type-unknown"),
        pytest.param(make_nifti(datatype=1536), Reason.UNSUPPORTED, id="float128"),
        pytest.param(make_nifti(STORED_XYZ.astype(np.complex64)), Reason.UNSUPPORTED, id="complex"),
        pytest.param(nib.Nifti1Image(RGB, RAS_MM).to_bytes(), Reason.UNSUPPORTED, id="rgb"),
        pytest.param(make_nifti(vox_offset=np.nan), Reason.UNREADABLE, id="offset-nan"),
        pytest.param(make_nifti(vox_offset=-352), Reason.UNREADABLE, id="offset-negative"),
        pytest.param(make_nifti(vox_offset=1e30), Reason.UNREADABLE, id="offset-huge"),
        pytest.param(make_nifti(vox_offset=4000), Reason.TRUNCATED, id="offset-after-the-end"),
        pytest.param(make_nifti(srow_x=[np.nan] * 4), Reason.UNREADABLE, id="sform-nan"),
        pytest.param(make_nifti(srow_x=[500, 0, 0, 0]), Reason.UNREADABLE, id="spacing-500-mm"),
        pytest.param(make_nifti(scl_slope=1, scl_inter=np.inf), Reason.UNREADABLE, id="intercept-infinite"),
        pytest.param(make_nifti(affine=SHEARED, sform_code=1), Reason.GANTRY_TILT, id="sheared"),
        pytest.param(make_nifti(WITH_NAN), Reason.NON_FINITE, id="nan"),
        pytest.param(make_nifti(WITH_INF), Reason.NON_FINITE, id="beyond-float32"),
        pytest.param(make_nifti(scl_slope=3e38), Reason.NON_FINITE, id="slope-overflows"),
        pytest.param(make_nifti(np.full((6, 5, 4), 7, np.int16)), Reason.NOT_A_VOLUME, id="constant"),
    ],
)  # fmt: skip
def test_invalid_files_are_rejected_with_their_reason(data: bytes, reason: Reason) -> None:
    assert read_reason(data) == reason


def test_the_limit_is_a_number_of_voxels() -> None:
    assert read(make_nifti(), max_voxels=120).voxels_zyx.size == 120
    assert read_reason(make_nifti(), max_voxels=119) == Reason.TOO_LARGE


def test_extensions_before_the_voxels_are_skipped() -> None:
    image = nib.Nifti1Image(STORED_XYZ, RAS_MM)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 5000))

    assert (read(gzip.compress(image.to_bytes())).voxels_zyx == STORED_XYZ.T).all()


def test_a_deflate_stream_that_is_not_gzip_is_unreadable() -> None:
    assert read_reason(zlib.compress(make_nifti())) == Reason.UNREADABLE
