"""Sum moments, covariances and cross-covariances over blocks of scans.

Features do not fit in memory: 100,000 scans x 5 candidates x 2,048 float32 values are 4.1 GB. So they are
read twice in blocks, and all sums are float64:

1. `MomentSum`, one per candidate, gives the mean, variance, minimum, maximum and zeros of each unit. It needs
   about 100 bytes per unit.
2. `ProductSum`, one for all candidates, gives the products of the values around these means.
   `estimate_product_bytes` says how much memory it needs: 503 MB for 5 candidates of 2,048 values, besides
   the float64 copy of one block (84 MB for 1,024 scans of these candidates) and one temporary product
   (34 MB).

Both passes subtract a value of the unit before they sum, so a large offset costs no digits, and the variance
of a unit that never changes is exactly 0. Variances and covariances are divided by the number of scans.

A block is an array (scans, units) of any real type. All blocks of a candidate have the same units, and row i
of a block is the same scan for every candidate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Block = NDArray[Any]
"""Features (scans, units) of one candidate, of any real type.

Pass the type in which the values are stored: a conversion to float64 hides their rounding error.
"""
Values = NDArray[np.float64]

ROUNDING_MARGIN = 2
"""A standard deviation below this multiple of the rounding error of the stored values is rounding."""
DEAD_VARIANCE = 1e-8
"""A unit is dead if its variance is below this multiple of the median variance of the other units."""
_BLOCK_ROWS = 1024
_PRODUCT_ROWS = 2048
"""Products are added to at most this many rows of a matrix at once, which limits the temporary memory."""


@dataclass(frozen=True)
class Moments:
    """Statistics of the units of one candidate, in the units of the features.

    Attributes:
        scans: Number of scans that were summed.
        mean: (units,) mean over the scans.
        variance: (units,) variance over the scans, divided by the number of scans.
        minimum: (units,) smallest value.
        maximum: (units,) largest value.
        zeros: (units,) int64, number of scans whose value is exactly 0.
        resolution: Relative rounding error of the type in which the values are stored: 1.2e-7 for float32.
    """

    scans: int
    mean: Values
    variance: Values
    minimum: Values
    maximum: Values
    zeros: NDArray[np.int64]
    resolution: float

    @property
    def units(self) -> int:
        """Number of values per scan."""
        return len(self.mean)

    @property
    def is_constant(self) -> NDArray[np.bool_]:
        """(units,) whether all scans have the same value."""
        return np.equal(self.minimum, self.maximum)

    @property
    def rounding(self) -> Values:
        """(units,) upper bound of the difference between two neighboring values of the stored type."""
        return self.resolution * np.maximum(np.abs(self.minimum), np.abs(self.maximum))

    @property
    def has_variation(self) -> NDArray[np.bool_]:
        """(units,) whether the values differ by more than their rounding error. The scale does not matter."""
        return ~self.is_constant & (np.sqrt(self.variance) > ROUNDING_MARGIN * self.rounding)

    @property
    def is_alive(self) -> NDArray[np.bool_]:
        """(units,) whether the unit has variation, and not much less than the other units.

        The limit `DEAD_VARIANCE` is relative, so the scale of the candidate does not matter.
        """
        is_alive = self.has_variation
        if is_alive.any():
            is_alive &= self.variance >= DEAD_VARIANCE * np.median(self.variance[is_alive])
        return is_alive


class MomentSum:
    """Sums the moments of one candidate over blocks of scans.

    Blocks are merged by the formula of Chan, Golub and LeVeque (1979), around the values of the first scan.
    """

    def __init__(self, units: int) -> None:
        self._scans = 0
        self._origin = np.zeros(units)
        self._mean, self._scatter = np.zeros(units), np.zeros(units)
        self._minimum, self._maximum = np.full(units, np.inf), np.full(units, -np.inf)
        self._zeros = np.zeros(units, np.int64)
        self._resolution = 0.0

    def add(self, block: Block) -> None:
        """Add the scans of a block.

        Raises:
            ValueError: The block has another number of units, or values that are not finite.
        """
        values = convert_block(block, len(self._mean))
        if not len(values):
            return
        if np.issubdtype(block.dtype, np.floating):
            self._resolution = max(self._resolution, float(np.finfo(block.dtype).eps))
        self._minimum = np.minimum(self._minimum, values.min(axis=0))
        self._maximum = np.maximum(self._maximum, values.max(axis=0))
        self._zeros += (values == 0).sum(axis=0)
        if not self._scans:
            self._origin = values[0].copy()
        self._merge(values - self._origin)

    def _merge(self, values: Values) -> None:
        scans, mean = len(values), values.mean(axis=0)
        difference, total = mean - self._mean, self._scans + scans
        scatter = np.square(values - mean).sum(axis=0)
        self._scatter += scatter + np.square(difference) * (self._scans * scans / total)
        self._mean += difference * (scans / total)
        self._scans = total

    def finish(self) -> Moments:
        """Return the moments of all scans that were added.

        Raises:
            ValueError: No scan was added.
        """
        if not self._scans:
            raise ValueError("no scans: moments need at least one")
        return Moments(
            scans=self._scans,
            mean=self._origin + self._mean,
            variance=self._scatter / self._scans,
            minimum=self._minimum,
            maximum=self._maximum,
            zeros=self._zeros,
            resolution=self._resolution,
        )


@dataclass(frozen=True)
class Products:
    """Sums over scans of products of centered values, for several candidates.

    With x_i and y_i the centered values of scan i in two candidates:

    Attributes:
        scans: Number of scans that were summed.
        scatter: For each pair of candidates (a, b) with a <= b, the matrix (units of a, units of b) of the
            sums of x_i y_i. Divided by `scans` it is the covariance.
        norms: (candidates, candidates), the sums of |x_i|² |y_i|².
    """

    scans: int
    scatter: Mapping[tuple[int, int], Values]
    norms: Values

    def compute_covariance(self, candidate: int) -> Values:
        """Return the covariance (units, units) of a candidate, divided by the number of scans."""
        return self.scatter[candidate, candidate] / self.scans


class ProductSum:
    """Sums the products of the values of several candidates over blocks of the same scans.

    Args:
        means: For each candidate, the mean (units,) over all scans: `Moments.mean`.
    """

    def __init__(self, means: Sequence[Values]) -> None:
        self._means = [np.asarray(mean, np.float64) for mean in means]
        self._scans = 0
        self._norms = np.zeros((len(means), len(means)))
        self._sums = [np.zeros(len(mean)) for mean in means]
        self._scatter = {
            (a, b): np.zeros((len(means[a]), len(means[b])))
            for a in range(len(means))
            for b in range(a, len(means))
        }

    def add(self, blocks: Sequence[Block]) -> None:
        """Add one block of every candidate, with the same scans in the same order.

        Raises:
            ValueError: The number of candidates, scans or units differs, or values are not finite.
        """
        if len(blocks) != len(self._means) or len({len(block) for block in blocks}) != 1:
            raise ValueError("each candidate needs a block, and all blocks the same scans")
        values = [
            convert_block(block, len(mean)) - mean for block, mean in zip(blocks, self._means, strict=True)
        ]
        self._scans += len(blocks[0])
        norms = np.stack([np.square(rows).sum(axis=1) for rows in values])
        self._norms += norms @ norms.T
        for rows, total in zip(values, self._sums, strict=True):
            total += rows.sum(axis=0)
        for (a, b), scatter in self._scatter.items():
            for units in split_rows(len(scatter), _PRODUCT_ROWS):
                scatter[units] += values[a][:, units].T @ values[b]

    def finish(self) -> Products:
        """Return the products of all scans that were added.

        Raises:
            ValueError: No scan was added, or the means are not the means of these scans.
        """
        if not self._scans:
            raise ValueError("no scans: products need at least one")
        for candidate, total in enumerate(self._sums):
            spread = np.sqrt(self._scatter[candidate, candidate].diagonal() * self._scans)
            size = np.abs(self._means[candidate]) * self._scans
            if (np.abs(total) > 1e-6 * spread + 1e-12 * size).any():
                raise ValueError(f"candidate {candidate}: the means are not those of the added scans")
        return Products(self._scans, self._scatter, self._norms)


def estimate_product_bytes(units: Sequence[int]) -> int:
    """Return the bytes of the matrices of `ProductSum` for candidates with these numbers of units."""
    return 8 * sum(a * b for first, a in enumerate(units) for b in units[first:])


def compute_moments(features: Block) -> Moments:
    """Return the moments of features (scans, units) that are in memory."""
    total = MomentSum(features.shape[1])
    for rows in split_rows(len(features)):
        total.add(features[rows])
    return total.finish()


def compute_products(features: Sequence[Block]) -> Products:
    """Return the products of candidates that are in memory, each (scans, units) with the same scans."""
    total = ProductSum([compute_moments(candidate).mean for candidate in features])
    for rows in split_rows(len(features[0])):
        total.add([candidate[rows] for candidate in features])
    return total.finish()


def split_rows(scans: int, size: int = _BLOCK_ROWS) -> Iterator[slice]:
    """Yield consecutive ranges of at most `size` rows."""
    for start in range(0, scans, size):
        yield slice(start, min(scans, start + size))


def convert_block(block: Block, units: int) -> Values:
    """Return a block as float64.

    Raises:
        ValueError: The block has another number of units, or values that are not finite.
    """
    if block.ndim != 2 or block.shape[1] != units:
        raise ValueError(f"features have shape {block.shape}; expected (scans, {units})")
    values = np.asarray(block, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("features hold NaN or infinity; leave these scans out for all candidates")
    return values
