"""Test single units of a layer against a label: correlation with false-discovery control, and the best unit.

For numbers the correlation is Pearson's. For classes it is the point-biserial correlation, which is Pearson's
with 0 and 1; with more than two classes each class is tested against the rest, and the strongest correlation
counts. The scans of a patient are not independent, so the p-values use the number of patients, not of scans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control
from scipy.stats import t as student_t
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from featray.commands.report.labeled.labels import Label, count_patients
from featray.commands.report.labeled.probe import compute_auc

MAX_Q = 0.05
"""Largest q-value of a unit that counts as related to the label."""
BEST_UNITS = 10
"""Units for which AUC and mutual information are computed."""
BINS = 20
"""Bins of a unit, and of a label that is a number, in the histogram."""

_NEAR_CONSTANT = 1e-6
"""Standard deviation, relative to the largest absolute value, below which a unit is constant."""
_COLUMNS_AT_ONCE = 256
"""Limits the memory for copies of columns in double precision."""
_MIN_SCANS = 10
"""Fewer scans have no estimate of the mutual information."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Histogram:
    """Two-dimensional histogram of a unit against a label.

    Attributes:
        unit_edges: Edges of the bins of the unit's values.
        label_edges: Edges of the bins of a number; empty for classes.
        classes: Names of the classes; empty for numbers.
        counts: (bins of the unit, bins or classes of the label), number of scans.
    """

    unit_edges: Floats
    label_edges: Floats
    classes: tuple[str, ...]
    counts: NDArray[np.intp]


@dataclass(frozen=True)
class Unit:
    """One of the units that are most related to the label.

    Attributes:
        number: Position of the unit in the feature.
        correlation: Pearson's or the point-biserial correlation.
        q: p-value after the control of Benjamini and Hochberg over all units of the layer.
        auc: For classes the AUC of the unit alone, in the direction of the correlation and for the class with
            the strongest correlation; NaN for numbers.
        information: Mutual information with the label in nats, estimated from nearest neighbors.
    """

    number: int
    correlation: float
    q: float
    auc: float
    information: float


@dataclass(frozen=True)
class UnitTests:
    """Result of testing all units of a layer.

    Attributes:
        correlations: Correlation of each unit; 0 for a constant unit.
        p: p-value of each unit; 1 for a constant unit.
        q: p-value after false-discovery control.
        best: The units with the strongest correlations, the strongest first.
        histogram: Histogram of the best unit; None if all units are constant.
        scans: Number of scans with a value of the label.
        patients: Number of patients of these scans.
    """

    correlations: Floats
    p: Floats
    q: Floats
    best: tuple[Unit, ...]
    histogram: Histogram | None
    scans: int
    patients: int

    @property
    def related(self) -> int:
        """Return the number of units with a q-value of at most 0.05."""
        return int(np.sum(self.q <= MAX_Q))


def measure_units(
    features: NDArray[np.floating], label: Label, patients: NDArray[np.intp], *, seed: int = 0
) -> UnitTests:
    """Return the tests of all units of a layer against a label.

    Args:
        features: (scans, units), finite.
        label: Label of the same scans; scans without a value are left out.
        patients: Number of the patient of each scan.
        seed: For the noise that the estimate of the mutual information adds.
    """
    values, truth = features[label.known], label.values[label.known]
    number = count_patients(patients, label.known)
    columns = _make_columns(label, truth)
    matrix = np.array([correlate_units(values, column) for column in columns.T])
    strongest = np.abs(matrix).argmax(axis=0)
    correlations: Floats = matrix[strongest, np.arange(matrix.shape[1])]
    p, q = control_discoveries(correlations, number, tests=columns.shape[1])
    order = np.argsort(-np.abs(correlations), kind="stable")[:BEST_UNITS]
    order = order[correlations[order] != 0]
    information = _estimate_information(values[:, order], label, truth, seed)
    best = tuple(
        Unit(
            int(unit),
            float(correlations[unit]),
            float(q[unit]),
            _compute_unit_auc(values[:, unit], columns[:, strongest[unit]], correlations[unit], label),
            float(bits),
        )
        for unit, bits in zip(order, information, strict=True)
    )
    histogram = count_histogram(values[:, order[0]], label, truth) if len(order) else None
    return UnitTests(correlations, p, q, best, histogram, len(truth), number)


