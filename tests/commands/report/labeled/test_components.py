"""The reduction to principal components: what is dropped, and what is learned from which part."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from featray.commands.report.labeled import components
from featray.commands.report.labeled.components import (
    count_components,
    find_varying_columns,
    reduce_columns,
)
from featray.commands.report.labeled.folds import make_folds

NOISE = np.random.default_rng(99).normal(size=(120, 300)).astype(np.float32)


def test_columns_that_differ_in_fewer_than_three_scans_are_dropped() -> None:
    values = np.zeros((20, 4))
    values[:, 0] = np.arange(20)
    values[:2, 1] = 100
    values[:3, 2] = 100
    values[:, 3] = 1e6 + 1e-3 * np.arange(20)
    assert find_varying_columns(values).tolist() == [True, False, True, False]


def test_components_have_the_mean_variance_one_and_are_learned_from_the_training_part() -> None:
    features = NOISE * 50
    train, test = reduce_columns(features[:80], features[80:], 30)
    assert train.shape == (80, 30)
    assert train.var(axis=0).mean() == pytest.approx(1)
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-8)
    changed, _ = reduce_columns(features[:80], features[80:] * 3, 30)
    np.testing.assert_array_equal(changed, train)
    assert test.shape == (40, 30)


def test_all_candidates_get_the_same_largest_number_of_components() -> None:
    assert count_components(make_folds(np.arange(120), None, 0)) == 89
    patients = np.arange(400)
    assert count_components(make_folds(patients, None, 0)) == 100


@pytest.mark.parametrize("columns", [40, 300])
def test_the_components_are_those_of_scikit_learn_for_standardized_columns(columns: int) -> None:
    values = np.random.default_rng(1).uniform(-1, 1, (100, columns)) * np.linspace(1, 9, columns)
    train, test = values[:80], values[80:]
    mean, sd = train.mean(axis=0), train.std(axis=0)
    exact = PCA(10, svd_solver="full").fit((train - mean) / sd)
    found = reduce_columns(train, test, 10)
    size = np.sqrt(exact.transform((train - mean) / sd).var(axis=0).mean())
    for part, reduced in zip((train, test), found, strict=True):
        expected = exact.transform((part - mean) / sd)[:, ::-1] / size
        np.testing.assert_allclose(np.abs(reduced), np.abs(expected), atol=1e-8)


def test_groups_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reduce_columns(NOISE[:80], NOISE[80:], 30)
    monkeypatch.setattr(components, "_COLUMNS_AT_ONCE", 70)
    found = reduce_columns(NOISE[:80], NOISE[80:], 30)
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.abs(part), np.abs(other), atol=1e-8)


def test_columns_that_all_are_constant_become_zeros() -> None:
    train, test = reduce_columns(np.ones((80, 9)), np.ones((40, 9)), 30)
    assert train.shape == (80, 1)
    assert test.shape == (40, 1)
    assert not train.any()
