"""Split the slices of one SeriesInstanceUID into volumes, if their headers separate the volumes cleanly.

Examples are patients who share a UID after faulty anonymization, and time points, convolution kernels or
slice thicknesses stored as one series. Reads no pixels. Slices that cannot be separated stay together, and
reading refuses them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.stack import SAME_POSITION_MM, project_on_normal

_VOLUME_FIELDS = (
    "temporal_position",
    "acquisition_number",
    "trigger_time",
    "convolution_kernel",
    "slice_thickness",
    "frame_of_reference_uid",
    "series_number",
    "image_type",
)
"""Fields of `SliceHeader` that may separate volumes at the same positions, the most explicit first."""


def split_by_fields(slices: Sequence[SliceHeader], *fields: str) -> list[list[SliceHeader]]:
    """Return the slices grouped by their values of `fields`.

    Slices with an empty value join the largest group.
    """
    groups = [list(slices)]
    for field in fields:
        groups = [part for group in groups for part in _split_by_field(group, field)]
    return groups


def split_volumes(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the volumes among slices of one orientation and matrix size, or all slices as one group.

    Slices are only split if positions repeat or if TemporalPositionIdentifier differs, and only if the split
    is clean: each part has at least two positions, has none of them twice, and covers the range of the other
    parts to within one step; and if all parts have about the same step, they have equally many slices. This
    keeps volumes that lack a slice, and successive ranges of slices from a table movement, from being split
    off.
    """
    if not all(header.position and header.orientation for header in slices) or len(slices) < 4:
        return [slices]
    distances = project_on_normal(slices)
    repeats = bool((np.diff(np.sort(distances)) < SAME_POSITION_MM).any())
    fields = [field for field in _VOLUME_FIELDS if len({getattr(header, field) for header in slices}) > 1]
    if not repeats:
        fields = [field for field in fields if field == "temporal_position"]
    for combination in [*((field,) for field in fields), tuple(fields)]:
        parts = _group_indices(slices, combination)
        if len(parts) > 1 and _is_clean_split([np.sort(distances[part]) for part in parts]):
            return [[slices[i] for i in part] for part in parts]
    return [slices]


def _split_by_field(slices: list[SliceHeader], field: str) -> list[list[SliceHeader]]:
    groups: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        groups[getattr(header, field)].append(header)
    without_value = groups.pop("", [])
    if not groups:
        return [slices]
    max(groups.values(), key=len).extend(without_value)
    return list(groups.values())


def _group_indices(slices: list[SliceHeader], fields: tuple[str, ...]) -> list[list[int]]:
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, header in enumerate(slices):
        groups[tuple(getattr(header, field) for field in fields)].append(index)
    return list(groups.values())


def _is_clean_split(parts: list[NDArray[np.float64]]) -> bool:
    """Return whether the parts, each sorted positions along the normal in mm, are complete volumes."""
    if min(map(len, parts)) < 2:
        return False
    low, high = min(part[0] for part in parts), max(part[-1] for part in parts)
    steps_of_parts = [np.diff(part) for part in parts]
    for part, steps in zip(parts, steps_of_parts, strict=True):
        if steps.min() < SAME_POSITION_MM or max(part[0] - low, high - part[-1]) > steps.max():
            return False
    medians = [float(np.median(steps)) for steps in steps_of_parts]
    has_one_step = max(medians) < 1.5 * min(medians)
    return not has_one_step or len({len(part) for part in parts}) == 1
