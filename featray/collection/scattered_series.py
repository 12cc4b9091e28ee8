"""Find series whose slices lie in several archives, or in an archive and in folders.

A scan is read from the files of one archive, or from files in the store. So the slices in each archive look
like a whole scan, although they may be only a share of the series. Such shares fail. A share of the slices
that another archive or folder holds completely is excluded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from featray.collection.files import FoundScan
from featray.ct.dicom.parts import (
    SAME_PLACE_MM,
    StackRange,
    are_complete_volumes,
    belong_together,
    is_share_of,
    share_positions,
)
from featray.errors import Reason

_ADVICE = (
    "other slices of this series are in another archive or folder; "
    "unpack the archives that hold slices of it into one folder"
)


def mark_scattered_series(found: Sequence[FoundScan]) -> list[FoundScan]:
    """Return the scans of a collection; scans that are shares of a series fail or are excluded."""
    by_series: dict[str, list[FoundScan]] = defaultdict(list)
    for found_scan in found:
        if found_scan.scan.series and found_scan.stack and not found_scan.scan.excluded:
            by_series[found_scan.scan.series].append(found_scan)
    marked = {
        id(member): _mark_share(member, members)
        for members in by_series.values()
        if len({member.scan.archive for member in members}) > 1
        for member in members
    }
    return [marked.get(id(found_scan), found_scan) for found_scan in found]


def _mark_share(found_scan: FoundScan, members: Sequence[FoundScan]) -> FoundScan:
    """Return a scan, marked if other archives or folders show that it is only a share of its series."""
    scan, stack = found_scan.scan, found_scan.stack
    if scan.reason is not None or stack is None:
        return found_scan
    others = [
        (other.stack, other.scan.scan_id)
        for other in members
        if other.scan.archive != scan.archive and other.stack is not None
    ]
    for other, name in others:
        if other.owner == stack.owner and is_share_of(stack.places, other.places):
            message = f"its slices are among those of {name}, which has the same SeriesInstanceUID"
            excluded = replace(scan, reason=Reason.DUPLICATE_SLICES, excluded=True, message=message)
            return replace(found_scan, scan=excluded)
    if any(_are_shares(stack, other) for other, _ in others):
        return replace(found_scan, scan=replace(scan, reason=Reason.MISSING_SLICES, message=_ADVICE))
    return found_scan


def _are_shares(stack: StackRange, other: StackRange) -> bool:
    """Return whether two scans of one series are likely shares of one stack, and neither holds the other."""
    first, second = stack.places, other.places
    if stack.owner != other.owner:
        return belong_together(first, second)
    if _are_copies(stack, other) or is_share_of(first, second) or is_share_of(second, first):
        return False
    if not are_complete_volumes([first, second]):
        return True
    # Volumes at the same positions are time points. Thick slices among thin ones are another reconstruction.
    steps = [float(np.ptp(places)) / (len(places) - 1) for places in (first, second)]
    return not share_positions([first, second]) and max(steps) < 1.5 * min(steps)


def _are_copies(stack: StackRange, other: StackRange) -> bool:
    if stack.instances == other.instances:
        return True
    ends = np.array([[stack.low, stack.high], [other.low, other.high]])
    return stack.count == other.count and bool(np.ptp(ends, axis=0).max() < SAME_PLACE_MM)
