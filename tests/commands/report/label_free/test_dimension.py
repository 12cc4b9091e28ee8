"""TwoNN on features of known dimension."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.label_free.dimension import Obstacle, _fit_slope, estimate_dimension


def make_plane(scans: int, dimension: int, units: int, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(scans, dimension)) @ rng.normal(size=(dimension, units))


@pytest.mark.parametrize(("dimension", "tolerance"), [(1, 0.1), (2, 0.2), (5, 0.6)])
def test_a_plane_has_its_dimension_in_more_units(dimension: int, tolerance: float) -> None:
    result = estimate_dimension(make_plane(1000, dimension, 20))
    assert result.at_least == pytest.approx(dimension, abs=tolerance)
    assert (result.obstacle, result.scans, result.duplicates, result.units) == (None, 1000, 0, 20)


def test_a_circle_is_a_line() -> None:
    angle = np.random.default_rng(1).uniform(0, 2 * np.pi, 500)
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert estimate_dimension(circle).at_least == pytest.approx(1, abs=0.15)


def test_high_dimensions_are_underestimated() -> None:
    found = estimate_dimension(make_plane(1000, 50, 100)).at_least
    assert found is not None
    assert 20 < found < 40


def test_the_fit_returns_the_dimension_of_exact_quantiles() -> None:
    share = np.arange(1, 1001) / 1000
    ratios = np.append((1 - share[:-1]) ** (-1 / 7), 1e9)
    assert _fit_slope(ratios[::-1]) == pytest.approx(7)


def test_scale_and_offset_of_units_do_not_matter() -> None:
    features = make_plane(200, 3, 6)
    moved = features * [1e-5, 1, 1e5, 1, 1, 1] + 1e3
    assert estimate_dimension(moved).at_least == pytest.approx(
        estimate_dimension(features).at_least, rel=1e-4
    )


def test_equal_scans_are_used_once() -> None:
    features = make_plane(300, 3, 6)
    doubled = np.concatenate([features, features[:50]])
    result = estimate_dimension(doubled)
    assert (result.scans, result.duplicates) == (300, 50)
    assert result.at_least == pytest.approx(estimate_dimension(features).at_least, rel=0.05)


def test_the_dimension_is_at_most_the_number_of_units() -> None:
    for seed in range(5):
        result = estimate_dimension(make_plane(150, 1, 1, seed))
        assert result.at_least is not None
        assert result.at_least <= 1


def test_fewer_than_a_hundred_different_scans_have_no_estimate() -> None:
    for features in (make_plane(99, 3, 6), np.repeat(make_plane(60, 3, 6), 2, axis=0), np.zeros((200, 4))):
        result = estimate_dimension(features)
        assert result.at_least is None
        assert result.obstacle is Obstacle.TOO_FEW_SCANS
    assert estimate_dimension(make_plane(100, 3, 6)).at_least is not None


@pytest.mark.parametrize("scans", [1, 2])
def test_one_and_two_scans_have_no_estimate(scans: int) -> None:
    assert estimate_dimension(make_plane(scans, 1, 1)).obstacle is Obstacle.TOO_FEW_SCANS


def test_features_on_a_lattice_have_no_estimate() -> None:
    lattice = np.random.default_rng(2).integers(0, 9, size=(500, 4)).astype(float)
    result = estimate_dimension(lattice)
    assert result.at_least is None
    assert result.obstacle is Obstacle.TIES
