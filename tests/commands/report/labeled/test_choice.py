"""The choice: the rule, scores with weights, and the correction for having chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import r2_score, roc_auc_score

from featray.commands.report.labeled.choice import (
    Rule,
    apply_rule,
    choose_candidate,
    compute_interval,
    draw_patients,
    score_weighted,
)
from featray.commands.report.labeled.compare import compare_scores
from featray.commands.report.labeled.folds import make_folds
from featray.commands.report.labeled.probe import Probe, Target, Trial, compute_auc, make_class_target

CANDIDATES = 3
NOBODY_BEATEN = np.zeros((CANDIDATES, CANDIDATES), bool)


def make_trial(scans: int = 80, seed: int = 0) -> Trial:
    codes = np.arange(scans) % 2
    patients = np.arange(scans)
    return Trial(make_class_target(codes, 2), patients, make_folds(patients, codes, seed), seed)


def make_probe(trial: Trial, strength: float, seed: int) -> Probe:
    """Return the probe of a candidate whose predictions are the label times `strength` plus noise."""
    truth = trial.target.columns
    noise = np.random.default_rng(seed).normal(size=truth.shape)
    one = (strength * truth + noise).astype(np.float32)
    predictions = np.stack([one] * (trial.folds[-1].repeat + 1))
    scores = [compute_auc(truth[fold.test], one[fold.test].astype(float))[0] for fold in trial.folds]
    return Probe(np.array(scores), predictions)


def make_rule(sizes: list[int], beaten: NDArray[np.bool_] | None = None) -> Rule:
    none = np.zeros((len(sizes), len(sizes)), bool)
    return Rule(np.array(sizes), none if beaten is None else beaten, np.ones(len(sizes), bool))


def test_the_smallest_candidate_within_the_tolerance_of_the_best_is_chosen() -> None:
    scores = np.array([[0.90], [0.87], [0.80]])
    rule = make_rule([1000, 100, 10])
    assert apply_rule(scores, rule, 0.01).tolist() == [0]
    assert apply_rule(scores, rule, 0.05).tolist() == [1]
    assert apply_rule(scores, rule, 0.2).tolist() == [2]


def test_a_candidate_that_the_best_one_beats_is_not_chosen() -> None:
    beaten = NOBODY_BEATEN.copy()
    beaten[0, 2] = True
    scores = np.array([[0.90], [0.87], [0.80]])
    assert apply_rule(scores, make_rule([1000, 100, 10], beaten), 0.2).tolist() == [1]


def test_a_smaller_candidate_that_is_not_better_than_the_baselines_is_not_chosen() -> None:
    rule = replace(make_rule([1000, 100, 10]), gains=np.array([True, True, False]))
    scores = np.array([[0.90], [0.87], [0.80]])
    assert apply_rule(scores, rule, 0.2).tolist() == [1]
    assert apply_rule(scores, replace(rule, gains=np.zeros(3, bool)), 0.2).tolist() == [2]


def test_of_candidates_of_one_size_the_better_one_is_chosen() -> None:
    assert apply_rule(np.array([[0.8], [0.9], [0.85]]), make_rule([8, 8, 8]), 0.5).tolist() == [1]


def test_patients_are_drawn_with_all_their_scans() -> None:
    patients = np.array([3, 3, 5, 5, 5, 9])
    drawn = draw_patients(patients, 50, 0)
    assert (drawn[:, 0] == drawn[:, 1]).all()
    assert (drawn[:, 2:5] == drawn[:, 2:3]).all()
    assert (drawn[:, [0, 2, 5]].sum(axis=1) == 3).all()


def test_weights_count_scans_several_times_and_only_pairs_in_one_test_part_count() -> None:
    trial = make_trial(40)
    probe = make_probe(trial, 1.0, 0)
    weights = draw_patients(trial.patients, 3, 1)
    scores = score_weighted(probe.predictions, trial, weights)
    truth = trial.target.columns[:, 0]
    for row, score in zip(weights, scores, strict=True):
        ordered = pairs = 0.0
        for fold in trial.folds:
            scans = np.repeat(fold.test, row[fold.test].astype(int))
            positives = truth[scans].sum()
            number = positives * (len(scans) - positives)
            if number:
                auc = roc_auc_score(truth[scans], probe.predictions[fold.repeat, scans, 0])
                ordered, pairs = ordered + number * auc, pairs + number
        assert score == pytest.approx(ordered / pairs, abs=1e-6)


def test_r2_with_weights_is_that_of_repeated_scans() -> None:
    generator = np.random.default_rng(0)
    values = 100 + generator.normal(size=(30, 1))
    patients = np.arange(30)
    trial = Trial(Target(values), patients, make_folds(patients, None, 0))
    one = (values + 0.5 * generator.normal(size=values.shape)).astype(np.float32)
    weights = draw_patients(patients, 2, 0)
    scores = score_weighted(np.stack([one] * 5), trial, weights)
    for row, score in zip(weights, scores, strict=True):
        scans = np.repeat(patients, row.astype(int))
        assert score == pytest.approx(r2_score(values[scans], one[scans]), abs=1e-4)


def test_a_score_without_both_classes_is_not_defined() -> None:
    trial = make_trial(40)
    weights = (trial.target.columns[:, 0] == 1).astype(np.float32)[None]
    assert np.isnan(score_weighted(make_probe(trial, 1.0, 0).predictions, trial, weights)).all()


def test_a_candidate_that_is_much_better_wins_all_resamples() -> None:
    trial = make_trial()
    probes = [make_probe(trial, strength, number) for number, strength in enumerate((0.0, 3.0, 0.5))]
    choice = choose_candidate(probes, trial, make_rule([1, 100, 10]))
    assert (choice.chosen, choice.best) == (1, 1)
    assert choice.wins == (0.0, 1.0, 0.0)
    assert choice.low < probes[1].score < choice.high
    assert choice.score == pytest.approx(probes[1].score, abs=0.01)
    assert choice.width == choice.high - choice.low


@pytest.mark.slow
def test_the_score_is_corrected_for_having_chosen_among_candidates_that_know_nothing() -> None:
    best, corrected = [], []
    for seed in range(12):
        trial = make_trial(60, seed)
        probes = [make_probe(trial, 0.0, 1000 * seed + number) for number in range(15)]
        choice = choose_candidate(probes, trial, make_rule([1] * 15))
        best.append(max(probe.score for probe in probes))
        corrected.append(choice.score)
    assert np.mean(best) > 0.58  # the best of fifteen seems to know something
    assert np.mean(corrected) == pytest.approx(0.5, abs=0.03)


def test_two_equal_candidates_share_the_resamples() -> None:
    trial = make_trial()
    probes = [make_probe(trial, 1.0, seed) for seed in (1, 1)]
    choice = choose_candidate(probes, trial, make_rule([40, 1]))
    assert choice.chosen == 1
    assert choice.wins == (0.0, 1.0)


def test_the_interval_leaves_out_scores_that_are_not_defined() -> None:
    assert compute_interval(np.array([0.0, np.nan, 1.0])) == pytest.approx((0.025, 0.975))
    assert np.isnan(compute_interval(np.array([np.nan]))).all()


def test_equal_predictions_are_no_difference() -> None:
    trial = make_trial()
    first, second = make_probe(trial, 1.0, 1), make_probe(trial, 1.0, 1)
    assert compare_scores(first.scores, second.scores, 1 / 3).p == 1
