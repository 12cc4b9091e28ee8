"""Test the resize kernels against other libraries, and against formulas evaluated one voxel at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import cv2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name its users know
from numpy.typing import NDArray
from scipy import ndimage

from featray.ct.resample import Interpolation, Kernel, resize

KERNELS: tuple[Interpolation, ...] = ("linear", "area", "nearest", "cubic")
SHAPE = (7, 12, 15)
SIZES = [(3, 5, 6), (16, 30, 20), (4, 12, 31), (1, 1, 1)]
TOLERANCE_HU = 2e-3
"""Tolerance for float32 rounding of values up to a few thousand HU."""

Row = dict[int, float]
"""Weights of one output voxel by source index."""


@pytest.fixture(scope="module")
def volume() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-1024, 3072, SHAPE).astype(np.int16)


def make_column(*values: float) -> NDArray[np.float32]:
    """Return a volume (n, 1, 1) with these values along z."""
    return np.array(values, np.float32).reshape(-1, 1, 1)


def resize_along_z(values: NDArray[np.float32], count: int, **options: object) -> list[float]:
    return resize(values, (count, 1, 1), **options)[:, 0, 0].tolist()  # type: ignore[arg-type]


def test_linear_averages_two_voxels_if_the_size_is_halved() -> None:
    assert resize_along_z(make_column(0, 10, 20, 30), 2) == [5, 25]


def test_linear_repeats_the_edge_voxel_outside_of_the_outer_centers() -> None:
    assert resize_along_z(make_column(0, 10), 4) == [0, 2.5, 7.5, 10]


def test_linear_with_aligned_corners_maps_end_voxels_onto_end_voxels() -> None:
    assert resize_along_z(make_column(0, 10), 5, kernel=Kernel(align_corners=True)) == [0, 2.5, 5, 7.5, 10]


def test_nearest_uses_the_voxel_that_contains_the_center() -> None:
    # torch "nearest-exact"; the older "nearest" and OpenCV INTER_NEAREST give 0, 1, 3
    assert resize_along_z(make_column(0, 1, 2, 3, 4), 3, kernel=Kernel("nearest")) == [0, 2, 4]


def test_area_weights_a_voxel_by_its_covered_fraction() -> None:
    # 3 voxels to 2: each output voxel covers one and a half source voxels
    assert resize_along_z(make_column(0, 30, 90), 2, kernel=Kernel("area")) == pytest.approx([10, 70])


def test_cubic_overshoots_next_to_a_step() -> None:
    values = resize_along_z(make_column(0, 0, 100, 100), 8, kernel=Kernel("cubic"))
    assert min(values) < 0
    assert max(values) > 100


def test_aligned_corners_with_one_output_voxel_use_the_first_voxel() -> None:
    assert resize_along_z(make_column(7, 8, 9), 1, kernel=Kernel(align_corners=True)) == [7]


# The torch formulas below are those of ATen's UpSample.h in float64, for one output voxel at a time.


def compute_torch_linear(n: int, m: int, corners: bool, o: int) -> Row:
    x = compute_corner_position(n, m, o) if corners else max(0.0, (o + 0.5) * n / m - 0.5)
    i = min(int(x), n - 1)
    return sum_weights([(i, 1 - (x - i)), (min(i + 1, n - 1), x - i)])


def compute_torch_cubic(n: int, m: int, corners: bool, o: int) -> Row:
    x = compute_corner_position(n, m, o) if corners else (o + 0.5) * n / m - 0.5
    i, t, a = math.floor(x), x - math.floor(x), -0.75

    def inner(d: float) -> float:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def outer(d: float) -> float:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = [outer(t + 1), inner(t), inner(1 - t), outer(2 - t)]
    return sum_weights([(min(max(i - 1 + k, 0), n - 1), weight) for k, weight in enumerate(weights)])


def compute_torch_nearest_exact(n: int, m: int, corners: bool, o: int) -> Row:
    return {min(math.floor((o + Fraction(1, 2)) * Fraction(n, m)), n - 1): 1.0}


def compute_box_mean(n: int, m: int, corners: bool, o: int) -> Row:
    low, high = Fraction(o * n, m), Fraction((o + 1) * n, m)
    covered = [(i, max(Fraction(0), min(high, Fraction(i + 1)) - max(low, Fraction(i)))) for i in range(n)]
    return sum_weights([(i, float(part / (high - low))) for i, part in covered])


def compute_corner_position(n: int, m: int, o: int) -> float:
    return o * (n - 1) / (m - 1) if m > 1 else 0.0


def sum_weights(pairs: list[tuple[int, float]]) -> Row:
    row: Row = {}
    for index, weight in pairs:
        row[index] = row.get(index, 0.0) + weight
    return row


def apply_formula(
    volume: NDArray[np.int16], size: tuple[int, int, int], formula: Callable[..., Row], corners: bool
) -> NDArray[np.float64]:
    result = volume.astype(np.float64)
    for axis, m in enumerate(size):
        n = result.shape[axis]
        weights = np.zeros((m, n))
        for o in range(m):
            for index, weight in formula(n, m, corners, o).items():
                weights[o, index] = weight
        result = np.moveaxis(np.tensordot(weights, result, axes=(1, axis)), 0, axis)
    return result


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("kernel", "corners", "formula"),
    [
        ("linear", False, compute_torch_linear),
        ("linear", True, compute_torch_linear),
        ("cubic", False, compute_torch_cubic),
        ("cubic", True, compute_torch_cubic),
        ("nearest", False, compute_torch_nearest_exact),
        ("area", False, compute_box_mean),
        ("area", True, compute_box_mean),
    ],
)
def test_a_kernel_agrees_with_its_formula(
    volume: NDArray[np.int16],
    size: tuple[int, int, int],
    kernel: Interpolation,
    corners: bool,
    formula: Callable[..., Row],
) -> None:
    actual = resize(volume, size, kernel=Kernel(kernel, align_corners=corners))
    np.testing.assert_allclose(
        actual, apply_formula(volume, size, formula, corners), rtol=0, atol=TOLERANCE_HU
    )


@pytest.mark.parametrize(("kernel", "order"), [("linear", 1), ("nearest", 0)])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_with_aligned_corners_agree_with_scipy_zoom(
    volume: NDArray[np.int16], size: tuple[int, int, int], kernel: Interpolation, order: int
) -> None:
    factors = [m / n for m, n in zip(size, SHAPE, strict=True)]
    expected = ndimage.zoom(volume.astype(np.float64), factors, order=order, mode="nearest")
    actual = resize(volume, size, kernel=Kernel(kernel, align_corners=True))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE_HU)


@pytest.mark.parametrize("size", SIZES)
def test_linear_agrees_with_simpleitk_between_the_outer_voxel_centers(
    volume: NDArray[np.int16], size: tuple[int, int, int]
) -> None:
    ratio_xyz = [n / m for n, m in zip(SHAPE[::-1], size[::-1], strict=True)]
    origin_xyz = [0.5 * ratio - 0.5 for ratio in ratio_xyz]
    image = sitk.GetImageFromArray(volume.astype(np.float64))
    resampled = sitk.Resample(
        image, size[::-1], sitk.Transform(), sitk.sitkLinear, origin_xyz, ratio_xyz, image.GetDirection()
    )
    inside = tuple(
        slice(*np.searchsorted((np.arange(m) + 0.5) * n / m - 0.5, [0, n - 1]))
        for n, m in zip(SHAPE, size, strict=True)
    )
    expected = sitk.GetArrayFromImage(resampled)[inside]
    assert expected.size
    np.testing.assert_allclose(resize(volume, size)[inside], expected, rtol=0, atol=TOLERANCE_HU)


@pytest.mark.parametrize(
    ("kernel", "flag", "size_yx"),
    [
        ("cubic", cv2.INTER_CUBIC, (5, 6)),
        ("cubic", cv2.INTER_CUBIC, (30, 20)),
        ("linear", cv2.INTER_LINEAR, (5, 6)),
        ("linear", cv2.INTER_LINEAR, (30, 20)),
        ("area", cv2.INTER_AREA, (5, 6)),
        ("area", cv2.INTER_AREA, (4, 5)),
    ],
)
def test_kernels_within_the_plane_agree_with_opencv(
    volume: NDArray[np.int16], kernel: Interpolation, flag: int, size_yx: tuple[int, int]
) -> None:
    actual = resize(volume, (SHAPE[0], *size_yx), kernel=Kernel(kernel))
    expected = [cv2.resize(plane.astype(np.float32), size_yx[::-1], interpolation=flag) for plane in volume]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE_HU)


def test_area_is_the_mean_of_blocks_if_the_new_size_divides_the_old(volume: NDArray[np.int16]) -> None:
    blocks = volume[:6].reshape(2, 3, 3, 4, 5, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(
        resize(volume[:6], (2, 3, 5), kernel=Kernel("area")), blocks, rtol=0, atol=TOLERANCE_HU
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("corners", [False, True])
def test_every_kernel_copies_the_volume_if_the_size_is_equal(
    volume: NDArray[np.int16], kernel: Interpolation, corners: bool
) -> None:
    actual = resize(volume, SHAPE, kernel=Kernel(kernel, align_corners=corners))
    np.testing.assert_array_equal(actual, volume)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "nearest", "cubic", "area"])
def test_an_axis_of_equal_size_is_unchanged(
    volume: NDArray[np.int16], kernel: Interpolation, corners: bool
) -> None:
    constant_in_plane = np.broadcast_to(volume[:, :1, :1], SHAPE)
    actual = resize(constant_in_plane, (SHAPE[0], 5, 6), kernel=Kernel(kernel, align_corners=corners))
    np.testing.assert_allclose(actual[:, 2, 3], volume[:, 0, 0], rtol=0, atol=TOLERANCE_HU)


def test_voxels_are_clipped_before_the_interpolation() -> None:
    assert resize_along_z(make_column(-3024, 0), 1, clip=(-1000, 1000)) == [-500]


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("clip", [(-0.5, 99.5), (-100_000, 100_000), (-1000, 40), (70_000, 80_000)])
def test_clip_bounds_have_the_same_effect_for_every_dtype(dtype: type, clip: tuple[float, float]) -> None:
    values = np.array([0, 40, 200], dtype).reshape(3, 1, 1)
    expected = np.clip([0.0, 40.0, 200.0], *clip)
    actual = resize(values, (3, 2, 1), clip=clip)
    np.testing.assert_array_equal(actual[:, 1, 0], expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [">i2", np.int32, np.float32, ">f4", np.float64])
def test_the_stored_dtype_changes_no_bit_of_the_result(
    volume: NDArray[np.int16], kernel: Interpolation, dtype: str
) -> None:
    stored = volume.astype(dtype)
    stored.flags.writeable = False
    expected = resize(volume, (3, 5, 6), kernel=Kernel(kernel), clip=(-1000, 1000))
    np.testing.assert_array_equal(
        resize(stored, (3, 5, 6), kernel=Kernel(kernel), clip=(-1000, 1000)), expected
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("step", [1, -1])
def test_the_stored_axis_order_and_direction_change_no_bit_of_the_result(
    volume: NDArray[np.int16], kernel: Interpolation, order: tuple[int, int, int], step: int
) -> None:
    stored = np.ascontiguousarray(volume[:, ::step, ::step].transpose(order))
    view = stored.transpose(np.argsort(order))[:, ::step, ::step]
    np.testing.assert_array_equal(
        resize(view, (3, 5, 6), kernel=Kernel(kernel)), resize(volume, (3, 5, 6), kernel=Kernel(kernel))
    )


@pytest.mark.parametrize(("count", "read"), [(8, [1, 2, 5, 6]), (6, [1, 4])])
def test_slices_of_weight_0_are_not_read(count: int, read: list[int]) -> None:
    # 8 slices to 2: the centers lie at 1.5 and 5.5; 6 slices to 2: at 1 and 4
    voxels = np.full((count, 2, 2), np.nan, np.float32)
    voxels[read] = 1
    np.testing.assert_array_equal(resize(voxels, (2, 1, 1)), np.ones((2, 1, 1)))


def test_the_source_is_left_unchanged(volume: NDArray[np.int16]) -> None:
    before = volume.copy()
    resize(volume, (3, 5, 6), clip=(0, 1))
    np.testing.assert_array_equal(volume, before)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_result_is_written_into_out(volume: NDArray[np.int16], kernel: Interpolation) -> None:
    out = np.full((3, 5, 6), np.nan, np.float32)
    assert resize(volume, (3, 5, 6), kernel=Kernel(kernel), out=out) is out
    np.testing.assert_array_equal(out, resize(volume, (3, 5, 6), kernel=Kernel(kernel)))


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, 5, 7), np.float32),
        np.empty((3, 5, 6), np.float64),
        np.empty((3, 5, 12), np.float32)[..., ::2],
    ],
    ids=["shape", "type", "strides"],
)
def test_an_unsuitable_out_array_is_rejected(volume: NDArray[np.int16], out: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="out: expected C-contiguous float32"):
        resize(volume, (3, 5, 6), out=out)


@pytest.mark.parametrize(
    "voxels",
    [np.zeros((2, 2)), np.zeros((0, 2, 2)), np.zeros((2, 2, 2), np.complex64)],
    ids=["flat", "empty", "complex"],
)
def test_an_array_that_is_not_a_volume_of_real_numbers_is_rejected(voxels: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="expected a volume"):
        resize(voxels, (1, 1, 1))


def test_a_size_below_one_is_rejected(volume: NDArray[np.int16]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        resize(volume, (1, 0, 1))
