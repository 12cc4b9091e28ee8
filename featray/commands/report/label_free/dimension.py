"""Estimate the intrinsic dimension of the features with TwoNN.

Source: E. Facco, M. d'Errico, A. Rodriguez and A. Laio, "Estimating the intrinsic dimension of datasets by a
minimal neighborhood information", Scientific Reports 7, 12140 (2017). If r1 and r2 are the distances of a
scan to its nearest and second-nearest neighbor, the ratio r2/r1 has the distribution function 1 - ratio^(-d)
for dimension d. As in the paper, the largest tenth of the ratios is left out, and a line through the origin
is fitted.

With few scans the estimate is too low: normally distributed features of 10 dimensions give 8.5 from 100 scans
and 9.4 from 1,000 scans; 50 dimensions give 27 and 31. So show the result as "at least". Its
standard deviation is about the dimension divided by the square root of the number of scans.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.health import digest_rows, find_first_rows
from featray.commands.report.label_free.moments import Block
from featray.commands.report.label_free.neighbors import find_nearest, standardize

MIN_SCANS = 100
_KEPT_SHARE = 0.9
"""Share of the ratios that are fitted. The largest ones are noisy."""
_MAX_TIED_SHARE = 0.05
"""Share of scans with two nearest neighbors at one distance above which the features are not continuous."""
_TIE = 1e-9


class Obstacle(StrEnum):
    """Reason for giving no estimate."""

    TOO_FEW_SCANS = "too_few_scans"
    """There are fewer than `MIN_SCANS` scans with different features."""
    TIES = "ties"
    """Many distances are equal, as for features of few different values. TwoNN needs continuous features."""


@dataclass(frozen=True)
class IntrinsicDimension:
    """Result of TwoNN on standardized values.

    Attributes:
        at_least: Estimated dimension, which the true one probably exceeds; at most `units`. None if there is
            an obstacle.
        obstacle: Reason for giving no estimate; None if an estimate is given.
        scans: Number of scans with different features that were used.
        duplicates: Number of scans that were left out because their features equal those of another scan.
        units: Number of units that were compared; units without variation are left out.
    """

    at_least: float | None
    obstacle: Obstacle | None
    scans: int
    duplicates: int
    units: int


def estimate_dimension(features: Block) -> IntrinsicDimension:
    """Return the intrinsic dimension of features (scans, units).

    All pairs of scans are compared: draw a sample, see `neighbors.py`.
    """
    values = standardize(features)
    distinct = values[find_first_rows(digest_rows(values))]
    scans, units = distinct.shape
    at_least, obstacle = _estimate(distinct)
    return IntrinsicDimension(at_least, obstacle, scans, len(values) - scans, units)


def _estimate(values: NDArray[np.float64]) -> tuple[float | None, Obstacle | None]:
    if len(values) < MIN_SCANS:
        return None, Obstacle.TOO_FEW_SCANS
    _, distances = find_nearest(values, 2)
    ratios = distances[:, 1] / distances[:, 0]
    if np.mean(ratios < 1 + _TIE) > _MAX_TIED_SHARE:
        return None, Obstacle.TIES
    return min(_fit_slope(ratios), float(values.shape[1])), None


def _fit_slope(ratios: NDArray[np.float64]) -> float:
    """Return the slope of -log(1 - share of smaller ratios) over log(ratio), fitted through the origin."""
    scans = len(ratios)
    kept = int(scans * _KEPT_SHARE)
    x = np.log(np.sort(ratios)[:kept])
    y = -np.log1p(-np.arange(1, kept + 1) / scans)
    return float(x @ y) / float(x @ x)
