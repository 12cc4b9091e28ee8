"""Find reasons that rule a candidate out, without labels. No measure here says that a candidate is good."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from featray.commands.report.describe.latent_names import Role, find_role
from featray.commands.report.describe.measure import CandidateMeasures, Measures
from featray.commands.report.describe.texts import count, count_part, format_share
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.label_free.health import SignPattern
from featray.commands.report.label_free.latents import ACTIVE_VARIANCE, MIN_SCANS, Collapse, Latents
from featray.commands.report.label_free.similarity import REDUNDANT

MIN_SCANS_TO_JUDGE = 20
"""With fewer scans, units of a ReLU are often 0 in all of them by chance."""
MIN_SCANS_TO_COMPARE = 30
"""With fewer scans, two unrelated candidates can have a high CKA by chance."""
_MOST_UNITS = 0.5


class Kind(StrEnum):
    """Kind of a finding, from the most to the least severe."""

    NON_FINITE = "non_finite"
    """Values are NaN or infinite."""
    EQUAL_SCANS = "equal_scans"
    """All scans, or most scans that other candidates tell apart, have the same values."""
    COLLAPSE = "collapse"
    """Most or all latents are not in use."""
    FEW_UNITS = "few_units"
    """Most units are constant or dead."""
    SAMPLING = "sampling"
    """The values are random."""
    RELU = "relu"
    """Means of latents have no negative values."""
    REDUNDANT = "redundant"
    """A smaller candidate holds nearly the same."""
    UNCERTAINTY = "uncertainty"
    """The layer holds the uncertainty of latents. This is information only."""


@dataclass(frozen=True)
class Finding:
    """Something against a candidate.

    Attributes:
        candidate: Name of the candidate.
        kind: Kind of the finding.
        reason: One sentence with the number, and a second one with advice if there is any.
        other: Name of the smaller candidate for `REDUNDANT`; otherwise empty.
    """

    candidate: str
    kind: Kind
    reason: str
    other: str = ""


def find_faults(features: FeatureSet, measures: Measures) -> list[Finding]:
    """Return all findings, the most severe kind first, then in network order."""
    findings = list(_find_broken(features, measures))
    for candidate in measures.candidates:
        findings += _find_equal_scans(candidate, measures)
        findings += _find_unit_faults(candidate)
        findings += _find_latent_faults(candidate)
    for view in features.views:
        role = find_role(view)
        if role is Role.SAMPLE:
            findings.append(Finding(view.name, Kind.SAMPLING, _explain_sampling(is_known=view.is_sampling)))
        if role in (Role.LOG_VARIANCE, Role.SPREAD):
            reason = (
                "By its name it holds the uncertainty of the latents, not their content (information only)."
            )
            findings.append(Finding(view.name, Kind.UNCERTAINTY, reason))
    findings += _find_redundant(measures, {finding.candidate for finding in findings})
    order = {kind: number for number, kind in enumerate(Kind)}
    return sorted(findings, key=lambda finding: order[finding.kind])


def describe_collapse(latents: Latents) -> str:
    """Return the verdict on posterior collapse as a sentence."""
    used = f"{count_part(latents.in_use, latents.latents, 'latent')} {_be(latents.in_use)} in use"
    rule = f"a latent is in use if its mean causes more than {100 * ACTIVE_VARIANCE:g} % of its variance"
    if latents.signal is None:
        rule = f"a latent is in use if its mean has a variance above {ACTIVE_VARIANCE}, the prior having 1"
    if latents.verdict is Collapse.TOO_FEW_SCANS:
        return (
            f"There is no verdict on posterior collapse from {count(latents.scans, 'scan')}; "
            f"{MIN_SCANS} are needed."
        )
    if latents.verdict is Collapse.COMPLETE:
        return f"The posterior has collapsed: none of {count(latents.latents, 'latent')} is in use ({rule})."
    if latents.verdict is Collapse.MOST:
        advice = "An earlier layer probably holds more."
        return f"Most of the posterior has collapsed: only {used} ({rule}). {advice}"
    if latents.verdict is Collapse.PARTIAL:
        advice = "This is usual if a model has more latents than its data needs."
        return f"The posterior has collapsed in part: {used} ({rule}). {advice}"
    return f"The posterior has not collapsed: {used} ({rule})."


def _be(number: int) -> str:
    return "is" if number == 1 else "are"


def _find_broken(features: FeatureSet, measures: Measures) -> Iterator[Finding]:
    scope = measures.scope
    for place, view in enumerate(features.views):
        broken = int(scope.non_finite[place])
        if broken:
            rest = "" if place in scope.candidates else " Nothing else was measured of it."
            scans = count_part(broken, scope.scans, "scan")
            reason = f"{scans} {'has' if broken == 1 else 'have'} NaN or infinite values.{rest}"
            yield Finding(view.name, Kind.NON_FINITE, reason)


def _find_equal_scans(candidate: CandidateMeasures, measures: Measures) -> Iterator[Finding]:
    scans, different = count_finite(candidate), count_different(candidate)
    most = max(map(count_different, measures.candidates))
    if scans > 1 and different == 1:
        yield Finding(candidate.view.name, Kind.EQUAL_SCANS, f"All {scans:,} scans have the same values.")
    elif different < scans / 2 and different < most / 2:
        reason = (
            f"It has only {count(different, 'different row')} of values for {scans:,} scans; another layer "
            f"has {most:,}."
        )
        yield Finding(candidate.view.name, Kind.EQUAL_SCANS, reason)


def count_finite(candidate: CandidateMeasures) -> int:
    """Return the number of scans without NaN and infinity."""
    return candidate.rows.scans - len(candidate.rows.non_finite)


def count_equal_scans(candidate: CandidateMeasures) -> int:
    """Return the number of finite scans whose values equal those of an earlier scan."""
    return sum(len(group) - 1 for group in candidate.rows.duplicates)


def count_different(candidate: CandidateMeasures) -> int:
    """Return the number of different rows of values among the finite scans."""
    return count_finite(candidate) - count_equal_scans(candidate)


def _find_unit_faults(candidate: CandidateMeasures) -> Iterator[Finding]:
    units = candidate.units
    silent = units.units - units.alive
    is_known = count_different(candidate) > 1 and units.scans >= MIN_SCANS_TO_JUDGE
    if not is_known or silent <= _MOST_UNITS * units.units:
        return
    reason = (
        f"{silent:,} of {count(units.units, 'value')} ({format_share(silent / units.units)}) are the same, "
        f"or nearly the same, for all {units.scans:,} scans."
    )
    yield Finding(candidate.view.name, Kind.FEW_UNITS, reason)


def _find_latent_faults(candidate: CandidateMeasures) -> Iterator[Finding]:
    latents, units = candidate.latents, candidate.units
    if latents is None:
        return
    if latents.verdict in (Collapse.COMPLETE, Collapse.MOST):
        yield Finding(candidate.view.name, Kind.COLLAPSE, describe_collapse(latents))
    if units.signs is SignPattern.RELU and units.scans >= MIN_SCANS_TO_JUDGE:
        reason = (
            f"No value is negative and {format_share(units.zero_share)} are exactly 0, as after a ReLU; "
            "means of latents should have both signs."
        )
        yield Finding(candidate.view.name, Kind.RELU, reason)


def _explain_sampling(*, is_known: bool | None) -> str:
    source = "It draws random values" if is_known else "By its name it draws random values"
    return f"{source}: the same scan gives other values each time. Take the layer of the means instead."


def _find_redundant(measures: Measures, faulty: Collection[str]) -> Iterator[Finding]:
    """Yield the candidates that a smaller one can replace; `faulty` ones cannot replace others."""
    similarity = measures.similarity
    if similarity is None or similarity.scans < MIN_SCANS_TO_COMPARE:
        return
    views = [candidate.view for candidate in measures.candidates]
    order = [(view.units, number) for number, view in enumerate(views)]
    for number, view in enumerate(views):
        near = np.flatnonzero((similarity.cka[number] > REDUNDANT) & similarity.is_defined)
        smaller = [
            order[other] for other in near if order[other] < order[number] and views[other].name not in faulty
        ]
        if not smaller or not similarity.is_defined[number]:
            continue
        units, other = min(smaller)
        size = (
            "as many values" if units == view.units else f"{count(units, 'value')} instead of {view.units:,}"
        )
        reason = (
            f"Nearly the same as {views[other].name}, which has {size}: debiased CKA "
            f"{similarity.cka[number, other]:.2f}. A label can still depend on the small rest."
        )
        yield Finding(view.name, Kind.REDUNDANT, reason, views[other].name)
