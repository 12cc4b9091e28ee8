"""Leakage: a layer that holds the scanner is found, and facts that cannot be read are left out."""

from __future__ import annotations

import numpy as np
import pytest

from featray.commands.report.labeled.labels import Label, LeftOut
from featray.commands.report.labeled.leakage import make_facts, measure_leakage, merge_rare_classes

SCANS = 100
PATIENTS = np.arange(SCANS)
GENERATOR = np.random.default_rng(4)
SCANNER = np.arange(SCANS) % 2
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
    assert "same value" in left_out[0].reason


def test_a_layer_that_holds_the_scanner_leaks_and_noise_does_not() -> None:
    facts, _ = make_facts(make_columns(), PATIENTS)
    noise = GENERATOR.normal(size=(SCANS, 8)).astype(np.float32)
    leaky = noise.copy()
    leaky[:, 0] += 4 * SCANNER
    leaky[:, 1] = SPACING
    leaks = measure_leakage({"leaky": leaky, "clean": noise}, facts, PATIENTS)
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


def test_facts_of_few_patients_are_left_out() -> None:
    facts, left_out = make_facts(make_columns(), PATIENTS // 10)
    assert facts == []
    assert left_out[0].reason == "it is known for fewer than 20 patients"


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
