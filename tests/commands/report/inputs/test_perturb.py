"""Perturbations of model inputs: their size, and what they leave as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featray.commands.report.inputs.perturb import (
    NOISE_HU,
    add_noise,
    make_perturbations,
    resample_and_restore,
    shift_by_one,
)
from featray.commands.report.label_free.stability import measure_reliability
from featray.config import PreprocessConfig


def make_preprocess(**keys: Any) -> PreprocessConfig:
    return PreprocessConfig.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "deviation"),
    [
        ({"window": [-1000, 1000], "scale": [0, 1]}, 5 / 2000),
        ({"window": [-500, 500], "scale": [-1, 1]}, 5 * 2 / 1000),
        ({"window": [-1000, 1000], "scale": [1, 0]}, 5 / 2000),
        ({"window": None}, 5),
    ],
)
def test_the_noise_has_five_hu_in_the_unit_of_the_input(keys: dict[str, Any], deviation: float) -> None:
    patches = np.full((2, 20, 20, 20), 0.5, np.float32)
    noise = add_noise(patches, make_preprocess(**keys), "scan") - patches
    assert noise.std() == pytest.approx(deviation, rel=0.02)
    assert abs(noise.mean()) < 0.05 * deviation
    neighbors = np.corrcoef(noise[..., 1:].ravel(), noise[..., :-1].ravel())[0, 1]
    assert abs(neighbors) < 0.03


def test_noise_stays_within_the_scale_and_follows_from_the_scan() -> None:
    preprocess = make_preprocess(window=[-1000, 1000], scale=[0, 1])
    patches = np.zeros((1, 8, 8, 8), np.float32)
    noisy = add_noise(patches, preprocess, "scan")
    assert noisy.min() == 0
    assert noisy.max() > 0
    assert noisy.dtype == np.float32
    assert np.array_equal(noisy, add_noise(patches, preprocess, "scan"))
    assert not np.array_equal(noisy, add_noise(patches, preprocess, "other"))
    assert not patches.any()


def test_the_reliability_of_a_voxel_under_noise_is_the_one_that_its_variances_give() -> None:
    # ICC = between / (between + within); of an original and a noisy repeat, within is half the noise variance
    spread = NOISE_HU / np.sqrt(2)
    rng = np.random.default_rng(0)
    values = rng.normal(0, spread, 1500).astype(np.float32)
    preprocess = make_preprocess(window=None)
    noisy = [
        add_noise(value.reshape(1, 1, 1, 1), preprocess, str(number)) for number, value in enumerate(values)
    ]
    features = np.stack([values, np.ravel(noisy)], axis=1)[:, :, None]
    assert measure_reliability(features).icc_2_1[0] == pytest.approx(0.5, abs=0.06)


def test_a_shift_moves_every_axis_by_one_voxel_and_repeats_the_edge() -> None:
    patches = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    shifted = shift_by_one(patches)
    assert np.array_equal(shifted[:, 1:, 1:, 1:], patches[:, :-1, :-1, :-1])
    assert np.array_equal(shifted[:, 0, 1:, 1:], patches[:, 0, :-1, :-1])
    assert np.array_equal(shifted[:, 0, 0, 0], patches[:, 0, 0, 0])


def test_an_axis_of_one_voxel_is_not_shifted() -> None:
    patches = np.arange(6, dtype=np.float32).reshape(1, 1, 2, 3)
    assert shift_by_one(patches).tolist() == [[[[0, 0, 1], [0, 0, 1]]]]


def test_resampling_keeps_shape_and_smooth_values_and_blurs_single_voxels() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (2, 40, 40, 40))
    restored = resample_and_restore(ramp)
    assert restored.shape == ramp.shape
    assert restored.dtype == np.float32
    assert np.allclose(restored[..., 2:-2], ramp[..., 2:-2], atol=1e-3)
    checks = np.indices((40, 40, 40)).sum(axis=0)[None].astype(np.float32) % 2
    blurred = resample_and_restore(checks)
    assert 0.01 < blurred.std() < 0.7 * checks.std()


def test_resampling_leaves_axes_of_up_to_ten_voxels_as_they_are() -> None:
    patches = np.random.default_rng(0).random((1, 10, 4, 1), np.float32)
    assert np.array_equal(resample_and_restore(patches), patches)


def test_every_perturbation_changes_an_input_a_little() -> None:
    z, y, x = np.indices((16, 24, 24))
    smooth = (0.5 + 0.2 * np.sin((z + y) / 5) + 0.2 * np.cos(x / 7))[None].astype(np.float32)
    for perturbation in make_perturbations(make_preprocess()):
        change = perturbation.apply(smooth, "scan") - smooth
        assert 0 < change.std() < smooth.std(), perturbation.name
        assert perturbation.description
