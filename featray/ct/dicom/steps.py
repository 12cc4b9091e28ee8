"""Judge the steps between slices along their normal: regular, irregular, with slices missing, or two passes.

Works on numbers only, and knows neither headers nor policies. A stack is regular in one of two ways:

- Each step lies within the larger of 0.01 mm and 1 % of the median step, and no slice lies more than a
  quarter of a step from its place on the line from the first to the last slice. So small differences cannot
  add up.
- The positions are those of an even grid, rounded as in the headers (to 0.1 mm for positions such as 12.3):
  a line exists from which none is farther than half of the last digit. This holds only if half of the last
  digit is at most an eighth of a step; coarser positions show neither a missing nor a moved slice.

Steps that are not regular are judged in an order in which a resampling never hides anything: slices are
missing, two passes overlap, or, last, the steps are irregular and may be resampled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.dicom.passes import MAX_ROUNDING_FRACTION, are_numbered_in_passes, have_overlapping_passes
from featray.errors import Reason

STEP_TOLERANCE_MM, STEP_TOLERANCE_FRACTION = 0.01, 0.01
"""A step is regular within the larger of 0.01 mm and 1 % of the median step, because headers are rounded."""

MAX_DEVIATION_FRACTION = 0.25
"""Distance of a slice from its place on the even grid, as a fraction of a step, up to which it is regular."""

MAX_GAP_SHARE = 0.25
"""Largest share of irregular steps at which whole multiples of the median step count as missing slices."""

GAP_FACTOR = 1.5
"""A step this many times larger than both its neighbors is a gap, even among irregular steps."""

_ROUNDING_NOISE_MM = 1e-6
"""Errors of floating-point arithmetic in positions."""


def judge_steps(
    distances: NDArray[np.float64], numbers: Sequence[int | None], last_digit_mm: float
) -> Reason | None:
    """Return the problem of the steps of a stack, or None if they are regular.

    Returns:
        `missing_slices`; `duplicate_slices` if two passes overlap; `irregular_spacing` if the steps are
        neither of both and can be resampled; or None.

    Args:
        distances: Positions along the normal in mm, ascending, all different.
        numbers: InstanceNumber of each slice.
        last_digit_mm: Unit to which the positions are rounded, as `find_last_digit` returns it.
    """
    steps = np.diff(distances)
    median = float(np.median(steps))
    if median > geometry.MAX_SPACING_MM:
        return Reason.MISSING_SLICES
    if are_numbered_in_passes(distances, numbers):
        return Reason.DUPLICATE_SLICES
    if _is_regular(distances) or _is_rounded_grid(distances, last_digit_mm):
        return None
    if _has_number_jumps(steps, numbers) or _has_multiples(steps, median):
        return Reason.MISSING_SLICES
    if have_overlapping_passes(distances, last_digit_mm):
        return Reason.DUPLICATE_SLICES
    return Reason.MISSING_SLICES if _has_gaps(steps) else Reason.IRREGULAR_SPACING


def find_last_digit(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> float:
    """Return the unit in mm to which positions along the normal are rounded, from their decimal places.

    Coordinates that all slices share add no rounding to the steps.

    Args:
        positions: (n, 3) mm, as written in the headers.
        normal: Unit vector.
    """
    varying = np.flatnonzero(np.ptp(positions, axis=0) > 0)
    units = {axis: 10.0 ** -max(map(_count_decimals, positions[:, axis].tolist())) for axis in varying}
    return float(sum(abs(normal[axis]) * unit for axis, unit in units.items()))


def _count_decimals(value: float) -> int:
    text = repr(value)
    return 9 if "e" in text else len(text.rpartition(".")[2].rstrip("0"))


def _is_regular(distances: NDArray[np.float64]) -> bool:
    """Return whether all steps are about the median step, and their differences do not add up."""
    steps = np.diff(distances)
    median = float(np.median(steps))
    tolerance = max(STEP_TOLERANCE_MM, STEP_TOLERANCE_FRACTION * median) + _ROUNDING_NOISE_MM
    deviations = distances - np.linspace(distances[0], distances[-1], len(distances))
    is_even = np.abs(deviations).max() <= MAX_DEVIATION_FRACTION * median
    return bool(np.abs(steps - median).max() <= tolerance and is_even)


def _is_rounded_grid(distances: NDArray[np.float64], last_digit_mm: float) -> bool:
    """Return whether rounding to the last digit explains the deviations from an even grid.

    Then the steps are two neighboring multiples of the last digit. They may be three if the positions of the
    grid end in a 5 behind the last digit, because some are rounded up and others down; a single slice out of
    line is not explained so.
    """
    steps = np.diff(distances)
    if last_digit_mm / 2 > MAX_ROUNDING_FRACTION * float(steps.mean()):
        return False
    residuals = _compute_residuals(distances)
    limit = last_digit_mm / 2 + _ROUNDING_NOISE_MM
    if np.abs(residuals).max() > limit:
        return False
    at_edge = np.abs(residuals) > limit - 2 * _ROUNDING_NOISE_MM
    at_both = min(int((at_edge & (residuals > 0)).sum()), int((at_edge & (residuals < 0)).sum()))
    return bool(np.ptp(steps) <= last_digit_mm + _ROUNDING_NOISE_MM or at_both >= 2)


def _compute_residuals(distances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distances from the line whose largest distance to any slice is smallest."""
    indices = np.arange(len(distances))

    def compute_for(step: float) -> NDArray[np.float64]:
        residuals = distances - step * indices
        return np.asarray(residuals - (residuals.max() + residuals.min()) / 2)

    low, high = float(np.diff(distances).min()), float(np.diff(distances).max())
    for _ in range(80):  # the largest distance is a convex function of the step
        third = (high - low) / 3
        if compute_for(low + third).max() < compute_for(high - third).max():
            high -= third
        else:
            low += third
    return compute_for((low + high) / 2)


def _has_number_jumps(steps: NDArray[np.float64], numbers: Sequence[int | None]) -> bool:
    """Return whether steps are proportional to jumps of InstanceNumber, so that slices are missing."""
    if None in numbers:
        return False
    jumps = np.diff(np.array(numbers, dtype=np.float64))
    if (jumps == 0).any() or len(set(np.abs(jumps))) == 1:
        return False
    per_number = steps / jumps
    tolerance = STEP_TOLERANCE_MM + STEP_TOLERANCE_FRACTION * abs(np.median(per_number))
    return bool(np.ptp(per_number) <= tolerance)


def _has_multiples(steps: NDArray[np.float64], median: float) -> bool:
    """Return whether few steps are irregular and all of these are whole multiples of the median step."""
    is_irregular = np.abs(steps - median) > max(STEP_TOLERANCE_MM, STEP_TOLERANCE_FRACTION * median)
    ratios = steps[is_irregular] / median
    is_whole = np.abs(ratios - np.round(ratios)) <= STEP_TOLERANCE_FRACTION * np.round(ratios)
    is_few = 0 < is_irregular.mean() <= MAX_GAP_SHARE
    return bool(is_few and is_whole.all() and (ratios > 1.5).all())


def _has_gaps(steps: NDArray[np.float64]) -> bool:
    """Return whether a step is too large to interpolate.

    Such a step is `GAP_FACTOR` times larger than both its neighbors, or above `geometry.MAX_SPACING_MM`.
    """
    if len(steps) < 2:
        return False
    before, after = np.r_[0, steps[:-1]], np.r_[steps[1:], 0]
    is_gap = steps > GAP_FACTOR * np.maximum(before, after)
    return bool(is_gap.any() or steps.max() > geometry.MAX_SPACING_MM)
