"""Measure how well a light probe reads a label from features, by cross-validation over patients.

A probe is a logistic regression for classes and a ridge regression for numbers. Everything that is learned
from the data is learned inside the training part of a fold: the principal components of the standardized
columns, and the penalty, which an inner cross-validation over patients chooses. All candidates get the same
largest number of components, so that a wide layer has no larger probe than a narrow layer.

Classes are scored by the area under the ROC curve (AUC), for more than two classes as the mean over the
classes, each against the rest. Numbers are scored by R². The score is computed per fold and then averaged,
because predictions of different folds have different offsets and must not be pooled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from featray.commands.report.labeled.components import count_components, reduce_columns
from featray.commands.report.labeled.folds import Fold, make_folds
from featray.commands.report.labeled.labels import Label

PERMUTATIONS = 99

_INNER_FOLDS = 3
_PENALTIES = 10.0 ** np.arange(3, -4, -1)
"""Penalties of the ridge regression per training scan, the strongest first."""
_INVERSE_PENALTIES = 10.0 ** np.arange(-4, 2)
"""Parameters C of the logistic regression, the strongest penalty first."""
_GRADIENT_TOLERANCE = 1e-6
"""At this tolerance, log odds differ from the exact ones by less than 0.001."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Target:
    """A label of the scans in the form that the probe needs; no value is missing.

    Attributes:
        columns: (scans, columns). For numbers one column; for two classes one column with 1 for the second
            class; for more classes one column of 0 and 1 per class.
        codes: Class of each scan; None for numbers.
    """

    columns: Floats
    codes: NDArray[np.intp] | None = None

    @property
    def metric(self) -> str:
        """Return the name of the score: `AUC` or `R²`."""
        return "R²" if self.codes is None else "AUC"


@dataclass(frozen=True)
class Trial:
    """The parts of a probe that all candidates of a label share. All arrays are for the same scans.

    Attributes:
        target: The label.
        patients: Number of the patient of each scan.
        folds: The folds.
        seed: Decides permutations and resamples.
    """

    target: Target
    patients: NDArray[np.intp]
    folds: Sequence[Fold]
    seed: int = 0


@dataclass(frozen=True)
class Probe:
    """Result of the probe of one candidate.

    Attributes:
        scores: Score of each fold; NaN if the score is not defined, because the test part has one class.
        predictions: (repeats, scans, columns), prediction of each scan by the fold that had it in its test
            part. For classes these are log odds.
    """

    scores: Floats
    predictions: NDArray[np.float32]

    @property
    def score(self) -> float:
        """Return the mean over the folds."""
        return mean_without_nan(self.scores)


@dataclass(frozen=True)
class PermutationControl:
    """Scores of a least-squares probe for the true label and for labels that were permuted among patients.

    Attributes:
        observed: Score for the true label.
        permuted: Score for each permuted label.
    """

    observed: float
    permuted: Floats

    @property
    def chance(self) -> float:
        """Return the mean score for permuted labels, which is not always 0.5 or 0."""
        return mean_without_nan(self.permuted)


def make_target(label: Label, scans: NDArray[np.intp]) -> Target:
    """Return the target of the scans at these positions, which must have a value of the label."""
    values = label.values[scans]
    if np.isnan(values).any():
        raise ValueError("scans without a value cannot be in a target")
    if label.kind == "number":
        return Target(values[:, None])
    return make_class_target(values.astype(np.intp), len(label.classes))


def make_class_target(codes: NDArray[np.intp], classes: int) -> Target:
    """Return the target of classes from 0 to `classes` - 1."""
    indicators = (codes[:, None] == np.arange(classes)).astype(np.float64)
    return Target(indicators[:, 1:] if classes == 2 else indicators, codes)


def probe_features(features: NDArray[np.floating], trial: Trial) -> Probe:
    """Return the scores and out-of-fold predictions of one candidate.

    Args:
        features: (scans, values), finite.
        trial: Label, patients and folds of the same scans.
    """
    target, folds = trial.target, trial.folds
    components = count_components(folds)
    shape = (folds[-1].repeat + 1, *target.columns.shape)
    predictions = np.full(shape, np.nan, np.float32)
    scores = []
    for number, fold in enumerate(folds):
        train, test = reduce_columns(features[fold.train], features[fold.test], components)
        codes = None if target.codes is None else target.codes[fold.train]
        inner = make_folds(trial.patients[fold.train], codes, number, repeats=1, folds=_INNER_FOLDS)
        predicted = _predict(train, target.columns[fold.train], test, inner, is_class=codes is not None)
        predictions[fold.repeat, fold.test] = predicted
        scores.append(score_columns(target, target.columns[fold.test], predicted))
    return Probe(np.array(scores), predictions)


