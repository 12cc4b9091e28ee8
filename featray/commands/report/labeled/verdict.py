"""Say in one sentence which candidate to take for a label, or why the verdict is refused.

A verdict is refused if there are fewer than 50 patients, fewer than 15 patients in the smallest class, an
interval wider than 0.3, a permutation p-value above 0.05, or no gain over the baselines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.labeled.choice import Choice
from featray.commands.report.labeled.compare import MAX_P, MIN_GAP, Comparison, compare_scores
from featray.commands.report.labeled.labels import Label, count_class_patients, count_patients

MIN_PATIENTS = 50
MIN_CLASS_PATIENTS = 15
MAX_WIDTH = 0.3
"""Largest width of the interval of a verdict."""
MAX_PERMUTATION_P = 0.05
TYPICAL_PATIENTS = 150
"""Patients with which the interval of an AUC is usually narrower than `MAX_WIDTH`."""

_NORMAL_1_PERCENT = 2.58
"""Standard errors at which a two-sided normal test has p = 0.01."""
_MAX_GROWTH = 20
"""More than this multiple of the present patients is not named as an aim."""


class Refusal(StrEnum):
    """Reason for refusing a verdict. The values are stable."""

    FEW_PATIENTS = "few_patients"
    SMALL_CLASS = "small_class"
    WIDE_INTERVAL = "wide_interval"
    CHANCE = "chance"
    NO_GAIN = "no_gain"


@dataclass(frozen=True)
class Score:
    """Score of a candidate or of a baseline.

    Attributes:
        name: Name for the reader, such as `conv_3 (grid)`.
        size: Values per scan.
        scores: Score of each fold.
        score: Mean over the folds.
        interval: Ends of the 95 % interval of the score on patients that were not drawn; NaN if not known.
    """

    name: str
    size: int
    scores: NDArray[np.float64]
    score: float
    interval: tuple[float, float] = (math.nan, math.nan)


@dataclass(frozen=True)
class Evidence:
    """Results on which a verdict is based.

    Attributes:
        label: Name of the label.
        metric: `AUC` or `R²`.
        patients: Number of patients whose scans were scored.
        noun: Noun for patients: `patients`, or `scans` if each scan counts as one patient.
        candidates: Layers in their views.
        baselines: Baselines, which need no trained model.
        choice: Result of the choice among the candidates.
        permutation_p: p-value of the best candidate against permuted labels.
        chance: Mean and standard deviation of the best candidate's score for permuted labels.
        test_ratio: Test scans divided by training scans.
    """

    label: str
    metric: str
    patients: int
    noun: str
    candidates: tuple[Score, ...]
    baselines: tuple[Score, ...]
    choice: Choice
    permutation_p: float
    chance: tuple[float, float]
    test_ratio: float


@dataclass(frozen=True)
class Verdict:
    """The answer for one label.

    Attributes:
        label: Name of the label.
        text: The sentence.
        refusal: Reason for refusing a verdict; None if a verdict is given.
        needed: About how many patients are needed for a verdict; None if there is one, or if more patients
            are not expected to help.
        candidate: Name of the chosen candidate; None after a refusal for too few patients.
        other: Name of a candidate that is as good within error, and smaller or larger; None without one.
        size_ratio: Size of the larger of these two divided by the size of the smaller.
        baseline: Name of the best baseline; None without baselines.
        is_baseline_enough: Whether the best baseline is so good that no candidate could be better by
            `MIN_GAP`.
    """

    label: str
    text: str
    refusal: Refusal | None = None
    needed: int | None = None
    candidate: str | None = None
    other: str | None = None
    size_ratio: float | None = None
    baseline: str | None = None
    is_baseline_enough: bool = False


def check_size(label: Label, patients: NDArray[np.intp], noun: str = "patients") -> Verdict | None:
    """Return a refusal if a label has too few patients to be probed, and None otherwise.

    Args:
        label: The label; scans without a value do not count.
        patients: Number of the patient of each scan.
        noun: Noun for patients, `patients` or `scans`.
    """
    number = count_patients(patients, label.known)
    classes = count_class_patients(label, patients)
    smallest = min(classes, default=number)
    share = max(smallest, 1) / max(number, 1)
    in_class = math.ceil(MIN_CLASS_PATIENTS / share) if classes else 0
    if number < MIN_PATIENTS:
        needed = round_up(max(TYPICAL_PATIENTS, in_class))
        text = f"{_refuse(label.name)}: {number} {noun}; about {needed} are needed."
        return Verdict(label.name, text, Refusal.FEW_PATIENTS, needed)
    if smallest < MIN_CLASS_PATIENTS and classes:
        needed = round_up(in_class)
        merge = "; or merge classes" if len(classes) > 2 else ""
        text = (
            f"{_refuse(label.name)}: {smallest} {noun} in the smallest class; {MIN_CLASS_PATIENTS} "
            f"are needed, about {needed} in all classes at the same shares{merge}."
        )
        return Verdict(label.name, text, Refusal.SMALL_CLASS, needed)
    return None


def decide_verdict(evidence: Evidence) -> Verdict:
    """Return the verdict for a label with enough patients."""
    for check in (_check_width, _check_chance, _check_gain):
        refused = check(evidence)
        if refused is not None:
            return refused
    chosen, choice = evidence.candidates[evidence.choice.chosen], evidence.choice
    other = find_other(evidence)
    clauses = [
        f"For {evidence.label} take {chosen.name}: {_format_score(evidence)}",
        f"it wins {choice.wins[choice.chosen]:.0%} of resamples".replace("%", " %"),
    ]
    equals = find_equals(evidence)
    if other is not None:
        clauses.append(_describe_other(chosen, other))
    elif equals:
        more = f" and {len(equals) - 1} more" if len(equals) > 1 else ""
        clauses.append(f"{equals[0].name}{more} {'are' if more else 'is'} as good within error")
    baseline = next(iter(_sort_baselines(evidence)), None)
    if baseline is not None:
        gain = compare_scores(chosen.scores, baseline.scores, evidence.test_ratio)
        if gain.p >= MAX_P:
            clauses.append(
                f"its gain of {gain.gap:.2f} over the baseline {baseline.name} is not certain "
                f"(p = {gain.p:.2f})"
            )
    return Verdict(
        evidence.label,
        "; ".join(clauses) + ".",
        candidate=chosen.name,
        other=other.name if other is not None else None,
        size_ratio=_compute_size_ratio(chosen, other) if other is not None else None,
        baseline=baseline.name if baseline is not None else None,
    )


def find_other(evidence: Evidence) -> Score | None:
    """Return a candidate that is as good within error and that the sentence should name, or None.

    If the best candidate was not chosen because a smaller one is as good, this is the best candidate.
    Otherwise it is the smallest candidate that is as good within error and smaller than the chosen one.
    """
    chosen = evidence.candidates[evidence.choice.chosen]
    best = evidence.candidates[evidence.choice.best]
    if best.size > chosen.size:
        return best
    smaller = [score for score in find_equals(evidence) if score.size < chosen.size]
    return min(smaller, key=lambda score: (score.size, -score.score), default=None)


def find_equals(evidence: Evidence) -> list[Score]:
    """Return the other candidates that are as good as the chosen one within error, the best one first."""
    choice, ratio = evidence.choice, evidence.test_ratio
    chosen = evidence.candidates[choice.chosen]
    equals = [
        score
        for place, score in enumerate(evidence.candidates)
        if place != choice.chosen
        and compare_scores(chosen.scores, score.scores, ratio).is_within_error(choice.tolerance)
    ]
    return sorted(equals, key=lambda score: -score.score)


def estimate_to_beat(evidence: Evidence, first: Score, second: Score) -> int | None:
    """Return about how many patients would make the gap between two candidates certain.

    None if the gap is certain or too small to matter, or if more patients than can be expected are needed.
    """
    comparison = compare_scores(first.scores, second.scores, evidence.test_ratio)
    if comparison.p < MAX_P or not abs(comparison.gap) > MIN_GAP:
        return None
    return _estimate_needed(evidence, _NORMAL_1_PERCENT * comparison.error / abs(comparison.gap))


def round_up(number: float) -> int:
    """Return a number of patients as a round number: steps of 10, from 200 of 50, from 1,000 of 500."""
    step = 10 if number <= 200 else 50 if number <= 1000 else 500
    return math.ceil(number / step) * step


def _check_width(evidence: Evidence) -> Verdict | None:
    width = evidence.choice.width
    if width <= MAX_WIDTH:
        return None
    needed = None if math.isnan(width) else _estimate_needed(evidence, width / MAX_WIDTH)
    reason = f"{_format_score(evidence)} is too uncertain with {evidence.patients} {evidence.noun}"
    return _make_refusal(evidence, Refusal.WIDE_INTERVAL, reason, needed)


def _check_chance(evidence: Evidence) -> Verdict | None:
    if evidence.permutation_p <= MAX_PERMUTATION_P:
        return None
    best = evidence.candidates[evidence.choice.best]
    mean, sd = evidence.chance
    gap = best.score - mean
    needed = _estimate_needed(evidence, _NORMAL_1_PERCENT * sd / gap) if gap > MIN_GAP else None
    reason = (
        f"{best.name} has the best {evidence.metric}, {best.score:.2f}, "
        f"and permuted labels reach the same (p = {evidence.permutation_p:.2f})"
    )
    return _make_refusal(evidence, Refusal.CHANCE, reason, needed)


def _check_gain(evidence: Evidence) -> Verdict | None:
    """Return a refusal if the chosen candidate is not better than every baseline, the best one first."""
    chosen = evidence.candidates[evidence.choice.chosen]
    for baseline in _sort_baselines(evidence):
        gain = compare_scores(chosen.scores, baseline.scores, evidence.test_ratio)
        if not gain.is_gain:
            reason = (
                f"{chosen.name} has {evidence.metric} {chosen.score:.2f} and the baseline {baseline.name} "
                f"{baseline.score:.2f}, no gain beyond error"
            )
            return _make_refusal(evidence, Refusal.NO_GAIN, reason, _estimate_for_gain(evidence, gain))
    return None


def _estimate_for_gain(evidence: Evidence, gain: Comparison) -> int | None:
    """Return the patients at which the present gain would be certain; None if it is too small to matter."""
    if not gain.gap > MIN_GAP:
        return None
    return _estimate_needed(evidence, _NORMAL_1_PERCENT * gain.error / gain.gap)


def _estimate_needed(evidence: Evidence, ratio: float) -> int | None:
    """Return the patients at which an error is smaller by `ratio`; None if that is out of reach."""
    growth = max(ratio, 1.0) ** 2
    return None if growth > _MAX_GROWTH else round_up(evidence.patients * growth + 1)


def _make_refusal(evidence: Evidence, refusal: Refusal, reason: str, needed: int | None) -> Verdict:
    baseline = next(iter(_sort_baselines(evidence)), None)
    is_enough = refusal is Refusal.NO_GAIN and baseline is not None and baseline.score > 1 - MIN_GAP
    if is_enough:
        advice = "the baseline is enough"
    elif needed is not None:
        advice = (
            f"about {needed} are needed"
            if refusal is Refusal.WIDE_INTERVAL
            else f"about {needed} {evidence.noun} are needed to tell"
        )
    elif refusal is Refusal.NO_GAIN:
        advice = "another layer, view or model is needed"
    else:
        advice = (
            f"more {evidence.noun} alone are not expected to help; another layer, view or model is needed"
        )
    return Verdict(
        evidence.label,
        f"{_refuse(evidence.label)}: {reason}; {advice}.",
        refusal,
        needed,
        candidate=evidence.candidates[evidence.choice.chosen].name,
        baseline=baseline.name if baseline is not None else None,
        is_baseline_enough=is_enough,
    )


def _refuse(label: str) -> str:
    return f"No verdict for {label}"


def _sort_baselines(evidence: Evidence) -> list[Score]:
    """Return the baselines that have a score, the best one first."""
    defined = [score for score in evidence.baselines if not math.isnan(score.score)]
    return sorted(defined, key=lambda score: -score.score)


def _format_score(evidence: Evidence) -> str:
    choice = evidence.choice
    return f"{evidence.metric} {choice.score:.2f} ({choice.low:.2f} to {choice.high:.2f})"


def _describe_other(chosen: Score, other: Score) -> str:
    ratio = _compute_size_ratio(chosen, other)
    times = f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.1f} times".replace(".0 ", " ")
    if other.size < chosen.size:
        return f"{other.name} is as good within error and {times} smaller"
    return f"{other.name} is no better within error and {times} larger"


def _compute_size_ratio(first: Score, second: Score) -> float:
    return max(first.size, second.size) / min(first.size, second.size)
