"""The probe: it finds what features hold, does not leak patients, and matches scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, r2_score, roc_auc_score

from featray.commands.report.labeled.folds import Fold, make_folds
from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.probe import (
    PermutationControl,
    Target,
    Trial,
    compute_auc,
    compute_permutation_p,
    compute_r2,
    control_by_permutation,
    make_class_target,
    make_target,
    permute_target,
    predict_logistic,
    predict_ridge,
    probe_features,
)

SCANS = 120


def make_class_trial(classes: int = 2, seed: int = 0) -> Trial:
    codes = np.random.default_rng(seed).integers(0, classes, SCANS)
    patients = np.arange(SCANS)
    return Trial(make_class_target(codes, classes), patients, make_folds(patients, codes, seed), seed)


def make_number_trial(seed: int = 0) -> Trial:
    values = np.random.default_rng(seed).normal(size=(SCANS, 1))
    patients = np.arange(SCANS)
    return Trial(Target(values), patients, make_folds(patients, None, seed), seed)


def make_noise(columns: int, scans: int = SCANS) -> NDArray[np.float32]:
    return np.random.default_rng(99).normal(size=(scans, columns)).astype(np.float32)


def carry(trial: Trial, columns: int = 12, strength: float = 2.0) -> NDArray[np.float32]:
    """Return noise, with the columns of the target added to its first columns."""
    features = make_noise(columns)
    features[:, : trial.target.columns.shape[1]] += strength * trial.target.columns.astype(np.float32)
    return features


@pytest.mark.slow
def test_a_layer_that_carries_a_label_scores_high_and_one_that_does_not_scores_at_chance() -> None:
    trial = make_class_trial()
    # Two normal classes at a distance of 3 standard deviations have an AUC of 0.983.
    assert probe_features(carry(trial, 8, 3.0), trial).score == pytest.approx(0.983, abs=0.03)
    assert probe_features(make_noise(8), trial).score == pytest.approx(0.5, abs=0.15)


def test_a_number_is_predicted_as_well_as_its_noise_allows() -> None:
    trial = make_number_trial()
    # The variance of the label is 4 times that of the noise, so R² is at most 0.8.
    assert 0.7 < probe_features(carry(trial), trial).score < 0.85
    assert probe_features(make_noise(12), trial).score < 0.05


@pytest.mark.slow
def test_three_classes_have_the_mean_auc_of_each_against_the_rest() -> None:
    trial = make_class_trial(3)
    probe = probe_features(carry(trial, 8, 4.0), trial)
    assert probe.score > 0.95
    fold = trial.folds[0]
    assert trial.target.codes is not None
    each = [
        roc_auc_score(trial.target.codes[fold.test] == code, probe.predictions[0, fold.test, code])
        for code in range(3)
    ]
    assert probe.scores[0] == pytest.approx(np.mean(each))


def test_every_scan_has_one_prediction_per_repeat() -> None:
    trial = make_number_trial()
    probe = probe_features(make_noise(4), trial)
    assert probe.predictions.shape == (5, SCANS, 1)
    assert np.isfinite(probe.predictions).all()
    assert probe.scores.shape == (20,)


def test_the_same_trial_gives_the_same_scores() -> None:
    trial, features = make_number_trial(), make_noise(20)
    np.testing.assert_array_equal(
        probe_features(features, trial).scores, probe_features(features, trial).scores
    )


def make_patients_with_many_scans() -> tuple[NDArray[np.float32], Trial, Trial]:
    """Return features that know the patient and nothing else, and a trial by patient and one by scan."""
    generator = np.random.default_rng(1)
    patients = np.repeat(np.arange(30), 6)
    label_of_patient = generator.normal(size=30)
    features = (generator.normal(size=(30, 40))[patients] + 0.01 * generator.normal(size=(180, 40))).astype(
        np.float32
    )
    target = Target(label_of_patient[patients][:, None])
    scans = np.arange(180)
    by_patient = Trial(target, patients, make_folds(patients, None, 0))
    return features, by_patient, Trial(target, scans, make_folds(scans, None, 0))


def test_a_layer_that_only_knows_the_patient_scores_nothing_by_patient_and_would_score_high_by_scan() -> None:
    features, by_patient, by_scan = make_patients_with_many_scans()
    assert probe_features(features, by_scan).score > 0.9
    assert probe_features(features, by_patient).score < 0.1


def test_wide_maps_with_tiny_and_rare_columns_do_not_destroy_a_prediction() -> None:
    trial = make_number_trial()
    features = np.concatenate([carry(trial), np.zeros((SCANS, 3000), np.float32)], axis=1)
    generator = np.random.default_rng(7)
    features[generator.integers(0, SCANS, 500), generator.integers(12, 3012, 500)] = 1e4
    assert probe_features(features, trial).score > 0.6


@pytest.mark.slow
def test_constant_features_score_at_chance() -> None:
    classes, numbers = make_class_trial(), make_number_trial()
    constant = np.full((SCANS, 5), 7.0, np.float32)
    assert probe_features(constant, classes).score == 0.5
    assert probe_features(constant, numbers).score < 0.05


@pytest.mark.slow
def test_a_test_part_with_one_class_has_no_score() -> None:
    codes = np.repeat([0, 1], [38, 2])
    patients = np.arange(40)
    trial = Trial(make_class_target(codes, 2), patients, make_folds(patients, codes, 0))
    probe = probe_features(make_noise(4, 40), trial)
    assert 0 < np.isnan(probe.scores).sum() < 20
    assert 0 <= probe.score <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("scans", "columns"), [(40, 3), (75, 60), (60, 100)])
def test_the_log_odds_are_those_of_an_exact_regression_with_the_penalty_of_least_inner_loss(
    scans: int, columns: int
) -> None:
    generator = np.random.default_rng(scans)
    values = generator.normal(size=(scans + 20, columns))
    truth = (values[:, 0] + 0.5 * generator.normal(size=scans + 20) > 0).astype(np.float64)
    train, known, test = values[:scans], truth[:scans], values[scans:]
    inner = make_folds(np.arange(scans), known.astype(np.intp), 0, repeats=1, folds=3)

    def fit(penalty: float, part: NDArray[np.intp]) -> LogisticRegression:
        return LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(train[part], known[part])

    def sum_loss(penalty: float) -> float:
        return sum(
            log_loss(known[f.test], fit(penalty, f.train).predict_proba(train[f.test])) * len(f.test)
            for f in inner
        )

    best = min(10.0 ** np.arange(-4, 2), key=sum_loss)
    odds = predict_logistic(train, known, test, inner)
    np.testing.assert_allclose(odds, fit(best, np.arange(scans)).decision_function(test), atol=1e-3)


@pytest.mark.filterwarnings("error")
def test_classes_that_are_separable_have_finite_log_odds() -> None:
    values = np.linspace(-1, 1, 60)[:, None] * np.ones(3)
    truth = (values[:, 0] > 0).astype(np.float64)
    inner = make_folds(np.arange(60), truth.astype(np.intp), 0, repeats=1, folds=3)
    odds = predict_logistic(1e3 * values, truth, 1e3 * values, inner)
    assert np.isfinite(odds).all()
    assert ((odds > 0) == (truth == 1)).all()


def test_the_ridge_regression_is_that_of_scikit_learn_with_the_penalty_of_least_inner_error() -> None:
    generator = np.random.default_rng(2)
    train, test = generator.normal(size=(60, 8)), generator.normal(size=(20, 8))
    truth = train @ generator.normal(size=(8, 2)) + generator.normal(size=(60, 2))
    inner = make_folds(np.arange(60), None, 0, repeats=1, folds=3)

    def count_error(penalty: float, column: int) -> float:
        model = Ridge(alpha=penalty)
        return sum(
            float(
                (
                    (model.fit(train[f.train], truth[f.train, column]).predict(train[f.test]))
                    - truth[f.test, column]
                )
                @ (model.predict(train[f.test]) - truth[f.test, column])
            )
            for f in [Fold(0, fold.train, fold.test) for fold in inner]
        )

    predicted = predict_ridge(train, truth, test, inner)
    for column in range(2):
        # The penalty is per scan: the inner training parts have 40 scans, the outer one has 60.
        best = min(10.0 ** np.arange(-3, 4), key=lambda p: count_error(p * 40, column))
        expected = Ridge(alpha=best * 60).fit(train, truth[:, column]).predict(test)
        np.testing.assert_allclose(predicted[:, column], expected)


def test_auc_and_r2_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 2, (50, 3)).astype(float)
    predicted = generator.integers(0, 5, (50, 3)).astype(float)  # with ties
    expected = [roc_auc_score(truth[:, column], predicted[:, column]) for column in range(3)]
    np.testing.assert_allclose(compute_auc(truth, predicted), expected)
    np.testing.assert_allclose(
        compute_r2(truth, predicted), r2_score(truth, predicted, multioutput="raw_values")
    )
    assert np.isnan(compute_auc(np.ones((5, 1)), np.zeros((5, 1)))).all()


def test_permuted_labels_of_a_layer_with_the_label_score_at_chance() -> None:
    trial = make_class_trial()
    control = control_by_permutation(carry(trial), trial)
    assert control.observed > 0.8
    assert control.chance == pytest.approx(0.5, abs=0.03)
    assert control.permuted.max() < control.observed
    assert compute_permutation_p([control]) == 0.01


def test_the_p_value_accounts_for_the_number_of_candidates() -> None:
    permuted = np.arange(99) / 99
    first, second = PermutationControl(0.9, permuted), PermutationControl(0.1, permuted[::-1])
    alone, together = compute_permutation_p([first]), compute_permutation_p([first, second])
    assert alone == pytest.approx(0.1)
    assert together == pytest.approx(0.19)


def test_patients_exchange_whole_labels() -> None:
    patients = np.repeat(np.arange(20), 3)
    codes = (np.arange(20) % 2)[patients]
    permuted = permute_target(make_class_target(codes, 2), patients, 10, 0)
    assert permuted.shape == (60, 11, 1)
    np.testing.assert_array_equal(permuted[:, 0, 0], codes)
    for number in range(1, 11):
        by_patient = permuted[:, number, 0].reshape(20, 3)
        assert (by_patient == by_patient[:, :1]).all()
        assert by_patient[:, 0].sum() == 10
        assert not np.array_equal(permuted[:, number, 0], codes)


def test_labels_of_scans_are_exchanged_between_patients_with_the_same_number_of_scans() -> None:
    patients = np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])
    codes = np.array([0, 1, 0, 1, 1, 1, 1, 0, 0])
    permuted = permute_target(make_class_target(codes, 2), patients, 20, 0)[..., 0]
    for number in range(1, 21):
        pairs = sorted(tuple(pair) for pair in permuted[:6, number].reshape(3, 2).tolist())
        assert pairs == [(0, 1), (0, 1), (1, 1)]
        assert permuted[6:, number].tolist() == [1, 0, 0]


def test_a_target_needs_a_value_for_every_scan() -> None:
    label = Label("x", "classes", np.array([0, np.nan, 1]), ("a", "b"))
    assert make_target(label, np.array([0, 2])).columns.tolist() == [[0], [1]]
    assert make_target(label, np.array([0, 2])).metric == "AUC"
    with pytest.raises(ValueError, match="without a value"):
        make_target(label, np.arange(3))
