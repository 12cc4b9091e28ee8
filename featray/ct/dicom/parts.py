"""Decide from positions alone how the parts of one series are related.

All functions take distances along the slice normal in mm. The labels that made the parts are not known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.stack import SAME_POSITION_MM

Distances = NDArray[np.float64]
"""Distances of slices along their normal in mm."""

SAME_PLACE_MM = 0.1
"""Copies of a slice are at most this far apart, because some exports round positions."""

MAX_GAP_STEPS = 3.5
"""Parts whose ranges are at most this many steps apart belong to one stack; slices may be missing between."""

MIN_RUN = 3
"""Shortest run of one label, in slices, that a table movement may have made among returning labels."""


@dataclass(frozen=True)
class StackRange:
    """Where the slices of a scan lie, in few numbers, to compare it with scans of the same series elsewhere.

    Attributes:
        count: Number of different positions.
        low: Lowest position along the normal in mm.
        high: Highest position along the normal in mm.
        owner: Hash of SeriesInstanceUID, PatientID and StudyInstanceUID.
        instances: Hash of all SOPInstanceUIDs.
    """

    count: int
    low: float
    high: float
    owner: str
    instances: str

    @property
    def places(self) -> Distances:
        """Distances along the normal in mm, under the assumption of equal steps."""
        return np.linspace(self.low, self.high, self.count)


_STEP_TOLERANCE_MM, _STEP_TOLERANCE_FRACTION = 0.02, 0.01
"""Steps are equal within the larger of these, because both ends of a step may be rounded to 0.01 mm."""

_GRID_FRACTION = 0.05
"""Largest distance from the grid of a stack, in steps, at which a slice continues the stack."""

_SQUEEZED_FRACTION = 0.9
"""A step below this fraction of the median step means that a slice lies between the slices of a stack."""


def is_regular(distances: Distances) -> bool:
    """Return whether two or more slices lie at equal steps, apart from rounding."""
    steps = np.diff(np.sort(distances))
    if len(steps) == 0 or steps.min() < SAME_POSITION_MM:
        return False
    median = float(np.median(steps))
    return bool(np.abs(steps - median).max() <= max(_STEP_TOLERANCE_MM, _STEP_TOLERANCE_FRACTION * median))


def unite(parts: Sequence[Distances]) -> Distances:
    """Return the sorted distances of all parts; positions that occur more than once are returned once."""
    merged: Distances = np.sort(np.concatenate(list(parts)))
    united: Distances = merged[np.append(True, np.diff(merged) >= SAME_POSITION_MM)]
    return united


def share_positions(parts: Sequence[Distances]) -> bool:
    """Return whether a position occurs more than once."""
    return len(unite(parts)) < sum(map(len, parts))


def have_squeezed_slices(distances: Distances) -> bool:
    """Return whether slices lie between the slices of a stack, so that a step is shorter than the others."""
    steps = np.diff(unite([distances]))
    return len(steps) > 1 and bool(steps.min() < _SQUEEZED_FRACTION * np.median(steps))


def are_complete_volumes(parts: Sequence[Distances]) -> bool:
    """Return whether each part is a volume over the whole range.

    Each part has at least two positions, has none of them twice, and covers the range of the other parts to
    within one step. If all parts have about the same step, they have equally many slices. Unless the parts
    share positions, each part has equal steps; otherwise the parts may be random shares of one stack.
    """
    if min(map(len, parts)) < 2:
        return False
    low, high = min(part.min() for part in parts), max(part.max() for part in parts)
    steps_of_parts = [np.diff(np.sort(part)) for part in parts]
    for part, steps in zip(parts, steps_of_parts, strict=True):
        if steps.min() < SAME_POSITION_MM or max(part.min() - low, high - part.max()) > steps.max() * 1.01:
            return False
    medians = [float(np.median(steps)) for steps in steps_of_parts]
    has_one_step = max(medians) < 1.5 * min(medians)
    if has_one_step and len({len(part) for part in parts}) > 1:
        return False
    return share_positions(parts) or all(map(is_regular, parts))


def belong_together(first: Distances, second: Distances) -> bool:
    """Return whether two parts without a common position are likely shares of one stack.

    This is the case if their ranges do not overlap and one continues the grid of the other, or if their
    ranges overlap and they complete one regular grid although not each of them has equal steps.
    """
    if share_positions([first, second]):
        return False
    low, high = (first, second) if first.min() <= second.min() else (second, first)
    gap = float(high.min() - low.max())
    if gap <= 0:
        return is_regular(unite([first, second])) and not (is_regular(first) and is_regular(second))
    steps = [float(np.median(np.diff(np.sort(part)))) for part in (first, second) if len(part) > 1]
    step = max(steps, default=gap)
    is_on_grid = abs(gap - round(gap / step) * step) <= _GRID_FRACTION * step
    return is_on_grid and gap <= MAX_GAP_STEPS * step and step <= 1.5 * min(steps, default=gap)


def complete_one_stack(parts: Sequence[Distances]) -> bool:
    """Return whether parts fill each place of one regular grid once, although not each has equal steps."""
    is_one_grid = not share_positions(parts) and is_regular(unite(parts))
    return is_one_grid and not all(map(is_regular, parts))


def is_share_of(places: Distances, grid: Distances) -> bool:
    """Return whether all places are neighboring places of a larger stack."""
    if len(places) >= len(grid):
        return False
    sorted_grid, sorted_places = np.sort(grid), np.sort(places)
    indices = np.searchsorted(sorted_grid, sorted_places - SAME_PLACE_MM)
    is_inside = indices < len(sorted_grid)
    if not is_inside.all() or np.abs(sorted_grid[indices] - sorted_places).max() > SAME_PLACE_MM:
        return False
    return bool((np.diff(indices) == 1).all())


def has_crossing_labels(labels: Sequence[Hashable]) -> bool:
    """Return whether a label and the other labels each form two or more runs, so that they alternate.

    A label that forms one run, such as a table position or a single deviating slice, does not alternate.

    Args:
        labels: One label per slice, in the order of the positions.
    """
    runs = [label for label, _ in groupby(labels)]
    return any(
        number > 1 and number - 1 + (runs[0] != label) + (runs[-1] != label) > 1
        for label, number in Counter(runs).items()
    )


def has_short_run(labels: Sequence[Hashable]) -> bool:
    """Return whether a run of equal labels is shorter than `MIN_RUN`."""
    return any(sum(1 for _ in run) < MIN_RUN for _, run in groupby(labels))


def has_returning_label(labels: Sequence[Hashable]) -> bool:
    """Return whether a label occurs again after another one."""
    return sum(1 for _ in groupby(labels)) > len(set(labels))
