"""Test single units of all candidates against labels: correlation with false-discovery control.

For numbers the correlation is Pearson's. For classes it is the point-biserial correlation, which is Pearson's
with 0 and 1; with more than two classes each class is tested against the rest, and the strongest correlation
counts. The scans of a patient are not independent, so the p-values use the number of patients, not of scans.

The correlations of all scans are summed over blocks, in one pass for all labels. Memory: 24 bytes per unit
and column of a label, and one block in double precision.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
UNIT_BINS, LABEL_BINS = 12, 8
"""Bins of a unit, and of a label that is a number, in a histogram."""
MAX_INFORMATION_SCANS = 2000
"""Scans from which the mutual information is estimated; more are sampled."""

_NEAR_CONSTANT = 1e-6
"""Standard deviation, relative to the largest absolute value, below which a unit is constant."""
_MIN_SCANS = 10
"""Fewer scans have no estimate of the mutual information."""
_HISTOGRAM_RANGE = (2, 98)
"""Percentiles between which the bins lie; the outer bins also count the values beyond."""

Floats = NDArray[np.float64]
Block = NDArray[Any]


@dataclass(frozen=True)
class UnitTests:
    """Result of testing all units of all candidates against one label.

    Attributes:
        label: The label.
        correlations: For each candidate the correlation of each unit; 0 for a constant unit.
        q: For each candidate the q-value of each unit: the p-value after the control of Benjamini and
            Hochberg over all units of all candidates; 1 for a constant unit.
        classes: For each candidate the class that each unit follows most; 1 for two classes, 0 for numbers.
        scans: Number of scans with a value of the label.
        patients: Number of patients of these scans.
    """

    label: Label
    correlations: tuple[Floats, ...]
    q: tuple[Floats, ...]
    classes: tuple[NDArray[np.intp], ...]
    scans: int
    patients: int

    def find_strongest(self, candidate: int, number: int) -> list[int]:
        """Return the units of a candidate with the strongest correlations, without constant units."""
        size = np.abs(self.correlations[candidate])
        order = np.argsort(-size, kind="stable")[:number]
        return [int(unit) for unit in order if size[unit] > 0]

    def count_related(self, candidate: int) -> int:
        """Return the number of units of a candidate with a q-value of at most 0.05."""
        return int(np.sum(self.q[candidate] <= MAX_Q))


@dataclass(frozen=True)
class Histogram:
    """Two-dimensional histogram of a unit against a label.

    Attributes:
        unit_edges: Edges of the bins of the unit's values.
        label_edges: Edges of the bins of a number; empty for classes.
        counts: (bins of the unit, bins or classes of the label), number of scans.
    """

    unit_edges: Floats
    label_edges: Floats
    counts: NDArray[np.intp]


class CorrelationSum:
    """Sums the correlations of the units of one candidate with several columns over blocks of scans.

    Args:
        units: Number of units.
        columns: (scans, columns) numbers; NaN where a scan does not count for the column.
    """

    def __init__(self, units: int, columns: Floats) -> None:
        self._is_known = ~np.isnan(columns)
        self._counts = self._is_known.sum(axis=0)[:, None]
        level = np.where(self._is_known, columns, 0).sum(axis=0) / self._counts[:, 0].clip(1)
        self._columns = np.where(self._is_known, columns - level, 0.0)
        shape = (columns.shape[1], units)
        self._sums, self._squares, self._products = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self._largest = np.zeros(units)
        self._origin: Floats | None = None

    def add(self, block: Block, start: int) -> None:
        """Add the features (scans, units) of consecutive scans, of which the first is scan `start`.

        The features of scans that count for no column are ignored.
        """
        rows = np.arange(start, start + len(block))
        used = self._is_known[rows].any(axis=1)
        values, known = block[used].astype(np.float64), self._is_known[rows[used]].astype(np.float64)
        if not len(values):
            return
        self._largest = np.maximum(self._largest, np.abs(values).max(axis=0))
        if self._origin is None:
            self._origin = values.mean(axis=0)
        values -= self._origin  # a large mean would cost digits
        self._products += self._columns[rows[used]].T @ values
        self._sums += known.T @ values
        self._squares += known.T @ np.square(values, out=values)

    def finish(self) -> Floats:
        """Return the correlations (columns, units); 0 if the unit or the column is constant."""
        counts = self._counts.clip(1)
        variance = (self._squares / counts - np.square(self._sums / counts)).clip(0)
        spread = np.square(self._columns).sum(axis=0)[:, None] / counts
        varies = (np.sqrt(variance) > _NEAR_CONSTANT * self._largest) & (spread > 0)
        size = np.sqrt(np.where(varies, variance * spread, 1.0))
        correlations: Floats = np.where(varies, self._products / counts / size, 0.0).clip(-1, 1)
        return correlations


def correlate_units(
    blocks: Iterable[Sequence[Block]],
    units: Sequence[int],
    labels: Sequence[Label],
    patients: NDArray[np.intp],
) -> list[UnitTests]:
    """Return the tests of all units for each label, from one pass over the features.

    Args:
        blocks: Consecutive blocks of the same scans of all candidates.
        units: Number of units of each candidate.
        labels: Labels of the scans. The features of scans with a value must be finite.
        patients: Number of the patient of each scan.
    """
    columns = [_make_columns(label) for label in labels]
    sums = [CorrelationSum(number, np.concatenate(columns, axis=1)) for number in units]
    start = 0
    for block in blocks:
        for total, values in zip(sums, block, strict=True):
            total.add(values, start)
        start += len(block[0])
    correlations = [total.finish() for total in sums]
    ends = np.cumsum([part.shape[1] for part in columns])
    return [
        _test_label(label, [one[end - part.shape[1] : end] for one in correlations], patients)
        for label, part, end in zip(labels, columns, ends, strict=True)
    ]


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


def count_histogram(unit: Block, label: Label) -> Histogram:
    """Return the histogram of the values of a unit against a label; scans without a value do not count."""
    values, truth = unit[label.known].astype(np.float64), label.values[label.known]
    edges = _make_edges(values, UNIT_BINS)
    if label.kind == "classes":
        label_edges = np.linspace(-0.5, len(label.classes) - 0.5, len(label.classes) + 1)
    else:
        label_edges = _make_edges(truth, LABEL_BINS)
    values, truth = np.clip(values, edges[0], edges[-1]), np.clip(truth, label_edges[0], label_edges[-1])
    counts = np.histogram2d(values, truth, (edges, label_edges))[0].astype(np.intp)
    return Histogram(edges, np.zeros(0) if label.kind == "classes" else label_edges, counts)


def compute_unit_auc(unit: Block, label: Label, code: int) -> float:
    """Return the AUC of a unit for one class against the rest, in the better direction; NaN for numbers."""
    if label.kind == "number":
        return float("nan")
    truth = (label.values[label.known] == code).astype(np.float64)
    auc = float(compute_auc(truth[:, None], unit[label.known, None])[0])
    return max(auc, 1 - auc)


def estimate_information(units: Block, label: Label, seed: int = 0) -> Floats:
    """Return the mutual information of each column with a label in nats; NaN with too few scans.

    Args:
        units: (scans, units).
        label: The label; scans without a value are left out.
        seed: For the sample of scans, and for the noise that the estimate from nearest neighbors adds.
    """
    scans = np.flatnonzero(label.known)
    if len(scans) < _MIN_SCANS or not units.shape[1]:
        return np.full(units.shape[1], np.nan)
    if len(scans) > MAX_INFORMATION_SCANS:
        scans = np.random.default_rng(seed).choice(scans, MAX_INFORMATION_SCANS, replace=False)
    estimate = mutual_info_classif if label.kind == "classes" else mutual_info_regression
    information: Floats = estimate(units[scans], label.values[scans], random_state=seed)
    return information


def _make_columns(label: Label) -> Floats:
    """Return the label as columns: the number, the second of two classes, or each class against the rest."""
    if label.kind == "number":
        return label.values[:, None]
    columns: Floats = (label.values[:, None] == np.arange(len(label.classes))).astype(np.float64)
    columns[~label.known] = np.nan
    return columns[:, 1:] if len(label.classes) == 2 else columns


def _test_label(label: Label, matrices: Sequence[Floats], patients: NDArray[np.intp]) -> UnitTests:
    """Return the tests for a label from the correlations (columns of the label, units) of each candidate."""
    strongest = [np.abs(matrix).argmax(axis=0) for matrix in matrices]
    correlations = [
        matrix[column, np.arange(matrix.shape[1])] for matrix, column in zip(matrices, strongest, strict=True)
    ]
    number = count_patients(patients, label.known)
    _, q = control_discoveries(np.concatenate(correlations), number, tests=len(matrices[0]))
    ends = np.cumsum([len(one) for one in correlations])[:-1]
    return UnitTests(
        label=label,
        correlations=tuple(correlations),
        q=tuple(np.split(q, ends)),
        classes=tuple(column + (len(label.classes) == 2) for column in strongest),
        scans=int(label.known.sum()),
        patients=number,
    )


def _make_edges(values: Floats, bins: int) -> Floats:
    low = float(np.percentile(values, _HISTOGRAM_RANGE[0], method="higher"))
    high = float(np.percentile(values, _HISTOGRAM_RANGE[1], method="lower"))
    if low >= high:
        low, high = float(values.min()), float(values.max())
    edges: Floats = np.linspace(low, high, bins + 1)
    return edges
