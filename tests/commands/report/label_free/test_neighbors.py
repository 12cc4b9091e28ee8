"""Nearest neighbors equal those of scikit-learn, and agreement has known values, also with ties."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors

from featray.commands.report.label_free import neighbors as module
from featray.commands.report.label_free.neighbors import (
    compare_neighbors,
    find_nearest,
    find_neighbors,
    standardize,
)


def make_features(scans: int, units: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(scans, units))


@pytest.mark.parametrize("block_rows", [7, 256])
def test_neighbors_equal_those_of_scikit_learn(block_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", block_rows)
    features = make_features(100, 6) * [1, 100, 0.01, 5, 5, 5] + 1e4
    values = (features - features.mean(axis=0)) / features.std(axis=0)
    tree = NearestNeighbors(n_neighbors=11, algorithm="kd_tree").fit(values)
    distances, rows = tree.kneighbors(values)
    found = find_neighbors(features, 10)
    np.testing.assert_array_equal(found.rows, rows[:, 1:])
    np.testing.assert_allclose(found.distances, distances[:, 1:], rtol=1e-9)
    assert not found.is_tied.any()
    assert (found.scans, found.units) == (100, 6)


def test_nearly_equal_scans_have_exact_distances() -> None:
    values = make_features(50, 20) + 100
    values[1] = values[0]
    values[1, 0] += 1e-9
    rows, distances = find_nearest(values, 1)
    assert rows[0, 0] == 1
    assert distances[0, 0] == pytest.approx(1e-9, rel=1e-4)


def test_standardized_values_leave_out_units_without_variation() -> None:
    features = make_features(30, 4)
    features[:, 2] = 0.1
    values = standardize(features)
    assert values.shape == (30, 3)
    np.testing.assert_allclose(values.std(axis=0), 1)
    np.testing.assert_allclose(values.mean(axis=0), 0, atol=1e-12)


def test_the_scale_of_a_unit_does_not_matter() -> None:
    features = make_features(60, 5)
    scaled = features * [1e-6, 1, 1e6, 3, 7]
    agreement = compare_neighbors(find_neighbors(features), find_neighbors(scaled))
    assert agreement.share == 1


def test_equal_candidates_agree_completely_and_unrelated_ones_by_chance() -> None:
    first, second = find_neighbors(make_features(400, 8, 1)), find_neighbors(make_features(400, 8, 2))
    same = compare_neighbors(first, first)
    assert (same.share, same.scans, same.tied, same.neighbors) == (1, 400, 0, 10)
    other = compare_neighbors(first, second)
    assert other.chance == 10 / 399
    assert other.share == pytest.approx(other.chance, abs=0.01)


def test_the_share_counts_common_neighbors() -> None:
    first = np.array([0.0, 1.0, 3.0, 7.0, 15.0])[:, None]
    second = np.array([0.0, 7.0, 3.0, 1.0, 15.0])[:, None]  # scans 1 and 3 change places
    agreement = compare_neighbors(find_neighbors(first, 1), find_neighbors(second, 1))
    # nearest of the first: 1 0 1 2 3; of the second: 3 2 3 0 1
    assert agreement.share == 0
    assert agreement.chance == 0.25
    two = compare_neighbors(find_neighbors(first, 2), find_neighbors(second, 2))
    # pairs of the first: 12 02 01 12 23; of the second: 23 23 03 02 12
    assert two.share == pytest.approx((1 + 1 + 1 + 1 + 1) / 10)


def test_unrelated_features_of_two_values_do_not_agree() -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 2, size=(100, 1)).astype(float) for _ in range(2))
    agreement = compare_neighbors(find_neighbors(first), find_neighbors(second))
    assert agreement.share is None
    assert (agreement.scans, agreement.tied) == (0, 100)


def test_scans_with_ties_are_left_out() -> None:
    features = make_features(100, 4)
    features[:20] = features[0]
    found = find_neighbors(features)
    assert found.is_tied[:20].all()
    agreement = compare_neighbors(found, found)
    assert agreement.share == 1
    assert agreement.tied >= 20
    assert agreement.scans == 100 - agreement.tied


def test_a_constant_candidate_agrees_with_nothing() -> None:
    constant, other = find_neighbors(np.full((30, 4), 0.1)), find_neighbors(make_features(30, 4))
    assert constant.units == 0
    assert constant.is_tied.all()
    assert compare_neighbors(constant, other).share is None
    assert compare_neighbors(constant, constant).share is None


def test_few_scans_have_all_others_as_neighbors() -> None:
    found = find_neighbors(make_features(4, 3), 10)
    assert found.rows.shape == (4, 3)
    agreement = compare_neighbors(found, found)
    assert (agreement.share, agreement.chance, agreement.neighbors) == (1, 1, 3)
    pair = find_neighbors(make_features(2, 3))
    assert pair.rows.tolist() == [[1], [0]]


def test_one_scan_has_no_neighbors() -> None:
    found = find_neighbors(make_features(1, 3))
    assert found.rows.shape == (1, 0)
    agreement = compare_neighbors(found, found)
    assert agreement.share is None
    assert agreement.scans == 0


def test_candidates_with_different_scans_are_an_error() -> None:
    with pytest.raises(ValueError, match="same scans"):
        compare_neighbors(find_neighbors(make_features(20, 3)), find_neighbors(make_features(21, 3)))
