"""The corrected resampled t-test: the published example, and the conditions under which A beats B."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.datasets import make_moons
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.svm import SVC

from featray.commands.report.labeled.compare import compare_scores, compute_test_ratio, find_beaten
from featray.commands.report.labeled.folds import make_folds


@pytest.mark.slow
def test_the_example_in_the_documentation_of_scikit_learn_has_the_published_t_and_p() -> None:
    features, truth = make_moons(noise=0.352, random_state=1, n_samples=100)
    folds = RepeatedStratifiedKFold(n_splits=10, n_repeats=10, random_state=0)
    first, second = (
        cross_val_score(SVC(kernel=kernel, random_state=0), features, truth, scoring="roc_auc", cv=folds)
        for kernel in ("rbf", "linear")
    )
    comparison = compare_scores(first, second, 10 / 90)
    assert round(comparison.t, 3) == 0.750
    assert round(comparison.p / 2, 3) == 0.227  # the published p-value is one-sided
    assert not comparison.first_beats


def test_the_statistic_is_that_of_the_formula() -> None:
    first, second = np.array([0.9, 0.8, 0.85, 0.95]), np.array([0.7, 0.7, 0.75, 0.7])
    variance = np.var(first - second, ddof=1)
    comparison = compare_scores(first, second, 1 / 3)
    assert comparison.gap == pytest.approx(0.1625)
    assert comparison.error == pytest.approx(math.sqrt(variance * (1 / 4 + 1 / 3)))
    assert comparison.t == pytest.approx(0.1625 / comparison.error)


def test_a_candidate_beats_another_only_with_a_gap_that_is_certain_and_matters() -> None:
    noise = np.random.default_rng(0).normal(0, 0.01, 20)
    base = np.full(20, 0.7)
    assert compare_scores(base + 0.1 + noise, base, 1 / 3).first_beats
    assert not compare_scores(base + 0.02 + noise / 10, base, 1 / 3).first_beats
    assert not compare_scores(base + 0.1 + 20 * noise, base, 1 / 3).first_beats
    assert not compare_scores(base - 0.1 + noise, base, 1 / 3).first_beats


def test_a_gain_needs_less_certainty_than_beating() -> None:
    differences = 0.1 + np.array([-0.1, 0.1] * 10)
    comparison = compare_scores(differences, np.zeros(20), 1 / 3)
    assert 0.01 < comparison.p < 0.2
    assert comparison.is_gain == (comparison.p < 0.05)
    assert not comparison.first_beats
    certain = compare_scores(0.02 + differences / 1000, np.zeros(20), 1 / 3)
    assert not certain.is_gain


def test_candidates_are_as_good_within_error_if_the_gap_is_small_or_neither_certain_nor_large() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    zeros = np.zeros(20)
    tiny = compare_scores(0.02 + noise / 1000, zeros, 1 / 3)
    assert tiny.p < 0.01
    assert tiny.is_within_error(0.0)
    uncertain = compare_scores(0.06 + noise - noise.mean(), zeros, 1 / 3)
    assert uncertain.p > 0.05
    assert uncertain.is_within_error(0.031)
    assert not uncertain.is_within_error(0.029)
    assert not compare_scores(0.06 + noise / 100, zeros, 1 / 3).is_within_error(0.1)


def test_folds_without_a_score_are_left_out() -> None:
    first, second = np.array([0.9, np.nan, 0.8, 0.7]), np.array([0.5, 0.1, np.nan, 0.6])
    assert compare_scores(first, second, 1 / 3).gap == pytest.approx(0.25)
    assert compare_scores(first[:2], second[:2], 1 / 3).p == 1


def test_equal_scores_are_no_difference_and_a_constant_difference_is_certain() -> None:
    scores = np.array([0.5, 0.75, 1.0])
    assert compare_scores(scores, scores, 1 / 3).p == 1
    assert compare_scores(scores + 0.25, scores, 1 / 3).first_beats


def test_the_matrix_says_which_candidate_beats_which() -> None:
    base = np.array([0.5, 0.75, 0.625])
    assert find_beaten([base, base + 0.125, base], 1 / 3).tolist() == [
        [False, False, False],
        [True, False, True],
        [False, False, False],
    ]


def test_the_ratio_of_four_folds_is_one_third() -> None:
    assert compute_test_ratio(make_folds(np.arange(40), None, 0)) == pytest.approx(1 / 3)
