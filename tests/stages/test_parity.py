"""Preprocessing against the tools people train with, through the config as a user writes it.

Everything is compared after the window is mapped onto [0, 1], within `TOLERANCE` of the window's width
(measured: 1e-7). SimpleITK, SciPy, nibabel, OpenCV and TensorFlow are called. torch, MONAI and TorchIO are
too large to install: their published formulas are written out here in float64, one weight matrix an axis.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813 - the name its users know
from numpy.typing import NDArray
from scipy import ndimage

from featray.config import PreprocessConfig
from featray.ct.volume import Volume
from featray.stages.preprocess import input_spacing, preprocess, resampled_shape

TOLERANCE = 1e-5
"""Of the window's width."""

WINDOW = (-1000.0, 1000.0)
SHAPE = (9, 12, 15)
SPACING = (5.0, 0.7, 0.8)
SIZES = [(4, 5, 7), (18, 24, 30), (3, 31, 15), (1, 1, 1), (16, 6, 5), (9, 12, 1)]
"""Down and up, whole and odd factors, both at once, one voxel, some axes unchanged."""

Voxels = NDArray[Any]
Weights = Callable[[int, int], NDArray[np.float64]]


@pytest.fixture(scope="module")
def voxels() -> Voxels:
    return np.random.default_rng(7).integers(-3024, 3072, SHAPE).astype(np.int16)


def model_input(voxels: Voxels, **options: Any) -> Voxels:
    """Return the first patch that the config makes of an LPS volume of `SPACING`."""
    return np.asarray(preprocess(volume_of(voxels), config_of(**options)).tensor[0])


def volume_of(voxels: Voxels) -> Volume:
    return Volume(voxels, np.diag([*SPACING[::-1], 1.0]))


def config_of(**options: Any) -> PreprocessConfig:
    return PreprocessConfig(**{"window": WINDOW, "scale": (0, 1), "size": None, **options})


def clipped(voxels: Voxels) -> NDArray[np.float64]:
    return np.clip(voxels.astype(np.float64), *WINDOW)


def scaled(values: Voxels) -> Voxels:
    """Return what MONAI's ScaleIntensityRanged(-1000, 1000, 0, 1) makes of values inside the window."""
    return np.asarray((values - WINDOW[0]) / (WINDOW[1] - WINDOW[0]))


def along_axes(voxels: Voxels, size: Sequence[int], weights: Weights) -> Voxels:
    for axis, count in enumerate(size):
        matrix = weights(voxels.shape[axis], count)
        voxels = np.moveaxis(np.tensordot(matrix, voxels, axes=(1, axis)), 0, axis)
    return voxels


def same(got: Voxels, want: Voxels) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def differs(got: Voxels, want: Voxels) -> bool:
    return bool(np.abs(got - want).max() > 0.01)


# torch.nn.functional.interpolate, from its documentation and ATen's UpSample.h; MONAI's Resize calls it.


def trilinear(corners: bool) -> Weights:
    def weights(n: int, m: int) -> NDArray[np.float64]:
        o = np.arange(m)
        x = o * ((n - 1) / (m - 1) if m > 1 else 0) if corners else np.maximum((o + 0.5) * n / m - 0.5, 0)
        lower = np.minimum(x.astype(int), n - 1)
        return spread_over(n, [(lower, 1 - (x - lower)), (np.minimum(lower + 1, n - 1), x - lower)])

    return weights


