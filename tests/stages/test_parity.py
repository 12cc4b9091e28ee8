"""Preprocessing compared with libraries that are used for training.

Each test configures preprocessing as a user does. Values are compared after the window is mapped onto [0, 1];
the greatest measured difference is 1e-7. SimpleITK, SciPy, nibabel, OpenCV and TensorFlow are called. torch,
MONAI and TorchIO are too large to install, so their published formulas are implemented here in float64, as
one weight matrix per axis.
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
import SimpleITK as sitk  # noqa: N813  # its usual name
from numpy.typing import NDArray
from scipy import ndimage

from featray.config import PreprocessConfig
from featray.ct.volume import Volume
from featray.stages.preprocess import input_spacing, preprocess, resampled_shape

TOLERANCE = 1e-5
"""Greatest difference that is accepted, as a share of the width of the window."""

WINDOW = (-1000.0, 1000.0)
SHAPE = (9, 12, 15)
SPACING = (5.0, 0.7, 0.8)
SIZES = [(4, 5, 7), (18, 24, 30), (3, 31, 15), (1, 1, 1), (16, 6, 5), (9, 12, 1)]
"""Reduction and magnification by integer and other factors, also mixed; one voxel; unchanged axes."""

Voxels = NDArray[Any]
Weights = Callable[[int, int], NDArray[np.float64]]
"""(Old number of voxels, new number) → matrix of shape (new, old)."""


@pytest.fixture(scope="module")
def voxels() -> Voxels:
    return np.random.default_rng(7).integers(-3024, 3072, SHAPE).astype(np.int16)


def make_input(voxels: Voxels, **options: Any) -> Voxels:
    """Preprocess an LPS volume with voxels of `SPACING`; return the first patch."""
    return np.asarray(preprocess(make_volume(voxels), make_config(**options)).tensor[0])


def make_volume(voxels: Voxels) -> Volume:
    return Volume(voxels, np.diag([*SPACING[::-1], 1.0]))


def make_config(**options: Any) -> PreprocessConfig:
    return PreprocessConfig(**{"window": WINDOW, "scale": (0, 1), "size": None, **options})


def clip(voxels: Voxels) -> NDArray[np.float64]:
    return np.clip(voxels.astype(np.float64), *WINDOW)


def scale_to_unit(values: Voxels) -> Voxels:
    """Map values inside the window onto [0, 1], like MONAI's ScaleIntensityRanged(-1000, 1000, 0, 1)."""
    return np.asarray((values - WINDOW[0]) / (WINDOW[1] - WINDOW[0]))


def apply_along_axes(voxels: Voxels, size: Sequence[int], weights: Weights) -> Voxels:
    """Resize all axes, one after the other, with the weight matrix of each."""
    for axis, count in enumerate(size):
        matrix = weights(voxels.shape[axis], count)
        voxels = np.moveaxis(np.tensordot(matrix, voxels, axes=(1, axis)), 0, axis)
    return voxels


def assert_close(got: Voxels, want: Voxels) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


def is_different(got: Voxels, want: Voxels) -> bool:
    return bool(np.abs(got - want).max() > 0.01)


# torch.nn.functional.interpolate, according to its documentation and to UpSample.h of ATen; MONAI's Resize
# calls it.


def make_trilinear_weights(corners: bool) -> Weights:
    def weights(n: int, m: int) -> NDArray[np.float64]:
        o = np.arange(m)
        x = o * ((n - 1) / (m - 1) if m > 1 else 0) if corners else np.maximum((o + 0.5) * n / m - 0.5, 0)
        lower = np.minimum(x.astype(int), n - 1)
        return make_matrix(n, [(lower, 1 - (x - lower)), (np.minimum(lower + 1, n - 1), x - lower)])

    return weights


