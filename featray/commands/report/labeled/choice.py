"""Choose one candidate, and estimate its score and uncertainty corrected for having chosen.

The best of many scores is too good, because it is also the luckiest. The correction is the bootstrap
bias-corrected cross-validation of Tsamardinos, Greasidou and Borboudakis (Machine Learning 107, 2018):
patients are drawn with replacement, the choice is made again on the drawn patients, and the candidate chosen
then is scored on the patients that were not drawn. No probe is trained again.

Inside a resample a fold may hold very few scans. Therefore AUC is computed from all pairs of scans of which
both are in the test part of the same fold, and R² from the squared errors of all folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.labeled.folds import Fold
from featray.commands.report.labeled.probe import Probe, Trial, mean_without_nan

RESAMPLES = 500
INTERVAL = (2.5, 97.5)
"""Percentiles of the interval."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """Result of choosing among candidates.

    Attributes:
        chosen: Position of the chosen candidate.
        best: Position of the candidate with the highest score.
        score: Mean over the resamples of the score on patients that were not drawn.
        low: Lower end of the 95 % interval of this score.
        high: Upper end.
        wins: For each candidate the share of the resamples in which it is chosen.
        intervals: For each candidate the 95 % interval of its own score on patients that were not drawn.
        tolerance: Standard error of the score of the best candidate.
    """

    chosen: int
    best: int
    score: float
    low: float
    high: float
    wins: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    tolerance: float

    @property
    def width(self) -> float:
        """Return the width of the interval."""
        return self.high - self.low


@dataclass(frozen=True)
class Rule:
    """Criteria of the choice besides the scores.

    Attributes:
        sizes: Values per scan of each candidate.
        beaten: Whether the candidate of the row beats the candidate of the column.
        gains: Whether the candidate is better than all baselines. Others are chosen only if no such
            candidate is within the tolerance.
    """

    sizes: NDArray[np.intp]
    beaten: NDArray[np.bool_]
    gains: NDArray[np.bool_]


def choose_candidate(probes: Sequence[Probe], trial: Trial, rule: Rule) -> Choice:
    """Return the choice: the smallest candidate within one standard error of the best and not beaten by it.

    Args:
        probes: Result of each candidate.
        trial: The trial of all probes; its seed decides which patients are drawn.
        rule: Sizes of the candidates, and which of them beats which.
    """
    drawn = draw_patients(trial.patients, RESAMPLES, trial.seed)
    left_out = (drawn == 0).astype(np.float32)
    inside = np.array([score_weighted(probe.predictions, trial, drawn) for probe in probes])
    outside = np.array([score_weighted(probe.predictions, trial, left_out) for probe in probes])
    scores = np.array([probe.score for probe in probes])
    best = int(np.nanargmax(scores))
    tolerance = float(np.nanstd(inside[best]))
    usable = ~(np.isnan(inside).any(axis=0) | np.isnan(outside).any(axis=0))
    chosen = apply_rule(inside[:, usable], rule, tolerance)
    corrected = outside[:, usable][chosen, np.arange(len(chosen))]
    low, high = compute_interval(corrected)
    return Choice(
        chosen=int(apply_rule(scores[:, None], rule, tolerance)[0]),
        best=best,
        score=mean_without_nan(corrected),
        low=low,
        high=high,
        wins=tuple(float(np.mean(chosen == place)) if len(chosen) else 0.0 for place in range(len(probes))),
        intervals=tuple(compute_interval(row) for row in outside),
        tolerance=tolerance,
    )


def measure_interval(predictions: Sequence[NDArray[np.float32]], trial: Trial) -> tuple[float, float]:
    """Return the 95 % interval of a score on patients that were not drawn; NaN if it is not defined.

    Args:
        predictions: Out-of-fold predictions (repeats, scans, columns), one array per seed. In each resample,
            the score is the mean over the seeds.
        trial: The trial of the predictions.
    """
    left_out = (draw_patients(trial.patients, RESAMPLES, trial.seed) == 0).astype(np.float32)
    scores = np.mean([score_weighted(one, trial, left_out) for one in predictions], axis=0)
    return compute_interval(scores)


def compute_interval(scores: Floats) -> tuple[float, float]:
    """Return the ends of the 95 % interval of the scores that are defined; NaN without any."""
    defined = scores[~np.isnan(scores)]
    low, high = np.percentile(defined, INTERVAL) if len(defined) else (np.nan, np.nan)
    return float(low), float(high)


def apply_rule(scores: Floats, rule: Rule, tolerance: float) -> NDArray[np.intp]:
    """Return the chosen candidate of each column of `scores`, which has one row per candidate.

    Candidates of the same size are ordered by score.
    """
    best = scores.argmax(axis=0)
    allowed = (scores >= scores.max(axis=0) - tolerance) & ~rule.beaten[best].T
    order = np.where(rule.gains, rule.sizes, rule.sizes + rule.sizes.max())
    sizes = np.where(allowed, order[:, None], np.iinfo(np.intp).max)
    smallest = sizes == sizes.min(axis=0)
    chosen: NDArray[np.intp] = np.where(smallest, scores, -np.inf).argmax(axis=0)
    return chosen


def draw_patients(patients: NDArray[np.intp], resamples: int, seed: int) -> NDArray[np.float32]:
    """Return (resamples, scans): how often each scan is drawn, when patients are drawn with replacement."""
    numbers, of_scan = np.unique(patients, return_inverse=True)
    chances = np.full(len(numbers), 1 / len(numbers))
    counts = np.random.default_rng(seed).multinomial(len(numbers), chances, size=resamples)
    return counts[:, of_scan].astype(np.float32)


def score_weighted(predictions: NDArray[np.float32], trial: Trial, weights: NDArray[np.float32]) -> Floats:
    """Return the score for each row of weights of the scans; NaN if it is not defined.

    Args:
        predictions: Out-of-fold predictions (repeats, scans, columns).
        trial: The trial of the predictions.
        weights: (rows, scans).
    """
    target = trial.target
    if target.codes is None:
        return _score_r2(predictions, target.columns, weights)
    columns = range(target.columns.shape[1])
    scores = np.array(
        [_score_auc(predictions[..., c], target.columns[:, c], trial.folds, weights) for c in columns]
    )
    defined = ~np.isnan(scores)
    total = np.where(defined, scores, 0).sum(axis=0)
    result: Floats = total / np.where(defined.any(axis=0), defined.sum(axis=0), np.nan)
    return result


def _score_auc(
    predictions: NDArray[np.float32], truth: Floats, folds: Sequence[Fold], weights: NDArray[np.float32]
) -> Floats:
    """Return the share of pairs in order, over the pairs of scans that are in the same test part."""
    ordered, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for fold in folds:
        positive = fold.test[truth[fold.test] == 1]
        negative = fold.test[truth[fold.test] == 0]
        first, second = predictions[fold.repeat, positive], predictions[fold.repeat, negative]
        order = (first[:, None] > second).astype(np.float32) + np.float32(0.5) * (first[:, None] == second)
        ordered += ((weights[:, positive] @ order) * weights[:, negative]).sum(axis=1)
        pairs += weights[:, positive].sum(axis=1) * weights[:, negative].sum(axis=1)
    scores: Floats = ordered / np.where(pairs > 0, pairs, np.nan)
    return scores


def _score_r2(predictions: NDArray[np.float32], truth: Floats, weights: NDArray[np.float32]) -> Floats:
    """Return R² from the mean squared error over the repeats and the variance among the weighted scans."""
    values = truth[:, 0]
    errors = ((predictions[..., 0] - values) ** 2).mean(axis=0)
    heavy = weights.astype(np.float64)
    total = heavy.sum(axis=1)
    total = np.where(total > 0, total, np.nan)
    mean = heavy @ values / total
    variance = heavy @ (values - values.mean()) ** 2 / total - (mean - values.mean()) ** 2
    scores: Floats = 1 - (heavy @ errors / total) / np.where(variance > 0, variance, np.nan)
    return scores
