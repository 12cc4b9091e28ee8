"""Answer for each label which layer to take, and make the parts of the page that need labels.

Time on one core: 63 s for a label of two classes with 1,000 scans, 5 candidates of 2,048 values and 3
baselines, 45 s for a number, and about 4 s more per candidate for each further class. Memory: 0.4 GB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from featray.commands.report.answer.baselines import BaselineFeatures, Baselines, make_baselines
from featray.commands.report.answer.changes import list_changes, list_table_cautions
from featray.commands.report.answer.label_results import make_label_result
from featray.commands.report.answer.methods import list_methods
from featray.commands.report.answer.probe_plan import ProbePlan, make_candidates
from featray.commands.report.answer.unit_panels import UnitData, make_extremes, make_unit_matrices
from featray.commands.report.describe.progress import OnStep, Span
from featray.commands.report.describe.scan_columns import make_label_column
from featray.commands.report.describe.scope import read_blocks
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.answer import Answer, answer_label, restrict_label
from featray.commands.report.labeled.labels import LabelTable
from featray.commands.report.labeled.units import UnitTests, correlate_units
from featray.commands.report.page.model import Candidate, Column, Extremes, LabelResult, Matrix, Method

MIN_UNIT_SCANS = 10
"""Scans with a value below which the units are not tested against a label."""

MIN_COVERAGE = 0.8
"""Share of the scans of a plan that must have been read again, so that the others are left out instead."""


@dataclass(frozen=True, eq=False)
class LabeledParts:
    """The parts of `PageModel` that need labels, and the results behind them.

    Attributes:
        labels: Verdicts and scores, in the order of the table.
        baselines: The baselines, for the end of `PageModel.candidates`.
        units: Heat maps of units and labels.
        extremes: Scans at both ends of the best unit. Their positions are those of the report's scans, not
            of the scans that the page shows.
        changes: Advice on steps that would change the answers.
        cautions: Rows and columns of the table of labels that are not used.
        methods: Descriptions of the methods.
        columns: Labels by which maps can be colored, with one value per scan of the report.
        answers: The answers, parallel to `labels`.
        tests: Tests of single units for the labels with enough scans.
    """

    labels: tuple[LabelResult, ...]
    baselines: tuple[Candidate, ...]
    units: tuple[Matrix, ...]
    extremes: Extremes | None
    changes: tuple[str, ...]
    cautions: tuple[str, ...]
    methods: tuple[Method, ...]
    columns: tuple[Column, ...]
    answers: tuple[Answer, ...]
    tests: tuple[UnitTests, ...]


def answer_labels(
    features: FeatureSet,
    table: LabelTable,
    plan: ProbePlan,
    again: BaselineFeatures | None,
    on_step: OnStep,
) -> LabeledParts:
    """Return everything of the page that needs labels.

    If scans were read again for baselines, a label is probed only on the scans of its plan for which that
    succeeded, so that layers and baselines are compared on the same scans. If that would leave too few, these
    baselines are left out instead.

    Args:
        features: The candidates.
        table: Labels of the scans of `features`.
        plan: Which scans are probed; see `plan_probes`.
        again: Features for which scans of the plan were read again; None without them.
        on_step: Called with the current step in words and the share of the work that is done.
    """
    probing, testing = Span(on_step).divide(0.85, 1.0)
    used, reread_cautions = _check_coverage(plan, again)
    baselines = make_baselines(features, used, table.labels)
    answers = list(_probe_labels(features, plan, baselines, used, probing))
    tests = _test_units(features, plan, testing)
    data = UnitData(features, plan.candidates, tests, plan.collection.seed)
    on_step("Answered all labels", 1.0)
    return LabeledParts(
        labels=tuple(
            make_label_result(answer, label, scans, plan.collection)
            for answer, label, scans in zip(answers, table.labels, plan.scans, strict=True)
        ),
        baselines=baselines.shown if any(answer.evidence is not None for answer in answers) else (),
        units=make_unit_matrices(data),
        extremes=make_extremes(data, answers),
        changes=list_changes(answers, plan.collection, used),
        cautions=(*list_table_cautions(table), *reread_cautions),
        methods=list_methods(answers, baselines.probed),
        columns=tuple(map(make_label_column, table.labels)),
        answers=tuple(answers),
        tests=tests,
    )


def _check_coverage(
    plan: ProbePlan, again: BaselineFeatures | None
) -> tuple[BaselineFeatures | None, tuple[str, ...]]:
    """Return `again` if it holds enough scans of the plan, else None and a sentence."""
    planned = plan.union
    if again is None or again.is_empty or not len(planned):
        return None, ()
    found = len(np.intersect1d(planned, again.rows))
    if found >= MIN_COVERAGE * len(planned):
        return again, ()
    caution = (
        f"Baselines of voxels and of random weights are left out, because only {found:,} of {len(planned):,} "
        "scans could be read again."
    )
    return None, (caution,)


def _probe_labels(
    features: FeatureSet,
    plan: ProbePlan,
    baselines: Baselines,
    again: BaselineFeatures | None,
    span: Span,
) -> Iterator[Answer]:
    candidates = make_candidates(features, plan.candidates)
    number = len(candidates) + len(baselines.probed)
    parts = span.divide(*(np.arange(1, len(plan.labels) + 1) / max(len(plan.labels), 1)).tolist())
    for label, planned, part in zip(plan.labels, plan.scans, parts, strict=True):
        scans = planned if again is None else np.intersect1d(planned, again.rows)
        restricted = restrict_label(label, scans) if len(planned) else label
        report = _ProbeProgress(part, label.name, number)
        yield answer_label(restricted, candidates, baselines.probed, plan.collection, report)


class _ProbeProgress:
    """Reports each probe of one label.

    Args:
        span: Receives the progress.
        label: Name of the label.
        number: Number of probes.
    """

    def __init__(self, span: Span, label: str, number: int) -> None:
        self._span, self._label, self._number = span, label, number
        self._begun = 0

    def __call__(self, name: str) -> None:
        self._span.report(f"{self._label}: probing {name}", self._begun, self._number)
        self._begun += 1


def _test_units(features: FeatureSet, plan: ProbePlan, span: Span) -> tuple[UnitTests, ...]:
    labels = [label for label in plan.labels if label.known.sum() >= MIN_UNIT_SCANS]
    if not labels or not plan.candidates:
        return ()
    units = [features.views[place].units for place in plan.candidates]
    blocks = read_blocks(features, plan.candidates, span, "Testing all units")
    return tuple(correlate_units(blocks, units, labels, plan.collection.patients))