def make_bicubic_weights(corners: bool) -> Weights:
    """Return the weights of Keys' kernel with a = -0.75; torch has it for two axes, here it is for three."""

    def kernel(d: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
        d = np.abs(d)
        inner, outer = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.where(d <= 1, inner, np.where(d < 2, outer, 0))

    def weights(n: int, m: int) -> NDArray[np.float64]:
        o = np.arange(m)
        x = o * ((n - 1) / (m - 1) if m > 1 else 0) if corners else (o + 0.5) * n / m - 0.5
        base = np.floor(x).astype(int)
        return make_matrix(n, [(np.clip(base + k, 0, n - 1), kernel(x - base - k)) for k in (-1, 0, 1, 2)])

    return weights


def nearest_exact_weights(n: int, m: int) -> NDArray[np.float64]:
    return make_matrix(n, [(np.array([(2 * o + 1) * n // (2 * m) for o in range(m)]), np.ones(m))])


def nearest_weights(n: int, m: int) -> NDArray[np.float64]:
    return make_matrix(n, [(np.array([o * n // m for o in range(m)]), np.ones(m))])


def adaptive_average_weights(n: int, m: int) -> NDArray[np.float64]:
    """Return equal weights of the voxels floor(o n / m) … ceil((o + 1) n / m) - 1."""
    matrix = np.zeros((m, n))
    for o in range(m):
        start, end = o * n // m, -(-(o + 1) * n // m)
        matrix[o, start:end] = 1 / (end - start)
    return matrix


def box_mean_weights(n: int, m: int) -> NDArray[np.float64]:
    edges = np.arange(m + 1) * (n / m)
    voxel = np.arange(n)
    covered = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    return np.maximum(covered, 0) * (m / n)


def make_matrix(n: int, taps: list[tuple[Voxels, Voxels]]) -> NDArray[np.float64]:
    matrix = np.zeros((len(taps[0][0]), n))
    for index, weight in taps:
        np.add.at(matrix, (np.arange(len(index)), index), weight)
    return matrix


KERNELS: list[tuple[str, bool, Weights]] = [
    ("linear", False, make_trilinear_weights(False)),
    ("linear", True, make_trilinear_weights(True)),
    ("cubic", False, make_bicubic_weights(False)),
    ("cubic", True, make_bicubic_weights(True)),
    ("nearest", False, nearest_exact_weights),
    ("area", False, box_mean_weights),
    ("area", True, box_mean_weights),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kernel", "corners", "weights"), KERNELS)
def test_stretch_equals_the_formulas_of_torch(
    voxels: Voxels, kernel: str, corners: bool, weights: Weights, size: tuple[int, int, int]
) -> None:
    got = make_input(voxels, size=size, interpolation=kernel, align_corners=corners)
    assert_close(got, scale_to_unit(apply_along_axes(clip(voxels), size, weights)))


@pytest.mark.parametrize("shape", [(1, 12, 15), (9, 1, 1), (1, 1, 1)])
@pytest.mark.parametrize(("kernel", "corners", "weights"), KERNELS)
def test_a_single_voxel_along_an_axis_is_repeated(
    voxels: Voxels, kernel: str, corners: bool, weights: Weights, shape: tuple[int, int, int]
) -> None:
    thin = voxels[tuple(slice(count) for count in shape)]
    got = make_input(thin, size=(4, 5, 7), interpolation=kernel, align_corners=corners)
    assert_close(got, scale_to_unit(apply_along_axes(clip(thin), (4, 5, 7), weights)))


def test_nearest_of_torch_gives_the_same_values_only_for_integer_magnification(voxels: Voxels) -> None:
    whole, odd = (18, 36, 15), (4, 5, 7)
    assert_close(
        make_input(voxels, size=whole, interpolation="nearest"),
        scale_to_unit(apply_along_axes(clip(voxels), whole, nearest_weights)),
    )
    assert is_different(
        make_input(voxels, size=odd, interpolation="nearest"),
        scale_to_unit(apply_along_axes(clip(voxels), odd, nearest_weights)),
    )


def test_area_of_torch_gives_the_same_values_only_if_the_size_divides_the_volume(voxels: Voxels) -> None:
    divides, odd = (3, 4, 5), (4, 5, 7)
    assert_close(
        make_input(voxels, size=divides, interpolation="area"),
        scale_to_unit(apply_along_axes(clip(voxels), divides, adaptive_average_weights)),
    )
    assert is_different(
        make_input(voxels, size=odd, interpolation="area"),
        scale_to_unit(apply_along_axes(clip(voxels), odd, adaptive_average_weights)),
    )


# SciPy


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(("kernel", "order"), [("linear", 1), ("nearest", 0)])
def test_stretch_equals_scipy_zoom(
    voxels: Voxels, size: tuple[int, int, int], corners: bool, kernel: str, order: int
) -> None:
    factors = [m / n for m, n in zip(size, SHAPE, strict=True)]
    want = ndimage.zoom(clip(voxels), factors, order=order, mode="nearest", grid_mode=not corners)
    got = make_input(voxels, size=size, interpolation=kernel, align_corners=corners)
    if kernel == "nearest":  # halfway between two voxels, the choice of SciPy depends on rounding
        index = ~find_halfway(size, corners)
        got, want = got[index], want[index]
    assert_close(got, scale_to_unit(want))


def find_halfway(size: Sequence[int], corners: bool) -> NDArray[np.bool_]:
    """Return a mask of the output voxels that lie exactly halfway between two source voxels along an axis."""
    marks = []
    for n, m in zip(SHAPE, size, strict=True):
        o = np.arange(m)
        twice, unit = (2 * o * (n - 1), max(m - 1, 1)) if corners else ((2 * o + 1) * n - m, m)
        marks.append((twice % unit == 0) & (twice // unit % 2 == 1))
    return np.asarray(marks[0][:, None, None] | marks[1][:, None] | marks[2])


def test_cubic_differs_from_the_splines_of_scipy_and_simpleitk(voxels: Voxels) -> None:
    size = (18, 24, 30)
    got = make_input(voxels, size=size, interpolation="cubic", align_corners=True)
    factors = [m / n for m, n in zip(size, SHAPE, strict=True)]
    assert is_different(got, scale_to_unit(ndimage.zoom(clip(voxels), factors, order=3, mode="nearest")))
    half_pixel = make_input(voxels, size=size, interpolation="cubic")
    assert is_different(
        half_pixel, scale_to_unit(resample_with_simpleitk(clip(voxels), size, sitk.sitkBSpline))
    )


# SimpleITK


def resample_with_simpleitk(
    voxels: Voxels, size: Sequence[int], kernel: int, corners: bool = False
) -> Voxels:
    """Resample a volume of unit spacing between its outer edges, or between its corner voxels."""
    pairs = list(zip(voxels.shape[::-1], size[::-1], strict=True))
    step_xyz = [(n - 1) / (m - 1) if corners and min(n, m) > 1 else n / m for n, m in pairs]
    origin_xyz = [0.0 if corners else 0.5 * step - 0.5 for step in step_xyz]
    return resample_on_grid(voxels, (1.0, 1.0, 1.0), size, step_xyz, origin_xyz, kernel)


def resample_on_grid(
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
    got = make_input(voxels, size=size, interpolation=kernel, align_corners=corners)
    want = scale_to_unit(resample_with_simpleitk(clip(voxels), size, itk, corners))
    index = ~find_halfway(size, corners) if kernel == "nearest" else ...
    assert_close(got[index], want[index])


# OpenCV and TensorFlow, in the plane of a slice


IN_PLANE = [(5, 7), (24, 30), (31, 4), (6, 5)]
OPENCV = {
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST_EXACT,
    "area": cv2.INTER_AREA,
}


@pytest.mark.parametrize(
    ("kernel", "size_yx"),
    # INTER_AREA of OpenCV computes means only if both axes shrink
    [
        (kernel, size)
        for kernel in OPENCV
        for size in IN_PLANE
        if kernel != "area" or size in ((5, 7), (6, 5))
    ],
)
def test_planes_equal_opencv(voxels: Voxels, kernel: str, size_yx: tuple[int, int]) -> None:
    planes = clip(voxels).astype(np.float32)
    want = scale_to_unit(
        np.array([cv2.resize(plane, size_yx[::-1], interpolation=OPENCV[kernel]) for plane in planes])
    )
    size = (SHAPE[0], *size_yx)
    index = ~find_halfway(size, corners=False) if kernel == "nearest" else ...
    assert_close(make_input(voxels, size=size, interpolation=kernel)[index], want[index])


@pytest.mark.parametrize("size_yx", IN_PLANE)
@pytest.mark.parametrize(
    ("kernel", "method"), [("linear", "bilinear"), ("nearest", "nearest"), ("area", "area")]
)
def test_planes_equal_tf_image_resize(
    voxels: Voxels, size_yx: tuple[int, int], kernel: str, method: str
) -> None:
    import tensorflow as tf

    planes = clip(voxels).astype(np.float32)[..., None]
    want = scale_to_unit(tf.image.resize(planes, size_yx, method=method).numpy()[..., 0])
    size = (SHAPE[0], *size_yx)
    index = ~find_halfway(size, corners=False) if kernel == "nearest" else ...
    assert_close(make_input(voxels, size=size, interpolation=kernel)[index], want[index])


def test_bicubic_and_antialias_of_tf_give_other_values(voxels: Voxels) -> None:
    import tensorflow as tf

    planes = clip(voxels).astype(np.float32)[..., None]
    bicubic_half = tf.image.resize(planes, (5, 7), method="bicubic").numpy()[..., 0]
    smoothed = tf.image.resize(planes, (5, 7), antialias=True).numpy()[..., 0]
    size = (SHAPE[0], 5, 7)
    assert is_different(make_input(voxels, size=size, interpolation="cubic"), scale_to_unit(bicubic_half))
    assert is_different(make_input(voxels, size=size), scale_to_unit(smoothed))


# Order of the steps: clip, interpolate, scale


@pytest.mark.parametrize("kernel", ["linear", "cubic", "area"])
def test_padding_of_minus_3024_is_clipped_to_air_before_interpolation(kernel: str) -> None:
    padded = np.full((4, 8, 8), -3024, np.int16)  # as outside the reconstruction circle
    padded[:, :, 4:] = 40
    air = np.where(padded == -3024, -1000, padded).astype(np.int16)
    got = make_input(padded, size=(4, 8, 12), interpolation=kernel)
    np.testing.assert_array_equal(got, make_input(air, size=(4, 8, 12), interpolation=kernel))


def test_clipping_after_interpolation_gives_other_values_next_to_padding() -> None:
    padded = np.full((4, 8, 8), -3024, np.int16)
    padded[:, :, 4:] = 40
    clipped_late = np.clip(
        apply_along_axes(padded.astype(float), (4, 8, 12), make_trilinear_weights(False)), *WINDOW
    )
    assert is_different(make_input(padded, size=(4, 8, 12)), scale_to_unit(clipped_late))


@pytest.mark.parametrize("scale", [(0, 1), (-1, 1), (1, 0)])
def test_window_and_scale_equal_scale_intensity_range_of_monai(
    voxels: Voxels, scale: tuple[float, float]
) -> None:
    got = make_input(voxels, window=(-160, 240), scale=scale)
    want = (np.clip(voxels, -160.0, 240.0) + 160) / 400 * (scale[1] - scale[0]) + scale[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


# Orientation


@pytest.mark.parametrize("stored", ["LPS", "RAS", "LAS", "SRA", "PIR"])
def test_orientation_ras_equals_the_transposed_canonical_array_of_nibabel(
    voxels: Voxels, stored: str
) -> None:
    affine_ras = nib.orientations.inv_ornt_aff(
        nib.orientations.axcodes2ornt(stored), np.array(SHAPE)[[0, 1, 2]]
    )
    image = nib.Nifti1Image(voxels, affine_ras)  # axes (i, j, k) along `stored`
    canonical = nib.as_closest_canonical(image)  # as MONAI Orientationd("RAS") and TorchIO ToCanonical
    volume = Volume(voxels.transpose(2, 1, 0), np.diag([-1.0, -1, 1, 1]) @ affine_ras)
    got = preprocess(volume, PreprocessConfig(orientation="RAS", window=None, size=None)).tensor[0]
    np.testing.assert_array_equal(got, np.asarray(canonical.dataobj).transpose(2, 1, 0))


@pytest.mark.parametrize("wanted", ["LPS", "RAS", "LPI", "RAI"])
def test_orientations_equal_those_of_dicom_orient_of_simpleitk(voxels: Voxels, wanted: str) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetDirection([0, -1, 0, 0, 0, 1, 1, 0, 0])
    direction = np.array(image.GetDirection()).reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = direction
    got = preprocess(
        Volume(voxels, affine), PreprocessConfig(orientation=wanted, window=None, size=None)
    ).tensor[0]
    np.testing.assert_array_equal(got, sitk.GetArrayFromImage(sitk.DICOMOrient(image, wanted)))


# Spacing


@pytest.mark.parametrize("wanted", [(3, 1, 1), (2.5, 0.7, 0.4), (5, 2, 2), (1.5, 1.5, 1.5)])
def test_spacing_equals_a_simpleitk_grid_between_the_outer_edges(
    voxels: Voxels, wanted: tuple[float, float, float]
) -> None:
    size = [round(n * step / goal) for n, step, goal in zip(SHAPE, SPACING, wanted, strict=True)]
    reached = [n * step / m for n, step, m in zip(SHAPE, SPACING, size, strict=True)]
    origin = [0.5 * (new - old) for new, old in zip(reached, SPACING, strict=True)]
    want = resample_on_grid(clip(voxels), SPACING, size, reached[::-1], origin[::-1])
    assert_close(make_input(voxels, spacing=wanted), scale_to_unit(want))
    assert input_spacing(make_config(spacing=wanted), SHAPE, SPACING) == pytest.approx(reached)


def test_spacing_equals_resample_of_torchio_if_the_extent_is_an_integer_number_of_voxels(
    voxels: Voxels,
) -> None:
    wanted = (2.5, 1.4, 2.4)  # 45, 8.4 and 12 mm: 18, 6 and 5 voxels
    size = [math.ceil(n * step / goal - 1e-9) for n, step, goal in zip(SHAPE, SPACING, wanted, strict=True)]
    origin = [0.5 * (goal - step) for goal, step in zip(wanted, SPACING, strict=True)]  # TorchIO 0.x
    want = resample_on_grid(clip(voxels), SPACING, size, wanted[::-1], origin[::-1])
    assert_close(make_input(voxels, spacing=wanted), scale_to_unit(want))


def test_spacing_of_monai_differs_because_it_keeps_the_center_of_the_first_voxel(voxels: Voxels) -> None:
    # n voxels of s mm are resampled to m voxels of about w mm; positions are in mm from the first center.
    # Spacingd: m = round((n - 1) s / w) + 1 voxels of exactly w mm, voxel o at o w.
    # featray: m = round(n s / w) voxels of n s / m mm, voxel o at (o + 1/2) n s / m - s / 2.
    wanted = (5.0, 1.4, 1.6)  # half as many voxels along y and x: 6 and 7.5
    size = [round((n - 1) * step / goal) + 1 for n, step, goal in zip(SHAPE, SPACING, wanted, strict=True)]
    theirs = resample_on_grid(clip(voxels), SPACING, size, wanted[::-1], (0.0, 0.0, 0.0))
    assert size == [9, 7, 8]
    assert resampled_shape(make_config(spacing=wanted), SHAPE, SPACING) == (9, 6, 8)
    ours = make_input(voxels, spacing=wanted)
    assert is_different(ours[:, :6], scale_to_unit(theirs)[:, :6])
    along_y = apply_along_axes(clip(voxels)[:1, :, :1], (1, 6, 1), make_trilinear_weights(False))
    assert along_y[0, 0, 0] == clip(voxels)[0, :2, 0].mean()  # 0.35 mm from voxel 0; MONAI takes voxel 0


def test_spacing_with_align_corners_equals_scipy_zoom_by_the_ratio_of_spacings(voxels: Voxels) -> None:
    wanted = (3, 1, 1)
    factors = [step / goal for step, goal in zip(SPACING, wanted, strict=True)]
    want = ndimage.zoom(clip(voxels), factors, order=1, mode="nearest")
    assert_close(make_input(voxels, spacing=wanted, align_corners=True), scale_to_unit(want))
    reached = [(n - 1) * step / (m - 1) for n, step, m in zip(SHAPE, SPACING, want.shape, strict=True)]
    assert input_spacing(make_config(spacing=wanted, align_corners=True), SHAPE, SPACING) == pytest.approx(
        reached
    )


@pytest.mark.parametrize(
    "options", [{"fit": "stretch"}, {"fit": "crop_pad"}, {"fit": "patches", "stride": (4, 2, 5)}]
)
def test_the_volume_is_resampled_to_the_spacing_before_it_is_fitted(
    voxels: Voxels, options: dict[str, Any]
) -> None:
    size = (7, 5, 9)
    both = preprocess(
        make_volume(np.clip(voxels, *WINDOW)), make_config(spacing=(3, 1, 1), size=size, **options)
    )
    spaced = make_input(np.clip(voxels, -1000, 1000), spacing=(3, 1, 1), window=None)
    after = preprocess(make_volume(spaced), make_config(size=size, **options))
    assert_close(both.tensor, after.tensor)
    np.testing.assert_array_equal(both.origins, after.origins)


# Fit crop_pad

CROPS = list(itertools.product(range(1, 9), repeat=2))


def crop_or_pad_row(count: int, size: int) -> list[float]:
    row = np.arange(1, count + 1).reshape(1, 1, count)
    return (
        make_input(row, window=(0, 100), scale=(0, 100), size=(1, 1, size), fit="crop_pad").ravel().tolist()
    )


def compute_row(count: int, size: int, pad_front: int, crop_front: int) -> list[float]:
    behind = max(size - count - pad_front, 0)
    row = [0.0] * pad_front + [float(value) for value in range(1, count + 1)] + [0.0] * behind
    return row[crop_front : crop_front + size]


@pytest.mark.parametrize(("count", "size"), CROPS)
def test_crop_pad_equals_resize_with_pad_or_crop_of_monai(count: int, size: int) -> None:
    # SpatialPad(method="symmetric"): (size - n) // 2 in front; CenterSpatialCrop: from n // 2 - size // 2
    pad, crop = max(size - count, 0) // 2, count // 2 - size // 2 if count > size else 0
    assert crop_or_pad_row(count, size) == pytest.approx(compute_row(count, size, pad, crop))


@pytest.mark.parametrize(("count", "size"), CROPS)
def test_crop_or_pad_of_torchio_is_shifted_by_one_voxel_for_some_sizes(count: int, size: int) -> None:
    # TorchIO crops or pads ceil(half the difference) in front
    pad, crop = -(-max(size - count, 0) // 2), -(-max(count - size, 0) // 2)
    theirs = compute_row(count, size, pad, crop)
    agree = (count - size) % 2 == 0 or (count > size and count % 2 == 0)
    assert (crop_or_pad_row(count, size) == pytest.approx(theirs)) == agree


@pytest.mark.parametrize(("count", "size"), CROPS)
def test_crop_or_pad_of_tf_differs_only_if_an_even_size_is_cropped_to_an_odd_one(
    count: int, size: int
) -> None:
    import tensorflow as tf

    row = np.arange(1, count + 1, dtype=np.float32).reshape(1, count, 1)
    theirs = tf.image.resize_with_crop_or_pad(row, 1, size).numpy().ravel()
    agree = not (count > size and count % 2 == 0 and size % 2 == 1)
    assert (crop_or_pad_row(count, size) == pytest.approx(theirs.tolist())) == agree


# Patches


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (4, 2), (4, 3), (3, 1), (5, 5), (6, 4)])
def test_patches_start_where_those_of_monai_and_torchio_start(count: int, size: int, stride: int) -> None:
    row = np.arange(count).reshape(1, 1, count)
    config = make_config(size=(1, 1, size), stride=(1, 1, stride), fit="patches", window=None)
    starts = preprocess(make_volume(row), config).origins[:, 2].tolist()
    if count >= size:
        assert starts == compute_monai_starts(count, size, stride)
        assert starts == compute_torchio_starts(count, size, stride)
    else:
        assert starts == [0]
    covered = {start + offset for start in starts for offset in range(size)}
    assert covered >= set(range(count))


def compute_monai_starts(count: int, size: int, interval: int) -> list[int]:
    """Return the starts of MONAI's dense_patch_slices."""
    windows = next(d for d in range(-(-count // interval)) if d * interval + size >= count) + 1
    return [d * interval - max(d * interval + size - count, 0) for d in range(windows)]


def compute_torchio_starts(count: int, size: int, step: int) -> list[int]:
    """Return the starts of TorchIO's GridSampler with patch_overlap = size - step and no padding."""
    starts = list(range(0, count + 1 - size, step))
    return starts if starts[-1] == count - size else [*starts, count - size]


def test_patches_cover_every_voxel_and_hold_the_voxels_at_their_origins(voxels: Voxels) -> None:
    size, stride = (4, 5, 7), (3, 5, 4)
    whole = make_input(voxels)
    result = preprocess(make_volume(voxels), make_config(size=size, stride=stride, fit="patches"))
    counts = np.zeros(SHAPE, int)
    for patch, start in zip(result.tensor, result.origins, strict=True):
        region = tuple(slice(at, at + count) for at, count in zip(start, size, strict=True))
        np.testing.assert_array_equal(patch, whole[region])
        counts[region] += 1
    assert counts.min() == 1


def test_size_null_keeps_every_voxel(voxels: Voxels) -> None:
    assert_close(make_input(voxels, size=None), scale_to_unit(clip(voxels)))
