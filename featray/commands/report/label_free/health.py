"""Check the features of a candidate: dead and duplicate units, scans that are broken, equal or outliers.

Everything except the duplicate units is streamed over blocks of scans:

1. `RowChecks` reads the features once. It finds values that are not finite and scans with equal features.
2. `MomentSum` (see `moments.py`) gives the statistics of the units, from which `describe_units` counts them.
3. `measure_distances` gives one distance per scan in the second pass, and `find_outliers` judges them.

`find_duplicate_units` needs the features of a sample in memory, and `find_duplicate_units_of_covariance` the
covariance of all scans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import (
    Block,
    Moments,
    Values,
    compute_moments,
    convert_block,
    split_rows,
)

Positions = NDArray[np.int64]

DUPLICATE_CORRELATION = 0.999
MIN_SCANS_FOR_DUPLICATES = 10
"""With fewer scans, unrelated units can correlate above `DUPLICATE_CORRELATION` by chance."""
MIN_SCANS_FOR_OUTLIERS = 10
OUTLIER_SCORE = 3.5
MAX_DEVIATION = 5.0
"""Standard deviations to which a unit is limited, so that no single unit of many makes an outlier."""
_BLOCK_UNITS = 512


class SignPattern(StrEnum):
    """Signs of the values of a candidate over all scans and units."""

    SIGNED = "signed"
    """There are negative values."""
    RELU = "relu"
    """There are exact zeros and no negative values: a ReLU. A Gaussian mean must not have this pattern."""
    POSITIVE = "positive"
    """All values are above 0, as after a softplus or sigmoid. A Gaussian mean rarely has this pattern."""
    ZERO = "zero"
    """All values are 0."""


@dataclass(frozen=True)
class UnitHealth:
    """Counts of the units of a candidate.

    Attributes:
        scans: Number of scans that were used.
        units: Number of values per scan.
        constant: Positions of the units with the same value in all scans. With one scan these are all units.
        dead: Positions of the units that are not constant, but whose variance is rounding or tiny compared
            with that of the other units; see `Moments.is_alive`.
        zero_share: Share of all values that are exactly 0, from 0 to 1.
        minimum: Smallest value, in the units of the features.
        maximum: Largest value.
        signs: Pattern of the signs. It means something only for layers that should have both signs.
    """

    scans: int
    units: int
    constant: Positions
    dead: Positions
    zero_share: float
    minimum: float
    maximum: float
    signs: SignPattern

    @property
    def alive(self) -> int:
        """Number of units that are neither constant nor dead."""
        return self.units - len(self.constant) - len(self.dead)


@dataclass(frozen=True)
class DuplicateUnits:
    """Units whose correlation with an earlier unit is above `DUPLICATE_CORRELATION` or below its negative.

    Attributes:
        units: Positions of the later units of such pairs; None if there are too few scans to say.
        scans: Number of scans that were used.
    """

    units: Positions | None
    scans: int


@dataclass(frozen=True)
class RowHealth:
    """Scans of a candidate that are not usable or that are equal.

    Attributes:
        scans: Number of scans that were checked.
        non_finite: Positions of the scans with NaN or infinity. They are an error of the output or the model:
            leave them out for all candidates.
        duplicates: Groups of two or more scans whose finite features are exactly equal, each as ascending
            positions.
    """

    scans: int
    non_finite: Positions
    duplicates: tuple[Positions, ...]


@dataclass(frozen=True)
class Outliers:
    """Scans that are far from the other scans.

    The distance d of a scan is the root mean square of its standardized units, each limited to
    `MAX_DEVIATION`. For normally distributed features d² has a chi-square distribution, so x = d^(2/3) has
    nearly a normal one for any number of independent units (E. Wilson and M. Hilferty, PNAS 1931). The score
    is the modified z-score 0.6745 (x - median) / MAD, and a scan is an outlier if it is above 3.5 (B.
    Iglewicz and D. Hoaglin, "How to detect and handle outliers", ASQC 1993): 2 of 10,000 normally distributed
    scans are.

    Attributes:
        rows: Positions of the outliers, the farthest first; None if there are too few scans or no unit has
            variation.
        scores: (scans,) score of each scan; 0 if `rows` is None.
        scans: Number of scans that were used.
    """

    rows: Positions | None
    scores: Values
    scans: int


@dataclass(frozen=True)
class Health:
    """All checks of one candidate.

    Attributes:
        units: Constant and dead units, zeros and signs.
        duplicate_units: Units that repeat an earlier unit.
        rows: Scans with equal features.
        outliers: Scans that are far from the other scans.
    """

    units: UnitHealth
    duplicate_units: DuplicateUnits
    rows: RowHealth
    outliers: Outliers


def measure_health(features: Block) -> Health:
    """Return all checks of features (scans, units) that are in memory.

    Raises:
        ValueError: `features` has no scan, or values that are not finite. `RowChecks` names the scans.
    """
    moments = compute_moments(features)
    checks = RowChecks()
    checks.add(features)
    return Health(
        units=describe_units(moments),
        duplicate_units=find_duplicate_units(features),
        rows=checks.finish(),
        outliers=find_outliers(measure_distances(features, moments)),
    )


def describe_units(moments: Moments) -> UnitHealth:
    """Return the counts of constant and dead units, the zeros and the signs."""
    return UnitHealth(
        scans=moments.scans,
        units=moments.units,
        constant=np.flatnonzero(moments.is_constant),
        dead=np.flatnonzero(~moments.is_constant & ~moments.is_alive),
        zero_share=float(moments.zeros.sum()) / max(moments.scans * moments.units, 1),
        minimum=float(moments.minimum.min(initial=np.inf)),
        maximum=float(moments.maximum.max(initial=-np.inf)),
        signs=_find_signs(moments),
    )


def _find_signs(moments: Moments) -> SignPattern:
    if (moments.minimum < 0).any():
        return SignPattern.SIGNED
    if not (moments.maximum > 0).any():
        return SignPattern.ZERO
    return SignPattern.RELU if moments.zeros.any() else SignPattern.POSITIVE


class RowChecks:
    """Checks the scans of one candidate over blocks. It keeps about 60 bytes per scan."""

    def __init__(self) -> None:
        self._scans = 0
        self._non_finite: list[int] = []
        self._digests: list[bytes] = []

    def add(self, block: Block) -> None:
        """Add the scans of a block (scans, units) of any real type, which may hold NaN or infinity."""
        is_finite = np.isfinite(block).all(axis=1)
        self._non_finite.extend((np.flatnonzero(~is_finite) + self._scans).tolist())
        self._digests.extend(digest_rows(block))
        self._scans += len(block)

    def finish(self) -> RowHealth:
        """Return the findings; positions count from the first scan that was added."""
        broken = set(self._non_finite)
        groups: dict[bytes, list[int]] = {}
        for row, digest in enumerate(self._digests):
            if row not in broken:
                groups.setdefault(digest, []).append(row)
        return RowHealth(
            scans=self._scans,
            non_finite=np.array(self._non_finite, np.int64),
            duplicates=tuple(np.array(rows, np.int64) for rows in groups.values() if len(rows) > 1),
        )


def digest_rows(block: Block) -> list[bytes]:
    """Return 16 bytes per row that are equal if and only if the rows are equal as float64 values."""
    values = np.ascontiguousarray(block, np.float64) + 0.0  # turns -0 into 0
    return [blake2b(row.tobytes(), digest_size=16).digest() for row in values]


def find_first_rows(digests: Sequence[bytes]) -> Positions:
    """Return the position of the first row of each digest, ascending."""
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        first.setdefault(digest, row)
    return np.array(list(first.values()), np.int64)


def find_duplicate_units(features: Block) -> DuplicateUnits:
    """Return the duplicate units of features (scans, units) in memory, among those with variation.

    Memory: the standardized features as float64, and 512 x units correlations.
    """
    moments = compute_moments(features)
    kept = np.flatnonzero(moments.has_variation)
    values = convert_block(features, moments.units)[:, kept] - moments.mean[kept]
    values /= np.sqrt(moments.variance[kept] * moments.scans)
    found = _find_correlated(len(kept), lambda part: values[:, : part.stop].T @ values[:, part])
    return _name_duplicates(kept[found], moments.scans)


def find_duplicate_units_of_covariance(covariance: Values, moments: Moments) -> DuplicateUnits:
    """Return the duplicate units from the covariance (units, units) and the moments of the same scans."""
    kept = np.flatnonzero(moments.has_variation)
    deviation = np.sqrt(covariance.diagonal()[kept])

    def correlate(part: slice) -> Values:
        block = covariance[np.ix_(kept[: part.stop], kept[part])]
        return np.asarray(block / np.outer(deviation[: part.stop], deviation[part]), np.float64)

    return _name_duplicates(kept[_find_correlated(len(kept), correlate)], moments.scans)


def _name_duplicates(units: Positions, scans: int) -> DuplicateUnits:
    return DuplicateUnits(units if scans >= MIN_SCANS_FOR_DUPLICATES else None, scans)


def _find_correlated(units: int, correlate: Callable[[slice], Values]) -> Positions:
    """Return the units that correlate with an earlier one.

    `correlate` returns the correlations of all units up to the end of a range with the units of the range.
    """
    found = [np.empty(0, np.int64)]
    for part in split_rows(units, _BLOCK_UNITS):
        strong = np.abs(correlate(part)) > DUPLICATE_CORRELATION
        earlier = np.arange(part.stop)[:, None] < np.arange(part.start, part.stop)
        found.append(np.flatnonzero((strong & earlier).any(axis=0)) + part.start)
    return np.concatenate(found)


def measure_distances(block: Block, moments: Moments) -> Values:
    """Return the distance (scans,) of each scan of a block from the mean; see `Outliers`.

    `moments` are those of all scans. The distances are 0 if no unit has variation.
    """
    kept = moments.has_variation
    values = convert_block(block, moments.units)[:, kept] - moments.mean[kept]
    values /= np.sqrt(moments.variance[kept])
    np.clip(values, -MAX_DEVIATION, MAX_DEVIATION, out=values)
    total = np.square(values).sum(axis=1)
    return np.asarray(np.sqrt(total / max(int(kept.sum()), 1)), np.float64)


def find_outliers(distances: Values) -> Outliers:
    """Return the outliers among all scans from their distances (scans,)."""
    scans = len(distances)
    if scans < MIN_SCANS_FOR_OUTLIERS or not distances.any():
        return Outliers(None, np.zeros(scans), scans)
    values = np.cbrt(np.square(distances))
    deviations = values - np.median(values)
    scores = deviations / _estimate_spread(deviations)
    rows = np.flatnonzero(scores > OUTLIER_SCORE)
    return Outliers(rows[np.argsort(-scores[rows], kind="stable")], scores, scans)


def _estimate_spread(deviations: Values) -> float:
    """Return the robust standard deviation of deviations from their median.

    If more than half of the deviations are 0, so that their median absolute deviation is 0, the mean absolute
    deviation replaces it, also with the factor that makes it the standard deviation of a normal distribution.
    """
    absolute = np.abs(deviations)
    median = float(np.median(absolute))
    rounding = 1e-9
    if median > rounding:
        return median / 0.6745
    return max(1.253314 * float(absolute.mean()), rounding)
