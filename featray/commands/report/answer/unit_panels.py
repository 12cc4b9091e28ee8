"""Turn the tests of single units into heat maps, histograms and the scans at both ends of a unit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.describe.texts import count
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.answer import Answer
from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.units import (
    MAX_INFORMATION_SCANS,
    MAX_Q,
    UnitTests,
    compute_unit_auc,
    count_histogram,
    estimate_information,
)
from featray.commands.report.page.model import Extreme, Extremes, Matrix
from featray.commands.report.page.numbers import format_cell, format_number

MAX_ROWS = 24
"""Rows of the heat map of units, over all labels."""
MIN_ROWS_PER_LABEL = 3
MAX_ROWS_PER_CANDIDATE = 3
"""Units of one candidate that a label adds to the heat map, so that no candidate fills it alone."""
EXTREMES = 4
"""Scans at each end of the best unit."""
_BLOCK_VALUES = 2**24


@dataclass(frozen=True, order=True)
class UnitKey:
    """A unit: the position of its candidate among the tested ones, and its number."""

    candidate: int
    unit: int


@dataclass(frozen=True, eq=False)
class UnitData:
    """The tests of all labels, and how to read the values.

    Attributes:
        features: The candidates of the report.
        places: Positions of the tested candidates among the views of the report.
        tests: Tests of each label.
        seed: For the estimate of the mutual information.
    """

    features: FeatureSet
    places: tuple[int, ...]
    tests: Sequence[UnitTests]
    seed: int = 0

    def get_name(self, candidate: int) -> str:
        """Return the name of a tested candidate."""
        return self.features.views[self.places[candidate]].name

    def get_unit_name(self, key: UnitKey) -> str:
        """Return the name of a unit for the reader."""
        return f"{self.get_name(key.candidate)}, unit {key.unit}"

    def read(self, keys: Sequence[UnitKey]) -> NDArray[np.float32]:
        """Return the values (scans, units) of some units for all scans."""
        result = np.empty((len(self.features.scan_ids), len(keys)), np.float32)
        for candidate in {key.candidate for key in keys}:
            file = self.features.files[self.places[candidate]]
            columns = [place for place, key in enumerate(keys) if key.candidate == candidate]
            units = [keys[place].unit for place in columns]
            rows = max(1, _BLOCK_VALUES // file.units)
            for start in range(0, len(result), rows):
                result[start : start + rows, columns] = file.read(slice(start, start + rows))[:, units]
        return result


def make_unit_matrices(data: UnitData) -> tuple[Matrix, ...]:
    """Return the heat maps of units and labels, and a histogram of the best unit of each label."""
    keys = _choose_rows(data)
    if not keys:
        return ()
    values = data.read(keys)
    matrices = [_make_correlations(data, keys), _make_information(data, keys, values)]
    matrices.append(_make_counts(data))
    matrices += _make_histograms(data, keys, values)
    return tuple(matrices)


def make_extremes(data: UnitData, answers: Sequence[Answer]) -> Extremes | None:
    """Return the scans at both ends of the best unit.

    This is the unit of the recommended candidate with the strongest correlation, for the first label with a
    verdict. Without a verdict it is the unit with the strongest correlation of all candidates and labels.

    The positions of the scans are those of the report, not of the scans that the page shows. None if no unit
    is related to a label with a q-value of at most 0.05.
    """
    found = _find_best_unit(data, answers)
    if found is None:
        return None
    test, key = found
    label, values = test.label, data.read([key])[:, 0]
    scans = np.flatnonzero(label.known)
    order = scans[np.argsort(values[scans], kind="stable")]
    number = min(EXTREMES, len(order) // 2)
    low, high = (
        tuple(Extreme(int(scan), float(values[scan]), format_value(label, int(scan))) for scan in part)
        for part in (order[:number], order[len(order) - number :])
    )
    return Extremes(data.get_unit_name(key), label.name, low, high)


def format_value(label: Label, scan: int) -> str:
    """Return the value of a label as a text; empty if it is missing."""
    value = float(label.values[scan])
    if np.isnan(value):
        return ""
    return label.classes[int(value)] if label.kind == "classes" else format_cell(value)


def _choose_rows(data: UnitData) -> list[UnitKey]:
    """Return the strongest unit of each label and further related ones, label by label, each unit once."""
    number = max(MIN_ROWS_PER_LABEL, MAX_ROWS // max(len(data.tests), 1))
    keys: list[UnitKey] = []
    for test in data.tests:
        ranked = _rank_units(test, range(len(data.places)))[:number]
        keys += [key for place, key in enumerate(ranked) if place == 0 or _is_related(test, key)]
    return list(dict.fromkeys(keys))[:MAX_ROWS]


def _rank_units(test: UnitTests, candidates: Sequence[int]) -> list[UnitKey]:
    """Return a few of the strongest units of each candidate, the strongest first."""
    keys = [
        UnitKey(candidate, unit)
        for candidate in candidates
        for unit in test.find_strongest(candidate, MAX_ROWS_PER_CANDIDATE)
    ]
    return sorted(keys, key=lambda key: -abs(test.correlations[key.candidate][key.unit]))


def _make_correlations(data: UnitData, keys: Sequence[UnitKey]) -> Matrix:
    values = np.array([[_get_correlation(test, key) for test in data.tests] for key in keys])
    marks = tuple(
        tuple("*" if test.q[key.candidate][key.unit] <= MAX_Q else "" for test in data.tests) for key in keys
    )
    several = any(len(test.label.classes) > 2 for test in data.tests)
    sign = (
        " With more than two classes it is the size of the strongest correlation with one class."
        if several
        else ""
    )
    return Matrix(
        title="Strongest units",
        reading=(
            f"Correlation of single units with the labels, over all scans with a value ({_count(data)}); a "
            f"label of two classes counts as 0 and 1 in the order of their names.{sign} An asterisk marks a "
            f"q-value of at most {MAX_Q} over all units of all layers. The rows are the strongest unit of "
            f"each label and others with an asterisk, at most {MAX_ROWS_PER_CANDIDATE} per layer and label."
        ),
        rows=tuple(map(data.get_unit_name, keys)),
        columns=tuple(test.label.name for test in data.tests),
        values=values,
        low=-1.0,
        is_diverging=True,
        row_title="Unit",
        marks=marks,
    )


def _get_correlation(test: UnitTests, key: UnitKey) -> float:
    value = float(test.correlations[key.candidate][key.unit])
    return abs(value) if len(test.label.classes) > 2 else value


def _make_information(data: UnitData, keys: Sequence[UnitKey], values: NDArray[np.float32]) -> Matrix:
    columns = [estimate_information(values, test.label, data.seed) for test in data.tests]
    table = np.stack(columns, axis=1)
    return Matrix(
        title="Mutual information",
        reading=(
            "Mutual information of the same units and labels in nats, estimated from nearest neighbors on at "
            f"most {MAX_INFORMATION_SCANS:,} scans: 0 if they are independent. Unlike the correlation it "
            "also finds relations that are not linear. With few scans, values below 0.1 are noise."
        ),
        rows=tuple(map(data.get_unit_name, keys)),
        columns=tuple(test.label.name for test in data.tests),
        values=table,
        high=float(max(0.1, np.nanmax(table, initial=0.0))),
        row_title="Unit",
    )


def _make_counts(data: UnitData) -> Matrix:
    candidates = range(len(data.places))
    shares = [
        [100 * test.count_related(place) / len(test.q[place]) for test in data.tests] for place in candidates
    ]
    return Matrix(
        title="Units that follow a label",
        reading=(
            f"Share of the units of a layer, in percent, whose q-value is at most {MAX_Q}. A label can be "
            "spread over many units or held by few; the probes above use all units of a layer together."
        ),
        rows=tuple(map(data.get_name, candidates)),
        columns=tuple(test.label.name for test in data.tests),
        values=np.array(shares),
        high=100.0,
        decimals=1,
        row_title="Layer (view)",
    )


def _make_histograms(
    data: UnitData, keys: Sequence[UnitKey], values: NDArray[np.float32]
) -> Iterator[Matrix]:
    for test in data.tests:
        ranked = [key for key in _rank_units(test, range(len(data.places))) if key in keys]
        if ranked:
            yield _make_histogram(data, test, ranked[0], values[:, keys.index(ranked[0])])


def _make_histogram(data: UnitData, test: UnitTests, key: UnitKey, values: NDArray[np.float32]) -> Matrix:
    label = test.label
    histogram = count_histogram(values, label)
    rows = label.classes or tuple(_describe_bins(histogram.label_edges))
    counts = histogram.counts.T.astype(np.float64)
    return Matrix(
        title=f"Best unit for {label.name}",
        reading=(
            f"Number of scans by {label.name} (rows) and by the value of {data.get_unit_name(key)} "
            f"(columns), from {count(test.scans, 'scan')}. Ranges of numbers have the name of their middle, "
            f"and the outer ranges also count the scans beyond. {_describe_unit(test, key, values)}"
        ),
        rows=rows,
        columns=tuple(_describe_bins(histogram.unit_edges)),
        values=counts,
        high=float(max(1.0, counts.max())),
        decimals=0,
        row_title=label.name,
    )


def _describe_unit(test: UnitTests, key: UnitKey, values: NDArray[np.float32]) -> str:
    label, number = test.label, int(test.classes[key.candidate][key.unit])
    q = float(test.q[key.candidate][key.unit])
    certainty = "q below 0.001" if q < 0.001 else f"q = {q:.2g}"
    correlation = f"Correlation {format_number(_get_correlation(test, key))} ({certainty})"
    if label.kind == "number":
        return f"{correlation}."
    auc = compute_unit_auc(values, label, number)
    against = f" for {label.classes[number]} against the rest" if len(label.classes) > 2 else ""
    return f"{correlation}; AUC of this unit alone {auc:.2f}{against}."


def _describe_bins(edges: NDArray[np.float64]) -> Iterator[str]:
    """Yield the middle of each range, with two digits for the width of a range."""
    width = float(edges[1] - edges[0])
    decimals = min(6, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 2
    for low, high in pairwise(edges.tolist()):
        yield format_number((low + high) / 2, decimals)


def _find_best_unit(data: UnitData, answers: Sequence[Answer]) -> tuple[UnitTests, UnitKey] | None:
    by_name = {test.label.name: test for test in data.tests}
    names = [data.get_name(candidate) for candidate in range(len(data.places))]
    for answer in answers:
        if answer.verdict.refusal is None and answer.label.name in by_name:
            test = by_name[answer.label.name]
            ranked = _rank_units(test, [names.index(str(answer.verdict.candidate))])
            if ranked and _is_related(test, ranked[0]):
                return test, ranked[0]
    best = [(test, ranked[0]) for test in data.tests if (ranked := _rank_units(test, range(len(names))))]
    best = [(test, key) for test, key in best if _is_related(test, key)]
    return max(best, key=lambda pair: abs(_get_correlation(*pair)), default=None)


def _is_related(test: UnitTests, key: UnitKey) -> bool:
    return bool(test.q[key.candidate][key.unit] <= MAX_Q)


def _count(data: UnitData) -> str:
    numbers = sorted({test.scans for test in data.tests})
    if len(numbers) == 1:
        return count(numbers[0], "scan")
    return f"{numbers[0]:,} to {numbers[-1]:,} scans"
