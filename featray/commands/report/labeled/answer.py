"""Answer for one label which candidate to take: probe all candidates and baselines, choose, and decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.labeled.choice import Rule, choose_candidate
from featray.commands.report.labeled.compare import compare_scores, compute_test_ratio, find_beaten
from featray.commands.report.labeled.folds import make_folds, sample_scans
from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.probe import (
    PermutationControl,
    Probe,
    Trial,
    compute_permutation_p,
    control_by_permutation,
    make_target,
    probe_features,
)
from featray.commands.report.labeled.verdict import Evidence, Score, Verdict, check_size, decide_verdict

MAX_SCANS = 1000
"""Largest number of scans that are probed. More are sampled by patient."""


@dataclass(frozen=True)
class Candidate:
    """A layer in one view, or a baseline.

    Attributes:
        name: Name for the reader, such as `conv_3 (grid)`.
        features: (scans, values), finite. A memory-mapped array is read one candidate at a time.
    """

    name: str
    features: NDArray[np.floating]


@dataclass(frozen=True)
class Collection:
    """The scans of the candidates.

    Attributes:
        patients: Number of the patient of each scan.
        has_patients: Whether the patients are known; otherwise each scan counts as one patient.
        seed: Decides the folds, the sample, the permutations and the resamples.
    """

    patients: NDArray[np.intp]
    has_patients: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer for one label.

    Attributes:
        label: The label.
        scans: Positions of the scans that were probed; empty if the label has too few patients.
        verdict: The sentence.
        evidence: Scores of candidates and baselines, the choice and the p-value against permuted labels; None
            if nothing was probed.
        controls: Permutation control of each candidate.
        beaten: Whether the candidate of the row beats the candidate of the column.
        predictions: Out-of-fold predictions of the chosen candidate (repeats, scans, columns).
    """

    label: Label
    scans: NDArray[np.intp]
    verdict: Verdict
    evidence: Evidence | None = None
    controls: tuple[PermutationControl, ...] = ()
    beaten: NDArray[np.bool_] | None = None
    predictions: NDArray[np.float32] | None = None


def answer_label(
    label: Label, candidates: Sequence[Candidate], baselines: Sequence[Candidate], collection: Collection
) -> Answer:
    """Return the answer for one label.

    Args:
        label: The label, one value per scan.
        candidates: At least one layer in one view, all for the same scans as the label.
        baselines: What the chosen candidate must be better than; may be empty.
        collection: The scans.
    """
    noun = "patients" if collection.has_patients else "scans"
    refused = check_size(label, collection.patients, noun)
    if refused is not None:
        return Answer(label, np.zeros(0, np.intp), refused)
    scans, trial = _make_trial(label, collection)
    probes = [probe_features(candidate.features[scans], trial) for candidate in candidates]
    controls = tuple(control_by_permutation(candidate.features[scans], trial) for candidate in candidates)
    references = [probe_features(baseline.features[scans], trial) for baseline in baselines]
    rule = _make_rule(candidates, probes, references, compute_test_ratio(trial.folds))
    choice = choose_candidate(probes, trial, rule)
    best_control = controls[choice.best]
    evidence = Evidence(
        label=label.name,
        metric=trial.target.metric,
        patients=len(np.unique(trial.patients)),
        noun=noun,
        candidates=tuple(map(_make_score, candidates, probes)),
        baselines=tuple(map(_make_score, baselines, references)),
        choice=choice,
        permutation_p=compute_permutation_p(controls),
        chance=(best_control.chance, float(np.nanstd(best_control.permuted))),
        test_ratio=compute_test_ratio(trial.folds),
    )
    return Answer(
        label,
        scans,
        decide_verdict(evidence),
        evidence,
        controls,
        rule.beaten,
        probes[choice.chosen].predictions,
    )


def _make_trial(label: Label, collection: Collection) -> tuple[NDArray[np.intp], Trial]:
    """Return the positions of the scans to probe, and the trial of these scans."""
    known = np.flatnonzero(label.known)
    codes = label.values[known].astype(np.intp) if label.kind == "classes" else None
    scans = known[sample_scans(collection.patients[known], codes, MAX_SCANS, collection.seed)]
    target, patients = make_target(label, scans), collection.patients[scans]
    folds = make_folds(patients, target.codes, collection.seed)
    return scans, Trial(target, patients, folds, collection.seed)


def _make_rule(
    candidates: Sequence[Candidate], probes: Sequence[Probe], references: Sequence[Probe], test_ratio: float
) -> Rule:
    """Return the rule of the choice; `references` are the results of the baselines."""
    sizes = np.array([candidate.features.shape[1] for candidate in candidates], np.intp)
    gains = [
        all(compare_scores(probe.scores, other.scores, test_ratio).is_gain for other in references)
        for probe in probes
    ]
    return Rule(sizes, find_beaten([probe.scores for probe in probes], test_ratio), np.array(gains, bool))


def _make_score(candidate: Candidate, probe: Probe) -> Score:
    return Score(candidate.name, candidate.features.shape[1], probe.scores, probe.score)
