"""Compute the range and percentiles of a volume, and decide whether its values can be HU.

In: voxels (z, y, x) after slope and intercept, before any window. Out: numbers and warning codes. This module
changes no voxel and must not know any file format.
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
"""Largest int16 volume whose percentiles use every voxel.

It is below 2**24, up to which the float32 counts of OpenCV's calcHist are exact.
"""

SAMPLE_VOXELS = 2_000_000
"""Number of voxels that `sample_rows` takes at least from a larger volume."""

PERCENTILES = (1.0, 50.0, 99.0)

AIR_HU = (-1100, -900)
"""Range of air, with noise."""

TISSUE_HU = (-250, 350)
"""Range from fat to contrast-enhanced blood.

Most voxels of a body lie in it, but few voxels of a body whose values are off by 1000.
"""

MAX_FAT_HU = -30
"""Upper bound of fat, lung and air. Muscle, organs and blood rarely lie below it."""

HIGHEST_WINDOW_HU = 2000
"""A maximum below it may be the upper bound of a window; scanners with 12 bits saturate above it."""

_FIRST, _LAST = -32768, 32767
_SPIKE_NEIGHBORS = 20


@dataclass(frozen=True)
class HuStatistics:
    """Range and percentiles of a volume, in the units of its voxels.

    Attributes:
        minimum: Exact minimum.
        p01: 1st percentile.
        p50: Median.
        p99: 99th percentile.
        maximum: Exact maximum.
        counts: Histogram (65536,) of the voxels that `sample_rows` returns: the number of values that round
            to -32768, -32767 … 32767. Values outside of this range are in the first or the last bin.
    """

    minimum: float
    p01: float
    p50: float
    p99: float
    maximum: float
    counts: NDArray[np.int64] = field(repr=False, compare=False)


def compute_statistics(voxels_zyx: NDArray[Any]) -> HuStatistics:
    """Return the minimum, the maximum and the 1st, 50th and 99th percentile.

    Minimum and maximum are exact. Percentiles interpolate linearly between the two nearest ranks, as
    `numpy.percentile` does. They use every voxel of an int16 volume of up to `EXACT_VOXELS`, and otherwise
    only the voxels that `sample_rows` returns.
    """
    ranges = [cv2.minMaxLoc(plane)[:2] for plane in voxels_zyx]  # finds both in one pass
    minimum, maximum = min(low for low, _ in ranges), max(high for _, high in ranges)
    sample = sample_rows(voxels_zyx).reshape(-1)
    rounded = _round_values(sample)
    counts = _count_values(rounded)
    if voxels_zyx.dtype != np.int16:
        percentiles = _compute_percentiles(sample.size, _make_value_finder(sample, rounded, counts))
    else:
        needs_all = voxels_zyx.size <= EXACT_VOXELS and sample.size < voxels_zyx.size
        all_counts = _count_values(np.ascontiguousarray(voxels_zyx).reshape(-1)) if needs_all else counts
        cumulative = np.cumsum(all_counts)
        percentiles = _compute_percentiles(
            int(cumulative[-1]), lambda rank: float(np.searchsorted(cumulative, rank, side="right") + _FIRST)
        )
    p01, p50, p99 = percentiles
    return HuStatistics(minimum, p01, p50, p99, maximum, counts)


def sample_rows(voxels_zyx: NDArray[Any]) -> NDArray[Any]:
    """Return rows of voxels (n, x) that represent the volume, as a contiguous array.

    The rows have a constant distance in the order of the volume and together hold at least `SAMPLE_VOXELS`
    voxels; a smaller volume is returned whole. The position of the rows differs from slice to slice, so each
    region of the volume is represented in proportion to its size.
    """
    slices, rows, _ = voxels_zyx.shape
    step = max(1, voxels_zyx.size // SAMPLE_VOXELS)
    if step > 1 and rows % step == 0:
        step -= 1  # with this step the rows would have the same position in all slices
    z, y = np.divmod(np.arange(0, slices * rows, step), rows)
    return np.ascontiguousarray(voxels_zyx[z, y])


def find_hu_warnings(statistics: HuStatistics) -> tuple[str, ...]:
    """Return the warning codes `not_hu` and `padding_value`, if the histogram shows these cases.

    `not_hu` means that the values cannot be HU, for one of these reasons:
      - Impossible range: the minimum is 0 or more, the range is at most 256 (8-bit or normalized values), or
        the maximum is above 32,767 (negative values that were read as unsigned).
      - Almost no value is as low as fat, lung or air: stored values without rescale, MR or PET.
      - Much of the content has the density of bone: soft tissue without its intercept, or with its sign
        inverted.
      - There is little soft tissue, and air has the value that it gets if the intercept is applied twice, or
        much of the content lies below air.
      - The minimum or the maximum has a spike that cuts off a tail: the values were clipped to a window.
    A range of at most 256 and the lack of fat and air are accepted if the volume may be a box inside a brain
    or a liver.

    `padding_value` means that the minimum lies below air and that at least 0.1 % of the voxels have exactly
    this value. Scanners write such a value (-2000, -3024) outside of the reconstruction circle. Values that
    interpolation causes by overshooting are not as frequent.

    Spikes of the histogram are ignored in these decisions where possible, because software has set their
    values (padding, masks, clamped air).
    """
    histogram = _Histogram(statistics)
    codes = []
    if any(check(histogram) for check in _NOT_HU_CHECKS):
        codes.append(WarningCode.NOT_HU.value)
    if statistics.minimum < AIR_HU[0] and histogram.get_fraction_at(statistics.minimum) >= 1e-3:
        codes.append(WarningCode.PADDING_VALUE.value)
    return tuple(codes)


class _Histogram:
    """Fractions of voxels by value, with and without spikes.

    A spike is a single value that is much more frequent than its neighbors. The content of a volume is the
    histogram without spikes.

    Attributes:
        minimum: Minimum of the volume.
        maximum: Maximum of the volume.
        total: Number of voxels that were counted, at least 1.
        has_content: Whether more than 1 % of the voxels are content. A volume of a few values, such as a
            phantom without noise, has no content that could be judged.
    """

    def __init__(self, statistics: HuStatistics) -> None:
        self.minimum, self.maximum = statistics.minimum, statistics.maximum
        self.total = max(int(statistics.counts.sum()), 1)
        self._all = statistics.counts / self.total
        self._is_spike = _find_spikes(statistics.counts)
        content = np.where(self._is_spike, 0, statistics.counts)
        self.has_content = bool(content.sum() > 0.01 * self.total)
        self._content = content / max(int(content.sum()), 1)

    def get_fraction_at(self, value: float) -> float:
        """Return the fraction of all voxels that round to `value`."""
        return float(self._all[_get_bin(value)])

    def sum_content(self, low: float, high: float) -> float:
        """Return the fraction of the content that lies in [low, high]."""
        return float(self._content[_get_bin(low) : _get_bin(high) + 1].sum())

    def sum_spikes(self, low: float, high: float) -> float:
        """Return the fraction of all voxels that belong to spikes in [low, high]."""
        within = slice(_get_bin(low), _get_bin(high) + 1)
        return float(self._all[within][self._is_spike[within]].sum())

    def sum_without_spikes(self, low: float, high: float) -> float:
        """Return the fraction of all voxels that lie in [low, high] and belong to no spike."""
        within = slice(_get_bin(low), _get_bin(high) + 1)
        return float(self._all[within][~self._is_spike[within]].sum())


def _find_spikes(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return a mask of the spikes of a histogram.

    A spike holds more than 2 % of all voxels and more than 20 times the mean of its neighbors.
    """
    is_spike = np.zeros(counts.shape, np.bool_)
    for value in np.flatnonzero(counts > 0.02 * counts.sum()):
        around = counts[max(value - _SPIKE_NEIGHBORS, 0) : value + _SPIKE_NEIGHBORS + 1]
        mean_of_neighbors = (around.sum() - counts[value]) / (len(around) - 1)
        is_spike[value] = counts[value] > 20 * mean_of_neighbors
    return is_spike


