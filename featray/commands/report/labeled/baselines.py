"""Features that need no trained model: a layer must be better than these to be worth anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HISTOGRAM_BINS = 64
HU_RANGE = (-1000.0, 1000.0)
"""Values outside of this range count in the first and in the last bin."""
SIDE = 16
"""Voxels along each axis of a volume that is resized for the baseline of voxels."""


@dataclass(frozen=True)
class HeaderMatrix:
    """Numbers from the headers of scans.

    Attributes:
        names: Name of each column.
        values: (scans, columns), finite.
    """

    names: tuple[str, ...]
    values: NDArray[np.float32]


def make_header_matrix(columns: Mapping[str, Sequence[Any]]) -> HeaderMatrix:
    """Return the properties of the scans that need no voxels: spacing, slices, orientation and size.

    Spacing, number of voxels and size in mm are logarithms, because their ratios matter. The orientation
    becomes one column per orientation. A missing value becomes the median, and a further column marks it.

    Args:
        columns: Columns `spacing`, `shape` and `orientation` of the scans table. Spacing and shape have the
            axes (z, y, x); None if they are not known.
    """
    spacing, shape = _stack_logs(columns["spacing"]), _stack_logs(columns["shape"])
    axes = ("z", "y", "x")
    names = [f"{kind} {axis}" for kind in ("spacing", "voxels", "size") for axis in axes]
    values = np.concatenate([spacing, shape, spacing + shape], axis=1)
    missing = np.isnan(values).any(axis=1)
    filled = [_fill_missing(column) for column in values.T]
    orientations = columns["orientation"]
    for orientation in sorted({value for value in orientations if value}):
        names.append(f"orientation {orientation}")
        filled.append(np.array([value == orientation for value in orientations], np.float64))
    if missing.any():
        names.append("geometry is missing")
        filled.append(missing.astype(np.float64))
    return HeaderMatrix(tuple(names), np.stack(filled, axis=1).astype(np.float32))


def count_hu_histogram(
    volume: NDArray[Any], *, bins: int = HISTOGRAM_BINS, value_range: tuple[float, float] = HU_RANGE
) -> NDArray[np.float32]:
    """Return the share of the voxels in each bin.

    Args:
        volume: Voxels in HU, or in the unit of `value_range`.
        bins: Number of bins of equal width.
        value_range: Lower end of the first bin and upper end of the last bin.
    """
    counts = np.histogram(np.clip(volume, *value_range), bins, value_range)[0]
    return (counts / max(volume.size, 1)).astype(np.float32)


def resize_voxels(volume: NDArray[Any], side: int = SIDE) -> NDArray[np.float32]:
    """Return a volume as side³ values: means over boxes of equal size, flat in the order (z, y, x).

    The probe computes the principal components of these values inside each fold.

    Args:
        volume: (z, y, x).
        side: Boxes along each axis.
    """
    values = volume.astype(np.float32)
    for axis, length in enumerate(volume.shape):
        weights = make_box_weights(length, side)
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values.ravel()


def make_box_weights(length: int, boxes: int) -> NDArray[np.float32]:
    """Return (boxes, length): the share of each voxel in the mean of each box. Rows have the sum 1."""
    edges = np.linspace(0, length, boxes + 1)
    start = np.arange(length)
    overlap = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    weights = overlap.clip(0)
    result: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return result


def _stack_logs(rows: Sequence[Any]) -> NDArray[np.float64]:
    """Return (scans, 3) binary logarithms; NaN for rows that are missing or not three positive numbers."""
    result = np.full((len(rows), 3), np.nan)
    for number, row in enumerate(rows):
        if row is not None and len(row) == 3 and min(row) > 0:
            result[number] = np.log2(np.asarray(row, np.float64))
    return result


def _fill_missing(column: NDArray[np.float64]) -> NDArray[np.float64]:
    known = column[~np.isnan(column)]
    return np.where(np.isnan(column), np.median(known) if len(known) else 0.0, column)
