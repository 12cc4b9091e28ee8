"""The verdict: the sentence, and each refusal with what would change it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from featray.commands.report.labeled.choice import Choice
from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.verdict import (
    Evidence,
    Refusal,
    Score,
    check_size,
    decide_verdict,
    round_up,
)

NOISE = np.random.default_rng(0).normal(0, 0.01, (5, 20))


def make_score(name: str, size: int, score: float, row: int, spread: float = 1.0) -> Score:
    scores = score + spread * (NOISE[row] - NOISE[row].mean())
    return Score(name, size, scores, score)


GRID = make_score("conv_3 (grid)", 2560, 0.86, 0, 4)
LATENT = make_score("z_mean", 64, 0.80, 1, 20)
HISTOGRAM = make_score("HU histogram", 64, 0.60, 2)


def make_choice(chosen: int = 0, best: int = 0) -> Choice:
    intervals = ((0.78, 0.92), (0.7, 0.9))
    return Choice(chosen, best, 0.86, 0.78, 0.92, (0.71, 0.29), intervals, 0.03)


EVIDENCE = Evidence(
    label="contrast",
    metric="AUC",
    patients=200,
    noun="patients",
    candidates=(GRID, LATENT),
    baselines=(HISTOGRAM, make_score("header", 9, 0.55, 3)),
    choice=make_choice(),
    permutation_p=0.01,
    chance=(0.5, 0.05),
    test_ratio=1 / 3,
)


def make_label(counts: list[int]) -> tuple[Label, np.ndarray]:
    values = np.repeat(np.arange(len(counts), dtype=float), counts)
    classes = tuple(f"class {number}" for number in range(len(counts)))
    return Label("contrast", "classes", values, classes), np.arange(len(values))


def test_the_sentence_names_candidate_score_interval_wins_and_a_smaller_candidate_that_is_as_good() -> None:
    verdict = decide_verdict(EVIDENCE)
    assert verdict.text == (
        "For contrast take conv_3 (grid): AUC 0.86 (0.78 to 0.92); it wins 71 % of resamples; "
        "z_mean is as good within error and 40 times smaller."
    )
    assert verdict.refusal is None
    assert verdict.needed is None
    assert (verdict.candidate, verdict.other, verdict.size_ratio) == ("conv_3 (grid)", "z_mean", 40)
    assert verdict.baseline == "HU histogram"


def test_a_smaller_candidate_that_is_worse_beyond_error_is_not_named() -> None:
    worse = make_score("z_mean", 64, 0.70, 1)
    verdict = decide_verdict(replace(EVIDENCE, candidates=(GRID, worse)))
    assert verdict.text.endswith("it wins 71 % of resamples.")
    assert verdict.other is None


def test_if_a_smaller_candidate_is_chosen_the_best_one_is_named_with_its_size() -> None:
    close = make_score("z_mean", 640, 0.85, 1)
    choice = make_choice(chosen=1, best=0)
    verdict = decide_verdict(replace(EVIDENCE, candidates=(GRID, close), choice=choice))
    assert verdict.text == (
        "For contrast take z_mean: AUC 0.86 (0.78 to 0.92); it wins 29 % of resamples; "
        "conv_3 (grid) is no better within error and 4 times larger."
    )


def test_other_candidates_that_are_as_good_are_named_although_none_is_smaller() -> None:
    others = [make_score(f"conv_{number}", 2560, 0.85, number, 4) for number in (1, 2)]
    verdict = decide_verdict(replace(EVIDENCE, candidates=(GRID, *others)))
    assert verdict.text.endswith("it wins 71 % of resamples; conv_1 and 1 more are as good within error.")
    verdict = decide_verdict(replace(EVIDENCE, candidates=(GRID, others[0])))
    assert verdict.text.endswith("; conv_1 is as good within error.")
    assert verdict.other is None


def test_without_baselines_there_is_a_verdict() -> None:
    verdict = decide_verdict(replace(EVIDENCE, baselines=()))
    assert verdict.refusal is None
    assert verdict.baseline is None


def test_a_gain_that_is_not_certain_is_named_with_its_p_value() -> None:
    baseline = make_score("HU histogram", 64, 0.70, 2, 10)
    verdict = decide_verdict(replace(EVIDENCE, baselines=(baseline,)))
    assert verdict.refusal is None
    assert "its gain of 0.16 over the baseline HU histogram is not certain (p = 0.03)." in verdict.text


def test_few_scans_are_refused_with_the_number_that_is_needed() -> None:
    label, patients = make_label([12, 12])
    verdict = check_size(label, patients, "scans")
    assert verdict is not None
    assert verdict.text == "No verdict for contrast: 24 scans; about 150 are needed."
    assert (verdict.refusal, verdict.needed) == (Refusal.FEW_PATIENTS, 150)


def test_few_scans_of_which_one_class_is_rare_need_more() -> None:
    label, patients = make_label([38, 2])
    verdict = check_size(label, patients)
    assert verdict is not None
    assert verdict.text == "No verdict for contrast: 40 patients; about 300 are needed."


def test_scans_of_one_patient_count_once() -> None:
    label, _ = make_label([60, 60])
    verdict = check_size(label, np.arange(120) // 3)
    assert verdict is not None
    assert verdict.refusal is Refusal.FEW_PATIENTS
    assert "40 patients" in verdict.text


def test_a_small_class_is_refused() -> None:
    label, patients = make_label([90, 10])
    verdict = check_size(label, patients)
    assert verdict is not None
    assert verdict.refusal is Refusal.SMALL_CLASS
    assert verdict.text == (
        "No verdict for contrast: 10 patients in the smallest class; 15 are needed, about 150 in all "
        "classes at the same shares."
    )


def test_a_small_class_of_three_may_be_merged() -> None:
    label, patients = make_label([60, 30, 5])
    verdict = check_size(label, patients)
    assert verdict is not None
    assert verdict.text.endswith("; or merge classes.")


def test_one_class_is_refused() -> None:
    label = Label("contrast", "classes", np.zeros(80), ("no", "yes"))
    verdict = check_size(label, np.arange(80))
    assert verdict is not None
    assert "0 patients in the smallest class" in verdict.text


def test_scans_without_a_value_do_not_count() -> None:
    values = np.where(np.arange(100) < 40, np.arange(100), np.nan)
    verdict = check_size(Label("size", "number", values), np.arange(100))
    assert verdict is not None
    assert "40 patients" in verdict.text


def test_enough_patients_are_not_refused() -> None:
    label, patients = make_label([35, 15])
    assert check_size(label, patients) is None
    assert check_size(Label("size", "number", np.arange(50.0)), np.arange(50)) is None


def test_a_wide_interval_is_refused_with_the_patients_that_would_narrow_it() -> None:
    choice = replace(make_choice(), low=0.5, high=1.0)
    verdict = decide_verdict(replace(EVIDENCE, choice=choice, patients=60))
    assert (verdict.refusal, verdict.needed) == (Refusal.WIDE_INTERVAL, 170)
    assert verdict.text == (
        "No verdict for contrast: AUC 0.86 (0.50 to 1.00) is too uncertain with 60 patients; "
        "about 170 are needed."
    )


def test_an_interval_that_is_not_defined_is_refused() -> None:
    choice = replace(make_choice(), low=float("nan"), high=float("nan"))
    verdict = decide_verdict(replace(EVIDENCE, choice=choice))
    assert (verdict.refusal, verdict.needed) == (Refusal.WIDE_INTERVAL, None)


def test_a_score_that_permuted_labels_reach_is_refused() -> None:
    low = make_score("conv_3 (grid)", 2560, 0.58, 0)
    evidence = replace(EVIDENCE, candidates=(low, LATENT), permutation_p=0.21)
    verdict = decide_verdict(evidence)
    assert (verdict.refusal, verdict.needed) == (Refusal.CHANCE, 550)
    assert (
        "conv_3 (grid) has the best AUC, 0.58, and permuted labels reach the same (p = 0.21)" in verdict.text
    )
    assert verdict.text.endswith("about 550 patients are needed to tell.")


def test_a_score_at_chance_needs_other_layers_and_not_more_scans() -> None:
    low = make_score("conv_3 (grid)", 2560, 0.51, 0)
    verdict = decide_verdict(replace(EVIDENCE, candidates=(low, LATENT), permutation_p=0.5))
    assert verdict.needed is None
    assert "more patients alone are not expected to help" in verdict.text


def test_no_gain_over_a_baseline_is_refused() -> None:
    verdict = decide_verdict(replace(EVIDENCE, baselines=(make_score("HU histogram", 64, 0.85, 2),)))
    assert (verdict.refusal, verdict.needed) == (Refusal.NO_GAIN, None)
    assert verdict.text == (
        "No verdict for contrast: conv_3 (grid) has AUC 0.86 and the baseline HU histogram 0.85, "
        "no gain beyond error; another layer, view or model is needed."
    )


@pytest.mark.parametrize(("score", "is_enough"), [(0.98, True), (0.965, False)])
def test_a_baseline_over_which_no_layer_could_gain_is_enough(score: float, is_enough: bool) -> None:
    layer = make_score("conv_3 (grid)", 2560, 0.97, 0)
    baseline = make_score("PCA of voxels", 64, score, 2)
    evidence = replace(EVIDENCE, candidates=(layer, LATENT), baselines=(baseline,))
    verdict = decide_verdict(evidence)
    assert (verdict.refusal, verdict.is_baseline_enough) == (Refusal.NO_GAIN, is_enough)
    assert verdict.text.endswith("no gain beyond error; the baseline is enough.") is is_enough


def test_a_gain_within_error_is_refused_with_the_patients_that_would_show_it() -> None:
    baseline = make_score("HU histogram", 64, 0.80, 2, 10)
    verdict = decide_verdict(replace(EVIDENCE, baselines=(baseline,)))
    assert verdict.refusal is Refusal.NO_GAIN
    assert verdict.needed is not None
    assert verdict.needed > EVIDENCE.patients
    assert verdict.text.endswith(f"about {verdict.needed} patients are needed to tell.")


@pytest.mark.parametrize(("number", "rounded"), [(91, 100), (150, 150), (214, 250), (1001, 1500)])
def test_numbers_of_patients_are_rounded_up(number: int, rounded: int) -> None:
    assert round_up(number) == rounded
