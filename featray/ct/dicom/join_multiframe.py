"""Decide whether the multi-frame files of one series, and its single-frame slices, are one stack or several.

The files of a concatenation say so themselves. For other files the ranges of their frames decide: grouping
knows only the first and the last position of the frames of a file, and assumes equal steps between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from featray.ct.dicom.exclude import is_in_plane
from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.join import connect
from featray.ct.dicom.parts import (
    Distances,
    are_complete_volumes,
    belong_together,
    is_regular,
    share_positions,
    unite,
)
from featray.ct.dicom.stack import project_on_normal

_MAX_FILES = 50
"""Up to this number of stacks in one series, each pair of them is compared."""


def join_multiframes(stacks: list[list[SliceHeader]]) -> list[list[SliceHeader]]:
    """Return the stacks of one series after joining multi-frame files with the stacks that they continue.

    Files that cover the same range (time points, copies), and files whose range is not known, stay apart.
    """
    if len(stacks) > _MAX_FILES or not any(stack[0].frame_range for stack in stacks):
        return stacks
    places = [find_places(stack) for stack in stacks]
    linked = [
        (first, second)
        for first, second in combinations(range(len(stacks)), 2)
        if _are_shares((stacks[first], places[first]), (stacks[second], places[second]))
    ]
    return [
        [header for number in numbers for header in stacks[number]]
        for numbers in connect(len(stacks), linked)
    ]


def find_places(stack: list[SliceHeader]) -> Distances | None:
    """Return the distances of the slices or frames of a stack along its normal, or None if not known."""
    if len(stack) == 1 and stack[0].frame_range:
        low, high, _ = stack[0].frame_range
        return np.linspace(low, high, stack[0].number_of_frames)
    if all(header.position and header.orientation and header.number_of_frames == 1 for header in stack):
        return project_on_normal(stack)
    return None


def are_joined_multiframes(slices: Sequence[SliceHeader]) -> bool:
    """Return whether several multi-frame files, or one and other slices, were joined by their positions."""
    has_multiframe = any(header.number_of_frames > 1 for header in slices)
    return len(slices) > 1 and has_multiframe and not all(header.concatenation_uid for header in slices)


def find_multiframe_mixture(slices: Sequence[SliceHeader]) -> str:
    """Return why joined multi-frame files are not one volume, in words; empty if nothing shows that."""
    if not are_joined_multiframes(slices):
        return ""
    places = [find_places([header]) for header in slices if header.number_of_frames > 1]
    for first, second in combinations([each for each in places if each is not None], 2):
        does_overlap = first.max() > second.min() and second.max() > first.min()
        if does_overlap and not share_positions([first, second]):
            return (
                "the frames of several multi-frame files lie between each other; "
                "give each volume its own SeriesInstanceUID"
            )
    return ""


def _are_shares(
    first: tuple[list[SliceHeader], Distances | None], second: tuple[list[SliceHeader], Distances | None]
) -> bool:
    """Return whether two stacks, one of them a multi-frame file, are shares of one stack."""
    (stack, places), (other, other_places) = first, second
    if places is None or other_places is None or not (stack[0].frame_range or other[0].frame_range):
        return False
    header, other_header = _set_orientation(stack[0]), _set_orientation(other[0])
    if not is_in_plane(other_header, header.rows, header.columns, header.orientation):
        return False
    pair = [places, other_places]
    if are_complete_volumes(pair):
        return not share_positions(pair) and is_regular(unite(pair))
    does_overlap = places.max() >= other_places.min() and other_places.max() >= places.min()
    return does_overlap or belong_together(places, other_places)


def _set_orientation(header: SliceHeader) -> SliceHeader:
    """Return the header with the orientation of the frames as that of the file."""
    return replace(header, orientation=header.frame_range[2]) if header.frame_range else header