def _get_bin(value: float) -> int:
    """Return the index of the histogram bin that counts `value`."""
    return round(min(max(value, _FIRST), _LAST)) - _FIRST


def _has_impossible_range(histogram: _Histogram) -> bool:
    minimum, maximum = histogram.minimum, histogram.maximum
    narrow = maximum - minimum <= 256 and not _is_soft_tissue_only(histogram)
    return minimum >= 0 or narrow or maximum > _LAST


def _lacks_fat_and_air(histogram: _Histogram) -> bool:
    fat_and_air = histogram.sum_content(_FIRST, MAX_FAT_HU)
    lacks = histogram.has_content and fat_and_air < 0.01 and histogram.sum_spikes(*AIR_HU) < 0.01
    return lacks and not _is_soft_tissue_only(histogram)


def _is_soft_tissue_only(histogram: _Histogram) -> bool:
    """Return whether the volume may be a box inside a brain or a liver.

    Such a box has one peak above water. MR and PET have their peak at 0.
    """
    low, high = histogram.minimum, histogram.maximum
    plausible = high - low > 64 and high < 3100 and histogram.sum_content(700, 1400) < 0.15
    return plausible and histogram.sum_content(20, 100) > 0.5


def _has_too_much_bone(histogram: _Histogram) -> bool:
    """Return whether so much of the content is as dense as bone that soft tissue must lack its intercept."""
    dense, fat = histogram.sum_content(700, 1400), histogram.sum_content(-200, MAX_FAT_HU)
    return dense > 0.4 or (dense > 0.25 and fat < 0.02)