def correlate_units(features: NDArray[np.floating], values: Floats) -> Floats:
    """Return Pearson's correlation of each column with `values`; 0 for a constant column."""
    starts = range(0, features.shape[1], _COLUMNS_AT_ONCE)
    parts = [_correlate(features[:, start : start + _COLUMNS_AT_ONCE], values) for start in starts]
    return np.concatenate(parts)


def control_discoveries(correlations: Floats, patients: int, *, tests: int = 1) -> tuple[Floats, Floats]:
    """Return the p-values of correlations, and the q-values of Benjamini and Hochberg.

    Args:
        correlations: One per unit, the strongest of `tests` correlations; 0 for a constant unit.
        patients: Number of independent observations.
        tests: Classes that were tested for each unit, by which the p-values are multiplied.
    """
    freedom = max(patients - 2, 1)
    size = np.abs(correlations)
    statistic = size * np.sqrt(freedom / np.maximum(1 - size**2, 1e-15))
    p: Floats = np.where(size > 0, np.minimum(2 * student_t.sf(statistic, freedom) * tests, 1.0), 1.0)
    q: Floats = false_discovery_control(p, method="bh")
    return p, q


def count_histogram(unit: NDArray[np.floating], label: Label, truth: Floats) -> Histogram:
    """Return the two-dimensional histogram of the values of a unit against a label without missing values."""
    edges = np.histogram_bin_edges(unit.astype(np.float64), BINS).astype(np.float64)
    label_edges: NDArray[Any] = np.histogram_bin_edges(truth, BINS).astype(np.float64)
    if label.kind == "classes":
        label_edges = np.arange(len(label.classes) + 1) - 0.5
    counts = np.histogram2d(unit, truth, (edges, label_edges))[0].astype(np.intp)
    return Histogram(edges, np.zeros(0) if label.classes else label_edges, label.classes, counts)


def _correlate(features: NDArray[np.floating], values: Floats) -> Floats:
    largest = np.abs(features).max(axis=0)
    centered = features - features.mean(axis=0, dtype=np.float64)
    sd, level = centered.std(axis=0), values - values.mean()
    covariance = level @ centered / len(values)
    varies = (sd > _NEAR_CONSTANT * largest) & (level.std() > 0)
    result = np.where(varies, covariance / np.where(varies, sd * level.std(), 1), 0.0)
    return np.asarray(result.clip(-1, 1), np.float64)


def _make_columns(label: Label, truth: Floats) -> Floats:
    """Return the label as columns: the number, the second of two classes, or each class against the rest."""
    if label.kind == "number":
        return truth[:, None]
    columns: Floats = (truth[:, None] == np.arange(len(label.classes))).astype(np.float64)
    return columns[:, 1:] if len(label.classes) == 2 else columns


def _compute_unit_auc(unit: NDArray[np.floating], column: Floats, correlation: float, label: Label) -> float:
    if label.kind == "number":
        return float("nan")
    values = unit[:, None] * np.sign(correlation)
    return float(compute_auc(column[:, None], values)[0])


def _estimate_information(features: NDArray[np.floating], label: Label, truth: Floats, seed: int) -> Floats:
    """Return the mutual information of each column with the label; NaN with too few scans."""
    if not features.shape[1] or len(features) < _MIN_SCANS:
        return np.full(features.shape[1], np.nan)
    estimate = mutual_info_classif if label.kind == "classes" else mutual_info_regression
    information: Floats = estimate(features, truth, random_state=seed)
    return information
