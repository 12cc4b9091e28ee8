"""The resize kernels against named references, and against formulas worked out one voxel at a time."""

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
"""float32 rounding of values up to a few thousand HU."""

Row = dict[int, float]
"""Source index to weight, for one output voxel."""


@pytest.fixture(scope="module")
def volume() -> NDArray[np.int16]:
    return np.random.default_rng(0).integers(-1024, 3072, SHAPE).astype(np.int16)


def column(*values: float) -> NDArray[np.float32]:
    """Return a volume of one voxel by one voxel that has these values along z."""
    return np.array(values, np.float32).reshape(-1, 1, 1)


def along_z(values: NDArray[np.float32], count: int, **options: object) -> list[float]:
    return resize(values, (count, 1, 1), **options)[:, 0, 0].tolist()  # type: ignore[arg-type]


def test_linear_halves_a_column_by_averaging_the_two_voxels_below_each_centre() -> None:
    assert along_z(column(0, 10, 20, 30), 2) == [5, 25]


def test_linear_repeats_the_edge_voxel_outside_the_outer_centres() -> None:
    assert along_z(column(0, 10), 4) == [0, 2.5, 7.5, 10]


def test_linear_with_corners_puts_the_end_voxels_on_the_end_voxels() -> None:
    assert along_z(column(0, 10), 5, kernel=Kernel(align_corners=True)) == [0, 2.5, 5, 7.5, 10]


def test_nearest_takes_the_voxel_that_holds_the_centre() -> None:
    # torch "nearest-exact"; the older "nearest" and OpenCV INTER_NEAREST give 0, 1, 3
    assert along_z(column(0, 1, 2, 3, 4), 3, kernel=Kernel("nearest")) == [0, 2, 4]


def test_area_counts_a_voxel_by_the_fraction_covered() -> None:
    # 3 voxels to 2: each output covers one and a half
    assert along_z(column(0, 30, 90), 2, kernel=Kernel("area")) == pytest.approx([10, 70])


def test_cubic_overshoots_beside_a_step() -> None:
    values = along_z(column(0, 0, 100, 100), 8, kernel=Kernel("cubic"))
    assert min(values) < 0
    assert max(values) > 100


def test_corners_with_one_output_voxel_take_the_first_voxel() -> None:
    assert along_z(column(7, 8, 9), 1, kernel=Kernel(align_corners=True)) == [7]


# The torch references below restate ATen's UpSample.h in float64, one output voxel at a time.


def torch_linear(n: int, m: int, corners: bool, o: int) -> Row:
    x = _corner(n, m, o) if corners else max(0.0, (o + 0.5) * n / m - 0.5)
    i = min(int(x), n - 1)
    return _row([(i, 1 - (x - i)), (min(i + 1, n - 1), x - i)])


def torch_cubic(n: int, m: int, corners: bool, o: int) -> Row:
    x = _corner(n, m, o) if corners else (o + 0.5) * n / m - 0.5
    i, t, a = math.floor(x), x - math.floor(x), -0.75

    def inner(d: float) -> float:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def outer(d: float) -> float:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = [outer(t + 1), inner(t), inner(1 - t), outer(2 - t)]
    return _row([(min(max(i - 1 + k, 0), n - 1), weight) for k, weight in enumerate(weights)])


def torch_nearest_exact(n: int, m: int, corners: bool, o: int) -> Row:
    return {min(math.floor((o + Fraction(1, 2)) * Fraction(n, m)), n - 1): 1.0}


def box_mean(n: int, m: int, corners: bool, o: int) -> Row:
    low, high = Fraction(o * n, m), Fraction((o + 1) * n, m)
    covered = [(i, max(Fraction(0), min(high, Fraction(i + 1)) - max(low, Fraction(i)))) for i in range(n)]
    return _row([(i, float(part / (high - low))) for i, part in covered])


def _corner(n: int, m: int, o: int) -> float:
    return o * (n - 1) / (m - 1) if m > 1 else 0.0


def _row(pairs: list[tuple[int, float]]) -> Row:
    row: Row = {}
    for index, weight in pairs:
        row[index] = row.get(index, 0.0) + weight
    return row


def by_hand(
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
        ("linear", False, torch_linear),
        ("linear", True, torch_linear),
        ("cubic", False, torch_cubic),
        ("cubic", True, torch_cubic),
        ("nearest", False, torch_nearest_exact),
        ("area", False, box_mean),
        ("area", True, box_mean),
    ],
)
def test_a_kernel_gives_what_its_formula_says(
    volume: NDArray[np.int16],
    size: tuple[int, int, int],
    kernel: Interpolation,
    corners: bool,
    formula: Callable[..., Row],
) -> None:
    got = resize(volume, size, kernel=Kernel(kernel, align_corners=corners))
    np.testing.assert_allclose(got, by_hand(volume, size, formula, corners), rtol=0, atol=TOLERANCE_HU)


