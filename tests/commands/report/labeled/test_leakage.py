"""Leakage: a layer that holds the scanner is found, and facts that cannot be read are left out."""

from __future__ import annotations

import numpy as np
import pytest

from featray.commands.report.labeled.answer import Candidate
from featray.commands.report.labeled.labels import Label, LeftOut
from featray.commands.report.labeled.leakage import Leak, make_facts, measure_leakage, merge_rare_classes
from featray.commands.report.labeled.probe import PermutationControl, compute_permutation_p

SCANS = 100
PATIENTS = np.arange(SCANS)
GENERATOR = np.random.default_rng(4)
SCANNER = np.arange(SCANS) % 2
UNDEFINED = PermutationControl(np.nan, np.full(99, np.nan))
SPACING = GENERATOR.uniform(0.5, 5, SCANS)


def make_columns() -> dict[str, list[object]]:
    return {
        "scanner": [("A", "B")[code] for code in SCANNER],
        "spacing": SPACING.tolist(),
        "kernel": ["soft"] * SCANS,
        "kVp": [None] * SCANS,
    }


def test_facts_without_difference_are_left_out_with_the_reason() -> None:
    facts, left_out = make_facts(make_columns(), PATIENTS)
    assert [fact.name for fact in facts] == ["scanner", "spacing"]
    assert [item.name for item in left_out] == ["kernel", "kVp"]
    assert left_out[0].reason == "no difference between 100 scans"
    assert left_out[1].reason == "not known for any scan"


def test_a_layer_that_holds_the_scanner_leaks_and_noise_does_not() -> None:
    facts, _ = make_facts(make_columns(), PATIENTS)
    noise = GENERATOR.normal(size=(SCANS, 8)).astype(np.float32)
    leaky = noise.copy()
    leaky[:, 0] += 4 * SCANNER
    leaky[:, 1] = SPACING
    leaks = measure_leakage(
        [Candidate.from_arrays("leaky", leaky), Candidate.from_arrays("clean", noise)], facts, PATIENTS
    )
    found = {(leak.fact, leak.candidate): leak for leak in leaks}
    assert len(found) == 4
    assert found["scanner", "leaky"].score > 0.95
    assert found["scanner", "leaky"].metric == "AUC"
    assert found["scanner", "leaky"].is_above_chance
    assert found["scanner", "leaky"].chance == pytest.approx(0.5, abs=0.05)
    assert found["spacing", "leaky"].score > 0.8
    assert found["spacing", "leaky"].metric == "R²"
    assert found["scanner", "clean"].score < 0.7
    assert not found["scanner", "clean"].is_above_chance
    assert found["spacing", "clean"].score < 0.1


def test_facts_that_are_known_for_different_scans_are_measured_together() -> None:
    columns = make_columns()
    columns["spacing"][:30] = [None] * 30
    facts, _ = make_facts(columns, PATIENTS)
    leaky = Candidate.from_arrays("leaky", np.stack([SCANNER, np.log2(SPACING)], axis=1))
    leaks = measure_leakage([leaky], facts, PATIENTS)
    assert {leak.fact: round(leak.strength) for leak in leaks} == {"scanner": 1, "spacing": 1}


def test_texts_are_classes_and_numbers_are_logarithms_or_classes() -> None:
    count = 200
    columns = {
        "kernel": [f"B{number % 30}f" for number in range(count)],  # 7 of each
        "kVp": [("80", "120")[number % 2] for number in range(count)],
        "slice count": list(range(100, 100 + count)),
        "spacing": [1.0] * (count - 18) + [1.5 + 0.1 * number for number in range(18)],
        "offset": [-1.0, 0.5, 2.0, 3.0] * (count // 4),
    }
    facts, left_out = make_facts(columns, np.arange(count))
    found = {fact.name: fact for fact in facts}
    assert [item.name for item in left_out] == ["kernel"]
    assert found["kVp"].classes == ("120", "80")
    assert found["slice count"].kind == "number"
    assert found["slice count"].values[-1] == np.log2(299)
    assert found["spacing"].classes == ("other", "usual value")
    assert found["offset"].values[0] == -1


def test_a_score_that_is_not_defined_is_not_above_chance() -> None:
    leak = Leak("kernel", "layer", "AUC", np.nan, np.nan, compute_permutation_p([UNDEFINED]))
    assert not leak.is_above_chance
    assert np.isnan(leak.strength)


def test_facts_of_few_patients_are_left_out() -> None:
    facts, left_out = make_facts(make_columns(), PATIENTS // 10)
    assert facts == []
    assert left_out[0].reason == "known for fewer than 20 patients"


def test_rare_classes_are_merged() -> None:
    values = np.repeat([0.0, 1, 2, 3, np.nan], [40, 30, 8, 9, 5])
    merged = merge_rare_classes(Label("scanner", "classes", values, ("A", "B", "C", "D")))
    assert isinstance(merged, Label)
    assert merged.classes == ("A", "B", "other")
    assert [int((merged.values == code).sum()) for code in range(3)] == [40, 30, 17]
    assert np.isnan(merged.values).sum() == 5


def test_classes_that_are_rare_even_together_have_no_value() -> None:
    values = np.repeat([0.0, 1, 2], [40, 30, 8])
    merged = merge_rare_classes(Label("scanner", "classes", values, ("A", "B", "C")))
    assert isinstance(merged, Label)
    assert merged.classes == ("A", "B")
    assert np.isnan(merged.values).sum() == 8


def test_one_class_that_is_not_rare_is_no_fact() -> None:
    values = np.repeat([0.0, 1], [90, 10])
    assert isinstance(merge_rare_classes(Label("scanner", "classes", values, ("A", "B"))), LeftOut)
