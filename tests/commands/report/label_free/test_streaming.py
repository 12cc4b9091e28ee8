"""Both passes over blocks give the results of features in memory, also with broken scans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.label_free.health import find_duplicate_units_of_covariance, measure_health
from featray.commands.report.label_free.rank import measure_rank, measure_rank_of_covariance
from featray.commands.report.label_free.similarity import compare_features, compare_products
from featray.commands.report.label_free.streaming import ReadBlocks, measure_streams

Features = NDArray[np.float32]


def make_candidates(scans: int) -> list[Features]:
    rng = np.random.default_rng(0)
    first = rng.normal(size=(scans, 12))
    second = first @ rng.normal(size=(12, 5)) + 100
    first[:, 3] = -first[:, 1]
    first[scans // 2] *= 9
    return [first.astype(np.float32), second.astype(np.float32)]


def read_in_blocks(candidates: Sequence[Features], size: int) -> ReadBlocks:
    def read() -> Iterator[list[Features]]:
        for start in range(0, len(candidates[0]), size):
            yield [candidate[start : start + size] for candidate in candidates]

    return read


@pytest.mark.parametrize("size", [1, 13, 1000])
def test_streamed_measures_equal_those_of_features_in_memory(size: int) -> None:
    candidates = make_candidates(100)
    streamed = measure_streams(read_in_blocks(candidates, size), [12, 5])
    assert streamed.scans == 100
    assert streamed.used.tolist() == list(range(100))
    products = streamed.products
    assert products is not None
    np.testing.assert_allclose(
        compare_products(products).cka, compare_features(candidates).cka, rtol=0, atol=1e-10
    )
    for index, features in enumerate(candidates):
        health, moments = measure_health(features), streamed.moments[index]
        np.testing.assert_allclose(streamed.outliers[index].scores, health.outliers.scores, rtol=1e-6)
        covariance = products.compute_covariance(index)
        np.testing.assert_array_equal(
            find_duplicate_units_of_covariance(covariance, moments).units, health.duplicate_units.units
        )
        assert measure_rank_of_covariance(covariance, moments).effective_rank == pytest.approx(
            measure_rank(features).effective_rank
        )
    outliers = streamed.outliers[0].rows
    assert outliers is not None
    assert outliers[0] == 50


def test_a_scan_that_is_broken_in_one_candidate_is_left_out_for_all() -> None:
    candidates = make_candidates(60)
    candidates[1][[7, 40], 2] = np.nan
    candidates[0][5] = candidates[0][50]
    streamed = measure_streams(read_in_blocks(candidates, 16), [12, 5])
    assert [rows.non_finite.tolist() for rows in streamed.rows] == [[], [7, 40]]
    assert [group.tolist() for group in streamed.rows[0].duplicates] == [[5, 50]]
    assert streamed.scans == 60
    assert streamed.used.tolist() == [row for row in range(60) if row not in (7, 40)]
    assert [moments.scans for moments in streamed.moments] == [58, 58]
    assert streamed.products is not None
    assert streamed.products.scans == 58
    outliers = streamed.outliers[0].rows
    assert outliers is not None
    assert outliers[0] == 30


def test_products_that_need_too_much_memory_are_left_out() -> None:
    read = read_in_blocks(make_candidates(20), 8)
    needed = 8 * (12 * 12 + 12 * 5 + 5 * 5)
    assert measure_streams(read, [12, 5], needed).products is not None
    assert measure_streams(read, [12, 5], needed - 1).products is None


def test_a_second_pass_over_other_scans_is_an_error() -> None:
    passes = iter([read_in_blocks(make_candidates(20), 8)(), read_in_blocks(make_candidates(19), 8)()])
    with pytest.raises(ValueError, match="other scans"):
        measure_streams(lambda: next(passes), [12, 5])


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_no_usable_scan_is_an_error(value: float) -> None:
    candidates = [np.full((5 if np.isnan(value) else 0, 3), value, np.float32)]
    with pytest.raises(ValueError, match="no scans"):
        measure_streams(read_in_blocks(candidates, 8), [3])
