"""Decide before any probe which scans of which label are probed, so that only these are read again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.answer import Candidate, Collection, choose_scans, restrict_label
from featray.commands.report.labeled.labels import MISSING, Label, LabelTable

_PATIENT_COLUMNS = ("patient", "PatientID")
"""Columns of `scans` that say to which patient a scan belongs, if the table of labels does not."""


@dataclass(frozen=True, eq=False)
class ProbePlan:
    """Which scans are probed.

    Attributes:
        labels: Labels with one value per scan of the report; missing for scans that cannot be used.
        scans: For each label the positions of the scans to probe, at most 1,000; empty if the label has too
            few patients.
        candidates: Positions of the candidates to probe among the views of the report.
        collection: Patients and the seed.
    """

    labels: tuple[Label, ...]
    scans: tuple[NDArray[np.intp], ...]
    candidates: tuple[int, ...]
    collection: Collection

    @property
    def union(self) -> NDArray[np.intp]:
        """Return the positions of the scans that some label probes, in ascending order."""
        return np.unique(np.concatenate([np.zeros(0, np.intp), *self.scans]))


def plan_probes(
    features: FeatureSet,
    table: LabelTable,
    *,
    usable: NDArray[np.intp] | None = None,
    candidates: Sequence[int] | None = None,
    seed: int = 0,
) -> ProbePlan:
    """Return which scans are probed. The same arguments give the same scans.

    Args:
        features: The candidates.
        table: Labels of the scans of `features`.
        usable: Positions of the scans whose features are finite; None for all.
        candidates: Positions of the candidates to probe; None for all.
        seed: Decides sample, folds, permutations and resamples.
    """
    collection = group_scans(features.scans, table, seed)
    labels = table.labels if usable is None else [restrict_label(label, usable) for label in table.labels]
    return ProbePlan(
        labels=tuple(labels),
        scans=tuple(choose_scans(label, collection) for label in labels),
        candidates=tuple(range(len(features.views)) if candidates is None else candidates),
        collection=collection,
    )


def group_scans(scans: pa.Table, table: LabelTable | None, seed: int = 0) -> Collection:
    """Return the patients of the scans: from the table of labels, else from a column of `scans`.

    The columns of `scans` are `patient`, from a manifest, and `PatientID`, from `privacy.dicom_tags`. Without
    any, each scan counts as one patient, and so does a scan without a patient.
    """
    if table is not None and table.has_patients:
        return Collection(table.patients, has_patients=True, seed=seed)
    for name in _PATIENT_COLUMNS:
        if name in scans.column_names:
            return Collection(_number_patients(scans[name].to_pylist()), has_patients=True, seed=seed)
    return Collection(np.arange(len(scans)), has_patients=False, seed=seed)


def make_candidates(features: FeatureSet, places: Sequence[int]) -> list[Candidate]:
    """Return the candidates at these positions, which are read from their files only when they are probed."""
    return [
        Candidate(features.views[place].name, features.views[place].units, (features.files[place].read,))
        for place in places
    ]


def _number_patients(names: Sequence[object]) -> NDArray[np.intp]:
    """Return a number per patient; scans without a patient get a number of their own."""
    texts = ["" if name is None else str(name).strip() for name in names]
    keys = [("", place) if text.casefold() in MISSING else (text, -1) for place, text in enumerate(texts)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], np.intp)
