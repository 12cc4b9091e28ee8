"""Measure how well facts of the acquisition can be read off each layer, and make the parts of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.answer.probe_plan import make_candidates
from featray.commands.report.describe.progress import OnStep, Span
from featray.commands.report.describe.texts import count, join_words
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.label_free.neighbors import NEIGHBORS
from featray.commands.report.labeled.answer import Candidate, Collection
from featray.commands.report.labeled.folds import sample_scans
from featray.commands.report.labeled.labels import Label, LeftOut
from featray.commands.report.labeled.leakage import MAX_P, MIN_CLASS_SCANS, Leak, make_facts, measure_leakage
from featray.commands.report.leakage.facts import collect_geometry, collect_scanner_facts
from featray.commands.report.leakage.neighbor_sharing import (
    measure_chance,
    measure_sharing,
)
from featray.commands.report.page.model import Leak as PageLeak
from featray.commands.report.page.model import Matrix, Method, Veto

MAX_SCANS = 1000
"""Largest number of scans that are probed for facts. More are sampled by patient."""
STRONG = 0.8
"""Position between chance and perfect from which a leak is named as a warning."""
MIN_SHARING_SCANS = 50
"""Number of scans of different patients that a comparison of neighbors needs."""
_SCANNER_TITLES = (
    "scanner",
    "manufacturer",
    "site",
    "center",
    "hospital",
    "institution",
    "station",
    "kernel",
)
"""Facts that can stand for the scanner among neighbors, the first one that is known."""


@dataclass(frozen=True, eq=False)
class LeakParts:
    """The parts of `PageModel` about leakage, and the results behind them.

    Attributes:
        leaks: One per candidate and fact, in network order.
        vetoes: Warnings about strong leakage, at most one per candidate. They rule nothing out.
        sharing: Heat maps of how often neighbors share the label or the scanner; for `PageModel.units`.
        cautions: Facts that could not be measured.
        methods: Description of the method.
        results: The results behind `leaks`.
    """

    leaks: tuple[PageLeak, ...]
    vetoes: tuple[Veto, ...]
    sharing: tuple[Matrix, ...]
    cautions: tuple[str, ...]
    methods: tuple[Method, ...]
    results: tuple[Leak, ...]


@dataclass(frozen=True, eq=False)
class LeakScope:
    """Scans, labels and candidates for which leakage is measured.

    Attributes:
        collection: Patients of the scans of the report, and the seed.
        labels: The labels; a fact of the same name is left out.
        usable: Positions of the scans whose features are finite; None for all.
        candidates: Positions of the candidates among the views; None for all.
    """

    collection: Collection
    labels: tuple[Label, ...] = ()
    usable: NDArray[np.intp] | None = None
    candidates: Sequence[int] | None = None


def measure_leaks(features: FeatureSet, scope: LeakScope, on_step: OnStep) -> LeakParts:
    """Return everything of the page about leakage, from a sample of at most 1,000 scans.

    Args:
        features: The candidates.
        scope: Patients, labels, and the scans and candidates to measure.
        on_step: Called with the current step in words and the share of the work that is done.
    """
    probing, sharing = Span(on_step).divide(0.8, 1.0)
    scans = _choose_scans(features, scope)
    facts, left_out = _make_facts(features, scope, scans)
    places = range(len(features.views)) if scope.candidates is None else scope.candidates
    candidates = make_candidates(features, places)
    results = []
    for number, candidate in enumerate(candidates):
        probing.report(f"Reading facts of the acquisition off {candidate.name}", number, len(candidates))
        found = measure_leakage([candidate], facts, scope.collection.patients, seed=scope.collection.seed)
        results += sorted(found, key=lambda leak: [fact.name for fact in facts].index(leak.fact))
    matrices = tuple(_compare_sharing(candidates, scope, facts, sharing))
    on_step("Measured the leakage", 1.0)
    return LeakParts(
        leaks=tuple(map(_show_leak, results)),
        vetoes=tuple(_list_vetoes(results)),
        sharing=matrices,
        cautions=tuple(_list_cautions(facts, left_out)),
        methods=(_describe_method(len(scans)),) if facts else (),
        results=tuple(results),
    )


def _choose_scans(features: FeatureSet, scope: LeakScope) -> NDArray[np.intp]:
    usable = np.arange(len(features.scan_ids)) if scope.usable is None else scope.usable
    collection = scope.collection
    return usable[sample_scans(collection.patients[usable], None, MAX_SCANS, collection.seed)]


def _make_facts(
    features: FeatureSet, scope: LeakScope, scans: NDArray[np.intp]
) -> tuple[list[Label], list[LeftOut]]:
    """Return the facts, with values only for the scans of the sample, and the columns that are not facts."""
    names = [label.name for label in scope.labels]
    columns = collect_geometry(features.scans) | collect_scanner_facts(features.scans, names)
    is_sampled = np.isin(np.arange(len(features.scan_ids)), scans)
    sampled = {
        name: [value if use else None for value, use in zip(values, is_sampled, strict=True)]
        for name, values in columns.items()
    }
    return make_facts(sampled, scope.collection.patients)


def _show_leak(leak: Leak) -> PageLeak:
    return PageLeak(leak.candidate, leak.fact, leak.strength, leak.score, leak.metric)


def _list_vetoes(leaks: Sequence[Leak]) -> Iterator[Veto]:
    """Yield one warning per candidate with strong leaks."""
    for name in dict.fromkeys(leak.candidate for leak in leaks):
        strong = [
            f"{leak.fact} ({leak.metric} {leak.score:.2f})"
            for leak in leaks
            if leak.candidate == name and leak.is_above_chance and leak.strength >= STRONG
        ]
        if strong:
            yield Veto(
                name,
                f"Leakage: {join_words(strong)} can be read off its values. This rules nothing out, but a "
                "label that depends on such a fact in this collection looks predictable.",
            )


def _list_cautions(facts: Sequence[Label], left_out: Sequence[LeftOut]) -> Iterator[str]:
    if not facts:
        yield "Leakage was not measured, because no fact of the acquisition differs between enough scans."
    elif left_out:
        names: dict[str, list[str]] = {}
        for fact in left_out:
            names.setdefault(fact.reason, []).append(fact.name)
        reasons = "; ".join(f"{join_words(of_reason)}: {reason}" for reason, of_reason in names.items())
        yield f"Leakage was not measured for some facts ({reasons})."


def _compare_sharing(
    candidates: Sequence[Candidate], scope: LeakScope, facts: Sequence[Label], span: Span
) -> Iterator[Matrix]:
    """Yield one heat map per label with classes, if a fact stands for the scanner."""
    by_name = {fact.name: fact for fact in facts if fact.kind == "classes"}
    scanner = next((by_name[title] for title in _SCANNER_TITLES if title in by_name), None)
    labels = [label for label in scope.labels if label.kind == "classes"]
    if scanner is None:
        return
    for number, label in enumerate(labels):
        span.report(f"Comparing {label.name} and {scanner.name} among neighbors", number, len(labels))
        known = np.flatnonzero(label.known & scanner.known)
        _, first = np.unique(scope.collection.patients[known], return_index=True)
        scans = known[np.sort(first)]
        if len(scans) >= MIN_SHARING_SCANS:
            yield _make_sharing_matrix(candidates, label, scanner, scans)


def _make_sharing_matrix(
    candidates: Sequence[Candidate], label: Label, scanner: Label, scans: NDArray[np.intp]
) -> Matrix:
    classes = [part.values[scans].astype(np.intp) for part in (label, scanner)]
    rows = [measure_sharing(candidate.readers[0](scans), *classes) for candidate in candidates]
    chance = measure_chance(*classes)
    return Matrix(
        title=f"Neighbors: {label.name} or {scanner.name}",
        reading=(
            f"Share of the {NEIGHBORS} nearest neighbors of a scan that have the same {label.name} and the "
            f"same {scanner.name}, on {count(len(scans), 'scan')} of different patients; the last row is "
            "the share of all pairs. The third column is the robustness index: of the neighbors that share "
            f"only one of both, the share with the same {label.name}. Below the last row, the layer sorts "
            f"scans by {scanner.name} rather than by {label.name}."
        ),
        rows=(*(candidate.name for candidate in candidates), "all pairs of scans"),
        columns=(f"same {label.name}", f"same {scanner.name}", "robustness index"),
        values=np.array([[one.label, one.scanner, one.index] for one in (*rows, chance)]),
        row_title="Layer (view)",
    )


def _describe_method(scans: int) -> Method:
    return Method(
        "Leakage",
        f"A least-squares probe in 4 folds by patient, on {count(scans, 'scan')}, reads facts of the header "
        "off each layer: geometry, and scanner facts from manifest columns and `privacy.dicom_tags`. "
        f"Positive numbers are logarithms; classes of fewer than {MIN_CLASS_SCANS} scans are merged. The "
        "strength is the position of the score between the mean for permuted facts (0) and perfect (1). "
        f"There is no accepted limit; the page warns from a strength of {STRONG} with p of at most {MAX_P}. "
        "What neighbors share is compared by the robustness index of E. de Jong, E. Marcus and J. Teuwen "
        "(arXiv 2501.18055) in the form of J. Kömen et al. (arXiv 2507.17845).",
    )
