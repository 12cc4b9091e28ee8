"""From volume to model input: each step of preprocessing, with results that are computed by hand."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.config import PreprocessConfig
from featray.ct.reorient import reorient
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError
from featray.stages.preprocess import input_shape, preprocess, resampled_shape
from featray.synthetic.phantom import PhantomParameters, make_phantom

ALL_ORIENTATIONS = [
    "".join(letters) for axes in permutations(("LR", "PA", "SI")) for letters in product(*axes)
]


def make_volume(
    voxels: Any, spacing_zyx: tuple[float, float, float] = (1, 1, 1), dtype: Any = np.int16
) -> Volume:
    """Return an LPS volume with its first voxel at 0 mm."""
    return Volume(np.asarray(voxels, dtype), np.diag([*spacing_zyx[::-1], 1.0]))


def make_row(*values: float) -> Volume:
    """Return a volume of one row along x."""
    return make_volume([[values]])


def make_raw_config(**options: Any) -> PreprocessConfig:
    """Return a config that does not change values, unless `options` say otherwise."""
    return PreprocessConfig(**{"window": None, "size": None} | options)


def compute_values(volume: Volume, config: PreprocessConfig) -> list[float]:
    """Preprocess a volume; return all values of the model input in C order."""
    return preprocess(volume, config).tensor.ravel().tolist()


def make_numbered_volume(shape: tuple[int, int, int]) -> Volume:
    """Return a volume in which each voxel has another value."""
    return make_volume(np.arange(np.prod(shape)).reshape(shape))


def test_the_window_is_clipped_and_mapped_onto_the_scale() -> None:
    config = PreprocessConfig(window=(-1000, 1000), scale=(0, 1), size=None)
    assert compute_values(make_row(-3024, -1000, 0, 1000, 3071), config) == [0, 0, 0.5, 1, 1]


def test_the_scale_may_contain_negative_values_or_decrease() -> None:
    assert compute_values(
        make_row(-160, 40, 240), PreprocessConfig(window=(-160, 240), scale=(-1, 1), size=None)
    ) == [
        -1,
        0,
        1,
    ]
    assert compute_values(
        make_row(-160, 40, 240), PreprocessConfig(window=(-160, 240), scale=(1, 0), size=None)
    ) == [
        1,
        0.5,
        0,
    ]


def test_without_a_window_values_do_not_change() -> None:
    assert compute_values(make_row(-3024, 0, 3071), make_raw_config(scale=(0, 1))) == [-3024, 0, 3071]


def test_values_are_clipped_before_interpolation_not_after() -> None:
    config = PreprocessConfig(window=(-1000, 1000), scale=(-1000, 1000), size=(1, 1, 1))
    assert compute_values(make_row(-3024, 0), config) == [
        -500
    ]  # clipping after interpolation would give -1000


@pytest.mark.parametrize(
    ("fit", "size", "want"),
    [
        ("stretch", None, [-500, 0]),
        ("stretch", (1, 1, 1), [-250]),
        ("crop_pad", (1, 1, 2), [-500, 0]),
        ("patches", (1, 1, 1), [-500, 0]),
    ],
)
def test_values_are_clipped_before_the_spacing_step(fit: str, size: Any, want: list[float]) -> None:
    config = PreprocessConfig(
        window=(-1000, 1000), scale=(-1000, 1000), spacing=(1, 1, 2), size=size, fit=fit
    )
    assert compute_values(make_row(-3024, 0, 0, 0), config) == want


def test_values_that_cubic_interpolation_puts_outside_the_scale_are_kept() -> None:
    config = PreprocessConfig(
        window=(0, 100),
        scale=(0, 1),
        spacing=(1, 1, 0.5),
        size=(1, 1, 8),
        fit="crop_pad",
        interpolation="cubic",
    )
    got = compute_values(make_row(0, 0, 100, 100), config)
    assert min(got) < 0
    assert max(got) > 1


def test_the_spacing_step_keeps_the_extent_and_rounds_the_number_of_voxels() -> None:
    config = make_raw_config(spacing=(2.5, 1, 1))
    assert preprocess(make_volume(np.zeros((4, 2, 2)), (5, 1, 1)), config).tensor.shape == (1, 8, 2, 2)
    assert resampled_shape(config, (3, 2, 2), (3.27, 0.3, 1)) == (4, 1, 2)


def test_stretch_after_spacing_interpolates_the_resampled_volume() -> None:
    both = preprocess(make_row(0, 10, 40, 70), make_raw_config(spacing=(1, 1, 2), size=(1, 1, 1))).tensor
    assert both.item() == 30  # the resampled volume is 5 and 55


@pytest.mark.parametrize(
    ("count", "size", "want"),
    [
        (5, 2, [1, 2]),  # 5 // 2 - 2 // 2 = 1
        (4, 3, [1, 2, 3]),  # 4 // 2 - 3 // 2 = 1
        (5, 3, [1, 2, 3]),
        (2, 5, [-7, 0, 1, -7, -7]),  # (5 - 2) // 2 = 1 in front
        (3, 3, [0, 1, 2]),
    ],
)
def test_crop_pad_is_centered_as_in_monai(count: int, size: int, want: list[float]) -> None:
    config = PreprocessConfig(window=(-7, 100), scale=(-7, 100), size=(1, 1, size), fit="crop_pad")
    assert compute_values(make_row(*range(count)), config) == want


def test_crop_pad_crops_one_axis_while_it_pads_another() -> None:
    config = PreprocessConfig(window=(-7, 100), scale=(-7, 100), size=(3, 1, 2), fit="crop_pad")
    tensor = preprocess(make_volume(np.arange(4).reshape(1, 1, 4)), config).tensor
    np.testing.assert_array_equal(tensor[0, :, 0], [[-7, -7], [1, 2], [-7, -7]])


def test_padding_has_the_value_of_the_lower_bound_of_the_window() -> None:
    config = PreprocessConfig(window=(-1000, 1000), scale=(-1, 1), size=(1, 1, 3), fit="crop_pad")
    assert compute_values(make_row(1000), config) == [-1, 1, -1]


def test_padding_without_a_window_has_the_smallest_value_of_the_volume() -> None:
    assert compute_values(make_row(5, 9), make_raw_config(size=(1, 1, 4), fit="crop_pad")) == [5, 5, 9, 5]


def test_the_last_patch_is_shifted_so_that_it_ends_with_the_volume() -> None:
    got = preprocess(make_row(0, 1, 2, 3, 4), make_raw_config(size=(1, 1, 2), fit="patches"))
    np.testing.assert_array_equal(got.tensor[:, 0, 0], [[0, 1], [2, 3], [3, 4]])
    np.testing.assert_array_equal(got.origins, [[0, 0, 0], [0, 0, 2], [0, 0, 3]])


def test_patches_overlap_if_the_stride_is_smaller_than_their_size() -> None:
    got = preprocess(make_row(0, 1, 2, 3), make_raw_config(size=(1, 1, 2), fit="patches", stride=(1, 1, 1)))
    np.testing.assert_array_equal(got.tensor[:, 0, 0], [[0, 1], [1, 2], [2, 3]])


def test_patches_are_ordered_by_z_then_y_then_x() -> None:
    got = preprocess(make_numbered_volume((2, 2, 4)), make_raw_config(size=(1, 2, 2), fit="patches"))
    np.testing.assert_array_equal(got.origins, [[0, 0, 0], [0, 0, 2], [1, 0, 0], [1, 0, 2]])


def test_each_patch_holds_the_voxels_at_its_origin() -> None:
    volume = make_numbered_volume((5, 6, 7))
    got = preprocess(volume, make_raw_config(size=(2, 4, 3), fit="patches", stride=(2, 1, 3)))
    for patch, (z, y, x) in zip(got.tensor, got.origins, strict=True):
        np.testing.assert_array_equal(patch, volume.voxels_zyx[z : z + 2, y : y + 4, x : x + 3])


def test_a_volume_smaller_than_the_patch_is_padded_at_its_end_so_that_the_origin_is_0() -> None:
    config = PreprocessConfig(window=(-7, 100), scale=(-7, 100), size=(1, 2, 4), fit="patches")
    got = preprocess(make_row(1, 2, 3), config)
    np.testing.assert_array_equal(got.tensor[0, 0], [[1, 2, 3, -7], [-7, -7, -7, -7]])
    np.testing.assert_array_equal(got.origins, [[0, 0, 0]])


def test_a_whole_volume_input_is_one_patch_at_the_origin() -> None:
    got = preprocess(make_row(1, 2, 3), make_raw_config(size=(1, 1, 1), fit="crop_pad"))
    assert got.tensor.shape == (1, 1, 1, 1)
    np.testing.assert_array_equal(got.origins, [[0, 0, 0]])
    assert (got.tensor.dtype, got.origins.dtype) == (np.float32, np.int32)


CONFIGS = [
    make_raw_config(),
    make_raw_config(spacing=(1.5, 0.7, 3)),
    make_raw_config(size=(3, 4, 5)),
    make_raw_config(size=(3, 4, 5), spacing=(1.5, 0.7, 3)),
    make_raw_config(size=(3, 9, 2), fit="crop_pad"),
    make_raw_config(size=(3, 4, 5), fit="patches", stride=(2, 3, 4)),
    make_raw_config(size=(3, 4, 5), fit="patches", spacing=(0.5, 0.7, 1)),
    make_raw_config(size=(2, 2, 2), orientation="SAR"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_shape_of_the_input_is_computed_from_the_header(config: PreprocessConfig) -> None:
    volume = make_volume(np.zeros((5, 8, 11)), (2, 0.5, 0.8))
    reoriented = reorient(volume, config.orientation)
    want = input_shape(config, reoriented.voxels_zyx.shape, reoriented.spacing_zyx)
    assert preprocess(volume, config).tensor.shape == want


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_tensor_can_be_written_into_a_given_array(config: PreprocessConfig) -> None:
    volume = make_numbered_volume((5, 8, 11))
    want = preprocess(volume, config).tensor
    out = np.full(want.shape, np.nan, np.float32)
    assert preprocess(volume, config, out=out).tensor is out
    np.testing.assert_array_equal(out, want)


def test_a_given_array_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="out: expected"):
        preprocess(make_row(1, 2), make_raw_config(), out=np.empty((1, 1, 2), np.float32))


@pytest.mark.parametrize("orientation", ALL_ORIENTATIONS)
@pytest.mark.parametrize(
    "config", [CONFIGS[2], CONFIGS[3], CONFIGS[5]], ids=["stretch", "spacing", "patches"]
)
def test_the_orientation_of_the_file_does_not_change_the_input(
    orientation: str, config: PreprocessConfig
) -> None:
    volume = Volume(
        np.random.default_rng(0).integers(-1000, 1000, (5, 8, 11), np.int16), np.diag([0.8, 0.5, 2, 1])
    )
    stored = reorient(volume, orientation)
    stored = Volume(np.ascontiguousarray(stored.voxels_zyx), stored.affine_lps)
    assert stored.orientation == orientation
    np.testing.assert_array_equal(preprocess(stored, config).tensor, preprocess(volume, config).tensor)


def test_the_input_has_the_configured_orientation() -> None:
    # x points to the left in the volume and to the right in the input
    assert compute_values(make_row(1, 2, 3), make_raw_config(orientation="RPS")) == [3, 2, 1]


def test_with_area_the_corners_do_not_move_the_center_of_a_crop() -> None:
    # The first voxel becomes four. Its middle at 0 mm lies between the second and the third of these.
    row = make_volume([[[10, 20, 30]]], spacing_zyx=(1, 1, 10))
    for align_corners in (False, True):
        config = make_raw_config(
            spacing=(1, 1, 2.5),
            size=(1, 1, 2),
            fit="crop_pad",
            interpolation="area",
            align_corners=align_corners,
        )
        tensor = preprocess(row, config, center_lps=(0.0, 0.0, 0.0)).tensor
        whole = preprocess(row, config.model_copy(update={"size": None})).tensor
        assert tensor.ravel().tolist() == whole.ravel().tolist()[1:3]


LESION_XYZ_MM = (82.0, -33.0, 41.0)
OUTSIDE_XYZ_MM = (1000.0, 1000.0, 1000.0)


def make_phantom_with_lesion(xyz_mm: tuple[float, float, float]) -> Volume:
    """Return a phantom with its lesion at a position in mm (LPS), and without noise and table."""
    parameters = PhantomParameters(
        18, *xyz_mm, body_width_mm=340, body_depth_mm=240, lung_size=1, noise_hu=0, table=False
    )
    phantom = make_phantom(0, (50, 80, 80), parameters=parameters)
    return Volume(phantom.voxels_zyx, phantom.affine_lps)


@pytest.mark.parametrize("stored_as", ALL_ORIENTATIONS)
def test_a_lesion_is_at_its_voxel_for_each_orientation_of_the_file(stored_as: str) -> None:
    config = PreprocessConfig(window=(-1000, 1000), scale=(-1000, 1000), size=(25, 40, 40))
    with_lesion, without = (
        preprocess(reorient(make_phantom_with_lesion(position), stored_as), config).tensor[0]
        for position in (LESION_XYZ_MM, OUTSIDE_XYZ_MM)
    )
    lesion = with_lesion - without
    center_zyx = [(grid * lesion).sum() / lesion.sum() for grid in np.indices(lesion.shape)]
    # The volume is 300 x 400 x 400 mm with 0 mm in the middle. The input has 25 x 40 x 40 voxels of
    # 12 x 10 x 10 mm. The center of the first voxel is half a voxel from the edge: z = (41 + 150) / 12 - 1/2,
    # and likewise y and x.
    np.testing.assert_allclose(center_zyx, [15.4167, 16.2, 27.7], atol=0.05)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (np.nan, 1, 1), (np.inf, 1, 1)])
def test_an_unknown_spacing_is_refused_only_if_the_config_resamples_to_a_spacing(
    spacing: tuple[float, float, float],
) -> None:
    assert input_shape(make_raw_config(size=(2, 2, 2)), (3, 3, 3), spacing) == (1, 2, 2, 2)
    with pytest.raises(ScanError, match="expected a known voxel spacing") as caught:
        input_shape(make_raw_config(spacing=(1, 1, 1)), (3, 3, 3), spacing)
    assert caught.value.reason is Reason.PREPROCESS


@pytest.mark.parametrize(
    "voxels",
    [np.zeros((0, 2, 2), np.int16), np.zeros((2, 2, 2), np.complex64)],
    ids=["empty", "complex"],
)
def test_voxels_that_cannot_become_an_input_fail_with_reason_preprocess(voxels: NDArray[Any]) -> None:
    with pytest.raises(ScanError) as caught:
        preprocess(Volume(voxels, np.eye(4)), PreprocessConfig())
    assert caught.value.reason is Reason.PREPROCESS


def test_preprocessing_does_not_change_the_volume() -> None:
    volume = make_row(-3024, 0, 3071)
    volume.voxels_zyx.flags.writeable = False
    preprocess(volume, PreprocessConfig(size=None))
    assert volume.voxels_zyx.ravel().tolist() == [-3024, 0, 3071]