@pytest.mark.parametrize(("kernel", "order"), [("linear", 1), ("nearest", 0)])
@pytest.mark.parametrize("size", SIZES)
def test_kernels_with_corners_equal_scipy_zoom(
    volume: NDArray[np.int16], size: tuple[int, int, int], kernel: Interpolation, order: int
) -> None:
    factors = [m / n for m, n in zip(size, SHAPE, strict=True)]
    want = ndimage.zoom(volume.astype(np.float64), factors, order=order, mode="nearest")
    got = resize(volume, size, kernel=Kernel(kernel, align_corners=True))
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE_HU)


@pytest.mark.parametrize("size", SIZES)
def test_linear_equals_simpleitk_wherever_the_centre_lies_between_voxel_centres(
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
    want = sitk.GetArrayFromImage(resampled)[inside]
    assert want.size
    np.testing.assert_allclose(resize(volume, size)[inside], want, rtol=0, atol=TOLERANCE_HU)


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
def test_kernels_in_plane_equal_opencv(
    volume: NDArray[np.int16], kernel: Interpolation, flag: int, size_yx: tuple[int, int]
) -> None:
    got = resize(volume, (SHAPE[0], *size_yx), kernel=Kernel(kernel))
    want = [cv2.resize(plane.astype(np.float32), size_yx[::-1], interpolation=flag) for plane in volume]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE_HU)


def test_area_is_the_mean_of_blocks_where_the_size_divides(volume: NDArray[np.int16]) -> None:
    blocks = volume[:6].reshape(2, 3, 3, 4, 5, 3).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(
        resize(volume[:6], (2, 3, 5), kernel=Kernel("area")), blocks, rtol=0, atol=TOLERANCE_HU
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("corners", [False, True])
def test_every_kernel_is_a_copy_at_equal_size(
    volume: NDArray[np.int16], kernel: Interpolation, corners: bool
) -> None:
    got = resize(volume, SHAPE, kernel=Kernel(kernel, align_corners=corners))
    np.testing.assert_array_equal(got, volume)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "nearest", "cubic", "area"])
def test_an_axis_of_equal_size_is_left_as_it_is(
    volume: NDArray[np.int16], kernel: Interpolation, corners: bool
) -> None:
    constant_in_plane = np.broadcast_to(volume[:, :1, :1], SHAPE)
    got = resize(constant_in_plane, (SHAPE[0], 5, 6), kernel=Kernel(kernel, align_corners=corners))
    np.testing.assert_allclose(got[:, 2, 3], volume[:, 0, 0], rtol=0, atol=TOLERANCE_HU)


def test_voxels_are_clipped_before_they_are_blended() -> None:
    assert along_z(column(-3024, 0), 1, clip=(-1000, 1000)) == [-500]


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32])
@pytest.mark.parametrize("clip", [(-0.5, 99.5), (-100_000, 100_000), (-1000, 40), (70_000, 80_000)])
def test_clip_bounds_mean_the_same_for_every_type(dtype: type, clip: tuple[float, float]) -> None:
    values = np.array([0, 40, 200], dtype).reshape(3, 1, 1)
    want = np.clip([0.0, 40.0, 200.0], *clip)
    got = resize(values, (3, 2, 1), clip=clip)
    np.testing.assert_array_equal(got[:, 1, 0], want)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [">i2", np.int32, np.float32, ">f4", np.float64])
def test_the_stored_type_changes_no_bit_of_the_result(
    volume: NDArray[np.int16], kernel: Interpolation, dtype: str
) -> None:
    stored = volume.astype(dtype)
    stored.flags.writeable = False
    want = resize(volume, (3, 5, 6), kernel=Kernel(kernel), clip=(-1000, 1000))
    np.testing.assert_array_equal(resize(stored, (3, 5, 6), kernel=Kernel(kernel), clip=(-1000, 1000)), want)


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
def test_only_the_slices_that_carry_weight_are_read(count: int, read: list[int]) -> None:
    # the centres of 2 out of 8 lie at 1.5 and 5.5, of 2 out of 6 at 1 and 4
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
def test_an_out_that_does_not_fit_is_refused(volume: NDArray[np.int16], out: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="out: expected C-contiguous float32"):
        resize(volume, (3, 5, 6), out=out)


@pytest.mark.parametrize(
    "voxels",
    [np.zeros((2, 2)), np.zeros((0, 2, 2)), np.zeros((2, 2, 2), np.complex64)],
    ids=["flat", "empty", "complex"],
)
def test_what_is_no_volume_is_refused(voxels: NDArray[np.generic]) -> None:
    with pytest.raises(ValueError, match="expected a volume"):
        resize(voxels, (1, 1, 1))


def test_a_size_below_one_is_refused(volume: NDArray[np.int16]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        resize(volume, (1, 0, 1))
