"""The parts of the page about leakage, from layers of which it is known what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from featray.commands.report.answer.probe_plan import group_scans
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.labels import Label
from featray.commands.report.leakage.facts import collect_geometry, collect_scanner_facts
from featray.commands.report.leakage.measure_leaks import LeakParts, LeakScope, measure_leaks
from featray.commands.report.leakage.neighbor_sharing import measure_chance, measure_sharing

SCANS = 120
GENERATOR = np.random.default_rng(6)
SCANNER = np.arange(SCANS) % 2
CONTRAST = np.arange(SCANS) // 2 % 2
SPACING = GENERATOR.uniform(0.5, 5, SCANS)
SLICES = GENERATOR.integers(50, 300, SCANS)


@dataclass
class Result:
    """The parts, and the steps that were reported."""

    parts: LeakParts
    steps: list[tuple[str, float]]


@pytest.fixture(scope="module")
def features(make_set: Callable[..., FeatureSet]) -> FeatureSet:
    noise = GENERATOR.normal(size=(SCANS, 8)).astype(np.float32)
    leaky, clean = noise.copy(), noise.copy()
    leaky[:, 0] += 8 * SCANNER
    leaky[:, 1] = np.log2(SPACING)
    clean[:, 2] += 8 * CONTRAST
    columns = {
        "shape": [[int(slices), 512, 512] for slices in SLICES],
        "spacing": [[float(spacing), 0.7, 0.7] for spacing in SPACING],
        "orientation": ["LPS"] * SCANS,
        "format": ["nifti"] * SCANS,
        "ManufacturerModelName": [("A1", "B2")[code] for code in SCANNER],
        "contrast": [("no", "yes")[code] for code in CONTRAST],
        "Kernel": [("soft", "sharp")[code] for code in CONTRAST],
    }
    return make_set({"leaky": leaky, "clean": clean}, columns)


@pytest.fixture(scope="module")
def result(features: FeatureSet) -> Result:
    labels = (
        Label("contrast", "classes", CONTRAST.astype(float), ("no", "yes")),
        Label("kernel", "classes", CONTRAST.astype(float), ("no", "yes")),
    )
    steps: list[tuple[str, float]] = []
    scope = LeakScope(group_scans(features.scans, None), labels)
    return Result(measure_leaks(features, scope, lambda text, share: steps.append((text, share))), steps)


def test_each_layer_has_a_leak_per_fact_and_facts_that_are_labels_are_none(result: Result) -> None:
    names = [(leak.candidate, leak.target) for leak in result.parts.leaks]
    facts = ["slice spacing", "slice count", "scanner"]
    assert names == [(layer, fact) for layer in ("leaky (vector)", "clean (vector)") for fact in facts]


def test_the_layer_that_holds_the_scanner_leaks_and_the_other_one_does_not(result: Result) -> None:
    leaks = {(leak.candidate, leak.target): leak for leak in result.parts.leaks}
    assert leaks["leaky (vector)", "scanner"].strength > 0.95
    assert leaks["leaky (vector)", "scanner"].metric == "AUC"
    assert leaks["leaky (vector)", "slice spacing"].strength > 0.8
    assert leaks["leaky (vector)", "slice spacing"].metric == "R²"
    assert leaks["leaky (vector)", "slice count"].strength < 0.3
    assert leaks["clean (vector)", "scanner"].strength < 0.4


def test_strong_leakage_is_one_warning_per_layer(result: Result) -> None:
    (veto,) = result.parts.vetoes
    assert veto.candidate == "leaky (vector)"
    assert veto.reason.startswith("Leakage: slice spacing (R² 1.00)")
    assert "and scanner (AUC 1.00) can be read off its values. This rules nothing out" in veto.reason


def test_facts_that_do_not_differ_are_named(result: Result) -> None:
    (caution,) = result.parts.cautions
    assert caution == (
        "Leakage was not measured for some facts (pixel spacing, crop size, orientation and format: no "
        "difference between 120 scans)."
    )


def test_neighbors_share_the_scanner_in_one_layer_and_the_label_in_the_other(result: Result) -> None:
    contrast, _ = result.parts.sharing
    assert contrast.columns == ("same contrast", "same scanner", "robustness index")
    rows = dict(zip(contrast.rows, contrast.values.tolist(), strict=True))
    assert rows["leaky (vector)"][2] < 0.3
    assert rows["clean (vector)"][2] > 0.7
    assert rows["all pairs of scans"][2] == pytest.approx(0.5, abs=0.01)


def test_progress_ends_at_1(result: Result) -> None:
    assert [share for _, share in result.steps] == sorted(share for _, share in result.steps)
    assert result.steps[-1][1] == 1


def test_an_output_without_facts_says_so(make_set: Callable[..., FeatureSet]) -> None:
    features = make_set({"z": np.zeros((30, 2))})
    parts = measure_leaks(features, LeakScope(group_scans(features.scans, None)), lambda *_: None)
    assert parts.leaks == ()
    assert parts.methods == ()
    assert parts.cautions == (
        "Leakage was not measured, because no fact of the acquisition differs between enough scans.",
    )


def test_columns_of_scanners_are_recognized_by_name_and_unknown_columns_are_not() -> None:
    scans = pa.table(
        {
            "scan_id": ["a"],
            "KVP": ["120"],
            "vendor": ["X"],
            "Manufacturer": ["Y"],
            "age": ["70"],
            "bytes_read": [1],
        }
    )
    assert collect_scanner_facts(scans) == {"manufacturer": ["Y"], "kVp": ["120"]}
    assert collect_scanner_facts(scans, ["kvp"]) == {"manufacturer": ["Y"]}
    assert collect_geometry(scans) == {}


def test_arrays_without_geometry_have_no_geometry_facts() -> None:
    scans = pa.table({"spacing": [None, [1.0, 0.7, 0.7]], "shape": [[4], [30, 512, 256]]})
    facts = collect_geometry(scans)
    assert facts["slice spacing"] == [None, 1.0]
    assert facts["slice count"] == [None, 30]
    assert facts["crop size"] == [None, 512 * 256]


def test_the_robustness_index_counts_pairs_that_share_one_of_both() -> None:
    labels, scanners = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    chance = measure_chance(labels, scanners)
    assert (chance.label, chance.scanner, chance.index) == pytest.approx((1 / 3, 1 / 3, 1 / 2))
    many = np.repeat(np.arange(4), 12)
    by_label = (10.0 * labels + 0.1 * scanners)[many][:, None] + 1e-3 * GENERATOR.normal(size=(48, 1))
    sharing = measure_sharing(by_label, labels[many], scanners[many])
    assert sharing.label == 1
    assert np.isnan(sharing.index) or sharing.index == 1