def _has_intercept_applied_twice(histogram: _Histogram) -> bool:
    tissue = histogram.sum_content(*TISSUE_HU)
    if tissue > 0.1:
        return False
    below_air = histogram.sum_content(-2100, -1060) > 0.05
    noisy_air = histogram.sum_content(-2100, -1900) > 0.01
    clamped_air = histogram.sum_spikes(-2100, -1900) > 0.01
    return noisy_air or (below_air and (tissue < 0.03 or clamped_air))


def _is_clipped_to_window(histogram: _Histogram) -> bool:
    low, high = histogram.minimum, histogram.maximum
    reach = max((high - low) / 10, 2)
    clipped_above = high < HIGHEST_WINDOW_HU and _ends_in_spike(histogram, high, (high - reach, high - 1))
    return clipped_above or (low > AIR_HU[1] and _ends_in_spike(histogram, low, (low + 1, low + reach)))


def _ends_in_spike(histogram: _Histogram, end: float, tail: tuple[float, float]) -> bool:
    """Return whether far more voxels have the value `end` than the values of the tail next to it predict.

    An empty tail means that the values are not clipped there.
    """
    at_end, in_tail = histogram.get_fraction_at(end), histogram.sum_without_spikes(*tail)
    return (
        at_end > max(5e-5, 10 / histogram.total)
        and in_tail > 1e-5
        and at_end > 10 * in_tail / max(tail[1] - tail[0], 1)
    )


_NOT_HU_CHECKS = (
    _has_impossible_range,
    _lacks_fat_and_air,
    _has_too_much_bone,
    _has_intercept_applied_twice,
    _is_clipped_to_window,
)


def _make_value_finder(
    values: NDArray[Any], rounded: NDArray[np.int16], counts: NDArray[np.int64]
) -> Callable[[int], float]:
    """Return a function from a rank to the value at this rank, from 0.

    Its results are those of sorting, in a fifth of the time: a rank is looked up among the values that round
    to the same whole number.

    Args:
        values: Values (n,) that are not sorted.
        rounded: The same values, as `_round_values` returns them.
        counts: Their histogram.
    """
    cumulative = np.cumsum(counts)

    def find_value(rank: int) -> float:
        number = int(np.searchsorted(cumulative, rank, side="right"))
        equal = values[rounded == number + _FIRST]
        rank_among_equal = rank - int(cumulative[number] - counts[number])
        return float(np.partition(equal, rank_among_equal)[rank_among_equal])

    return find_value


def _round_values(values: NDArray[Any]) -> NDArray[np.int16]:
    """Return the values as int16: the nearest whole number from -32768 to 32767."""
    return values if values.dtype == np.int16 else np.clip(np.rint(values), _FIRST, _LAST).astype(np.int16)


def _count_values(rounded: NDArray[np.int16]) -> NDArray[np.int64]:
    """Return the histogram of `rounded` (n,): how often each number from -32768 to 32767 occurs."""
    counts = np.zeros(_LAST - _FIRST + 1, np.int64)
    for piece in _split(rounded):
        # calcHist supports uint16 but not int16. As uint16, -32768 … -1 are 32768 … 65535; the roll below
        # moves their counts to the front.
        unsigned = piece.reshape(1, -1).view(np.uint16)  # one long row is faster than many
        counts += cv2.calcHist([unsigned], [0], None, [65536], [0, 65536]).ravel().astype(np.int64)
    return np.roll(counts, -_FIRST)


def _split(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Yield pieces so small that their counts are exact in float32."""
    for start in range(0, len(flat), EXACT_VOXELS):
        yield flat[start : start + EXACT_VOXELS]


def _compute_percentiles(count: int, value_at: Callable[[int], float]) -> list[float]:
    """Return `PERCENTILES` of `count` values; `value_at` returns the value at a rank from 0."""
    values = []
    for q in PERCENTILES:
        rank = q / 100 * (count - 1)
        low, high = value_at(int(rank)), value_at(min(int(rank) + 1, count - 1))
        values.append(low + (high - low) * (rank - int(rank)))
    return values
