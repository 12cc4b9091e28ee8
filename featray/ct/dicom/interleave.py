"""Find volumes whose slices lie between each other in one series or multi-frame file.

Two reconstructions or passes that are shifted by half a step look like one volume of half the step. Their
headers tell them apart: each value of a field forms a regular stack of its own, over the same range as the
others. Values that form successive ranges (a moving table), and values whose slices only together fill every
place of one grid, do not count as volumes of their own. Reads no pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.stack import SAME_POSITION_MM, project_on_normal

TELLING_FIELDS = (
    "temporal_position",
    "stack_id",
    "acquisition_number",
    "trigger_time",
    "convolution_kernel",
    "kvp",
    "slice_thickness",
    "frame_of_reference_uid",
    "series_number",
    "image_type",
)
"""Fields of `SliceHeader` whose values tell images of different volumes apart, the most explicit first."""

_NUMBER_FIELDS = ("instance_number", "acquisition_number")
"""Fields that count the images of a volume; where they begin again another volume begins."""

_MIN_SLICES = 3
"""Slices from which the steps within one value of a field can be compared."""

_EVEN_TOLERANCE = 0.1
"""Deviation from the median step, as a fraction of it, up to which a stack counts as regular here."""


def find_interleaved_field(slices: Sequence[SliceHeader]) -> str | None:
    """Return the field by which slices are two or more interleaved volumes, or None.

    All slices must have a position and the same orientation.
    """
    distances = project_on_normal(slices)
    for field in TELLING_FIELDS:
        if are_interleaved(distances, [getattr(header, field) for header in slices]):
            return field
    for field in _NUMBER_FIELDS:
        passes = number_passes(distances, [_parse_number(getattr(header, field)) for header in slices])
        if are_interleaved(distances, passes):
            return field
    return None


def are_interleaved(distances: NDArray[np.float64], labels: Sequence[Hashable]) -> bool:
    """Return whether the slices of some labels are regular stacks with other slices between their own.

    If all slices together are regular, such stacks must hold most of the slices in their range. Otherwise
    the labels are complements of one grid, for example if every fifth slice has another label.

    Args:
        distances: Position of each slice along the normal in mm, in any order.
        labels: Label of each slice; any value, also an empty one.
    """
    if len(set(labels)) < 2:
        return False
    everything = np.sort(distances)
    mixed = [
        stack for stack in _find_regular_stacks(distances, labels) if _has_others_inside(stack, everything)
    ]
    if not mixed or not _is_even(everything):
        return bool(mixed)
    low, high = min(stack[0] for stack in mixed), max(stack[-1] for stack in mixed)
    in_range = (everything >= low) & (everything <= high)
    return 2 * sum(map(len, mixed)) > int(in_range.sum())


def number_passes(distances: NDArray[np.float64], numbers: Sequence[int | None]) -> list[int]:
    """Return the pass of each slice according to its number.

    In the order of the numbers, a pass ends where the direction along the normal turns. If numbers repeat,
    the slices that have a number for the first time along the normal are one pass, those that have it for
    the second time another, and so on. If a number is missing, all slices are of pass 0.
    """
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return [0] * len(numbers)
    if len(set(known)) < len(numbers):
        return _count_occurrences(distances, known)
    passes, current, direction = [0] * len(numbers), 0, 0.0
    order = np.argsort(known)
    for index, sign in zip(order[1:].tolist(), np.sign(np.diff(distances[order])).tolist(), strict=True):
        if direction and sign != direction:
            current, direction = current + 1, 0.0
        else:
            direction = sign
        passes[index] = current
    return passes


def _count_occurrences(distances: NDArray[np.float64], numbers: list[int]) -> list[int]:
    """Return for each slice how many slices before it along the normal have its number."""
    seen: Counter[int] = Counter()
    passes = [0] * len(numbers)
    for index in np.argsort(distances, kind="stable").tolist():
        passes[index] = seen[numbers[index]]
        seen[numbers[index]] += 1
    return passes


def _find_regular_stacks(
    distances: NDArray[np.float64], labels: Sequence[Hashable]
) -> list[NDArray[np.float64]]:
    """Return the sorted distances of each label whose slices are a regular stack."""
    groups: dict[Hashable, list[float]] = {}
    for distance, label in zip(distances.tolist(), labels, strict=True):
        groups.setdefault(label, []).append(distance)
    stacks = [np.sort(group) for group in groups.values() if len(group) >= _MIN_SLICES]
    return [stack for stack in stacks if _is_even(stack)]


def _is_even(stack: NDArray[np.float64]) -> bool:
    steps = np.diff(stack)
    median = float(np.median(steps))
    return bool(np.abs(steps - median).max() <= SAME_POSITION_MM + _EVEN_TOLERANCE * median)


def _has_others_inside(stack: NDArray[np.float64], everything: NDArray[np.float64]) -> bool:
    """Return whether slices of other labels lie between the first and the last slice of a stack."""
    low, high = np.searchsorted(everything, [stack[0], stack[-1] + SAME_POSITION_MM / 2])
    return bool(high - low > len(stack))


def _parse_number(value: str | int | None) -> int | None:
    """Return a number that may be text, or None."""
    if isinstance(value, str):
        return int(value) if value.lstrip("-").isdecimal() and len(value) < 12 else None
    return value
