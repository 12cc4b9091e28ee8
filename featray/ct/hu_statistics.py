"""Voxels in, their range, percentiles and "is it HU?" out; knows no file format and changes nothing.

All values are those after slope and intercept, before any window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.errors import WarningCode

EXACT_VOXELS = 12_000_000
"""Up to here percentiles of int16 use every voxel; also below 2**24, where calcHist's float32 is exact."""

SAMPLE_VOXELS = 2_000_000
"""Above it, at least this many voxels, in whole rows at one regular distance."""

PERCENTILES = (1.0, 50.0, 99.0)

AIR_HU = (-1100, -900)
"""Air, with noise."""

TISSUE_HU = (-250, 350)
"""Fat to contrast-enhanced blood: most of any body, and little of a body whose values are off by 1000."""

BELOW_FAT_HU = -30
"""Fat, lung and air lie below; muscle, organs and blood hardly ever."""

HIGHEST_WINDOW_HU = 2000
"""Upper bounds of windows lie below; where 12-bit scanners saturate lies above."""

_FIRST, _LAST = -32768, 32767
_SPIKE_NEIGHBOURS = 20


@dataclass(frozen=True)
class HuStatistics:
    """Range and percentiles of a volume, in the units of its voxels (HU if all is well).

    `counts` says how many voxels of `sample_rows` round to -32768, -32767 … 32767; values beyond are
    counted at the ends.
    """

    minimum: float
    p01: float
    p50: float
    p99: float
    maximum: float
    counts: NDArray[np.int64] = field(repr=False, compare=False)


def compute_statistics(voxels_zyx: NDArray[Any]) -> HuStatistics:
    """Return minimum, maximum and the 1st, 50th and 99th percentile.

    Minimum and maximum are exact. Percentiles (linear between the two nearest ranks, as
    `numpy.percentile`) are exact for int16 up to `EXACT_VOXELS`; else they are those of `sample_rows`.
    """
    ends = [cv2.minMaxLoc(plane)[:2] for plane in voxels_zyx]  # both in one pass
    minimum, maximum = min(low for low, _ in ends), max(high for _, high in ends)
    sample = sample_rows(voxels_zyx)
    counts = _counts(sample)
    if voxels_zyx.dtype != np.int16:
        ordered = np.sort(sample, axis=None)  # faster than np.partition at six ranks
        percentiles = _percentiles(ordered.size, lambda rank: float(ordered[rank]))
    else:
        exact = voxels_zyx.size <= EXACT_VOXELS and sample.size < voxels_zyx.size
        every = _counts(np.ascontiguousarray(voxels_zyx)) if exact else counts
        cumulative = np.cumsum(every)
        percentiles = _percentiles(
            int(cumulative[-1]), lambda rank: float(np.searchsorted(cumulative, rank, side="right") + _FIRST)
        )
    p01, p50, p99 = percentiles
    return HuStatistics(minimum, p01, p50, p99, maximum, counts)


