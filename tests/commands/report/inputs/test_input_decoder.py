"""Summaries of model inputs: histogram, resized voxels and the middle plane, for inputs of every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featray.commands.report.inputs.input_decoder import count_histogram, resize_samples, take_plane
from featray.config import PreprocessConfig


def make_preprocess(**keys: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate(keys)


@pytest.mark.parametrize("scale", [(0, 1), (1, 0), (-1, 1)])
def test_the_bins_of_the_histogram_cover_the_scale(scale: tuple[float, float]) -> None:
    low, high = min(scale), max(scale)
    tensor = np.linspace(low, high, 64 * 64, dtype=np.float32).reshape(1, 16, 16, 16)
    histogram = count_histogram(tensor, make_preprocess(scale=scale), has_volumes=True)
    assert histogram is not None
    assert histogram == pytest.approx(np.full(64, 1 / 64), abs=1 / 2048)


def test_without_a_window_the_bins_cover_hu_and_arrays_have_none() -> None:
    tensor = np.array([-3000, -990, 990, 990], np.float32).reshape(1, 1, 2, 2)
    preprocess = make_preprocess(window=None)
    histogram = count_histogram(tensor, preprocess, has_volumes=True)
    assert histogram is not None
    assert histogram[[0, -1]].tolist() == [0.5, 0.5]
    assert count_histogram(tensor, preprocess, has_volumes=False) is None


def test_values_that_an_interpolation_overshoots_count_in_the_last_bins() -> None:
    tensor = np.array([-0.1, 1.1], np.float32).reshape(1, 1, 1, 2)
    histogram = count_histogram(tensor, make_preprocess(scale=(0, 1)), has_volumes=True)
    assert histogram is not None
    assert histogram[[0, -1]].tolist() == [0.5, 0.5]


def test_the_resized_voxels_of_several_patches_are_their_mean() -> None:
    patches = np.random.default_rng(0).random((3, 16, 32, 32), np.float32)
    expected = patches.mean(axis=0).reshape(16, 16, 2, 16, 2).mean(axis=(2, 4))
    resized = resize_samples(patches)
    assert resized is not None
    assert resized == pytest.approx(expected.ravel(), abs=1e-6)


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((64,), 64),
        ((5000,), 4096),
        ((28, 28), 64 * 64),
        ((8, 9, 10), 16**3),
        ((28, 28, 3), 16**3),
        ((8, 9, 10, 1), 16**3),
        ((1, 1, 28, 28), 64 * 64),
    ],
)
def test_samples_of_every_rank_become_at_most_4096_values(shape: tuple[int, ...], values: int) -> None:
    resized = resize_samples(np.ones((2, *shape), np.float32))
    assert resized is not None
    assert resized.shape == (values,)
    assert resized == pytest.approx(np.ones(values), abs=1e-5)


def test_a_short_vector_keeps_its_values() -> None:
    samples = np.random.default_rng(0).random((1, 10), np.float32)
    resized = resize_samples(samples)
    assert resized is not None
    assert resized == pytest.approx(samples[0])


def test_a_long_vector_becomes_means_over_boxes_of_equal_size() -> None:
    samples = np.random.default_rng(0).random((1, 3 * 4096), np.float32)
    resized = resize_samples(samples)
    assert resized is not None
    assert resized == pytest.approx(samples.reshape(4096, 3).mean(axis=1), abs=1e-5)


def test_samples_of_more_than_three_axes_are_not_resized() -> None:
    tensor = np.ones((1, 4, 4, 4, 2), np.float32)
    assert resize_samples(tensor) is None
    assert take_plane(tensor, has_volumes=False) is None


def test_the_middle_plane_of_the_middle_patch_is_taken() -> None:
    tensor = np.arange(3 * 4 * 2 * 3, dtype=np.float32).reshape(3, 4, 2, 3)
    plane = take_plane(tensor, has_volumes=True)
    assert plane is not None
    assert np.array_equal(plane, tensor[1, 2])


def test_images_are_planes_and_vectors_have_none() -> None:
    image = np.random.default_rng(0).random((1, 6, 5), np.float32)
    assert np.array_equal(np.asarray(take_plane(image, has_volumes=False)), image[0])
    colors = np.random.default_rng(0).random((1, 6, 5, 3), np.float32)
    assert np.asarray(take_plane(colors, has_volumes=False)) == pytest.approx(colors[0].mean(axis=-1))
    assert take_plane(np.ones((1, 7), np.float32), has_volumes=False) is None
