"""Find the nearest neighbors of each scan, and how many of them two candidates have in common.

The distance is Euclidean between standardized values: each unit is divided by its standard deviation over the
scans. Units without variation (see `Moments.has_variation`) are left out. All pairs of scans are compared, so
time and memory of the caller limit the scans: draw a sample of `MAX_SCANS` with `draw_sample`, the same for
all candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import (
    Block,
    Values,
    compute_moments,
    convert_block,
    split_rows,
)

MAX_SCANS = 5000
"""Sample size of the measures that compare all pairs of scans: some 4 s per 2,048 units on one core."""
NEIGHBORS = 10
_SPARE = 8
"""Neighbors more than needed that are selected with approximate distances, before the exact ones decide."""
_TIE = 1e-9
"""Relative difference below which two distances count as equal."""
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class Neighbors:
    """The nearest neighbors of each scan in one candidate.

    Attributes:
        rows: int64 (scans, k), the neighbors of each scan, nearest first. k is at most scans - 1.
        distances: (scans, k), Euclidean distances between standardized values.
        is_tied: (scans,), whether another scan is as far away as the last neighbor, so that the choice
            between them is arbitrary. Equal features and features of few different values cause ties.
        units: Number of units that were compared. It is 0 if no unit has variation; then all scans are tied.
    """

    rows: NDArray[np.int64]
    distances: Values
    is_tied: NDArray[np.bool_]
    units: int

    @property
    def scans(self) -> int:
        """Number of scans that were compared."""
        return len(self.rows)


@dataclass(frozen=True)
class NeighborAgreement:
    """Share of the nearest neighbors that two candidates have in common.

    Attributes:
        share: Mean over scans of (common neighbors / k), from 0 to 1; None if no scan could be compared.
        chance: Expected share of two unrelated candidates: k / (scans - 1) of the sample.
        neighbors: Number of neighbors per scan, k.
        scans: Number of scans that were compared: those without a tie in either candidate.
        tied: Number of scans that were left out because of a tie.
    """

    share: float | None
    chance: float
    neighbors: int
    scans: int
    tied: int


def standardize(features: Block) -> Values:
    """Return (scans, units) with mean 0 and deviation 1; units without variation are left out."""
    moments = compute_moments(features)
    kept = moments.has_variation
    values = convert_block(features, moments.units)[:, kept]
    return np.asarray((values - moments.mean[kept]) / np.sqrt(moments.variance[kept]), np.float64)


def find_neighbors(features: Block, neighbors: int = NEIGHBORS) -> Neighbors:
    """Return the `neighbors` nearest neighbors of each scan, or all others if there are fewer."""
    values = standardize(features)
    rows, distances = find_nearest(values, neighbors + 1)
    count = min(neighbors, max(len(values) - 1, 0))
    is_tied = np.full(len(values), values.shape[1] == 0)
    if distances.shape[1] > count > 0:
        is_tied |= distances[:, count] <= distances[:, count - 1] * (1 + _TIE)
    return Neighbors(rows[:, :count], distances[:, :count], is_tied, values.shape[1])


def find_nearest(values: Values, neighbors: int) -> tuple[NDArray[np.int64], Values]:
    """Return the positions and distances of the nearest other rows, nearest first.

    Candidates are selected by |a|² + |b|² - 2ab and sorted by the exact |a - b|, because the first form loses
    digits for rows that are nearly equal. Equal distances are sorted by position.
    """
    scans = len(values)
    count = min(neighbors, max(scans - 1, 0))
    selected = min(count + _SPARE, max(scans - 1, 0))
    squares = np.square(values).sum(axis=1)
    rows = np.zeros((scans, count), np.int64)
    distances = np.zeros((scans, count))
    for part in split_rows(scans if count else 0, _BLOCK_ROWS):
        approximate = squares - 2 * (values[part] @ values.T)
        approximate[np.arange(part.stop - part.start), np.arange(part.start, part.stop)] = np.inf
        others = np.argpartition(approximate, selected - 1, axis=1)[:, :selected]
        others.sort(axis=1)
        exact = np.stack(
            [np.sqrt(np.square(values[part] - values[other]).sum(axis=1)) for other in others.T], 1
        )
        order = np.argsort(exact, axis=1, kind="stable")[:, :count]
        rows[part] = np.take_along_axis(others, order, 1)
        distances[part] = np.take_along_axis(exact, order, 1)
    return rows, distances


def compare_neighbors(first: Neighbors, second: Neighbors) -> NeighborAgreement:
    """Return the share of common neighbors of two candidates.

    Scans with a tie in either candidate are left out: their neighbors are partly arbitrary, and the same
    arbitrary order in both candidates would look like agreement.

    Raises:
        ValueError: The two were found for different numbers of scans or neighbors.
    """
    if first.rows.shape != second.rows.shape:
        raise ValueError("neighbors can only be compared if both candidates have the same scans")
    count, available = first.rows.shape[1], first.scans
    kept = np.flatnonzero(~(first.is_tied | second.is_tied)) if count else np.empty(0, np.int64)
    common = (first.rows[kept, :, None] == second.rows[kept, None, :]).sum()
    return NeighborAgreement(
        share=float(common) / (count * len(kept)) if len(kept) else None,
        chance=count / (available - 1) if available > 1 else 1.0,
        neighbors=count,
        scans=len(kept),
        tied=available - len(kept) if count else 0,
    )
