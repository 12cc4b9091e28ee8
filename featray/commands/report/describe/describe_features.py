"""Turn the features of all candidates into the parts of the page that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from featray.commands.report.describe.agreement import make_agreement
from featray.commands.report.describe.findings import Finding, Kind, find_faults
from featray.commands.report.describe.health_table import make_health_table
from featray.commands.report.describe.maps import make_maps
from featray.commands.report.describe.measure import (
    MAX_OUTLIERS,
    CandidateMeasures,
    Measures,
    RankedOutlier,
)
from featray.commands.report.describe.methods import list_cautions, list_methods
from featray.commands.report.describe.numbers import make_numbers
from featray.commands.report.describe.progress import OnStep, Span
from featray.commands.report.describe.scan_columns import choose_columns
from featray.commands.report.describe.texts import count
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.label_free.health import OUTLIER_SCORE, Positions
from featray.commands.report.label_free.neighbors import MAX_SCANS
from featray.commands.report.page.model import (
    Column,
    DataTable,
    Matrix,
    Method,
    NeighborLists,
    Outlier,
    ScanMap,
    Scans,
    Veto,
)

MAX_SHOWN = MAX_SCANS
"""Largest number of scans that the page shows. Of more scans it shows those that are compared."""
_INFORMATION = (Kind.REDUNDANT, Kind.UNCERTAINTY)
"""Kinds of findings that do not make the maps of a candidate less interesting."""


@dataclass(frozen=True, eq=False)
class LabelFreeParts:
    """The parts of `PageModel` that need no labels, and the numbers behind them.

    Attributes:
        health: For `PageModel.health`; `vetoes` to `cautions` are for the attributes with the same names.
        vetoes: The findings as sentences, the most severe first.
        agreement: Similarity and common neighbors.
        scans: The scans that the page shows, with columns.
        maps: Maps of the shown scans.
        neighbors: Neighbors of the shown scans.
        outliers: Outliers among the shown scans.
        methods: Descriptions of the methods.
        cautions: Sentences about samples and scans that are left out.
        shown: Positions of the shown scans in `FeatureSet.scan_ids`.
        findings: The findings behind `vetoes`, in the same order.
        numbers: One row per candidate with all measures as numbers.
        measures: The measures themselves.
    """

    health: DataTable
    vetoes: tuple[Veto, ...]
    agreement: tuple[Matrix, ...]
    scans: Scans
    maps: tuple[ScanMap, ...]
    neighbors: tuple[NeighborLists, ...]
    outliers: tuple[Outlier, ...]
    methods: tuple[Method, ...]
    cautions: tuple[str, ...]
    shown: Positions
    findings: tuple[Finding, ...]
    numbers: pa.Table
    measures: Measures


@dataclass(frozen=True)
class Emphasis:
    """The items that the answers for labels emphasize.

    Attributes:
        columns: Labels by which the maps can be colored, with one value per scan of the report.
        preferred: Names of the candidates whose maps and neighbors come first, such as those of the verdicts.
        included: Positions of scans that the page must show.
    """

    columns: Sequence[Column] = ()
    preferred: Sequence[str] = ()
    included: Sequence[int] = ()


def describe_features(
    features: FeatureSet, measures: Measures, emphasis: Emphasis, seed: int, on_step: OnStep
) -> LabelFreeParts:
    """Return everything of the page that needs no labels.

    Args:
        features: The candidates.
        measures: Their measures.
        emphasis: What comes first.
        seed: Decides the maps.
        on_step: Called with the current step in words and the share of the work that is done.
    """
    findings = find_faults(features, measures)
    shown = _choose_shown(measures, emphasis.included)
    order = _order_candidates(measures, findings, emphasis.preferred)
    maps = make_maps(measures, shown, order, seed, Span(on_step))
    chosen = choose_columns(features.scans, emphasis.columns, shown)
    cautions = list(list_cautions(features, measures, maps))
    if chosen.left_out:
        cautions.append(f"The maps cannot be colored by {count(chosen.left_out, 'further column')}.")
    on_step("Described all layers", 1.0)
    return LabelFreeParts(
        health=make_health_table(features, measures),
        vetoes=tuple(Veto(finding.candidate, finding.reason) for finding in findings),
        agreement=make_agreement(measures),
        scans=Scans(tuple(features.scan_ids[row] for row in shown.tolist()), chosen.columns),
        maps=maps.maps,
        neighbors=_list_neighbors(measures, shown, order),
        outliers=_list_outliers(measures, shown),
        methods=list_methods(measures),
        cautions=tuple(cautions),
        shown=shown,
        findings=tuple(findings),
        numbers=make_numbers(features, measures),
        measures=measures,
    )


def _choose_shown(measures: Measures, included: Sequence[int]) -> Positions:
    """Return all scans if there are few, otherwise the compared ones and those to include."""
    scans = measures.scope.scans
    if scans <= MAX_SHOWN:
        return np.arange(scans)
    return np.union1d(measures.compared, np.array(included, np.int64))


def _order_candidates(measures: Measures, findings: Sequence[Finding], preferred: Sequence[str]) -> list[str]:
    """Return the names of the measured candidates: preferred ones, those without a fault, the others."""
    faulty = {finding.candidate for finding in findings if finding.kind not in _INFORMATION}
    names = [candidate.view.name for candidate in measures.candidates]
    first = [name for name in dict.fromkeys(preferred) if name in names]
    return [*first, *sorted((name for name in names if name not in first), key=lambda name: name in faulty)]


def _list_neighbors(measures: Measures, shown: Positions, order: Sequence[str]) -> tuple[NeighborLists, ...]:
    """Return the neighbors of the shown scans in each candidate with variation."""
    by_name = {candidate.view.name: candidate for candidate in measures.candidates}
    places = np.searchsorted(shown, measures.compared)
    lists = [_list_candidate_neighbors(by_name[name], places, len(shown)) for name in order]
    return tuple(one for one in lists if one.neighbors.size)


def _list_candidate_neighbors(candidate: CandidateMeasures, places: Positions, shown: int) -> NeighborLists:
    found = candidate.sample.neighbors
    width = found.rows.shape[1] if found.units else 0
    rows, distances = np.full((shown, width), -1, np.int64), np.full((shown, width), np.nan)
    if width:
        rows[places] = places[found.rows]
        distances[places] = found.distances
    return NeighborLists(candidate.view.name, rows, distances, "distance of standardized values")


def _list_outliers(measures: Measures, shown: Positions) -> tuple[Outlier, ...]:
    names = [candidate.view.name for candidate in measures.candidates]
    return tuple(
        Outlier(
            int(np.searchsorted(shown, outlier.scan)),
            names[outlier.candidate],
            outlier.score,
            _explain_outlier(outlier, len(names)),
        )
        for outlier in measures.outliers[:MAX_OUTLIERS]
    )


def _explain_outlier(outlier: RankedOutlier, candidates: int) -> str:
    """Return why a scan is an outlier; only with several candidates in how many of them it is one."""
    reason = (
        f"Its distance from the mean is {outlier.score:.1f} robust standard deviations above that of the "
        f"median scan; {OUTLIER_SCORE} is the limit."
    )
    if candidates == 1:
        return reason
    return f"{reason} It is an outlier in {outlier.candidates} of {candidates} layers."