def sample_rows(voxels_zyx: NDArray[Any]) -> NDArray[Any]:
    """Return about `SAMPLE_VOXELS` voxels (all, if fewer) as contiguous rows (n, x).

    Rows lie at one regular distance through the whole volume, at other places in each slice, so
    every region counts by its volume.
    """
    slices, rows, _ = voxels_zyx.shape
    step = max(1, voxels_zyx.size // SAMPLE_VOXELS)
    if step > 1 and rows % step == 0:
        step -= 1  # else each slice would be met at the same rows
    z, y = np.divmod(np.arange(0, slices * rows, step), rows)
    return np.ascontiguousarray(voxels_zyx[z, y])


def find_hu_warnings(found: HuStatistics) -> tuple[str, ...]:
    """Return `not_hu` and `padding_value` where the histogram speaks for it.

    `not_hu`, one of
      - range: a minimum of 0 or more, a range of at most 256 (8 bit, normalised), a maximum above
        32,767 (negative values read as unsigned);
      - hardly anything below fat, air or not: stored values, MR, PET;
      - bone throughout: soft tissue without its intercept, or with its sign turned;
      - air where it lies with its intercept applied twice, or much below air and no soft tissue;
      - a heap at the very end of the values, with a tail that it cuts off: clipped to a window.
    `padding_value`: the minimum lies below air and at least 0.1 % of voxels have exactly that
    value, as outside the circle of reconstruction (-2000, -3024), unlike interpolation overshoot.

    The judgement leaves out values that software has set (padding, masks, clamped air): heaps of
    one value.
    """
    histogram = _Histogram(found)
    codes = []
    if any(check(histogram) for check in _CHECKS):
        codes.append(WarningCode.NOT_HU.value)
    if found.minimum < AIR_HU[0] and histogram.share_at(found.minimum) >= 1e-3:
        codes.append(WarningCode.PADDING_VALUE.value)
    return tuple(codes)


class _Histogram:
    """Shares of voxels by value, with and without the heaps of one value."""

    def __init__(self, found: HuStatistics) -> None:
        self.found = found
        self.total = max(int(found.counts.sum()), 1)
        self._all = found.counts / self.total
        self._heaps = _heaps(found.counts)
        content = np.where(self._heaps, 0, found.counts)
        # A volume of a few values, such as a phantom without noise, has no content to judge.
        self.has_content = bool(content.sum() > 0.01 * self.total)
        self._content = content / max(int(content.sum()), 1)

    def share_at(self, value: float) -> float:
        """Return the share of voxels that round to `value`."""
        return float(self._all[_bin(value)])

    def share(self, low: float, high: float) -> float:
        """Return which share of the content lies in [low, high]; heaps of one value do not count."""
        return float(self._content[_bin(low) : _bin(high) + 1].sum())

    def heaped(self, low: float, high: float) -> float:
        """Return which share of all voxels is in heaps of one value within [low, high]."""
        within = slice(_bin(low), _bin(high) + 1)
        return float(self._all[within][self._heaps[within]].sum())

    def beside(self, low: float, high: float) -> float:
        """Return which share of all voxels lies in [low, high], heaps left out."""
        within = slice(_bin(low), _bin(high) + 1)
        return float(self._all[within][~self._heaps[within]].sum())


def _heaps(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Tell values that more than 2 % of voxels have, and twenty times as many as have their neighbours."""
    heaps = np.zeros(counts.shape, np.bool_)
    for value in np.flatnonzero(counts > 0.02 * counts.sum()):
        around = counts[max(value - _SPIKE_NEIGHBOURS, 0) : value + _SPIKE_NEIGHBOURS + 1]
        others = (around.sum() - counts[value]) / (len(around) - 1)
        heaps[value] = counts[value] > 20 * others
    return heaps


def _bin(value: float) -> int:
    return round(min(max(value, _FIRST), _LAST)) - _FIRST


def _has_impossible_range(histogram: _Histogram) -> bool:
    found = histogram.found
    narrow = found.maximum - found.minimum <= 256 and not _is_soft_tissue_alone(histogram)
    return found.minimum >= 0 or narrow or found.maximum > _LAST


def _lacks_fat_and_air(histogram: _Histogram) -> bool:
    below = histogram.share(_FIRST, BELOW_FAT_HU)
    lacks = histogram.has_content and below < 0.01 and histogram.heaped(*AIR_HU) < 0.01
    return lacks and not _is_soft_tissue_alone(histogram)


def _is_soft_tissue_alone(histogram: _Histogram) -> bool:
    """Tell a box inside a brain or a liver: one peak above water, where MR and PET have theirs at 0."""
    low, high = histogram.found.minimum, histogram.found.maximum
    plausible = high - low > 64 and high < 3100 and histogram.share(700, 1400) < 0.15
    return plausible and histogram.share(20, 100) > 0.5


def _is_dense_throughout(histogram: _Histogram) -> bool:
    dense, fat = histogram.share(700, 1400), histogram.share(-200, BELOW_FAT_HU)
    return dense > 0.4 or (dense > 0.25 and fat < 0.02)


def _intercept_counts_twice(histogram: _Histogram) -> bool:
    if histogram.share(*TISSUE_HU) > 0.1:
        return False
    below_air, few = histogram.share(-2100, -1060) > 0.05, histogram.share(*TISSUE_HU) < 0.03
    noisy_air, clamped_air = histogram.share(-2100, -1900) > 0.01, histogram.heaped(-2100, -1900) > 0.01
    return noisy_air or (below_air and (few or clamped_air))


def _is_cut_off(histogram: _Histogram) -> bool:
    low, high = histogram.found.minimum, histogram.found.maximum
    reach = max((high - low) / 10, 2)
    above = high < HIGHEST_WINDOW_HU and _ends_in_a_heap(histogram, high, high - reach, high - 1)
    return above or (low > AIR_HU[1] and _ends_in_a_heap(histogram, low, low + 1, low + reach))


def _ends_in_a_heap(histogram: _Histogram, end: float, tail_from: float, tail_to: float) -> bool:
    """Tell an end that holds more voxels than a tail that thins out could; the tail must be there."""
    at_end, tail = histogram.share_at(end), histogram.beside(tail_from, tail_to)
    return (
        at_end > max(5e-5, 10 / histogram.total)
        and tail > 1e-5
        and at_end > 10 * tail / max(tail_to - tail_from, 1)
    )


_CHECKS = (
    _has_impossible_range,
    _lacks_fat_and_air,
    _is_dense_throughout,
    _intercept_counts_twice,
    _is_cut_off,
)


def _counts(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Return how many values round to each whole number of int16."""
    if rows.dtype != np.int16:
        rows = np.clip(np.rint(rows), _FIRST, _LAST).astype(np.int16)
    counts = np.zeros(_LAST - _FIRST + 1, np.int64)
    for piece in _pieces(rows.reshape(-1)):
        # calcHist knows uint16 only: -32768 … -1 appear as 32768 … 65535, rolled back to the front.
        unsigned = piece.reshape(1, -1).view(np.uint16)  # one long row is faster than many
        counts += cv2.calcHist([unsigned], [0], None, [65536], [0, 65536]).ravel().astype(np.int64)
    return np.roll(counts, -_FIRST)


def _pieces(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield parts whose counts stay exact in float32."""
    for start in range(0, len(flat), EXACT_VOXELS):
        yield flat[start : start + EXACT_VOXELS]


def _percentiles(count: int, value_at: Callable[[int], float]) -> list[float]:
    """Return `PERCENTILES` of `count` values, given the value at any rank from 0."""
    found = []
    for q in PERCENTILES:
        rank = q / 100 * (count - 1)
        low, high = value_at(int(rank)), value_at(min(int(rank) + 1, count - 1))
        found.append(low + (high - low) * (rank - int(rank)))
    return found
