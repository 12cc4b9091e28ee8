"""Sentences on what would change a report, and what is said without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from featray.commands.report.answer.answer_labels import answer_labels
from featray.commands.report.answer.changes import (
    list_changes,
    list_general_changes,
    list_table_cautions,
    write_summary,
)
from featray.commands.report.answer.probe_plan import plan_probes
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.answer import Answer, Collection
from featray.commands.report.labeled.choice import Choice
from featray.commands.report.labeled.labels import Label, LabelTable, parse_labels
from featray.commands.report.labeled.verdict import Evidence, Refusal, Score, Verdict

LABEL = Label("contrast", "classes", np.zeros(3), ("no", "yes"))
PATIENTS = Collection(np.arange(3), has_patients=True)
NO_SCANS = np.zeros(0, np.intp)
NOISE = np.random.default_rng(0).normal(0, 0.05, 20)


def explain(refusal: Refusal, needed: int | None, **options: Any) -> str:
    verdict = Verdict("contrast", "No verdict", refusal, needed, **options)
    (change,) = list_changes([Answer(LABEL, NO_SCANS, verdict)], PATIENTS, None)
    return change


def test_each_refusal_says_what_would_lift_it() -> None:
    assert explain(Refusal.FEW_PATIENTS, 150) == "contrast: about 150 patients with a value."
    small = explain(Refusal.SMALL_CLASS, 1500)
    assert small == "contrast: about 1,500 patients with a value, or 15 in each class."
    assert explain(Refusal.WIDE_INTERVAL, 170).endswith("for an interval narrower than 0.3.")
    assert explain(Refusal.CHANCE, 550).endswith(
        "about 550 patients with a value, to tell the score from chance."
    )
    assert "a layer, view or model that holds more of it; more patients alone" in explain(
        Refusal.CHANCE, None
    )
    gain = explain(Refusal.NO_GAIN, 400, candidate="z", baseline="header")
    assert gain.endswith("to tell whether z gains over the baseline header.")
    assert "holds more of it than the baseline header;" in explain(Refusal.NO_GAIN, None, baseline="header")
    enough = explain(Refusal.NO_GAIN, None, baseline="header", is_baseline_enough=True)
    assert enough.endswith("nothing, because no layer can hold much more of it than the baseline header.")


def test_a_verdict_says_how_many_patients_would_tell_close_layers_apart() -> None:
    first = Score("conv_3", 100, 0.8 + NOISE, 0.8)
    second = Score("z", 10, 0.75 - NOISE, 0.75)
    choice = Choice(0, 0, 0.8, 0.7, 0.9, (1.0, 0.0), ((0.7, 0.9), (0.7, 0.8)), 0.02)
    evidence = Evidence(
        "contrast", "AUC", 100, "patients", (first, second), (), choice, 0.01, (0.5, 0.1), 1 / 3
    )
    verdict = Verdict("contrast", "For contrast take conv_3", candidate="conv_3", other="z")
    changes = list_changes([Answer(LABEL, NO_SCANS, verdict, evidence)], PATIENTS, None)
    assert changes[0].startswith("contrast: about ")
    assert changes[0].endswith(" patients would tell conv_3 and z apart, if the gap of 0.05 remains.")
    assert changes[1].startswith("Missing baselines: HU histogram and PCA of voxels.")
    assert "--random-weights" in changes[2]
    near = replace(evidence, candidates=(first, replace(second, scores=first.scores - 0.01)))
    changes = list_changes([Answer(LABEL, NO_SCANS, verdict, near)], PATIENTS, None)
    assert not changes[0].startswith("contrast")  # the gap is too small to matter


def test_without_labels_the_changes_and_the_summary_say_what_labels_would_bring(
    make_set: Callable[..., FeatureSet],
) -> None:
    one = make_set({"z_mean": np.zeros((4, 2))})
    labels, layers = list_general_changes(one, None)
    assert "`--labels FILE.csv`" in labels
    assert layers.startswith("Only one layer was compared.")
    pooled = make_set({"conv": np.zeros((4, 2)), "z_mean": np.zeros((4, 2))}, views={"conv": "mean"})
    assert "`pool: grid`" in list_general_changes(pooled, None)[1]
    grids = make_set({"conv": np.zeros((4, 2)), "z_mean": np.zeros((4, 2))}, views={"conv": "grid"})
    assert len(list_general_changes(grids, None)) == 1
    assert write_summary(None).startswith("No labels were given, so no layer can be recommended: ")


def make_table(*lines: str) -> LabelTable:
    return parse_labels("\n".join(lines).encode(), [f"s{number}" for number in range(4)])


def test_a_table_without_a_usable_label_is_explained_in_the_summary() -> None:
    table = make_table("scan_id,visit,same", "s0,2024-01-01,x", "s1,2024-01-02,x")
    assert write_summary(table) == (
        "No column of the table of labels can be used, so no layer can be recommended: visit: it holds "
        "dates; same: it has the same value for all 2 scans that have one."
    )
    assert write_summary(make_table("scan_id,x", "s0,a", "s1,b")) == ""


def test_a_table_without_a_usable_label_gives_parts_without_content(
    make_set: Callable[..., FeatureSet],
) -> None:
    features = make_set({"z_mean": np.zeros((4, 2))})
    table = parse_labels(b"scan_id,x\nscan-00000,a\nscan-00001,a\n", features.scan_ids)
    parts = answer_labels(features, table, plan_probes(features, table), None, lambda *_: None)
    assert (parts.labels, parts.units, parts.methods, parts.baselines) == ((), (), (), ())
    assert parts.extremes is None


def test_rows_that_are_not_used_are_counted() -> None:
    table = make_table("scan_id,patient,x", "s0,p1,a", "s1,,b", "s2,p3,b", "gone,p1,a")
    assert list_table_cautions(table) == (
        "1 of 4 rows of the table of labels are of no scan of this report.",
        "Scans without a row in the table of labels: 1.",
        "Labels of 1 scan are not used, because the patient is missing.",
    )
