"""Dead and duplicate units, zeros, equal and broken scans, and outliers in features with known faults."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.label_free import health
from featray.commands.report.label_free.health import (
    MAX_DEVIATION,
    RowChecks,
    SignPattern,
    describe_units,
    find_duplicate_units,
    find_duplicate_units_of_covariance,
    find_outliers,
    measure_distances,
    measure_health,
)
from featray.commands.report.label_free.moments import compute_moments, compute_products


def make_features(scans: int, units: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(scans, units)).astype(np.float32)


def test_constant_and_dead_units_are_told_apart() -> None:
    features = make_features(100, 6)
    features[:, 1] = 0.1
    features[:, 2] = 0
    features[:, 4] *= 1e-6
    units = describe_units(compute_moments(features))
    assert units.constant.tolist() == [1, 2]
    assert units.dead.tolist() == [4]
    assert (units.units, units.alive, units.scans) == (6, 3, 100)


def test_a_unit_that_differs_only_by_rounding_is_dead() -> None:
    features = make_features(100, 3)
    features[:, 1] = 1
    features[::2, 1] = np.nextafter(np.float32(1), np.float32(0))
    assert describe_units(compute_moments(features)).dead.tolist() == [1]


def test_a_layer_of_small_values_is_alive() -> None:
    units = describe_units(compute_moments(make_features(100, 8) * np.float32(1e-12)))
    assert units.alive == 8


def test_the_share_of_zeros_counts_all_values() -> None:
    features = make_features(50, 4)
    features[:10, 0] = 0
    features[:, 3] = 0
    units = describe_units(compute_moments(features))
    assert units.zero_share == pytest.approx(60 / 200)
    assert units.minimum == features.min()
    assert units.maximum == features.max()


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda x: x, SignPattern.SIGNED),
        (lambda x: -np.abs(x), SignPattern.SIGNED),
        (lambda x: np.maximum(x, 0), SignPattern.RELU),
        (np.exp, SignPattern.POSITIVE),
        (lambda x: 0 * x, SignPattern.ZERO),
    ],
)
def test_the_signs_betray_the_activation(change, pattern: SignPattern) -> None:  # type: ignore[no-untyped-def]
    assert describe_units(compute_moments(change(make_features(40, 5)))).signs is pattern


@pytest.mark.parametrize("block_units", [1, 2, 512])
def test_later_copies_of_a_unit_are_duplicates(block_units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_BLOCK_UNITS", block_units)
    features = make_features(200, 7).astype(np.float64)
    features[:, 3] = 5 - 2 * features[:, 0]
    features[:, 5] = features[:, 2] * 1e4 + 1e3
    features[:, 6] = features[:, 1] + 0.1 * features[:, 4]  # correlation 0.995
    expected = [3, 5]
    duplicates = find_duplicate_units(features)
    assert duplicates.scans == 200
    assert duplicates.units is not None
    assert duplicates.units.tolist() == expected
    streamed = find_duplicate_units_of_covariance(
        compute_products([features]).compute_covariance(0), compute_moments(features)
    )
    assert streamed.units is not None
    assert streamed.units.tolist() == expected


def test_constant_units_are_no_duplicates_and_do_not_shift_positions() -> None:
    features = make_features(50, 5)
    features[:, :2] = 3
    features[:, 4] = features[:, 2]
    units = find_duplicate_units(features).units
    assert units is not None
    assert units.tolist() == [4]


def test_duplicates_are_found_at_a_large_offset() -> None:
    features = make_features(50, 3).astype(np.float64) + 1e8
    features[:, 2] = features[:, 0]
    units = find_duplicate_units(features).units
    assert units is not None
    assert units.tolist() == [2]


def test_few_scans_say_nothing_about_duplicate_units() -> None:
    assert find_duplicate_units(make_features(2, 100)).units is None
    assert find_duplicate_units(make_features(9, 100)).units is None
    units = find_duplicate_units(make_features(10, 1000)).units
    assert units is not None
    assert len(units) == 0


def test_equal_scans_are_grouped_across_blocks() -> None:
    features = make_features(20, 3)
    features[7] = features[18] = features[2]
    features[11] = features[19]
    features[5], features[6] = 0.0, -0.0
    checks = RowChecks()
    for start in range(0, 20, 6):
        checks.add(features[start : start + 6])
    rows = checks.finish()
    assert [group.tolist() for group in rows.duplicates] == [[2, 7, 18], [5, 6], [11, 19]]
    assert rows.scans == 20
    assert len(rows.non_finite) == 0


def test_broken_scans_are_named_and_are_no_duplicates() -> None:
    features = make_features(12, 3)
    features[[4, 9], 1] = np.nan
    features[10, 0] = -np.inf
    features[9] = features[4]
    checks = RowChecks()
    checks.add(features[:5])
    checks.add(features[5:])
    assert checks.finish().non_finite.tolist() == [4, 9, 10]
    assert checks.finish().duplicates == ()
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure_health(features)


def test_outliers_are_named_the_farthest_first() -> None:
    features = make_features(300, 30)
    features[17] *= 3
    features[123] *= 6
    moments = compute_moments(features)
    outliers = find_outliers(measure_distances(features, moments))
    assert outliers.rows is not None
    assert outliers.rows[:2].tolist() == [123, 17]
    assert len(outliers.rows) <= 4
    assert outliers.scans == len(outliers.scores) == 300


@pytest.mark.parametrize("seed", range(5))
def test_normal_scans_are_rarely_outliers(seed: int) -> None:
    features = make_features(500, 20, seed)
    outliers = find_outliers(measure_distances(features, compute_moments(features)))
    assert outliers.rows is not None
    assert len(outliers.rows) <= 2


def test_many_broken_scans_do_not_hide_each_other() -> None:
    features = make_features(200, 10)
    features[:20] += 50
    outliers = find_outliers(measure_distances(features, compute_moments(features)))
    assert outliers.rows is not None
    assert sorted(outliers.rows.tolist()) == list(range(20))


def test_one_unusual_unit_of_many_makes_no_outlier() -> None:
    features = make_features(1000, 400)
    features[:, 7] = 0
    features[5, 7] = 1
    moments = compute_moments(features)
    assert 1 / np.sqrt(moments.variance[7]) > 3 * MAX_DEVIATION
    outliers = find_outliers(measure_distances(features, moments))
    assert outliers.rows is not None
    assert 5 not in outliers.rows


def test_the_score_is_the_modified_z_score_of_the_power_two_thirds() -> None:
    values = np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 100.0])
    scores = find_outliers(values**1.5).scores
    np.testing.assert_allclose(scores, 0.6745 * (values - 5) / 3, atol=1e-12)


@pytest.mark.parametrize("independent", [1, 2, 5, 50])
def test_few_normal_scans_are_outliers_for_any_number_of_independent_units(independent: int) -> None:
    rng = np.random.default_rng(3)
    features = rng.normal(size=(20000, independent)) @ rng.normal(size=(independent, 50))
    outliers = find_outliers(measure_distances(features, compute_moments(features)))
    assert outliers.rows is not None
    assert len(outliers.rows) < 30


@pytest.mark.parametrize("units", [1, 2, 300])
def test_an_outlier_along_a_single_direction_is_found(units: int) -> None:
    features = np.repeat(make_features(500, 1), units, axis=1)
    features[9] = 8
    outliers = find_outliers(measure_distances(features, compute_moments(features)))
    assert outliers.rows is not None
    assert 9 in outliers.rows


def test_equal_distances_have_no_outliers_except_those_that_differ() -> None:
    distances = np.ones(100)
    outliers = find_outliers(distances)
    assert outliers.rows is not None
    assert len(outliers.rows) == 0
    distances[3] = 9
    outliers = find_outliers(distances)
    assert outliers.rows is not None
    assert outliers.rows.tolist() == [3]


def test_equal_scans_and_few_scans_have_no_verdict_on_outliers() -> None:
    equal = np.full((50, 3), 0.1, np.float32)
    assert find_outliers(measure_distances(equal, compute_moments(equal))).rows is None
    few = make_features(9, 3)
    outliers = find_outliers(measure_distances(few, compute_moments(few)))
    assert outliers.rows is None
    assert not outliers.scores.any()


@pytest.mark.parametrize(("scans", "units"), [(1, 5), (2, 5), (1, 1), (40, 1), (3, 500)])
def test_small_shapes_are_measured_without_an_error(scans: int, units: int) -> None:
    result = measure_health(make_features(scans, units))
    assert result.units.scans == result.rows.scans == result.outliers.scans == scans
    assert len(result.units.constant) == (units if scans == 1 else 0)
    assert result.rows.duplicates == ()


def test_equal_scans_are_one_group_of_constant_units() -> None:
    result = measure_health(np.full((30, 4), 0.1, np.float32))
    assert len(result.units.constant) == 4
    assert result.units.alive == 0
    assert result.duplicate_units.units is not None
    assert len(result.duplicate_units.units) == 0
    assert [len(group) for group in result.rows.duplicates] == [30]
