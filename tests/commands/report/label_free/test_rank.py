"""Effective rank and participation ratio of spectra with known values."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import hadamard

from featray.commands.report.label_free.moments import compute_moments, compute_products
from featray.commands.report.label_free.rank import measure_rank, measure_rank_of_covariance, measure_ranks


def make_features(scans: int, variances: list[float], units: int, seed: int = 0) -> NDArray[np.float64]:
    """Return features whose PCA variances are exactly these, in random directions."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(scans, len(variances)))
    left = np.linalg.qr(raw - raw.mean(axis=0))[0] * np.sqrt(scans)
    right = np.linalg.qr(rng.normal(size=(units, len(variances))))[0]
    return np.asarray(left * np.sqrt(variances) @ right.T)


def test_three_equal_directions_have_rank_three() -> None:
    rank = measure_rank(make_features(200, [2, 2, 2], 32))
    assert rank.effective_rank == pytest.approx(3)
    assert rank.participation_ratio == pytest.approx(3)
    assert (rank.components_90, rank.cap, rank.scans, rank.units) == (3, 32, 200, 32)
    np.testing.assert_allclose(rank.variances, [2, 2, 2])


def test_unequal_directions_have_the_rank_of_the_formula() -> None:
    variances = np.array([9.0, 4.0, 1.0])
    shares = np.array([3, 2, 1]) / 6
    rank = measure_rank(make_features(100, variances.tolist(), 10))
    assert rank.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert rank.participation_ratio == pytest.approx(14**2 / (81 + 16 + 1))
    assert rank.components_90 == 2


def test_the_rows_of_a_hadamard_matrix_fill_all_directions() -> None:
    rank = measure_rank(hadamard(16)[:, 1:].astype(np.float32))
    assert rank.effective_rank == pytest.approx(15)
    assert rank.participation_ratio == pytest.approx(15)
    assert rank.components_90 == 14


@pytest.mark.parametrize(("scans", "units"), [(20, 50), (50, 20)])
def test_features_covariance_and_singular_values_agree(scans: int, units: int) -> None:
    features = np.random.default_rng(1).normal(size=(scans, units)) + 5
    singular = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)[: min(scans - 1, units)]
    shares = singular / singular.sum()
    streamed = measure_rank_of_covariance(
        compute_products([features]).compute_covariance(0), compute_moments(features)
    )
    for rank in (measure_rank(features), streamed):
        assert rank.cap == min(scans - 1, units)
        assert rank.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
        assert rank.participation_ratio == pytest.approx((singular**2).sum() ** 2 / (singular**4).sum())


def test_the_scans_limit_the_rank_of_noise() -> None:
    noise = np.random.default_rng(2).normal(size=(400, 2000))
    few, more = measure_rank(noise[:50]), measure_rank(noise[:200])
    assert 48 < few.effective_rank < few.cap == 49
    assert 190 < more.effective_rank < more.cap == 199
    assert few.is_near_cap
    assert not measure_rank(noise[:, :10]).is_near_cap


def test_rotation_scale_and_offset_do_not_change_the_rank() -> None:
    features = make_features(100, [5, 2, 1], 8)
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(8, 8)))[0]
    rank, other = measure_rank(features), measure_rank(features @ rotation * 1e-9 + 1e-3)
    assert other.effective_rank == pytest.approx(rank.effective_rank)
    assert other.participation_ratio == pytest.approx(rank.participation_ratio)


def test_rounding_of_float32_at_a_large_offset_adds_no_directions() -> None:
    features = (make_features(300, [1, 1, 1], 64) + 1e5).astype(np.float32)
    singular = np.linalg.svd(features - features.mean(axis=0, dtype=np.float64), compute_uv=False)
    shares = singular / singular.sum()
    assert np.exp(-(shares * np.log(shares)).sum()) > 3.5
    assert measure_rank(features).effective_rank == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize(("scans", "units"), [(1, 1), (1, 8), (8, 1), (30, 8)])
def test_equal_scans_have_rank_zero(scans: int, units: int) -> None:
    rank = measure_rank(np.full((scans, units), 0.1, np.float32))
    assert (rank.effective_rank, rank.participation_ratio, rank.components_90) == (0, 0, 0)
    assert rank.cap == min(scans - 1, units)
    assert len(rank.variances) == 0


def test_two_scans_have_one_direction() -> None:
    rank = measure_rank(np.random.default_rng(4).normal(size=(2, 100)).astype(np.float32))
    assert rank.cap == 1
    assert rank.effective_rank == pytest.approx(1)
    assert rank.participation_ratio == pytest.approx(1)


def test_one_unit_has_one_direction() -> None:
    assert measure_rank(np.arange(10.0)[:, None]).effective_rank == pytest.approx(1)


def test_candidates_are_compared_on_the_same_scans_only() -> None:
    features = make_features(60, [1, 1], 4)
    ranks = measure_ranks({"a": features, "b": features[:, :1]})
    assert ranks["a"].effective_rank == pytest.approx(2)
    assert ranks["b"].effective_rank == pytest.approx(1)
    with pytest.raises(ValueError, match="same scans"):
        measure_ranks({"a": features, "b": features[:50]})
