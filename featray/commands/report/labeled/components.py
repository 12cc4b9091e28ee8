"""Reduce features to principal components, the same way for all candidates.

All steps are learned from the training part of a fold: near-constant columns are dropped, columns are
standardized with a floor for the standard deviation, and extreme values are clipped. Wide features are
processed in groups of columns, so that there is never a whole copy in double precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from featray.commands.report.labeled.folds import Fold

MAX_COMPONENTS = 100
"""Largest number of principal components that a probe gets."""
CLIP = 5.0
"""Largest absolute value of a standardized column."""

_NEAR_CONSTANT = 1e-6
"""Standard deviation, relative to the largest absolute value, below which a column is constant."""
_MIN_DIFFERENT = 3
"""Scans that must differ from the median of a column, so that the column is not near-constant."""
_SD_FLOOR = 0.01
"""Smallest standard deviation of a column, relative to the median over the columns."""
_COLUMNS_AT_ONCE = 2048
"""Limits the memory for copies of wide features in double precision."""

Floats = NDArray[np.float64]


def count_components(folds: Sequence[Fold]) -> int:
    """Return the largest number of principal components, the same for all candidates."""
    return min(MAX_COMPONENTS, min(len(fold.train) for fold in folds) - 1)


def reduce_columns(
    train: NDArray[np.floating], test: NDArray[np.floating], components: int
) -> tuple[Floats, Floats]:
    """Return the principal components of both parts, learned from the training part.

    The components have the mean variance 1 over the training part, so that one grid of penalties serves all
    candidates. Without any usable column, the result has one column of zeros.
    """
    scale = _learn_scale(train)
    if not len(scale.columns):
        return np.zeros((len(train), 1)), np.zeros((len(test), 1))
    project = _project_wide if len(scale.columns) > len(train) else _project_narrow
    known, new = project(_standardize(train, test, scale), components)
    size = np.sqrt(known.var(axis=0).mean())
    return known / size, new / size


@dataclass(frozen=True)
class _Scale:
    """Columns that vary in a training part, with the mean and the floored standard deviation of each."""

    columns: NDArray[np.intp]
    mean: Floats
    sd: Floats


def _learn_scale(train: NDArray[np.floating]) -> _Scale:
    parts = []
    for start in range(0, train.shape[1], _COLUMNS_AT_ONCE):
        values = train[:, start : start + _COLUMNS_AT_ONCE]
        kept = np.flatnonzero(find_varying_columns(values))
        known = values[:, kept].astype(np.float64)
        parts.append((start + kept, known.mean(axis=0), known.std(axis=0)))
    columns, mean, sd = (np.concatenate(part) for part in zip(*parts, strict=True))
    floor = _SD_FLOOR * np.median(sd) if len(sd) else 0.0
    return _Scale(columns, mean, np.maximum(sd, floor))


def _standardize(
    train: NDArray[np.floating], test: NDArray[np.floating], scale: _Scale
) -> Iterator[tuple[Floats, Floats]]:
    """Yield groups of columns of both parts, standardized, clipped, and centered by the training part."""
    for start in range(0, len(scale.columns), _COLUMNS_AT_ONCE):
        group = slice(start, start + _COLUMNS_AT_ONCE)
        columns, mean, sd = scale.columns[group], scale.mean[group], scale.sd[group]
        known, new = (
            np.clip((part[:, columns].astype(np.float64) - mean) / sd, -CLIP, CLIP) for part in (train, test)
        )
        center = known.mean(axis=0)
        yield known - center, new - center


def _project_wide(groups: Iterator[tuple[Floats, Floats]], components: int) -> tuple[Floats, Floats]:
    """Return the components of both parts, for more columns than scans: from the products of scans."""
    gram, cross = np.zeros((1, 1)), np.zeros((1, 1))
    for known, new in groups:
        gram, cross = gram + known @ known.T, cross + new @ known.T
    values, vectors = _find_largest(gram, components)
    return vectors * np.sqrt(values), cross @ vectors / np.sqrt(values)


def _project_narrow(groups: Iterator[tuple[Floats, Floats]], components: int) -> tuple[Floats, Floats]:
    """Return the components of both parts, for at least as many scans as columns: from the covariance."""
    known, new = (np.concatenate(part, axis=1) for part in zip(*groups, strict=True))
    _, vectors = _find_largest(known.T @ known, components)
    return known @ vectors, new @ vectors


def _find_largest(matrix: Floats, number: int) -> tuple[Floats, Floats]:
    """Return the largest eigenvalues that are not zero, at most `number`, and their eigenvectors."""
    count = min(number, len(matrix))
    values, vectors = eigh(matrix, subset_by_index=(len(matrix) - count, len(matrix) - 1))
    kept = values > 1e-10 * values[-1]
    return values[kept], vectors[:, kept]


def find_varying_columns(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return which columns vary: not constant, and not equal to the median in all but two scans."""
    largest = np.abs(values).max(axis=0)
    differs = np.abs(values - np.median(values, axis=0)) > _NEAR_CONSTANT * largest
    varies: NDArray[np.bool_] = values.std(axis=0, dtype=np.float64) > _NEAR_CONSTANT * largest
    varies &= differs.sum(axis=0) >= _MIN_DIFFERENT
    return varies
