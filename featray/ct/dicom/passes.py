"""Find passes of the scanner, or reconstructions, whose slices lie between each other, without any label.

Two passes that are shifted by half a step look like one volume of half the step. The numbers of their images
show them, because the numbers of each pass run over the same range. If the steps are uneven, the positions
alone show them: all slices are then places of grids with one step. Works on numbers only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MAX_ROUNDING_FRACTION = 0.125
"""Largest rounding error, as a fraction of a step, with which positions still show a missing slice."""

_MIN_SLICES = 3
"""Number of slices from which the steps within one pass can be compared."""

_EVEN_TOLERANCE_MM, _EVEN_TOLERANCE_FRACTION = 0.01, 0.1
"""Deviation from the median step of a pass up to which its numbers count as those of one pass."""

_PASS_TOLERANCE_MM, _PASS_TOLERANCE_FRACTION = 0.02, 0.02
"""Deviation from the step of a pass up to which slices are of one pass, in mm and as a fraction of it."""

_MIN_UNEVENNESS = 3.0
"""Difference of the steps between passes, as a multiple of the errors within passes, from which it counts."""

_MAX_PASSES = 4
"""Largest number of overlapping passes that are looked for without a label."""


def are_numbered_in_passes(distances: NDArray[np.float64], numbers: Sequence[int | None]) -> bool:
    """Return whether the numbers of images run over the same range more than once.

    Each pass must be a regular stack with slices of the others between its own. If all slices together are
    regular too, such passes must hold most of them.

    Args:
        distances: Positions along the normal in mm, ascending, all different.
        numbers: InstanceNumber of each slice. If one is missing, the result is false.
    """
    passes = np.array(number_passes(distances, numbers))
    stacks = [distances[passes == number] for number in np.flatnonzero(np.bincount(passes) >= _MIN_SLICES)]
    mixed = [stack for stack in stacks if _is_even(stack) and _has_others_inside(stack, distances)]
    if not mixed or not _is_even(distances):
        return bool(mixed)
    low, high = min(stack[0] for stack in mixed), max(stack[-1] for stack in mixed)
    in_range = (distances >= low) & (distances <= high)
    return 2 * sum(map(len, mixed)) > int(in_range.sum())


def have_overlapping_passes(distances: NDArray[np.float64], last_digit_mm: float) -> bool:
    """Return whether all slices belong to passes of one step that lie unevenly between each other."""
    steps = np.diff(distances)
    candidates = {float(steps.max())}
    for count in range(2, min(_MAX_PASSES, len(distances) - 1) + 1):
        candidates.add(float(np.median(distances[count:] - distances[:-count])))
    return any(_are_passes(distances, step, last_digit_mm) for step in candidates)


def number_passes(distances: NDArray[np.float64], numbers: Sequence[int | None]) -> list[int]:
    """Return the pass of each slice, from 0, according to its number; arguments as in the functions above.

    In the order of the numbers, a pass ends where the direction along the normal turns. If numbers repeat,
    the slices that have a number for the first time along the normal are one pass, those that have it for
    the second time another, and so on. If a number is missing, all slices are of pass 0.
    """
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return [0] * len(numbers)
    if len(set(known)) < len(numbers):
        return _count_occurrences(known)
    passes, current, direction = [0] * len(numbers), 0, 0.0
    order = np.argsort(known)
    for index, sign in zip(order[1:].tolist(), np.sign(np.diff(distances[order])).tolist(), strict=True):
        if direction and sign != direction:
            current, direction = current + 1, 0.0
        else:
            direction = sign
        passes[index] = current
    return passes


def _count_occurrences(numbers: list[int]) -> list[int]:
    """Return for each number how many times it occurs before."""
    seen: Counter[int] = Counter()
    counts = []
    for number in numbers:
        counts.append(seen[number])
        seen[number] += 1
    return counts


def _is_even(stack: NDArray[np.float64]) -> bool:
    steps = np.diff(stack)
    median = float(np.median(steps))
    return bool(np.abs(steps - median).max() <= _EVEN_TOLERANCE_MM + _EVEN_TOLERANCE_FRACTION * median)


def _has_others_inside(stack: NDArray[np.float64], distances: NDArray[np.float64]) -> bool:
    """Return whether other slices lie between the first and the last slice of a stack."""
    first, last = np.searchsorted(distances, [stack[0], stack[-1]])
    return bool(last - first >= len(stack))


def _are_passes(distances: NDArray[np.float64], step: float, last_digit_mm: float) -> bool:
    """Return whether each slice has another at `step` from it, with others between, mostly unevenly.

    If the others lie evenly, they are a zone of smaller steps; if few lie unevenly, they are next to a gap.
    """
    rounding = min(last_digit_mm, MAX_ROUNDING_FRACTION / 2 * step)
    tolerance = max(_PASS_TOLERANCE_MM, _PASS_TOLERANCE_FRACTION * step) + rounding
    partners = np.array([_find_nearest(distances, distance + step) for distance in distances.tolist()])
    errors = np.abs(distances[partners] - distances - step)
    firsts = np.flatnonzero((errors <= tolerance) & (partners > np.arange(len(distances))))
    seconds = partners[firsts]
    if len(np.union1d(firsts, seconds)) < len(distances) or not np.intersect1d(firsts, seconds).size:
        return False
    min_difference = max(tolerance, _MIN_UNEVENNESS * float(errors[firsts].max()))
    between = [
        np.diff(distances[first : second + 1])
        for first, second in zip(firsts.tolist(), seconds.tolist(), strict=True)
        if second > first + 1
    ]
    uneven = [steps for steps in between if np.ptp(steps) > min_difference]
    return len(uneven) > len(between) / 2


def _find_nearest(distances: NDArray[np.float64], target: float) -> int:
    """Return the index of the slice nearest to `target`."""
    right = min(int(np.searchsorted(distances, target)), len(distances) - 1)
    left = max(right - 1, 0)
    return left if target - distances[left] < distances[right] - target else right
