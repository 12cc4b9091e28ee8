"""Voxels in, their range, percentiles and "is it HU?" out; knows no file format and changes nothing.

All values are those after slope and intercept, before any window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.errors import Oddity

EXACT_VOXELS = 12_000_000
"""Up to here percentiles use every voxel; also below 2**24, where calcHist's float32 counts stay exact."""

LATTICE_VOXELS = 2_000_000
"""Above it, at least this many voxels, in whole rows at one regular distance."""

PERCENTILES = (1.0, 50.0, 99.0)

AIR_HU, BONE_HU = -1000.0, 300.0


@dataclass(frozen=True)
class HuStatistics:
    """Range and percentiles of a volume, in the units of its voxels (HU if all is well)."""

    minimum: float
    p01: float
    p50: float
    p99: float
    maximum: float


def statistics(voxels_zyx: NDArray[Any]) -> HuStatistics:
    """Return minimum, maximum and the 1st, 50th and 99th percentile.

    Minimum and maximum are exact. Percentiles (linear between the two nearest ranks, as
    `numpy.percentile`) are exact up to `EXACT_VOXELS`; above, they are those of `lattice`.
    """
    many = voxels_zyx.size > EXACT_VOXELS
    ranked = lattice(voxels_zyx) if many else np.ascontiguousarray(voxels_zyx)
    p01, p50, p99 = _percentiles(ranked)
    return HuStatistics(float(voxels_zyx.min()), p01, p50, p99, float(voxels_zyx.max()))


def lattice(voxels_zyx: NDArray[Any]) -> NDArray[Any]:
    """Return about `LATTICE_VOXELS` voxels (all, if fewer) as contiguous rows (n, x).

    Rows lie at one regular distance through the whole volume, at other places in each slice, so
    every region counts by its volume.
    """
    slices, rows, _ = voxels_zyx.shape
    step = max(1, voxels_zyx.size // LATTICE_VOXELS)
    if step > 1 and rows % step == 0:
        step -= 1  # else each slice would be met at the same rows
    z, y = np.divmod(np.arange(0, slices * rows, step), rows)
    return np.ascontiguousarray(voxels_zyx[z, y])


def oddities(found: HuStatistics, voxels_zyx: NDArray[Any]) -> tuple[str, ...]:
    """Return `not_hu` and `padding_value` where values speak for it; `found` is their `statistics`.

    `not_hu`, one of
      - a minimum of 0 or more: stored values, clipped negatives or an 8-bit image (a body holds
        fat below 0 HU even where it is cropped without air);
      - a range of at most 256: windowed to 8 bit, or normalised;
      - the 1st and 99th percentile at the very ends, and air or bone beyond them: clipped to a window;
      - a maximum above 32,767: negative values read as unsigned;
      - padding below air and nothing else below 0: the intercept was not applied;
      - more than 1 % of voxels at about -2024, with noise: air, the intercept applied twice.
    `padding_value`: the minimum lies below air and at least 0.1 % of voxels have exactly that
    value, as outside the circle of reconstruction (-2000, -3024), unlike interpolation overshoot.
    """
    sample = lattice(voxels_zyx)
    below_air = found.minimum < 1.1 * AIR_HU
    codes = []
    if _range_speaks_against(found) or (below_air and _air_is_elsewhere(sample, found.minimum)):
        codes.append(Oddity.NOT_HU.value)
    if below_air and np.mean(sample == found.minimum) >= 1e-3:
        codes.append(Oddity.PADDING_VALUE.value)
    return tuple(codes)


def _range_speaks_against(found: HuStatistics) -> bool:
    at_ends = found.p01 == found.minimum and found.p99 == found.maximum
    clipped = at_ends and (found.minimum > 0.9 * AIR_HU or found.maximum < BONE_HU)
    narrow = found.maximum - found.minimum <= 256
    return found.minimum >= 0 or narrow or clipped or found.maximum > np.iinfo(np.int16).max


def _air_is_elsewhere(sample: NDArray[Any], minimum: float) -> bool:
    """Tell unscaled and doubly scaled values; padding is one value, air has noise around it."""
    negative = sample[(sample < 0) & (sample != minimum)]
    if negative.size == 0:
        return True
    air_twice = sample[(sample > 2.1 * AIR_HU) & (sample < 1.9 * AIR_HU)]
    return air_twice.size > sample.size // 100 and np.unique(air_twice[:10_000]).size > 10


def _percentiles(contiguous: NDArray[Any]) -> list[float]:
    ranks = [q / 100 * (contiguous.size - 1) for q in PERCENTILES]
    below = [int(rank) for rank in ranks]
    above = [min(rank + 1, contiguous.size - 1) for rank in below]
    values = _order_statistics(contiguous, below + above)
    pairs = zip(ranks, below, values[:3], values[3:], strict=True)
    return [float(low + (high - low) * (rank - whole)) for rank, whole, low, high in pairs]


def _order_statistics(contiguous: NDArray[Any], ranks: list[int]) -> list[float]:
    if contiguous.dtype != np.int16:
        ordered = np.sort(contiguous, axis=None)
        return [float(ordered[rank]) for rank in ranks]
    # calcHist knows uint16 only: -32768 … -1 appear as 32768 … 65535, rolled back to the front.
    unsigned = contiguous.reshape(1, -1).view(np.uint16)  # one long row is faster than many
    counts = cv2.calcHist([unsigned], [0], None, [65536], [0, 65536]).ravel().astype(np.int64)
    cumulative = np.cumsum(np.roll(counts, 32768))
    return [float(np.searchsorted(cumulative, rank, side="right") - 32768) for rank in ranks]
