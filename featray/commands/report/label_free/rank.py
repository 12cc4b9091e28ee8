"""Measure how many directions carry the variance of the features: effective rank, participation ratio, PCA.

The measures use the centered features as they are, not standardized. They depend on the number of scans, so
all candidates must be measured on the same scans. They cannot say which of two layers is better: noise has a
high rank too.

Sources: O. Roy and M. Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007;
P. Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement", 2017 (participation
ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from featray.commands.report.label_free.moments import Block, Moments, Values, compute_moments, convert_block


@dataclass(frozen=True)
class Rank:
    """Number of directions that carry variance. All numbers are 0 if all scans have equal features.

    Attributes:
        scans: Number of scans that were used.
        units: Number of values per scan.
        cap: Largest possible value of the measures: min(scans - 1, units), because centering takes one
            direction.
        effective_rank: Exponential of the entropy (nats) of the singular values, divided by their sum.
        participation_ratio: (sum of the PCA variances)² / sum of their squares.
        components_90: Number of principal components that hold 90 % of the variance.
        variances: PCA variances above the rounding errors, largest first, in squared units of the features.
    """

    scans: int
    units: int
    cap: int
    effective_rank: float
    participation_ratio: float
    components_90: int
    variances: Values

    @property
    def is_near_cap(self) -> bool:
        """Whether the effective rank exceeds half of the cap and the scans set the cap.

        More scans would then give a higher effective rank.
        """
        return self.cap < self.units and self.effective_rank > self.cap / 2


def measure_ranks(candidates: Mapping[str, Block]) -> dict[str, Rank]:
    """Return the rank of each candidate, from the features (scans, units) of the same scans.

    Raises:
        ValueError: The candidates have different numbers of scans.
    """
    if len({len(features) for features in candidates.values()}) > 1:
        raise ValueError("ranks can only be compared if all candidates have the same scans")
    return {name: measure_rank(features) for name, features in candidates.items()}


def measure_rank(features: Block) -> Rank:
    """Return the rank of features (scans, units) in memory.

    The smaller of the two products of the centered features is decomposed: time min(scans, units)³.
    """
    scans, units = features.shape
    moments = compute_moments(features)
    values = convert_block(features, units) - moments.mean
    product = values @ values.T if scans < units else values.T @ values
    return _describe_spectrum(_decompose(product / scans), moments)


def measure_rank_of_covariance(covariance: Values, moments: Moments) -> Rank:
    """Return the rank from a covariance (units, units) and the moments of the same scans."""
    return _describe_spectrum(_decompose(covariance), moments)


def _decompose(product: Values) -> Values:
    """Return the eigenvalues of a symmetric matrix, largest first."""
    return np.asarray(eigh(product, eigvals_only=True), np.float64)[::-1]


def _find_floor(largest: float, moments: Moments) -> float:
    """Return the PCA variance that rounding alone can cause, in the sums and in the stored values.

    Values rounded to multiples of h have an error with variance h²/12. The largest eigenvalue of the
    covariance of such noise is (1 + sqrt(units / scans))² times its variance (Marchenko and Pastur, 1967).
    """
    scans, units = moments.scans, moments.units
    noise = float(np.square(moments.rounding).mean()) / 12
    stored = noise * (1 + math.sqrt(units / scans)) ** 2
    return max(largest * float(np.finfo(np.float64).eps) * max(scans, units), stored)


def _describe_spectrum(eigenvalues: Values, moments: Moments) -> Rank:
    scans, units = moments.scans, moments.units
    cap = min(scans - 1, units)
    leading = eigenvalues[:cap]
    variances = leading[leading > _find_floor(float(eigenvalues[0]), moments)].copy()
    if not len(variances):
        return Rank(scans, units, cap, 0.0, 0.0, 0, variances)
    relative = variances / variances[0]  # prevents an overflow of the squares
    shares = np.sqrt(relative) / np.sqrt(relative).sum()
    held = np.cumsum(relative) / relative.sum()
    return Rank(
        scans=scans,
        units=units,
        cap=cap,
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        participation_ratio=float(relative.sum() ** 2 / np.square(relative).sum()),
        components_90=int(np.searchsorted(held, 0.9 - 1e-12) + 1),
        variances=variances,
    )