def bicubic(corners: bool) -> Weights:
    """Keys' kernel, a = -0.75, which torch offers in two dimensions only; here it goes along all three."""

    def kernel(d: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
        d = np.abs(d)
        inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.where(d <= 1, inner, np.where(d < 2, outer, 0))

    def weights(n: int, m: int) -> NDArray[np.float64]:
        o = np.arange(m)
        x = o * ((n - 1) / (m - 1) if m > 1 else 0) if corners else (o + 0.5) * n / m - 0.5
        base = np.floor(x).astype(int)
        return spread_over(n, [(np.clip(base + k, 0, n - 1), kernel(x - base - k)) for k in (-1, 0, 1, 2)])

    return weights


def nearest_exact(n: int, m: int) -> NDArray[np.float64]:
    return spread_over(n, [(np.array([(2 * o + 1) * n // (2 * m) for o in range(m)]), np.ones(m))])


def nearest(n: int, m: int) -> NDArray[np.float64]:
    return spread_over(n, [(np.array([o * n // m for o in range(m)]), np.ones(m))])


def adaptive_average(n: int, m: int) -> NDArray[np.float64]:
    """Mean over whole voxels floor(o n / m) … ceil((o + 1) n / m) - 1, each counted fully."""
    matrix = np.zeros((m, n))
    for o in range(m):
        start, end = o * n // m, -(-(o + 1) * n // m)
        matrix[o, start:end] = 1 / (end - start)
    return matrix


def box_mean(n: int, m: int) -> NDArray[np.float64]:
    edges = np.arange(m + 1) * (n / m)
    voxel = np.arange(n)
    covered = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    return np.maximum(covered, 0) * (m / n)


def spread_over(n: int, taps: list[tuple[Voxels, Voxels]]) -> NDArray[np.float64]:
    matrix = np.zeros((len(taps[0][0]), n))
    for index, weight in taps:
        np.add.at(matrix, (np.arange(len(index)), index), weight)
    return matrix


KERNELS: list[tuple[str, bool, Weights]] = [
    ("linear", False, trilinear(False)),
    ("linear", True, trilinear(True)),
    ("cubic", False, bicubic(False)),
    ("cubic", True, bicubic(True)),
    ("nearest", False, nearest_exact),
    ("area", False, box_mean),
    ("area", True, box_mean),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "corners", "weights"), KERNELS)
def test_stretch_gives_what_torch_documents(
    voxels: Voxels, kernel: str, corners: bool, weights: Weights, size: tuple[int, int, int]
) -> None:
    got = model_input(voxels, size=size, interpolation=kernel, align_corners=corners)
    same(got, scaled(along_axes(clipped(voxels), size, weights)))


@pytest.mark.parametrize("shape", [(1, 12, 15), (9, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize(("kernel", "corners", "weights"), KERNELS)
def test_an_axis_of_one_voxel_is_repeated(
    voxels: Voxels, kernel: str, corners: bool, weights: Weights, shape: tuple[int, int, int]
) -> None:
    thin = voxels[tuple(slice(count) for count in shape)]
    got = model_input(thin, size=(4, 5, 7), interpolation=kernel, align_corners=corners)
    same(got, scaled(along_axes(clipped(thin), (4, 5, 7), weights)))


def test_the_older_torch_nearest_is_the_same_only_for_whole_magnification(voxels: Voxels) -> None:
    whole, odd = (18, 36, 15), (4, 5, 7)
    same(
        model_input(voxels, size=whole, interpolation="nearest"),
        scaled(along_axes(clipped(voxels), whole, nearest)),
    )
    assert differs(
        model_input(voxels, size=odd, interpolation="nearest"),
        scaled(along_axes(clipped(voxels), odd, nearest)),
    )


def test_torch_area_is_the_same_only_where_the_size_divides_the_volume(voxels: Voxels) -> None:
    divides, odd = (3, 4, 5), (4, 5, 7)
    same(
        model_input(voxels, size=divides, interpolation="area"),
        scaled(along_axes(clipped(voxels), divides, adaptive_average)),
    )
    assert differs(
        model_input(voxels, size=odd, interpolation="area"),
        scaled(along_axes(clipped(voxels), odd, adaptive_average)),
    )


# SciPy


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(("kernel", "order"), [("linear", 1), ("nearest", 0)])
def test_stretch_equals_scipy_zoom(
    voxels: Voxels, size: tuple[int, int, int], corners: bool, kernel: str, order: int
) -> None:
    factors = [m / n for m, n in zip(size, SHAPE, strict=True)]
    want = ndimage.zoom(clipped(voxels), factors, order=order, mode="nearest", grid_mode=not corners)
    got = model_input(voxels, size=size, interpolation=kernel, align_corners=corners)
    if kernel == "nearest":  # halfway between two voxels SciPy's choice hangs on rounding
        index = ~halfway(size, corners)
        got, want = got[index], want[index]
    same(got, scaled(want))


def halfway(size: Sequence[int], corners: bool) -> NDArray[np.bool_]:
    """Return which output voxels lie exactly halfway between two source voxels along an axis."""
    marks = []
    for n, m in zip(SHAPE, size, strict=True):
        o = np.arange(m)
        twice, unit = (2 * o * (n - 1), max(m - 1, 1)) if corners else ((2 * o + 1) * n - m, m)
        marks.append((twice % unit == 0) & (twice // unit % 2 == 1))
    return np.asarray(marks[0][:, None, None] | marks[1][:, None] | marks[2])


def test_cubic_is_neither_scipys_nor_simpleitks_spline(voxels: Voxels) -> None:
    size = (18, 24, 30)
    got = model_input(voxels, size=size, interpolation="cubic", align_corners=True)
    factors = [m / n for m, n in zip(size, SHAPE, strict=True)]
    assert differs(got, scaled(ndimage.zoom(clipped(voxels), factors, order=3, mode="nearest")))
    half_pixel = model_input(voxels, size=size, interpolation="cubic")
    assert differs(half_pixel, scaled(simpleitk(clipped(voxels), size, sitk.sitkBSpline)))


# SimpleITK


def simpleitk(voxels: Voxels, size: Sequence[int], kernel: int, corners: bool = False) -> Voxels:
    """Resample between the outer edges, or the corner voxels, of a volume of unit spacing."""
    pairs = list(zip(voxels.shape[::-1], size[::-1], strict=True))
    step_xyz = [(n - 1) / (m - 1) if corners and min(n, m) > 1 else n / m for n, m in pairs]
    origin_xyz = [0.0 if corners else 0.5 * step - 0.5 for step in step_xyz]
    return on_grid(voxels, (1.0, 1.0, 1.0), size, step_xyz, origin_xyz, kernel)


def on_grid(
    voxels: Voxels,
    spacing_zyx: Sequence[float],
    size_zyx: Sequence[int],
    step_xyz: Sequence[float],
    origin_xyz: Sequence[float],
    kernel: int = sitk.sitkLinear,
) -> Voxels:
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels, np.float64))
    image.SetSpacing([float(step) for step in spacing_zyx[::-1]])
    size_xyz = [int(count) for count in size_zyx[::-1]]
    sampled = sitk.Resample(
        image, size_xyz, sitk.Transform(), kernel, list(origin_xyz), list(step_xyz), image.GetDirection()
    )
    return np.asarray(sitk.GetArrayFromImage(sampled))


@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1, 1)])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(
    ("kernel", "itk"), [("linear", sitk.sitkLinear), ("nearest", sitk.sitkNearestNeighbor)]
)
def test_stretch_equals_simpleitk_on_the_same_extent(
    voxels: Voxels, size: tuple[int, int, int], corners: bool, kernel: str, itk: int
) -> None:
    got = model_input(voxels, size=size, interpolation=kernel, align_corners=corners)
    want = scaled(simpleitk(clipped(voxels), size, itk, corners))
    index = ~halfway(size, corners) if kernel == "nearest" else ...
    same(got[index], want[index])


# OpenCV and TensorFlow, in plane


IN_PLANE = [(5, 7), (24, 30), (31, 4), (6, 5)]
OPENCV = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST_EXACT,
    "area": cv2.INTER_AREA,
}


@pytest.mark.parametrize(
    ("kernel", "size_yx"),
    # OpenCV's INTER_AREA averages only when it shrinks both axes
    [
        (kernel, size)
        for kernel in OPENCV
        for size in IN_PLANE
        if kernel != "area" or size in ((5, 7), (6, 5))
    ],
)
def test_planes_equal_opencv(voxels: Voxels, kernel: str, size_yx: tuple[int, int]) -> None:
    planes = clipped(voxels).astype(np.float32)
    want = scaled(
        np.array([cv2.resize(plane, size_yx[::-1], interpolation=OPENCV[kernel]) for plane in planes])
    )
    size = (SHAPE[0], *size_yx)
    index = ~halfway(size, corners=False) if kernel == "nearest" else ...
    same(model_input(voxels, size=size, interpolation=kernel)[index], want[index])


@pytest.mark.parametrize("size_yx", IN_PLANE)
@pytest.mark.parametrize(
    ("kernel", "method"), [("linear", "bilinear"), ("nearest", "nearest"), ("area", "area")]
)
def test_planes_equal_tf_image_resize(
    voxels: Voxels, size_yx: tuple[int, int], kernel: str, method: str
) -> None:
    import tensorflow as tf

    planes = clipped(voxels).astype(np.float32)[..., None]
    want = scaled(tf.image.resize(planes, size_yx, method=method).numpy()[..., 0])
    size = (SHAPE[0], *size_yx)
    index = ~halfway(size, corners=False) if kernel == "nearest" else ...
    same(model_input(voxels, size=size, interpolation=kernel)[index], want[index])


def test_tf_bicubic_and_antialias_are_something_else(voxels: Voxels) -> None:
    import tensorflow as tf

    planes = clipped(voxels).astype(np.float32)[..., None]
    bicubic_half = tf.image.resize(planes, (5, 7), method="bicubic").numpy()[..., 0]
    smoothed = tf.image.resize(planes, (5, 7), antialias=True).numpy()[..., 0]
    size = (SHAPE[0], 5, 7)
    assert differs(model_input(voxels, size=size, interpolation="cubic"), scaled(bicubic_half))
    assert differs(model_input(voxels, size=size), scaled(smoothed))


# clip, then interpolate, then scale


@pytest.mark.parametrize("kernel", ["linear", "cubic", "area"])
def test_padding_of_minus_3024_is_air_before_interpolation(kernel: str) -> None:
    padded = np.full((4, 8, 8), -3024, np.int16)  # as outside the circle of reconstruction
    padded[:, :, 4:] = 40
    air = np.where(padded == -3024, -1000, padded).astype(np.int16)
    got = model_input(padded, size=(4, 8, 12), interpolation=kernel)
    np.testing.assert_array_equal(got, model_input(air, size=(4, 8, 12), interpolation=kernel))


def test_clipping_after_interpolation_as_many_pipelines_do_gives_other_values_beside_padding() -> None:
    padded = np.full((4, 8, 8), -3024, np.int16)
    padded[:, :, 4:] = 40
    late = np.clip(along_axes(padded.astype(float), (4, 8, 12), trilinear(False)), *WINDOW)
    assert differs(model_input(padded, size=(4, 8, 12)), scaled(late))


@pytest.mark.parametrize("scale", [(0, 1), (-1, 1), (1, 0)])
def test_window_and_scale_are_monais_scale_intensity_range(
    voxels: Voxels, scale: tuple[float, float]
) -> None:
    got = model_input(voxels, window=(-160, 240), scale=scale)
    want = (np.clip(voxels, -160.0, 240.0) + 160) / 400 * (scale[1] - scale[0]) + scale[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# orientation


@pytest.mark.parametrize("stored", ["LPS", "RAS", "LAS", "SRA", "PIR"])
def test_ras_is_nibabels_canonical_array_transposed(voxels: Voxels, stored: str) -> None:
    affine_ras = nib.orientations.inv_ornt_aff(
        nib.orientations.axcodes2ornt(stored), np.array(SHAPE)[[0, 1, 2]]
    )
    image = nib.Nifti1Image(voxels, affine_ras)  # axes (i, j, k) along `stored`
    canonical = nib.as_closest_canonical(image)  # what MONAI Orientationd("RAS") and TorchIO ToCanonical give
    volume = Volume(voxels.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ affine_ras)
    got = preprocess(volume, PreprocessConfig(orientation="RAS", window=None, size=None)).tensor[0]
    np.testing.assert_array_equal(got, np.asarray(canonical.dataobj).transpose(2, 1, 0))


@pytest.mark.parametrize("wanted", ["LPS", "RAS", "LPI", "RAI"])
def test_orientations_are_those_of_simpleitks_dicom_orient(voxels: Voxels, wanted: str) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetDirection([0, -1, 0, 0, 0, 1, 1, 0, 0])
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction
    got = preprocess(
        Volume(voxels, affine), PreprocessConfig(orientation=wanted, window=None, size=None)
    ).tensor[0]
    np.testing.assert_array_equal(got, sitk.GetArrayFromImage(sitk.DICOMOrient(image, wanted)))


# spacing


@pytest.mark.parametrize("wanted", [(3, 1, 1), (2.5, 0.7, 0.4), (5, 2, 2), (1.5, 1.5, 1.5)])
def test_spacing_keeps_the_extent_as_a_simpleitk_grid_from_edge_to_edge(
    voxels: Voxels, wanted: tuple[float, float, float]
) -> None:
    size = [round(n * step / goal) for n, step, goal in zip(SHAPE, SPACING, wanted, strict=True)]
    reached = [n * step / m for n, step, m in zip(SHAPE, SPACING, size, strict=True)]
    origin = [0.5 * (new - old) for new, old in zip(reached, SPACING, strict=True)]
    want = on_grid(clipped(voxels), SPACING, size, reached[::-1], origin[::-1])
    same(model_input(voxels, spacing=wanted), scaled(want))
    assert input_spacing(config_of(spacing=wanted), SHAPE, SPACING) == pytest.approx(reached)


def test_spacing_equals_torchios_resample_where_the_extent_is_a_whole_number_of_voxels(
    voxels: Voxels,
) -> None:
    wanted = (2.5, 1.4, 2.4)  # 45, 8.4 and 12 mm: 18, 6 and 5 voxels
    size = [math.ceil(n * step / goal - 1e-9) for n, step, goal in zip(SHAPE, SPACING, wanted, strict=True)]
    origin = [0.5 * (goal - step) for goal, step in zip(wanted, SPACING, strict=True)]  # TorchIO 0.x
    want = on_grid(clipped(voxels), SPACING, size, wanted[::-1], origin[::-1])
    same(model_input(voxels, spacing=wanted), scaled(want))


def test_monais_spacing_keeps_the_first_voxels_centre_instead(voxels: Voxels) -> None:
    # Spacingd: m = round((n - 1) s / w) + 1 voxels of exactly w mm, voxel o at o w mm from the first centre;
    # here: m = round(n s / w) voxels of n s / m mm, voxel o at (o + 1/2) n s / m - s / 2.
    wanted = (5.0, 1.4, 1.6)  # in plane half the voxels: 6 and 7.5
    size = [round((n - 1) * step / goal) + 1 for n, step, goal in zip(SHAPE, SPACING, wanted, strict=True)]
    theirs = on_grid(clipped(voxels), SPACING, size, wanted[::-1], (0.0, 0.0, 0.0))
    assert size == [9, 7, 8]
    assert resampled_shape(config_of(spacing=wanted), SHAPE, SPACING) == (9, 6, 8)
    ours = model_input(voxels, spacing=wanted)
    assert differs(ours[:, :6], scaled(theirs)[:, :6])
    along_y = along_axes(clipped(voxels)[:1, :, :1], (1, 6, 1), trilinear(False))
    assert along_y[0, 0, 0] == clipped(voxels)[0, :2, 0].mean()  # 0.35 mm in; MONAI's first is voxel 0


def test_spacing_with_corners_is_scipy_zoom_by_the_ratio_of_spacings(voxels: Voxels) -> None:
    wanted = (3, 1, 1)
    factors = [step / goal for step, goal in zip(SPACING, wanted, strict=True)]
    want = ndimage.zoom(clipped(voxels), factors, order=1, mode="nearest")
    same(model_input(voxels, spacing=wanted, align_corners=True), scaled(want))
    reached = [(n - 1) * step / (m - 1) for n, step, m in zip(SHAPE, SPACING, want.shape, strict=True)]
    assert input_spacing(config_of(spacing=wanted, align_corners=True), SHAPE, SPACING) == pytest.approx(
        reached
    )


@pytest.mark.parametrize(
    "options", [{"fit": "stretch"}, {"fit": "crop_pad"}, {"fit": "patches", "stride": (4, 2, 5)}]
)
def test_spacing_comes_first_and_each_fit_then_works_on_its_result(
    voxels: Voxels, options: dict[str, Any]
) -> None:
    size = (7, 5, 9)
    both = preprocess(volume_of(np.clip(voxels, *WINDOW)), config_of(spacing=(3, 1, 1), size=size, **options))
    spaced = model_input(np.clip(voxels, -1000, 1000), spacing=(3, 1, 1), window=None)
    after = preprocess(volume_of(spaced), config_of(size=size, **options))
    same(both.tensor, after.tensor)
    np.testing.assert_array_equal(both.origins, after.origins)


# crop_pad

CROPS = list(itertools.product(range(1, 9), repeat=2))


def cropped_row(count: int, size: int) -> list[float]:
    row = np.arange(1, count + 1).reshape(1, 1, count)
    return (
        model_input(row, window=(0, 100), scale=(0, 100), size=(1, 1, size), fit="crop_pad").ravel().tolist()
    )


def padded_or_cropped(count: int, size: int, pad_front: int, crop_front: int) -> list[float]:
    behind = max(size - count - pad_front, 0)
    row = [0.0] * pad_front + [float(value) for value in range(1, count + 1)] + [0.0] * behind
    return row[crop_front : crop_front + size]


@pytest.mark.parametrize(("count", "size"), CROPS)
def test_crop_pad_is_monais_resize_with_pad_or_crop(count: int, size: int) -> None:
    # SpatialPad(method="symmetric"): (size - n) // 2 in front; CenterSpatialCrop: from n // 2 - size // 2
    pad, crop = max(size - count, 0) // 2, count // 2 - size // 2 if count > size else 0
    assert cropped_row(count, size) == pytest.approx(padded_or_cropped(count, size, pad, crop))


@pytest.mark.parametrize(("count", "size"), CROPS)
def test_torchios_crop_or_pad_differs_by_one_voxel_at_most(count: int, size: int) -> None:
    # TorchIO: ceil of half the difference in front, for cropping and for padding
    pad, crop = -(-max(size - count, 0) // 2), -(-max(count - size, 0) // 2)
    theirs = padded_or_cropped(count, size, pad, crop)
    agree = (count - size) % 2 == 0 or (count > size and count % 2 == 0)
    assert (cropped_row(count, size) == pytest.approx(theirs)) == agree


@pytest.mark.parametrize(("count", "size"), CROPS)
def test_tf_crop_or_pad_differs_only_when_an_even_row_is_cropped_to_an_odd_one(count: int, size: int) -> None:
    import tensorflow as tf

    row = np.arange(1, count + 1, dtype=np.float32).reshape(1, count, 1)
    theirs = tf.image.resize_with_crop_or_pad(row, 1, size).numpy().ravel()
    agree = not (count > size and count % 2 == 0 and size % 2 == 1)
    assert (cropped_row(count, size) == pytest.approx(theirs.tolist())) == agree


# patches


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 2), (4, 3), (3, 1), (5, 5), (6, 4)])
def test_patches_start_where_monais_sliding_window_and_torchios_grid_sampler_start(
    count: int, size: int, stride: int
) -> None:
    row = np.arange(count).reshape(1, 1, count)
    config = config_of(size=(1, 1, size), stride=(1, 1, stride), fit="patches", window=None)
    starts = preprocess(volume_of(row), config).origins[:, 2].tolist()
    if count >= size:
        assert starts == sliding_window(count, size, stride)
        assert starts == grid_sampler(count, size, stride)
    else:
        assert starts == [0]
    covered = {start + offset for start in starts for offset in range(size)}
    assert covered >= set(range(count))


def sliding_window(count: int, size: int, interval: int) -> list[int]:
    """Return the starts of MONAI's dense_patch_slices."""
    windows = next(d for d in range(-(-count // interval)) if d * interval + size >= count) + 1
    return [d * interval - max(d * interval + size - count, 0) for d in range(windows)]


def grid_sampler(count: int, size: int, step: int) -> list[int]:
    """Return the starts of TorchIO's GridSampler with patch_overlap = size - step and no padding."""
    starts = list(range(0, count + 1 - size, step))
    return starts if starts[-1] == count - size else [*starts, count - size]


def test_patches_cover_every_voxel_and_hold_what_lies_at_their_origins(voxels: Voxels) -> None:
    size, stride = (4, 5, 7), (3, 5, 4)
    whole = model_input(voxels)
    made = preprocess(volume_of(voxels), config_of(size=size, stride=stride, fit="patches"))
    seen = np.zeros(SHAPE, int)
    for patch, start in zip(made.tensor, made.origins, strict=True):
        place = tuple(slice(at, at + count) for at, count in zip(start, size, strict=True))
        np.testing.assert_array_equal(patch, whole[place])
        seen[place] += 1
    assert seen.min() == 1


def test_size_null_keeps_every_voxel(voxels: Voxels) -> None:
    same(model_input(voxels, size=None), scaled(clipped(voxels)))
