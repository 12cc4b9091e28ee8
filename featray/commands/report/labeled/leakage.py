"""Measure how well facts of the header can be read from features: scanner, kernel, spacing and similar facts.

A layer that holds the scanner may predict a label only because the label depends on the scanner in this
collection. There is no accepted limit, so the scores are reported next to the score for permuted facts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.labeled.folds import make_folds
from featray.commands.report.labeled.labels import Label, LeftOut, count_patients, decide_column
from featray.commands.report.labeled.probe import (
    Trial,
    compute_permutation_p,
    control_by_permutation,
    make_target,
    probe_features,
)

MIN_CLASS_SCANS = 15
"""Smallest number of scans of a class; rarer classes are merged into one."""
MIN_PATIENTS = 20
"""Smallest number of patients for which a fact is probed."""
MAX_P = 0.05
OTHER = "other"
"""Name of the class into which rare classes are merged."""


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
    def is_above_chance(self) -> bool:
        """Return whether the fact can be read better than 95 % of the permuted facts."""
        return self.p <= MAX_P


def make_facts(
    columns: Mapping[str, Sequence[Any]], patients: NDArray[np.intp]
) -> tuple[list[Label], list[LeftOut]]:
    """Return facts as labels, and the columns that cannot be facts with the reason.

    The rules are those of labels. In addition, classes with fewer than 15 scans are merged into one class,
    and if that is still rarer, its scans are left out. Facts of fewer than 20 patients are left out.

    Args:
        columns: Name of the fact → one text or number per scan; None if it is not known.
        patients: Number of the patient of each scan.
    """
    facts, left_out = [], []
    for name, values in columns.items():
        decided = decide_column(name, ["" if value is None else str(value) for value in values])
        if isinstance(decided, Label) and decided.kind == "classes":
            decided = merge_rare_classes(decided)
        if isinstance(decided, Label) and count_patients(patients, decided.known) < MIN_PATIENTS:
            decided = LeftOut(name, f"it is known for fewer than {MIN_PATIENTS} patients")
        if isinstance(decided, Label):
            facts.append(decided)
        else:
            left_out.append(decided)
    return facts, left_out


def merge_rare_classes(label: Label) -> Label | LeftOut:
    """Return the label with rare classes merged into `OTHER`, or the reason why fewer than two remain."""
    codes = label.values[label.known].astype(np.intp)
    counts = np.bincount(codes, minlength=len(label.classes))
    kept = np.flatnonzero(counts >= MIN_CLASS_SCANS)
    rare = int(counts.sum() - counts[kept].sum())
    has_other = rare >= MIN_CLASS_SCANS
    if len(kept) + has_other < 2:
        return LeftOut(label.name, f"fewer than two of its classes have {MIN_CLASS_SCANS} scans")
    new_codes = np.full(len(label.classes), len(kept) if has_other else math.nan)
    new_codes[kept] = np.arange(len(kept))
    values = label.values.copy()
    values[label.known] = new_codes[codes]
    names = tuple(label.classes[code] for code in kept) + ((OTHER,) if has_other else ())
    return replace(label, values=values, classes=names)


def measure_leakage(
    candidates: Mapping[str, NDArray[np.floating]],
    facts: Sequence[Label],
    patients: NDArray[np.intp],
    *,
    seed: int = 0,
) -> list[Leak]:
    """Return one `Leak` per fact and candidate, by one repeat of the probe that scores labels.

    Args:
        candidates: Name → features (scans, values).
        facts: Facts of the same scans.
        patients: Number of the patient of each scan.
        seed: For the folds and the permutations.
    """
    leaks = []
    for fact in facts:
        scans = np.flatnonzero(fact.known)
        target = make_target(fact, scans)
        folds = make_folds(patients[scans], target.codes, seed, repeats=1)
        trial = Trial(target, patients[scans], folds, seed)
        for name, features in candidates.items():
            leaks.append(_measure_leak(fact.name, name, features[scans], trial))
    return leaks


def _measure_leak(fact: str, candidate: str, features: NDArray[np.floating], trial: Trial) -> Leak:
    probe = probe_features(features, trial)
    control = control_by_permutation(features, trial)
    p = compute_permutation_p([control])
    return Leak(fact, candidate, trial.target.metric, probe.score, control.chance, p)
