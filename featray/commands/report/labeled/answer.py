"""Answer for one label which candidate to take: probe all candidates and baselines, choose, and decide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from featray.commands.report.labeled.choice import Rule, choose_candidate, measure_interval
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
    mean_without_nan,
    probe_features,
)
from featray.commands.report.labeled.verdict import Evidence, Score, Verdict, check_size, decide_verdict

MAX_SCANS = 1000
"""Largest number of scans that are probed. More are sampled by patient."""


Reader = Callable[[NDArray[np.intp]], NDArray[Any]]
"""Returns the features (scans, units) of the scans at these positions, finite."""


@dataclass(frozen=True)
class Candidate:
    """A layer in one view, or a baseline.

    Attributes:
        name: Name for the reader, such as `conv_3 (grid)`.
        units: Number of values per scan.
        readers: Read the features. A baseline of random weights has one reader per seed, and its scores are
            the means over the seeds; all others have one reader.
    """

    name: str
    units: int
    readers: tuple[Reader, ...]

    @classmethod
    def from_arrays(cls, name: str, *arrays: NDArray[Any]) -> Candidate:
        """Return a candidate from features (scans, units) in memory, one array per seed."""
        return cls(name, arrays[0].shape[1], tuple(array.__getitem__ for array in arrays))


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

    @property
    def noun(self) -> str:
        """Return the noun for patients: `patients`, or `scans` if each scan counts as one patient."""
        return "patients" if self.has_patients else "scans"


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
        rule: Which candidate beats which, and which are better than all baselines; None if nothing was
            probed.
        predictions: Out-of-fold predictions of the chosen candidate (repeats, scans, columns).
    """

    label: Label
    scans: NDArray[np.intp]
    verdict: Verdict
    evidence: Evidence | None = None
    controls: tuple[PermutationControl, ...] = ()
    rule: Rule | None = None
    predictions: NDArray[np.float32] | None = None


def choose_scans(label: Label, collection: Collection) -> NDArray[np.intp]:
    """Return the positions of the scans to probe, at most `MAX_SCANS`.

    They are empty if the label has too few patients. Patients are sampled with all their scans, and classes
    get equal shares of the sample. The same arguments give the same scans.
    """
    if check_size(label, collection.patients, collection.noun) is not None:
        return np.zeros(0, np.intp)
    known = np.flatnonzero(label.known)
    codes = label.values[known].astype(np.intp) if label.kind == "classes" else None
    return known[sample_scans(collection.patients[known], codes, MAX_SCANS, collection.seed)]


def restrict_label(label: Label, scans: NDArray[np.intp]) -> Label:
    """Return the label with missing values for all scans except those at these positions."""
    values = np.full(len(label.values), np.nan)
    values[scans] = label.values[scans]
    return replace(label, values=values)


def answer_label(
    label: Label,
    candidates: Sequence[Candidate],
    baselines: Sequence[Candidate],
    collection: Collection,
    on_step: Callable[[str], None] = lambda _: None,
) -> Answer:
    """Return the answer for one label.

    Linear algebra runs on one thread, because the matrices of a probe are small: several threads gain little
    on a free machine, lose much on a busy one, and change the last digits of the scores.

    Args:
        label: The label, one value per scan.
        candidates: At least one layer in one view, all for the same scans as the label.
        baselines: Baselines that the chosen candidate must be better than; may be empty.
        collection: The scans.
        on_step: Called with the name of each candidate and baseline before it is probed.
    """
    scans = choose_scans(label, collection)
    refused = check_size(label, collection.patients, collection.noun)
    if refused is not None:
        return Answer(label, scans, refused)
    trial = _make_trial(label, scans, collection)
    probes, controls, references = [], [], []
    with threadpool_limits(1):
        for candidate in candidates:
            on_step(candidate.name)
            features = candidate.readers[0](scans)
            probes.append(probe_features(features, trial))
            controls.append(control_by_permutation(features, trial))
        for baseline in baselines:
            on_step(baseline.name)
            references.append(_probe_baseline(baseline, scans, trial))
    rule = _make_rule(candidates, probes, references, compute_test_ratio(trial.folds))
    choice = choose_candidate(probes, trial, rule)
    best_control = controls[choice.best]
    evidence = Evidence(
        label=label.name,
        metric=trial.target.metric,
        patients=len(np.unique(trial.patients)),
        noun=collection.noun,
        candidates=tuple(map(_make_score, candidates, probes, choice.intervals)),
        baselines=tuple(references),
        choice=choice,
        permutation_p=compute_permutation_p(controls),
        chance=(best_control.chance, float(np.nanstd(best_control.permuted))),
        test_ratio=compute_test_ratio(trial.folds),
    )
    predictions = probes[choice.chosen].predictions
    return Answer(label, scans, decide_verdict(evidence), evidence, tuple(controls), rule, predictions)


def _make_trial(label: Label, scans: NDArray[np.intp], collection: Collection) -> Trial:
    target, patients = make_target(label, scans), collection.patients[scans]
    return Trial(target, patients, make_folds(patients, target.codes, collection.seed), collection.seed)


def _probe_baseline(baseline: Candidate, scans: NDArray[np.intp], trial: Trial) -> Score:
    """Return the scores of a baseline, as means over its seeds."""
    probes = [probe_features(read(scans), trial) for read in baseline.readers]
    scores: NDArray[np.float64] = np.mean([probe.scores for probe in probes], axis=0)
    interval = measure_interval([probe.predictions for probe in probes], trial)
    return Score(baseline.name, baseline.units, scores, mean_without_nan(scores), interval)


def _make_rule(
    candidates: Sequence[Candidate], probes: Sequence[Probe], references: Sequence[Score], test_ratio: float
) -> Rule:
    """Return the rule of the choice; `references` are the scores of the baselines."""
    sizes = np.array([candidate.units for candidate in candidates], np.intp)
    gains = [
        all(compare_scores(probe.scores, other.scores, test_ratio).is_gain for other in references)
        for probe in probes
    ]
    return Rule(sizes, find_beaten([probe.scores for probe in probes], test_ratio), np.array(gains, bool))


def _make_score(candidate: Candidate, probe: Probe, interval: tuple[float, float]) -> Score:
    return Score(candidate.name, candidate.units, probe.scores, probe.score, interval)
