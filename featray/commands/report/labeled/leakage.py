"""Measure how well facts of the header can be read from features: scanner, kernel, spacing and similar facts.

A layer that holds the scanner may predict a label only because the label depends on the scanner in this
collection. There is no accepted limit, so the scores are reported next to the score for permuted facts. The
probe is a least-squares probe on one repeat of the folds, because it scores all facts and their permutations
from one reduction of the features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from featray.commands.report.labeled.answer import Candidate
from featray.commands.report.labeled.folds import make_folds
from featray.commands.report.labeled.labels import (
    MAX_WHOLE_CLASSES,
    MISSING,
    Label,
    LeftOut,
    count_patients,
    parse_number,
)
from featray.commands.report.labeled.probe import (
    PermutationControl,
    Trial,
    compute_permutation_p,
    control_targets,
    make_target,
)

MIN_CLASS_SCANS = 15
"""Smallest number of scans of a class; rarer classes are merged into one."""
MIN_PATIENTS = 20
"""Smallest number of patients for which a fact is probed."""
MAX_P = 0.05
OTHER = "other"
"""Name of the class into which rare classes are merged."""
_SAME_SHARE = 0.9
"""Share of scans with the same number from which a number becomes two classes."""


@dataclass(frozen=True)
class Leak:
    """How well one fact can be read from one candidate.

    Attributes:
        fact: Name of the fact.
        candidate: Name of the candidate.
        metric: `AUC` or `R²`.
        score: Mean score over the folds.
        chance: Mean score for permuted facts.
        p: Share of the permuted facts that can be read as well as the true fact.
    """

    fact: str
    candidate: str
    metric: str
    score: float
    chance: float
    p: float

    @property
    def strength(self) -> float:
        """Return the position of the score between chance (0) and perfect (1)."""
        return float(np.clip((self.score - self.chance) / (1 - self.chance), 0, 1))

    @property
    def is_above_chance(self) -> bool:
        """Return whether the fact can be read better than 95 % of the permuted facts."""
        return self.p <= MAX_P


def make_facts(
    columns: Mapping[str, Sequence[Any]], patients: NDArray[np.intp]
) -> tuple[list[Label], list[LeftOut]]:
    """Return facts as labels, and the columns that cannot be facts with the reason.

    Texts are classes. Numbers are classes if there are two of them or at most five whole ones, or if nearly
    all scans have the same; then the classes are this value and all others. Other numbers are numbers, and
    logarithms if all are positive, because ratios of spacings matter. Classes with fewer than 15 scans are
    merged into one class, and if that is still rarer, its scans are left out. Facts of fewer than 20 patients
    are left out.

    Args:
        columns: Name of the fact → one text or number per scan; None if it is not known.
        patients: Number of the patient of each scan.
    """
    facts, left_out = [], []
    for name, values in columns.items():
        decided = _decide_fact(name, ["" if value is None else str(value).strip() for value in values])
        if isinstance(decided, Label) and count_patients(patients, decided.known) < MIN_PATIENTS:
            decided = LeftOut(name, f"known for fewer than {MIN_PATIENTS} patients")
        if isinstance(decided, Label):
            facts.append(decided)
        else:
            left_out.append(decided)
    return facts, left_out


def _decide_fact(name: str, texts: Sequence[str]) -> Label | LeftOut:
    is_known = np.array([text.casefold() not in MISSING for text in texts], bool)
    present = np.array(texts, object)[is_known]
    if not len(present):
        return LeftOut(name, "not known for any scan")
    numbers = [parse_number(text) for text in present]
    if None in numbers:
        return _make_class_fact(name, present, is_known)
    values = np.array(numbers, np.float64)
    different, counts = np.unique(values, return_counts=True)
    is_whole = bool(np.all(different == np.round(different)))
    if len(different) <= 2 or (is_whole and len(different) <= MAX_WHOLE_CLASSES):
        return _make_class_fact(name, np.array([f"{value:g}" for value in values], object), is_known)
    if counts.max() >= _SAME_SHARE * len(values):
        is_usual = values == different[counts.argmax()]
        return _make_class_fact(name, np.where(is_usual, "usual value", OTHER).astype(object), is_known)
    result = np.full(len(texts), math.nan)
    result[is_known] = np.log2(values) if different[0] > 0 else values
    return Label(name, "number", result)


def _make_class_fact(name: str, present: NDArray[Any], is_known: NDArray[np.bool_]) -> Label | LeftOut:
    """Return the fact with the classes `present`, one for each scan of which it is known."""
    classes, codes = np.unique(present.astype(str), return_inverse=True)
    if len(classes) == 1:
        return LeftOut(name, f"no difference between {len(present)} scans")
    values = np.full(len(is_known), math.nan)
    values[is_known] = codes
    return merge_rare_classes(Label(name, "classes", values, tuple(map(str, classes))))


def merge_rare_classes(label: Label) -> Label | LeftOut:
    """Return the label with rare classes merged into `OTHER`, or the reason why fewer than two remain."""
    codes = label.values[label.known].astype(np.intp)
    counts = np.bincount(codes, minlength=len(label.classes))
    kept = np.flatnonzero(counts >= MIN_CLASS_SCANS)
    rare = int(counts.sum() - counts[kept].sum())
    has_other = rare >= MIN_CLASS_SCANS
    if len(kept) + has_other < 2:
        return LeftOut(label.name, f"fewer than two classes with {MIN_CLASS_SCANS} scans")
    new_codes = np.full(len(label.classes), len(kept) if has_other else math.nan)
    new_codes[kept] = np.arange(len(kept))
    values = label.values.copy()
    values[label.known] = new_codes[codes]
    names = tuple(label.classes[code] for code in kept) + ((OTHER,) if has_other else ())
    return replace(label, values=values, classes=names)


def measure_leakage(
    candidates: Sequence[Candidate], facts: Sequence[Label], patients: NDArray[np.intp], *, seed: int = 0
) -> list[Leak]:
    """Return one `Leak` per candidate and fact.

    Args:
        candidates: The candidates.
        facts: Facts, one value per scan. Scans without a value are left out.
        patients: Number of the patient of each scan.
        seed: For the folds and the permutations.
    """
    leaks = []
    for group in _group_by_scans(facts):
        scans = np.flatnonzero(group[0].known)
        targets = [make_target(fact, scans) for fact in group]
        folds = make_folds(patients[scans], None, seed, repeats=1)
        trial = Trial(targets[0], patients[scans], folds, seed)
        for candidate in candidates:
            with threadpool_limits(1):  # as in `answer_label`
                controls = control_targets(candidate.readers[0](scans), targets, trial)
            leaks += [
                _make_leak(fact.name, candidate.name, target.metric, control)
                for fact, target, control in zip(group, targets, controls, strict=True)
            ]
    return leaks


def _group_by_scans(facts: Sequence[Label]) -> list[list[Label]]:
    """Return the facts that are known for the same scans together."""
    groups: dict[bytes, list[Label]] = {}
    for fact in facts:
        groups.setdefault(fact.known.tobytes(), []).append(fact)
    return list(groups.values())


def _make_leak(fact: str, candidate: str, metric: str, control: PermutationControl) -> Leak:
    p = compute_permutation_p([control])
    return Leak(fact, candidate, metric, control.observed, control.chance, p)
