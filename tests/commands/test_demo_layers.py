"""What the layers of the demo's VAE hold: `z_mean` the body and not the lesion, `conv_3` on a grid both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import featray
from featray.commands import demo
from featray.commands.report.label_file import read_labels
from featray.commands.report.labeled.answer import Answer, Candidate, Collection, answer_label
from featray.config import load
from featray.pipeline import extract
from featray.synthetic import varied_collection

SCANS = 150
LAYERS = ("conv_3", "conv_3_grid", "z_mean")
LESION, BODY = "lesion_radius_mm", "body_depth_mm"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answer]:
    """Return the answers for two labels of a larger demo, with coarse scans and a short training."""
    folder = tmp_path_factory.mktemp("demo-layers")
    values = demo.make_demo_config(folder, SCANS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varied_collection, "SLICES", (16, 20, 24))
        patch.setattr(varied_collection, "MATRICES", (48, 54, 60))
        patch.setattr(demo, "_count_epochs", lambda _: 2)
        demo._make_collection(folder, SCANS)
        demo._train(load(values), folder / "vae.keras", show=False)
    assert extract(values).ok == SCANS
    return {label: answer(folder, label) for label in (LESION, BODY)}


def answer(folder: Path, name: str) -> Answer:
    layers = [featray.read(folder / "out", layer) for layer in LAYERS]
    table = read_labels(folder / "ct" / "labels.csv", layers[0].scan_ids)
    (label,) = [label for label in table.labels if label.name == name]
    arrays = [(layer.layer, layer.array.reshape(SCANS, -1)) for layer in layers]
    candidates = [Candidate.from_arrays(*item) for item in arrays]
    return answer_label(label, candidates, (), Collection(table.patients, table.has_patients))


def get_scores(answer: Answer) -> dict[str, float]:
    assert answer.evidence is not None
    return {candidate.name: candidate.score for candidate in answer.evidence.candidates}


@pytest.mark.slow
def test_z_mean_knows_the_body_and_not_the_lesion(answers: Mapping[str, Answer]) -> None:
    assert get_scores(answers[BODY])["z_mean"] > 0.6
    assert get_scores(answers[LESION])["z_mean"] < 0.1


@pytest.mark.slow
def test_a_convolutional_layer_knows_the_lesion_on_a_grid_and_not_by_its_mean(
    answers: Mapping[str, Answer],
) -> None:
    scores = get_scores(answers[LESION])
    assert scores["conv_3_grid"] > 0.35
    assert scores["conv_3"] < 0.2


@pytest.mark.slow
def test_the_verdict_for_the_lesion_is_the_grid(answers: Mapping[str, Answer]) -> None:
    verdict = answers[LESION].verdict
    assert verdict.refusal is None
    assert verdict.candidate == "conv_3_grid"
    assert verdict.text.endswith("it wins 100 % of resamples.")
