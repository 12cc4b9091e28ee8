"""The answer for a label, from constructed features of which it is known what they hold."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.labeled.answer import (
    Answer,
    Candidate,
    Collection,
    answer_label,
    choose_scans,
    restrict_label,
)
from featray.commands.report.labeled.compare import find_beaten
from featray.commands.report.labeled.folds import make_folds
from featray.commands.report.labeled.labels import Label
from featray.commands.report.labeled.probe import Target, Trial, probe_features
from featray.commands.report.labeled.verdict import Refusal, Score

SCANS = 150
COLLECTION = Collection(np.arange(SCANS))


def make_label(seed: int = 0, scans: int = SCANS) -> Label:
    return Label("size", "number", np.random.default_rng(seed).normal(size=scans))


def make_noise(seed: int, columns: int, scans: int = SCANS) -> NDArray[np.float32]:
    return np.random.default_rng(100 + seed).normal(size=(scans, columns)).astype(np.float32)


def carry(label: Label, seed: int, columns: int, noise: float = 0.5) -> NDArray[np.float32]:
    """Return noise with a first column that holds the label."""
    features = make_noise(seed, columns, len(label.values))
    features[:, 0] = np.nan_to_num(label.values) + noise * features[:, 0]
    return features


def answer(
    label: Label, layers: dict[str, NDArray[np.float32]], collection: Collection = COLLECTION
) -> Answer:
    baselines = [Candidate.from_arrays("header", make_noise(50, 3, len(label.values)))]
    return answer_label(
        label, [Candidate.from_arrays(*item) for item in layers.items()], baselines, collection
    )


@pytest.mark.slow
def test_the_layer_that_carries_the_label_is_chosen_and_beats_one_that_does_not() -> None:
    label = make_label()
    result = answer(label, {"noise": make_noise(1, 4), "carrier": carry(label, 2, 8)})
    assert result.verdict.candidate == "carrier"
    assert result.verdict.refusal is None
    assert result.verdict.text.startswith("For size take carrier: R² 0.7")
    assert result.rule is not None
    assert result.rule.beaten.tolist() == [[False, False], [True, False]]
    assert result.rule.gains.tolist() == [False, True]
    assert result.evidence is not None
    assert result.evidence.choice.wins == (0.0, 1.0)
    assert result.evidence.choice.low < result.evidence.candidates[1].score < result.evidence.choice.high
    assert result.evidence.permutation_p == 0.01
    assert [control.permuted.shape for control in result.controls] == [(99,), (99,)]
    assert result.predictions is not None
    assert result.predictions.shape == (5, SCANS, 1)


@pytest.mark.slow
def test_classes_are_answered_with_the_auc() -> None:
    number = make_label()
    label = Label("contrast", "classes", (number.values > 0).astype(float), ("no", "yes"))
    result = answer(label, {"carrier": carry(number, 2, 6, 0.2), "noise": make_noise(1, 6)})
    assert result.verdict.candidate == "carrier"
    assert result.verdict.text.startswith("For contrast take carrier: AUC 0.9")


def test_of_two_layers_that_hold_the_same_the_smaller_one_is_chosen() -> None:
    label = make_label()
    small = carry(label, 2, 4)
    wide = np.concatenate([small] * 10, axis=1)
    result = answer(label, {"wide": wide, "small": small})
    assert result.verdict.candidate == "small"


@pytest.mark.slow
def test_two_equal_layers_have_no_winner_in_at_least_nine_of_ten_draws() -> None:
    draws, winners = 30, 0
    for seed in range(draws):
        values = np.random.default_rng(seed).normal(size=80)
        patients = np.arange(80)
        trial = Trial(Target(values[:, None]), patients, make_folds(patients, None, seed), seed)
        label = Label("size", "number", values)
        layers = [carry(label, 1000 + 2 * seed + part, 6, 1.0) for part in range(2)]
        beaten = find_beaten([probe_features(layer, trial).scores for layer in layers], 1 / 3)
        winners += bool(beaten.any())
    assert winners <= draws / 10


@pytest.mark.slow
def test_layers_that_hold_nothing_get_no_verdict() -> None:
    result = answer(make_label(), {"a": make_noise(1, 10), "b": make_noise(2, 20)})
    assert result.verdict.refusal in (Refusal.CHANCE, Refusal.WIDE_INTERVAL)
    assert result.verdict.text.startswith("No verdict for size: ")


def test_a_layer_that_is_not_better_than_a_baseline_gets_no_verdict() -> None:
    label = make_label()
    layer = carry(label, 2, 10)
    result = answer_label(
        label, [Candidate.from_arrays("layer", layer)], [Candidate.from_arrays("header", layer)], COLLECTION
    )
    assert result.verdict.refusal is Refusal.NO_GAIN
    assert "the baseline header" in result.verdict.text


@pytest.mark.slow
def test_a_baseline_of_several_seeds_has_the_mean_scores_and_an_interval() -> None:
    label = make_label()
    arrays = [carry(label, seed, 4, 1.0) for seed in (5, 6)]

    def get_scores(*chosen: NDArray[np.float32]) -> Score:
        layer = Candidate.from_arrays("layer", carry(label, 2, 10))
        result = answer_label(label, [layer], [Candidate.from_arrays("untrained", *chosen)], COLLECTION)
        assert result.evidence is not None
        return result.evidence.baselines[0]

    both, first, second = get_scores(*arrays), get_scores(arrays[0]), get_scores(arrays[1])
    np.testing.assert_allclose(both.scores, (first.scores + second.scores) / 2)
    assert both.interval[0] < both.score < both.interval[1]


@pytest.mark.slow
def test_each_candidate_and_baseline_is_named_before_it_is_probed() -> None:
    label, steps = make_label(), []
    layers = [Candidate.from_arrays(name, make_noise(1, 2)) for name in ("a", "b")]
    answer_label(label, layers, [Candidate.from_arrays("header", make_noise(2, 2))], COLLECTION, steps.append)
    assert steps == ["a", "b", "header"]


def test_at_most_a_thousand_scans_are_probed_always_the_same() -> None:
    label = make_label(scans=1500)
    collection = Collection(np.arange(1500))
    scans = choose_scans(label, collection)
    assert len(scans) == 1000
    np.testing.assert_array_equal(scans, choose_scans(label, collection))
    restricted = restrict_label(label, scans)
    np.testing.assert_array_equal(choose_scans(restricted, collection), scans)
    np.testing.assert_array_equal(np.flatnonzero(restricted.known), scans)


def test_a_label_that_is_refused_for_its_size_needs_no_scans() -> None:
    assert len(choose_scans(make_label(scans=24), Collection(np.arange(24)))) == 0


def test_too_few_scans_are_refused_and_not_probed() -> None:
    label = make_label(scans=24)
    result = answer(label, {"a": carry(label, 1, 5)}, Collection(np.arange(24), has_patients=False))
    assert result.verdict.text == "No verdict for size: 24 scans; about 150 are needed."
    assert result.evidence is None
    assert len(result.scans) == 0


def test_scans_without_a_value_are_left_out() -> None:
    label = make_label()
    values = label.values.copy()
    values[::3] = np.nan
    layer = carry(label, 2, 6)
    layer[::3] = 1e6  # would destroy the probe if these scans were used
    result = answer(Label("size", "number", values), {"layer": layer})
    np.testing.assert_array_equal(result.scans, np.flatnonzero(~np.isnan(values)))
    assert result.verdict.candidate == "layer"


@pytest.mark.slow
def test_a_layer_that_only_knows_the_patient_gets_no_verdict() -> None:
    patients = np.repeat(np.arange(60), 3)
    label = Label("size", "number", np.random.default_rng(0).normal(size=60)[patients])
    identity = make_noise(3, 30, 60)[patients] + 0.01 * make_noise(4, 30, 180)
    by_patient = answer(label, {"identity": identity}, Collection(patients))
    assert by_patient.verdict.refusal is not None
    by_scan = answer(label, {"identity": identity}, Collection(np.arange(180)))
    assert by_scan.verdict.refusal is None  # the split by scan leaks
