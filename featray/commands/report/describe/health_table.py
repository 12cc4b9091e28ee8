"""Write the measures of health as a table for the page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from featray.commands.report.describe.findings import count_equal_scans, describe_collapse
from featray.commands.report.describe.measure import CandidateMeasures, Measures
from featray.commands.report.describe.sample import MAX_UNITS_FOR_DUPLICATES
from featray.commands.report.describe.texts import count, format_share
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.label_free.dimension import MIN_SCANS as MIN_SCANS_OF_DIMENSION
from featray.commands.report.label_free.dimension import Obstacle
from featray.commands.report.label_free.health import (
    DUPLICATE_CORRELATION,
    MIN_SCANS_FOR_DUPLICATES,
    UnitHealth,
)
from featray.commands.report.label_free.latents import ACTIVE_VARIANCE
from featray.commands.report.label_free.moments import DEAD_VARIANCE
from featray.commands.report.page.model import Cell, DataTable
from featray.commands.report.page.numbers import format_cell

NOT_COMPARABLE = (
    "These measures can rule a layer out; they cannot say which layer is better. Ranks and dimensions of "
    "different layers are not comparable in quality, because noise has a high rank too."
)
Measure = Callable[[CandidateMeasures], Cell]


@dataclass(frozen=True)
class _Column:
    """A column of the table: title, sentence that explains it, and its cells."""

    title: str
    explanation: str
    get_cell: Measure


def make_health_table(features: FeatureSet, measures: Measures) -> DataTable:
    """Return one row per candidate in network order; candidates that are not measured have dashes."""
    columns = _make_columns(measures)
    by_name = {candidate.view.name: candidate for candidate in measures.candidates}
    rows = []
    for place, view in enumerate(features.views):
        candidate = by_name.get(view.name)
        cells = [None if candidate is None else column.get_cell(candidate) for column in columns]
        rows.append((view.name, view.units, int(measures.scope.non_finite[place]), *cells))
    first = {
        "Values": "Number of values per scan, which are also called units.",
        "Broken scans": f"Scans with NaN or infinite values, of {count(measures.scope.scans, 'scan')}.",
    }
    verdicts = [
        f"{candidate.view.name}: {describe_collapse(candidate.latents)}"
        for candidate in measures.candidates
        if candidate.latents is not None
    ]
    return DataTable(
        columns=("Layer (view)", *first, *(column.title for column in columns)),
        rows=tuple(rows),
        explanations=first | {column.title: column.explanation for column in columns},
        reading=" ".join((NOT_COMPARABLE, *verdicts)),
    )


def _make_columns(measures: Measures) -> list[_Column]:
    used = f"over {count(len(measures.scope.used), 'scan')}"
    columns = [
        _Column(
            "Alive",
            f"Units that are neither constant nor dead, {used}; a dash for a single scan.",
            lambda one: _need_scans(one.units, one.units.alive),
        ),
        _Column(
            "Constant",
            f"Units with exactly the same value {used}.",
            lambda one: _need_scans(one.units, len(one.units.constant)),
        ),
        _Column(
            "Dead",
            f"Units whose variance {used} is rounding error, or below {DEAD_VARIANCE:g} of the median "
            "variance of the other units.",
            lambda one: _need_scans(one.units, len(one.units.dead)),
        ),
        _Column(
            "Duplicate units",
            f"Units whose correlation with an earlier unit is above {DUPLICATE_CORRELATION} or below "
            f"−{DUPLICATE_CORRELATION}, {_list_scans(measures, _count_duplicate_scans)}; a dash below "
            f"{MIN_SCANS_FOR_DUPLICATES} scans and above {MAX_UNITS_FOR_DUPLICATES:,} values.",
            _get_duplicates,
        ),
        _Column(
            "Exact zeros",
            f"Share of all values that are exactly 0, {used}; many zeros are usual after a ReLU.",
            lambda one: format_share(one.units.zero_share),
        ),
        _Column(
            "Equal scans",
            "Scans whose values all equal those of an earlier scan; the same number in all layers means that "
            "the scans themselves are equal.",
            count_equal_scans,
        ),
        *_make_rank_columns(measures),
    ]
    if any(candidate.latents for candidate in measures.candidates):
        columns += _make_latent_columns(used)
    return columns


def _make_rank_columns(measures: Measures) -> list[_Column]:
    ranks = _list_scans(measures, lambda one: one.sample.rank.scans)
    dimensions = _list_scans(measures, lambda one: one.sample.dimension.scans)
    columns = [
        _Column(
            "Effective rank",
            "Number of directions that carry the variance, from the entropy of the singular values, "
            f"{ranks}; at most the number of units and the number of scans minus 1, and near this cap more "
            "scans would give a higher rank.",
            _get_rank,
        ),
        _Column(
            "Participation ratio",
            f"Another number of directions, from the squares of the principal variances, {ranks}; it counts "
            "weak directions less.",
            lambda one: one.sample.rank.participation_ratio,
        ),
    ]
    if any(
        candidate.sample.dimension.obstacle is not Obstacle.TOO_FEW_SCANS for candidate in measures.candidates
    ):
        columns.append(
            _Column(
                "Intrinsic dimension",
                "Number of numbers that describe a scan locally, from the distances to its two nearest "
                f"neighbors (TwoNN), {dimensions} with different values, without latents that are not in "
                f"use; rather too low than too high; a dash below {MIN_SCANS_OF_DIMENSION} scans and where "
                "values repeat.",
                _get_dimension,
            )
        )
    return columns


def _make_latent_columns(used: str) -> list[_Column]:
    return [
        _Column(
            "Active latents",
            f"Latents whose mean has a variance above {ACTIVE_VARIANCE} {used}; this assumes a prior of "
            "variance 1.",
            lambda one: one.latents.active if one.latents else None,
        ),
        _Column(
            "Latents in use",
            f"Latents whose mean causes more than {100 * ACTIVE_VARIANCE:g} % of their variance {used}; a "
            "dash if the output has no layer of log-variances.",
            lambda one: None if one.latents is None or one.latents.signal is None else one.latents.in_use,
        ),
        _Column(
            "KL (nats)",
            f"Kullback-Leibler divergence of all latents from the prior, mean {used}: an upper bound of what "
            "they hold about a scan; a dash if the output has no layer of log-variances.",
            lambda one: one.latents.total_kl if one.latents else None,
        ),
    ]


def _list_scans(measures: Measures, get_scans: Callable[[CandidateMeasures], int]) -> str:
    """Return from how many scans a measure is, which can differ between candidates."""
    numbers = sorted({get_scans(candidate) for candidate in measures.candidates}) or [0]
    if len(numbers) == 1:
        return f"from {count(numbers[0], 'scan')}"
    return f"from {numbers[0]:,} to {numbers[-1]:,} scans"


def _need_scans(units: UnitHealth, number: int) -> int | None:
    return number if units.scans > 1 else None


def _count_duplicate_scans(candidate: CandidateMeasures) -> int:
    return candidate.sample.duplicate_units.scans


def _get_duplicates(candidate: CandidateMeasures) -> int | None:
    units = candidate.sample.duplicate_units.units
    return None if units is None else len(units)


def _get_rank(candidate: CandidateMeasures) -> Cell:
    rank = candidate.sample.rank
    if rank.is_near_cap:
        return f"{format_cell(rank.effective_rank)}, near the cap of {rank.cap:,}"
    return rank.effective_rank


def _get_dimension(candidate: CandidateMeasures) -> str | None:
    dimension = candidate.sample.dimension.at_least
    return None if dimension is None else f"at least {format_cell(dimension)}"
