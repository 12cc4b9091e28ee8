"""Measure one candidate where a sample of scans is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.feature_set import Floats
from featray.commands.report.label_free.dimension import IntrinsicDimension, estimate_dimension
from featray.commands.report.label_free.health import (
    DuplicateUnits,
    find_duplicate_units,
    find_duplicate_units_of_covariance,
)
from featray.commands.report.label_free.moments import Moments
from featray.commands.report.label_free.neighbors import Neighbors, find_neighbors, standardize
from featray.commands.report.label_free.rank import Rank, measure_rank, measure_rank_of_covariance
from featray.commands.report.label_free.sampling import draw_sample

COMPONENTS = 50
"""Principal components that are kept of each candidate for maps."""
MAX_UNITS_FOR_DUPLICATES = 20_000
"""Units above which duplicate units are not searched, because all pairs of units are compared."""
_MAX_DUPLICATE_WORK = 5e11
"""Limit of scans x units² for the search for duplicate units: some 25 s on one core."""


@dataclass(frozen=True, eq=False)
class ExactSums:
    """Covariance (units, units) and moments of all scans of a candidate."""

    covariance: NDArray[np.float64]
    moments: Moments


@dataclass(frozen=True, eq=False)
class Projection:
    """Principal components of the standardized values.

    Attributes:
        coordinates: (scans, components) positions of the compared scans; at most `COMPONENTS` components.
        shares: (components,) share of the variance that each component holds.
        scans: Number of scans from which the components were computed.
    """

    coordinates: NDArray[np.float64]
    shares: NDArray[np.float64]
    scans: int


@dataclass(frozen=True, eq=False)
class SampleMeasures:
    """Measures of a candidate that need a sample in memory."""

    duplicate_units: DuplicateUnits
    rank: Rank
    dimension: IntrinsicDimension
    neighbors: Neighbors
    projection: Projection


def measure_sample(
    block: Floats,
    is_sample: NDArray[np.bool_],
    exact: ExactSums | None,
    is_used: NDArray[np.bool_] | None,
    seed: int,
) -> SampleMeasures:
    """Return the measures of a candidate.

    Args:
        block: (scans, units) features of the compared scans.
        is_sample: (scans,) whether a scan belongs to the sample that represents all scans. Only neighbors and
            coordinates include the others.
        exact: Sums over all scans for the rank and the duplicate units; None to use the sample.
        is_used: (units,) units for distances between scans and for maps; None for all. Standardized, latents
            that are not in use would add as much noise as the others add signal.
        seed: Decides the principal components of large candidates.
    """
    if exact is None:
        sample = _select_rows(block, is_sample)
        rank, duplicates = measure_rank(sample), _find_duplicates(sample)
    else:
        rank = measure_rank_of_covariance(exact.covariance, exact.moments)
        duplicates = find_duplicate_units_of_covariance(exact.covariance, exact.moments)
    values = block if is_used is None else block[:, is_used]
    return SampleMeasures(
        duplicate_units=duplicates,
        rank=rank,
        dimension=estimate_dimension(_select_rows(values, is_sample)),
        neighbors=find_neighbors(values),
        projection=_project(values, is_sample, seed),
    )


def _select_rows(block: Floats, is_selected: NDArray[np.bool_]) -> Floats:
    return block if is_selected.all() else block[is_selected]


def _find_duplicates(sample: Floats) -> DuplicateUnits:
    """Return the duplicate units; of wide candidates from fewer scans, and of very wide ones none."""
    scans, units = sample.shape
    if units > MAX_UNITS_FOR_DUPLICATES:
        return DuplicateUnits(None, scans)
    limit = max(1, int(_MAX_DUPLICATE_WORK / units**2))
    if scans <= limit:
        return find_duplicate_units(sample)
    return find_duplicate_units(sample[draw_sample(scans, limit).rows])


def _project(block: Floats, is_sample: NDArray[np.bool_], seed: int) -> Projection:
    """Return the principal components of the sample, and the positions of all scans of the block."""
    from sklearn.decomposition import PCA

    values = standardize(block)
    scans = int(is_sample.sum())
    count = min(COMPONENTS, scans - 1, values.shape[1])
    if count < 1:
        return Projection(np.zeros((len(block), 0)), np.zeros(0), scans)
    with np.errstate(invalid="ignore"):  # the shares of scans that are all equal are 0/0
        pca = PCA(count, random_state=seed).fit(values[is_sample])
    shares = np.nan_to_num(pca.explained_variance_ratio_)
    return Projection(np.asarray(pca.transform(values), np.float64), shares, scans)