def control_by_permutation(features: NDArray[np.floating], trial: Trial) -> PermutationControl:
    """Return the scores for the true and for permuted labels, all by a least-squares probe on one repeat.

    The least-squares probe scores all permutations at once. The test is exact although another probe gives
    the score of the candidate, because the true label and the permuted labels are scored in the same way.
    The same trial gives the same permutations for all candidates.
    """
    return control_targets(features, [trial.target], trial)[0]


def control_targets(
    features: NDArray[np.floating], targets: Sequence[Target], trial: Trial
) -> list[PermutationControl]:
    """Return `control_by_permutation` for several targets of the same scans, in one reduction per fold.

    Args:
        features: (scans, values), finite.
        targets: Targets instead of that of the trial.
        trial: Patients and folds of the same scans.
    """
    patients, components = trial.patients, count_components(trial.folds)
    permuted = [permute_target(target, patients, PERMUTATIONS, trial.seed) for target in targets]
    scores: list[list[Floats]] = [[] for _ in targets]
    for number, fold in enumerate(fold for fold in trial.folds if fold.repeat == 0):
        train, test = reduce_columns(features[fold.train], features[fold.test], components)
        inner = make_folds(patients[fold.train], None, number, repeats=1, folds=_INNER_FOLDS)
        for target, columns, of_target in zip(targets, permuted, scores, strict=True):
            known = columns[fold.train].reshape(len(train), -1)
            predicted = predict_ridge(train, known, test, inner)
            of_target.append(_score_permutations(target, columns[fold.test], predicted))
    means = [[mean_without_nan(one) for one in np.array(of_target).T] for of_target in scores]
    return [PermutationControl(one[0], np.array(one[1:])) for one in means]


def compute_permutation_p(controls: Sequence[PermutationControl]) -> float:
    """Return the p-value of the best candidate, which accounts for having chosen among the candidates.

    The largest score over the candidates is compared with the largest score for each permuted label.
    """
    observed = np.fmax.reduce([control.observed for control in controls])
    largest = np.fmax.reduce([control.permuted for control in controls])
    reached = ~(largest < observed)  # scores that are not defined count against the label
    return float((1 + np.sum(reached)) / (1 + len(largest)))


def permute_target(target: Target, patients: NDArray[np.intp], permutations: int, seed: int) -> Floats:
    """Return (scans, 1 + permutations, columns): the true columns, and the columns of permuted labels.

    If all scans of a patient have the same label, patients exchange their labels. Otherwise patients exchange
    the labels of all their scans with a patient who has the same number of scans.
    """
    generator = np.random.default_rng(seed)
    numbers, first, of_scan = np.unique(patients, return_index=True, return_inverse=True)
    is_constant = bool(np.all(target.columns == target.columns[first][of_scan]))
    result = np.empty((len(patients), 1 + permutations, target.columns.shape[1]))
    result[:, 0] = target.columns
    by_patient = np.argsort(of_scan, kind="stable")
    blocks = np.split(by_patient, np.cumsum(np.bincount(of_scan))[:-1])
    for number in range(1, 1 + permutations):
        if is_constant:
            source = first[generator.permutation(len(numbers))][of_scan]
        else:
            source = _exchange_blocks(blocks, len(patients), generator)
        result[:, number] = target.columns[source]
    return result


def predict_ridge(train: Floats, truth: Floats, test: Floats, inner: Sequence[Fold]) -> Floats:
    """Return predictions of ridge regressions, one per column of `truth`, each with its own penalty.

    Args:
        train: (scans, components) of the training part.
        truth: (scans, columns) of the training part.
        test: (scans, components) of the test part.
        inner: Folds of the training part, by which the penalties are chosen.
    """
    errors = np.zeros((len(_PENALTIES), truth.shape[1]))
    for fold in inner:
        path = _predict_ridge_path(train[fold.train], truth[fold.train], train[fold.test])
        errors += ((path - truth[fold.test]) ** 2).sum(axis=1)
    best = errors.argmin(axis=0)
    path = _predict_ridge_path(train, truth, test)
    predicted: Floats = path[best, :, np.arange(truth.shape[1])].T
    return predicted


