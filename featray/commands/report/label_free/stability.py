"""Measure how much the features of a scan change if the scan is extracted again, for example with noise.

The arithmetic only: the caller extracts the features again. Source of the intraclass correlations: P. Shrout
and J. Fleiss, "Intraclass correlations: uses in assessing rater reliability", Psychological Bulletin 86
(1979). Source of the classes: T. Koo and M. Li, "A guideline of selecting and reporting intraclass
correlation coefficients", 2016: below 0.5 poor, 0.5 to 0.75 moderate, 0.75 to 0.9 good, above 0.9 excellent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import ROUNDING_MARGIN, Block, Values

GOOD_ICC = 0.75
MIN_SCANS = 10
"""With fewer scans an intraclass correlation is too uncertain to be read."""


@dataclass(frozen=True)
class Reliability:
    """Intraclass correlations of each unit. 1 means that repeats change nothing; values can be negative.

    Attributes:
        scans: Number of scans.
        repeats: Number of extractions of each scan, the original included.
        icc_1_1: (units,) one-way: the repeats of different scans are unrelated.
        icc_2_1: (units,) two-way, absolute agreement: a shift that a repeat causes in all scans counts as an
            error.
        icc_3_1: (units,) two-way, consistency: such a shift does not count.
        is_defined: (units,) False if the unit does not vary, or if there are fewer than two scans. Then all
            three numbers are 0.
    """

    scans: int
    repeats: int
    icc_1_1: Values
    icc_2_1: Values
    icc_3_1: Values
    is_defined: NDArray[np.bool_]

    @property
    def good_share(self) -> float | None:
        """Share of the defined units whose ICC(2,1) is at least `GOOD_ICC`.

        None if no unit is defined, or if there are fewer than `MIN_SCANS` scans.
        """
        defined = self.icc_2_1[self.is_defined]
        return float((defined >= GOOD_ICC).mean()) if len(defined) and self.scans >= MIN_SCANS else None


@dataclass(frozen=True)
class CosineStability:
    """Cosines between the features of a scan and those of its repeats.

    Attributes:
        scans: Number of scans.
        repeats: Number of extractions of each scan, the original included.
        cosine: (scans,) mean cosine of the original with each repeat, from -1 to 1; 0 if `is_defined` is
            False.
        is_defined: (scans,) False if the features of the scan or of a repeat are all 0.
        between_scans: Mean cosine between the originals of different scans. Features with a large common
            offset have cosines near 1 anyway, so compare with this. None with fewer than two defined scans.
    """

    scans: int
    repeats: int
    cosine: Values
    is_defined: NDArray[np.bool_]
    between_scans: float | None


def measure_reliability(features: Block) -> Reliability:
    """Return the intraclass correlations of repeated features (scans, repeats, units).

    Raises:
        ValueError: The shape is wrong, there are fewer than two repeats, or values are not finite.
    """
    values = _convert(features)
    scans, repeats, units = values.shape
    if scans < 2:
        zeros = np.zeros(units)
        return Reliability(scans, repeats, zeros, zeros, zeros, np.zeros(units, bool))
    largest = np.abs(values).max(axis=(0, 1))
    between, within, shift, error = _analyze_variance(values - values[0, 0])
    floor = np.square(ROUNDING_MARGIN * _find_resolution(features) * largest)
    is_defined = np.maximum(between, within) > floor
    agreement = between + (repeats - 1) * error + repeats * (shift - error) / scans
    consistency = between + (repeats - 1) * error
    one_way = between + (repeats - 1) * within
    return Reliability(
        scans=scans,
        repeats=repeats,
        icc_1_1=_divide(between - within, one_way, is_defined),
        icc_2_1=_divide(between - error, agreement, is_defined),
        icc_3_1=_divide(between - error, consistency, is_defined),
        is_defined=is_defined,
    )


def measure_cosines(features: Block) -> CosineStability:
    """Return the cosines of repeated features (scans, repeats, units); repeat 0 is the original.

    Raises:
        ValueError: The shape is wrong, there are fewer than two repeats, or values are not finite.
    """
    values = _convert(features)
    scans, repeats, _ = values.shape
    scale = np.abs(values).max(axis=2, initial=0.0, keepdims=True)
    scaled = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    lengths = np.linalg.norm(scaled, axis=2, keepdims=True)
    directions = np.divide(scaled, lengths, out=np.zeros_like(values), where=lengths > 0)
    is_defined = (scale > 0).all(axis=(1, 2))
    original = directions[:, 0]
    cosines = np.einsum("su,sru->sr", original, directions[:, 1:]).mean(axis=1)
    return CosineStability(
        scans=scans,
        repeats=repeats,
        cosine=np.where(is_defined, np.clip(cosines, -1.0, 1.0), 0.0),
        is_defined=is_defined,
        between_scans=_average_pairs(original[is_defined]),
    )


def _convert(features: Block) -> Values:
    if features.ndim != 3 or features.shape[0] < 1 or features.shape[1] < 2:
        raise ValueError(
            f"repeated features have shape {features.shape}; expected (scans, 2 or more repeats, units)"
        )
    values = np.asarray(features, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("repeated features hold NaN or infinity; leave these scans out")
    return values


def _find_resolution(features: Block) -> float:
    kind = features.dtype
    return float(np.finfo(kind).eps) if np.issubdtype(kind, np.floating) else 0.0


def _analyze_variance(values: Values) -> tuple[Values, Values, Values, Values]:
    """Return the mean squares (units,) between scans, within scans, between repeats, and of the residuals."""
    scans, repeats, _ = values.shape
    mean = values.mean(axis=(0, 1))
    of_scans, of_repeats = values.mean(axis=1), values.mean(axis=0)
    between = repeats * np.square(of_scans - mean).sum(axis=0) / (scans - 1)
    within = np.square(values - of_scans[:, None]).sum(axis=(0, 1)) / (scans * (repeats - 1))
    shift = scans * np.square(of_repeats - mean).sum(axis=0) / (repeats - 1)
    residuals = values - of_scans[:, None] - of_repeats + mean
    error = np.square(residuals).sum(axis=(0, 1)) / ((scans - 1) * (repeats - 1))
    return between, within, shift, error


def _divide(numerator: Values, denominator: Values, is_defined: NDArray[np.bool_]) -> Values:
    usable = is_defined & (denominator > 0)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=usable)


def _average_pairs(directions: Values) -> float | None:
    """Return the mean cosine of all pairs of different rows of length 1."""
    rows = len(directions)
    if rows < 2:
        return None
    total = directions.sum(axis=0)
    return float(np.clip((total @ total - rows) / (rows * (rows - 1)), -1.0, 1.0))
