"""Compare the scores of two candidates on the same folds.

Scores of overlapping training parts are correlated, so a plain paired t-test finds differences where there
are none. The corrected resampled t-test of Nadeau and Bengio (Machine Learning 52, 2003) increases the
variance by the ratio of test and training scans.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from featray.commands.report.labeled.folds import Fold

MAX_P = 0.01
"""Largest p-value at which one candidate beats another."""
MAX_GAIN_P = 0.05
"""Largest p-value at which a gap is more than error."""
MIN_GAP = 0.03
"""Smallest difference in score that matters."""


@dataclass(frozen=True)
class Comparison:
    """Difference between two candidates A and B.

    Attributes:
        gap: Mean over the folds of the score of A minus the score of B.
        error: Corrected standard error of the gap.
        t: Corrected t statistic.
        p: Two-sided p-value.
    """

    gap: float
    error: float
    t: float
    p: float

    @property
    def first_beats(self) -> bool:
        """Return whether A beats B: p below 0.01 and a gap above 0.03."""
        return self.p < MAX_P and self.gap > MIN_GAP

    @property
    def is_gain(self) -> bool:
        """Return whether A is better than B by more than error: p below 0.05 and a gap above 0.03."""
        return self.p < MAX_GAIN_P and self.gap > MIN_GAP

    def is_within_error(self, standard_error: float) -> bool:
        """Return whether A and B are as good within error.

        That is a gap of at most 0.03, or a gap of at most two standard errors with p of at least 0.05. A
        larger gap is not called as good, although with few patients its p may be large.

        Args:
            standard_error: Standard error of the score of the better candidate.
        """
        size = abs(self.gap)
        return size <= MIN_GAP or (size <= 2 * standard_error and self.p >= MAX_GAIN_P)


def compare_scores(first: NDArray[np.float64], second: NDArray[np.float64], test_ratio: float) -> Comparison:
    """Return the corrected resampled t-test of the scores of two candidates.

    Args:
        first: Scores of candidate A by fold. Folds with a NaN in A or B are left out.
        second: Scores of candidate B by fold.
        test_ratio: Number of test scans divided by the number of training scans.
    """
    differences = first - second
    differences = differences[~np.isnan(differences)]
    number = len(differences)
    if number < 2:
        return Comparison(math.nan, math.nan, math.nan, 1.0)
    gap = float(differences.mean())
    error = math.sqrt(float(differences.var(ddof=1)) * (1 / number + test_ratio))
    if error == 0:
        return Comparison(gap, 0.0, math.copysign(math.inf, gap) if gap else 0.0, float(gap == 0))
    return Comparison(gap, error, gap / error, float(2 * student_t.sf(abs(gap / error), number - 1)))


def find_beaten(scores: Sequence[NDArray[np.float64]], test_ratio: float) -> NDArray[np.bool_]:
    """Return a square matrix: whether the candidate of the row beats the candidate of the column."""
    return np.array([[compare_scores(a, b, test_ratio).first_beats for b in scores] for a in scores], bool)


def compute_test_ratio(folds: Sequence[Fold]) -> float:
    """Return the number of test scans divided by the number of training scans, over all folds."""
    return sum(len(fold.test) for fold in folds) / sum(len(fold.train) for fold in folds)