def predict_logistic(train: Floats, truth: Floats, test: Floats, inner: Sequence[Fold]) -> Floats:
    """Return log odds of one logistic regression for one column of 0 and 1; arguments as `predict_ridge`."""
    if truth.min() == truth.max():
        return np.zeros(len(test))
    losses = np.zeros(len(_INVERSE_PENALTIES))
    for fold in inner:
        known = truth[fold.train]
        if known.min() < known.max():
            path = _predict_logistic_path(train[fold.train], known, train[fold.test], _INVERSE_PENALTIES)
            losses += np.logaddexp(0, np.where(truth[fold.test] == 1, -path, path)).sum(axis=1)
    best = float(_INVERSE_PENALTIES[losses.argmin()])
    odds: Floats = _predict_logistic_path(train, truth, test, [best])[0]
    return odds


def score_columns(target: Target, truth: Floats, predicted: Floats) -> float:
    """Return the mean score over the columns; NaN if it is not defined for any of them."""
    score = compute_r2 if target.codes is None else compute_auc
    return mean_without_nan(score(truth, predicted))


def compute_auc(truth: Floats, predicted: Floats) -> Floats:
    """Return the AUC of each column of 0 and 1; NaN for a column with one class. Ties count one half."""
    positives = truth.sum(axis=0)
    negatives = len(truth) - positives
    ranks = (rankdata(predicted, axis=0) * truth).sum(axis=0)
    pairs = np.where(positives * negatives > 0, positives * negatives, np.nan)
    auc: Floats = (ranks - positives * (positives + 1) / 2) / pairs
    return auc


def compute_r2(truth: Floats, predicted: Floats) -> Floats:
    """Return R² of each column; NaN for a column with one value."""
    total = ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    r2: Floats = 1 - ((truth - predicted) ** 2).sum(axis=0) / np.where(total > 0, total, np.nan)
    return r2


def mean_without_nan(values: Floats) -> float:
    """Return the mean of the values that are not NaN; NaN without such values."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _score_permutations(target: Target, truth: Floats, predicted: Floats) -> Floats:
    """Return the score of each permutation; `truth` is (scans, permutations, columns)."""
    score = compute_r2 if target.codes is None else compute_auc
    of_columns = score(truth.reshape(len(truth), -1), predicted).reshape(truth.shape[1:])
    return np.array([mean_without_nan(one) for one in of_columns])


def _predict(train: Floats, truth: Floats, test: Floats, inner: Sequence[Fold], *, is_class: bool) -> Floats:
    if not is_class:
        return predict_ridge(train, truth, test, inner)
    return np.stack([predict_logistic(train, column, test, inner) for column in truth.T], axis=1)


def _predict_ridge_path(train: Floats, truth: Floats, new: Floats) -> Floats:
    """Return (penalties, scans, columns): the predictions of new scans for each penalty."""
    center, level = train.mean(axis=0), truth.mean(axis=0)
    centered = train - center
    values, vectors = np.linalg.eigh(centered.T @ centered)
    weights = vectors.T @ (centered.T @ (truth - level))
    rotated = (new - center) @ vectors
    shrink = 1 / (np.maximum(values, 0) + _PENALTIES[:, None] * len(train))
    path: Floats = np.stack([rotated @ (row[:, None] * weights) for row in shrink]) + level
    return path


def _predict_logistic_path(
    train: Floats, truth: Floats, new: Floats, inverse_penalties: Sequence[float] | NDArray[np.floating]
) -> Floats:
    """Return (penalties, scans): the log odds of new scans for each penalty.

    Each regression starts from the result for the penalty before it.
    """
    model = LogisticRegression(solver="newton-cholesky", tol=_GRADIENT_TOLERANCE, warm_start=True)
    path = []
    with warnings.catch_warnings():
        # With a weak penalty, the steps for separable classes end at the precision of the loss.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for inverse in inverse_penalties:
            model.set_params(C=float(inverse)).fit(train, truth)
            path.append(model.decision_function(new))
    return np.stack(path)


def _exchange_blocks(
    blocks: Sequence[NDArray[np.intp]], scans: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Return for each scan the scan whose label it gets, by exchange between patients with equal scans."""
    source = np.arange(scans)
    sizes = np.array([len(block) for block in blocks])
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        for patient, other in zip(same, generator.permutation(same), strict=True):
            source[blocks[int(patient)]] = blocks[int(other)]
    return source
