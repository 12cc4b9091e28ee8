"""The plan of the probes: which scans, and which patients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from featray.commands.report.answer.probe_plan import group_scans, plan_probes
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.labels import LabelTable, parse_labels

SCANS = 1500


@pytest.fixture(scope="module")
def features(make_set: Callable[..., FeatureSet]) -> FeatureSet:
    columns = {"PatientID": [f"p{number // 2}" for number in range(SCANS - 2)] + [None, " "]}
    return make_set({"a": np.zeros((SCANS, 2)), "b": np.zeros((SCANS, 3))}, columns)


def make_table(features: FeatureSet, with_patients: bool = False) -> LabelTable:
    lines = ["scan_id,many,few,rare" + (",patient" if with_patients else "")]
    for number, scan_id in enumerate(features.scan_ids):
        values = [f"{number / 7:.3f}", str(number / 3) if number < 120 else "", "x" if number < 30 else ""]
        lines.append(",".join([scan_id, *values, *([f"q{number // 3}"] if with_patients else [])]))
    return parse_labels("\n".join(lines).encode(), features.scan_ids)


def test_labels_are_probed_on_few_scans_by_patient_and_the_union_is_what_must_be_read_again(
    features: FeatureSet,
) -> None:
    plan = plan_probes(features, make_table(features))
    many, few = plan.scans
    assert 998 <= len(many) <= 1000
    assert few.tolist() == list(range(120))
    assert plan.union.tolist() == sorted(set(many) | set(few))
    # Patients are sampled with all their scans, except the last two scans, whose patient is not known.
    paired = many[many < SCANS - 2]
    assert (np.bincount(paired // 2) % 2 == 0).all()
    assert plan.candidates == (0, 1)


def test_the_same_seed_gives_the_same_plan_and_another_seed_another_one(features: FeatureSet) -> None:
    table = make_table(features)
    first, again, other = (plan_probes(features, table, seed=seed).union for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_scans_that_cannot_be_used_and_candidates_that_cannot_be_measured_are_left_out(
    features: FeatureSet,
) -> None:
    plan = plan_probes(features, make_table(features), usable=np.arange(10, 130), candidates=[1])
    assert plan.union.tolist() == list(range(10, 130))
    assert plan.candidates == (1,)


def test_the_patients_of_the_table_of_labels_come_first(features: FeatureSet) -> None:
    collection = group_scans(features.scans, make_table(features, with_patients=True))
    assert collection.has_patients
    assert collection.patients[:6].tolist() == [0, 0, 0, 1, 1, 1]


def test_patients_from_the_manifest_or_the_header_are_used_without_labels(features: FeatureSet) -> None:
    collection = group_scans(features.scans, None)
    assert collection.has_patients
    assert collection.patients[:4].tolist() == [0, 0, 1, 1]
    assert len(set(collection.patients[-3:])) == 3  # scans without a patient are patients of their own


def test_without_patients_each_scan_counts_as_one(features: FeatureSet) -> None:
    collection = group_scans(features.scans.select(["scan_id"]), None)
    assert not collection.has_patients
    assert len(set(collection.patients)) == SCANS


def test_a_label_with_few_patients_has_no_scans_to_read(features: FeatureSet) -> None:
    lines = ["scan_id,contrast", *(f"{features.scan_ids[number]},{number % 2}" for number in range(24))]
    plan = plan_probes(features, parse_labels("\n".join(lines).encode(), features.scan_ids))
    assert len(plan.union) == 0
