"""Streamed moments and products equal those of numpy, also for large offsets, and few scans."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.label_free import moments
from featray.commands.report.label_free.moments import (
    Moments,
    MomentSum,
    Products,
    ProductSum,
    compute_moments,
    compute_products,
    estimate_product_bytes,
)
from featray.commands.report.label_free.sampling import draw_sample


def make_features(scans: int, units: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(scans, units))


def sum_in_blocks(features: NDArray[np.generic], size: int) -> Moments:
    total = MomentSum(features.shape[1])
    for start in range(0, len(features), size):
        total.add(features[start : start + size])
    return total.finish()


def multiply_in_blocks(features: list[NDArray[np.float64]], size: int) -> Products:
    total = ProductSum([candidate.mean(axis=0) for candidate in features])
    for start in range(0, len(features[0]), size):
        total.add([candidate[start : start + size] for candidate in features])
    return total.finish()


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_moments_of_blocks_equal_those_of_numpy(size: int) -> None:
    features = make_features(200, 5) * [1, 10, 0.1, 1e6, 1e-6] + [0, 3, -2, 1e6, 0]
    result = sum_in_blocks(features, size)
    assert (result.scans, result.units) == (200, 5)
    np.testing.assert_allclose(result.mean, features.mean(axis=0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(result.variance, features.var(axis=0), rtol=1e-12)
    np.testing.assert_array_equal(result.minimum, features.min(axis=0))
    np.testing.assert_array_equal(result.maximum, features.max(axis=0))


def test_blocks_that_drift_give_the_same_variance() -> None:
    features = make_features(300, 3) + np.linspace(0, 1e4, 300)[:, None]
    np.testing.assert_allclose(sum_in_blocks(features, 10).variance, features.var(axis=0), rtol=1e-12)


def test_a_large_offset_costs_no_digits_of_the_variance() -> None:
    steps = np.tile(np.arange(8.0), 100)[:, None]
    features = (steps + 2**23).astype(np.float32)  # exact in float32; a float32 sum of squares would not be
    result = sum_in_blocks(features, 33)
    assert result.variance[0] == pytest.approx(63 / 12, rel=1e-13)
    assert result.mean[0] == 2**23 + 3.5


def test_float32_sums_of_many_values_are_exact() -> None:
    features = np.full((3000, 1), 0.1, np.float32)
    features[::2] = 0.3
    result = sum_in_blocks(features, 1024)
    expected = (float(np.float32(0.1)) + float(np.float32(0.3))) / 2
    assert result.mean[0] == pytest.approx(expected, rel=1e-15)


def test_a_constant_unit_has_no_variance_at_all() -> None:
    features = np.full((1000, 2), 0.1, np.float32)
    features[:, 1] = np.arange(1000)
    result = sum_in_blocks(features, 100)
    assert result.variance[0] == 0
    assert result.mean[0] == np.float32(0.1)
    assert result.is_constant.tolist() == [True, False]
    products = compute_products([features])
    assert not products.scatter[0, 0][0].any()


def test_zeros_are_counted_with_negative_zeros() -> None:
    features = np.array([[0.0, 1.0], [-0.0, 2.0], [1e-30, 0.0]])
    assert compute_moments(features).zeros.tolist() == [2, 1]


def test_one_scan_has_no_variance() -> None:
    result = compute_moments(np.array([[1.0, -2.0]], np.float32))
    assert result.variance.tolist() == [0, 0]
    assert result.is_constant.all()
    assert not result.is_alive.any()


def test_integers_and_half_precision_are_accepted() -> None:
    assert compute_moments(np.array([[1], [3]], np.int16)).mean.tolist() == [2]
    half = compute_moments(np.array([[1], [3]], np.float16))
    assert half.mean.tolist() == [2]
    assert half.resolution == pytest.approx(2**-10)


def test_values_that_differ_in_the_last_digit_are_not_alive() -> None:
    features = np.ones((100, 2), np.float32)
    features[::2, 0] = np.nextafter(np.float32(1), np.float32(2))
    features[::2, 1] = 1.001
    assert compute_moments(features).is_alive.tolist() == [False, True]


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_unit_is_dead_by_comparison_with_the_others_in_any_scale(scale: float) -> None:
    features = make_features(100, 4) * [1, 1, 1, 5e-5] * scale
    assert compute_moments(features).is_alive.tolist() == [True, True, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        compute_moments(np.array([[1.0], [value]]))
    with pytest.raises(ValueError, match="NaN or infinity"):
        ProductSum([np.zeros(1)]).add([np.array([[value]])])


def test_no_scans_and_other_widths_are_errors() -> None:
    with pytest.raises(ValueError, match="no scans"):
        MomentSum(3).finish()
    with pytest.raises(ValueError, match="no scans"):
        ProductSum([np.zeros(3)]).finish()
    with pytest.raises(ValueError, match=r"expected \(scans, 3\)"):
        MomentSum(3).add(np.zeros((2, 4)))


@pytest.mark.parametrize("size", [1, 16, 500])
def test_products_of_blocks_equal_the_covariance_of_numpy(size: int) -> None:
    features = [make_features(100, 4, 1) + 1e5, make_features(100, 7, 2), make_features(100, 1, 3)]
    products = multiply_in_blocks(features, size)
    whole = np.cov(np.concatenate(features, axis=1).T, bias=True)
    assert products.scans == 100
    np.testing.assert_allclose(products.compute_covariance(0), whole[:4, :4], atol=1e-10)
    np.testing.assert_allclose(products.scatter[0, 1] / 100, whole[:4, 4:11], atol=1e-10)
    np.testing.assert_allclose(products.scatter[1, 2] / 100, whole[4:11, 11:], atol=1e-10)


def test_products_hold_the_sums_of_squared_norms() -> None:
    features = [make_features(50, 3, 1), make_features(50, 2, 2)]
    norms = np.stack([np.square(one - one.mean(axis=0)).sum(axis=1) for one in features])
    np.testing.assert_allclose(multiply_in_blocks(features, 9).norms, norms @ norms.T, rtol=1e-12)


def test_matrices_that_are_summed_in_parts_have_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    features = [make_features(30, 7, 1), make_features(30, 5, 2)]
    whole = compute_products(features)
    monkeypatch.setattr(moments, "_PRODUCT_ROWS", 3)
    for pair, scatter in compute_products(features).scatter.items():
        np.testing.assert_allclose(scatter, whole.scatter[pair], rtol=1e-12)


def test_means_of_other_scans_are_an_error() -> None:
    features = make_features(50, 3)
    total = ProductSum([features[:49].mean(axis=0)])
    total.add([features])
    with pytest.raises(ValueError, match="means are not those"):
        total.finish()


def test_candidates_with_different_scans_are_an_error() -> None:
    total = ProductSum([np.zeros(2), np.zeros(2)])
    with pytest.raises(ValueError, match="same scans"):
        total.add([np.zeros((3, 2)), np.zeros((4, 2))])
    with pytest.raises(ValueError, match="same scans"):
        total.add([np.zeros((3, 2))])


def test_the_matrices_of_five_wide_candidates_take_half_a_gigabyte() -> None:
    assert estimate_product_bytes([2048] * 5) == 15 * 2048**2 * 8 == 503_316_480
    assert estimate_product_bytes([2, 3]) == 8 * (4 + 6 + 9)


def test_a_sample_is_sorted_repeatable_and_without_repetition() -> None:
    sample = draw_sample(1000, 50, seed=3)
    assert len(np.unique(sample.rows)) == 50
    assert (np.diff(sample.rows) > 0).all()
    assert not sample.is_whole
    np.testing.assert_array_equal(sample.rows, draw_sample(1000, 50, seed=3).rows)


def test_a_sample_below_the_limit_holds_all_scans() -> None:
    sample = draw_sample(4, 4)
    assert sample.is_whole
    assert sample.rows.tolist() == [0, 1, 2, 3]
    assert len(draw_sample(0, 4).rows) == 0
    with pytest.raises(ValueError, match="cannot draw"):
        draw_sample(4, 0)
