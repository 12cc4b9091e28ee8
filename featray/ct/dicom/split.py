"""Slices of one SeriesInstanceUID in, the volumes among them out, where headers tell them apart cleanly.

Patients who share a UID by a careless anonymiser; time points, kernels and thicknesses stored as one
series. Sees no pixels. What cannot be told apart stays together, for reading to refuse.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.stack import SAME_PLACE_MM, places_along_normal

_TELLING = (
    "temporal",
    "acquisition",
    "trigger",
    "kernel",
    "thickness",
    "frame_uid",
    "series_number",
    "image_type",
)
"""Fields that tell volumes apart where places repeat, the plainest first."""


def apart(slices: Sequence[SliceHeader], *fields: str) -> list[list[SliceHeader]]:
    """Return the slices by their values of `fields`; one whose value is empty goes with the most."""
    parts = [list(slices)]
    for field in fields:
        parts = [part for whole in parts for part in _by_value(whole, field)]
    return parts


def volumes(slices: list[SliceHeader]) -> list[list[SliceHeader]]:
    """Return the volumes that lie at the same places, or all slices as one if that is not clean.

    Only where places repeat, or a temporal position is named, is anything split. Clean: each part has two
    places and more, no place twice, and covers what the others cover; parts with one step have the same
    places. So a volume that lacks a slice is never split off, nor a run of slices from a table move.
    """
    if not all(header.position and header.orientation for header in slices) or len(slices) < 4:
        return [slices]
    along = places_along_normal(slices)
    repeats = bool((np.diff(np.sort(along)) < SAME_PLACE_MM).any())
    telling = [field for field in _TELLING if len({getattr(header, field) for header in slices}) > 1]
    if not repeats:
        telling = [field for field in telling if field == "temporal"]
    for fields in [*((field,) for field in telling), tuple(telling)]:
        parts = _indices_by(slices, fields)
        if len(parts) > 1 and _clean([np.sort(along[part]) for part in parts]):
            return [[slices[i] for i in part] for part in parts]
    return [slices]


def _by_value(slices: list[SliceHeader], field: str) -> list[list[SliceHeader]]:
    parts: dict[str, list[SliceHeader]] = defaultdict(list)
    for header in slices:
        parts[getattr(header, field)].append(header)
    unknown = parts.pop("", [])
    if not parts:
        return [slices]
    max(parts.values(), key=len).extend(unknown)
    return list(parts.values())


def _indices_by(slices: list[SliceHeader], fields: tuple[str, ...]) -> list[list[int]]:
    parts: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for index, header in enumerate(slices):
        parts[tuple(getattr(header, field) for field in fields)].append(index)
    return list(parts.values())


def _clean(parts: list[NDArray[np.float64]]) -> bool:
    """Tell whether sorted places along the normal, in mm, are whole volumes that cover one another."""
    if min(map(len, parts)) < 2:
        return False
    low, high = min(part[0] for part in parts), max(part[-1] for part in parts)
    steps = [np.diff(part) for part in parts]
    for part, own in zip(parts, steps, strict=True):
        if own.min() < SAME_PLACE_MM or max(part[0] - low, high - part[-1]) > own.max():
            return False
    medians = [float(np.median(own)) for own in steps]
    one_step = max(medians) < 1.5 * min(medians)
    return not one_step or len({len(part) for part in parts}) == 1
