"""Turn the answer for a label into its part of the page: sentence, scores with words, and notes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.describe.texts import count
from featray.commands.report.labeled.answer import Answer, Collection
from featray.commands.report.labeled.compare import compare_scores
from featray.commands.report.labeled.labels import Label, count_patients
from featray.commands.report.labeled.probe import PERMUTATIONS
from featray.commands.report.labeled.verdict import Evidence
from featray.commands.report.labeled.verdict import Score as LabelScore
from featray.commands.report.page.model import LabelResult, Score
from featray.commands.report.page.numbers import format_cell

INTERVAL = "95 % interval over resampled patients"
CHOSEN, BEATEN, AS_GOOD, NO_GAIN = "chosen", "beaten", "as good", "no gain"
PROBABLY_WORSE, PROBABLY_BETTER = "probably worse", "probably better"
NOT_BEATEN, PROBABLY_BEATEN = "not beaten", "probably beaten"
_MAX_CLASSES_SHOWN = 8


def make_label_result(
    answer: Answer, known: Label, planned: NDArray[np.intp], collection: Collection
) -> LabelResult:
    """Return the part of the page for a label.

    Args:
        answer: The answer.
        known: The label before it was restricted to the scans that were probed.
        planned: Scans that were chosen for the probes, of which some may have been lost since.
        collection: The scans.
    """
    evidence = answer.evidence
    is_class = known.kind == "classes"
    patients = count_patients(collection.patients, known.known)
    if evidence is not None:
        patients = evidence.patients
    return LabelResult(
        label=known.name,
        sentence=answer.verdict.text,
        is_refusal=answer.verdict.refusal is not None,
        metric="AUC" if is_class else "R²",
        chance=(0.5 if is_class else 0.0) if evidence is None else evidence.chance[0],
        scans=int(known.known.sum()) if evidence is None else len(answer.scans),
        patients=patients if collection.has_patients else None,
        scores=() if evidence is None else (*_list_candidates(answer, evidence), *_list_baselines(evidence)),
        interval=INTERVAL,
        notes=tuple(_write_notes(answer, known, planned, collection)),
    )


def _list_candidates(answer: Answer, evidence: Evidence) -> Iterator[Score]:
    choice = evidence.choice
    for place, score in enumerate(evidence.candidates):
        word = _compare_candidate(place, answer, evidence)
        yield _make_score(score, choice.wins[place], word)


def _list_baselines(evidence: Evidence) -> Iterator[Score]:
    chosen = evidence.candidates[evidence.choice.chosen]
    for score in evidence.baselines:
        gain = compare_scores(chosen.scores, score.scores, evidence.test_ratio)
        word = BEATEN if gain.first_beats else PROBABLY_BEATEN if gain.is_gain else NOT_BEATEN
        yield _make_score(score, None, word)


def _make_score(score: LabelScore, wins: float | None, word: str) -> Score:
    low, high = (None if math.isnan(end) else end for end in score.interval)
    return Score(score.name, score.score, low, high, wins, word, is_chosen=word == CHOSEN)


def _compare_candidate(place: int, answer: Answer, evidence: Evidence) -> str:
    """Return a word about a candidate compared with the chosen one; after a refusal only about no gain."""
    assert answer.rule is not None, "a label with evidence was probed"
    chosen = evidence.choice.chosen
    has_gain = bool(answer.rule.gains[place])
    if answer.verdict.refusal is not None:
        return "" if has_gain else NO_GAIN
    if place == chosen:
        return CHOSEN
    if answer.rule.beaten[chosen, place]:
        return BEATEN
    if not has_gain:
        return NO_GAIN
    first, second = evidence.candidates[chosen], evidence.candidates[place]
    comparison = compare_scores(first.scores, second.scores, evidence.test_ratio)
    if comparison.is_within_error(evidence.choice.tolerance):
        return AS_GOOD
    return PROBABLY_WORSE if comparison.gap > 0 else PROBABLY_BETTER


def _write_notes(
    answer: Answer, known: Label, planned: NDArray[np.intp], collection: Collection
) -> Iterator[str]:
    number = int(known.known.sum())
    patients = count_patients(collection.patients, known.known)
    of_patients = f" of {count(patients, 'patient')}" if collection.has_patients else ""
    yield f"Values: {count(number, 'scan')}{of_patients}; {_describe(known)}."
    if 0 < len(planned) < number:
        shares = ", the classes in equal shares as far as possible" if known.kind == "classes" else ""
        unit = "by patient" if collection.has_patients else "at random"
        yield f"{len(planned):,} of them were drawn {unit} for the probes{shares}."
    lost = len(planned) - int(answer.label.known.sum())
    if planned.size and lost:
        yield f"Left out of the probes, because a baseline lacks them: {count(lost, 'scan')}."
    if answer.evidence is not None:
        yield _describe_control(answer, answer.evidence)


def _describe(label: Label) -> str:
    """Return the classes with their sizes, or the range of the numbers."""
    present = label.values[label.known]
    if label.kind == "number":
        low, middle, high = (format_cell(float(value)) for value in np.percentile(present, (0, 50, 100)))
        return f"{low} to {high}, median {middle}"
    sizes = np.bincount(present.astype(np.intp), minlength=len(label.classes))
    pairs = list(zip(label.classes, sizes.tolist(), strict=True))
    shown = ", ".join(f"{name}: {size:,}" for name, size in pairs[:_MAX_CLASSES_SHOWN])
    hidden = len(pairs) - _MAX_CLASSES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _describe_control(answer: Answer, evidence: Evidence) -> str:
    """Describe the scores of the probes for labels that are permuted among patients."""
    best = evidence.choice.best
    control, name = answer.controls[best], evidence.candidates[best].name
    over = f", over all {len(answer.controls)} layers" if len(answer.controls) > 1 else ""
    return (
        f"Control: with the label permuted among {evidence.noun} {PERMUTATIONS} times, a least-squares probe "
        f"of {name} has {evidence.metric} {control.chance:.2f} on average and "
        f"{np.fmax.reduce(control.permuted):.2f} at most, compared with {control.observed:.2f} for the true "
        f"label (p = {evidence.permutation_p:.2f}{over})."
    )
