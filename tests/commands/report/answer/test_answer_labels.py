"""The parts of the page with labels, from constructed features of which it is known what they hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.answer.answer_labels import LabeledParts, answer_labels
from featray.commands.report.answer.baselines import BaselineFeatures
from featray.commands.report.answer.probe_plan import plan_probes
from featray.commands.report.feature_set import FeatureFile, FeatureSet
from featray.commands.report.labeled.labels import LabelTable, parse_labels
from featray.commands.report.labeled.verdict import Refusal
from featray.commands.report.page.files import make_files
from featray.commands.report.page.model import Candidate, PageModel, Scans

SCANS = 120
GENERATOR = np.random.default_rng(5)
RADIUS = GENERATOR.normal(9, 3, SCANS)
SHAPES = [[int(40 + number % 30), 512, 512] for number in range(SCANS)]


def make_noise(columns: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(SCANS, columns)).astype(np.float32)


def carry(columns: int, seed: int, noise: float = 0.4) -> NDArray[np.float32]:
    """Return noise with a unit 3 that holds the radius."""
    features = make_noise(columns, seed)
    features[:, 3] = (RADIUS - 9) / 3 + noise * features[:, 3]
    return features


def make_table(ids: tuple[str, ...]) -> LabelTable:
    """Return a table with a number, classes of few scans, a column that is no label, and an unknown scan."""
    contrast = ["yes" if number % 3 else "no" for number in range(30)] + [""] * (SCANS - 30)
    lines = ["scan_id,radius,contrast,visit"]
    lines += [
        f"{scan_id},{RADIUS[number]:.4f},{contrast[number]},2024-01-{1 + number % 28:02d}"
        for number, scan_id in enumerate(ids[:-2])
    ]
    return parse_labels("\n".join([*lines, "elsewhere,1,yes,2024-01-01"]).encode(), ids)


@dataclass
class Result:
    """The parts, and what they were made of."""

    features: FeatureSet
    table: LabelTable
    parts: LabeledParts
    steps: list[tuple[str, float]]


@pytest.fixture(scope="module")
def result(make_set: Callable[..., FeatureSet], make_file: Callable[[NDArray[Any]], FeatureFile]) -> Result:
    """Return the parts for three layers of which two hold the radius, with all baselines."""
    latents = carry(4, 3)
    wide = np.tile(latents, 10) + 0.05 * make_noise(40, 2)
    layers = {"conv_1": make_noise(6, 1), "conv_3": wide, "z_mean": latents}
    columns = {"shape": SHAPES, "spacing": [[1.0, 0.7, 0.7]] * SCANS, "orientation": ["LPS"] * SCANS}
    features = make_set(layers, columns, {"conv_1": "mean", "conv_3": "grid"})
    table = make_table(features.scan_ids)
    plan = plan_probes(features, table)
    rows = np.setdiff1d(plan.union, [7, 8])
    again = BaselineFeatures(
        rows,
        histogram=make_file(make_noise(5, 4)[rows]),
        untrained={("conv_3 (grid)", seed): make_file(make_noise(40, seed)[rows]) for seed in (10, 11)},
    )
    steps: list[tuple[str, float]] = []
    parts = answer_labels(features, table, plan, again, lambda text, share: steps.append((text, share)))
    return Result(features, table, parts, steps)


pytestmark = pytest.mark.slow


def test_the_smaller_of_two_layers_that_hold_the_label_is_recommended(result: Result) -> None:
    radius = result.parts.labels[0]
    assert radius.sentence.startswith("For radius take z_mean (vector): R² 0.")
    assert not radius.is_refusal
    assert (radius.metric, radius.perfect, radius.patients) == ("R²", 1.0, None)
    assert radius.chance == pytest.approx(0, abs=0.1)
    words = {score.candidate: score.word for score in radius.scores}
    assert words == {
        "conv_1 (mean)": "beaten",
        "conv_3 (grid)": "as good",
        "z_mean (vector)": "chosen",
        "header": "beaten",
        "HU histogram": "beaten",
        "untrained conv_3 (grid)": "beaten",
    }
    assert [score.candidate for score in radius.scores if score.is_chosen] == ["z_mean (vector)"]


def test_candidates_and_baselines_have_intervals_and_only_candidates_win(result: Result) -> None:
    scores = {score.candidate: score for score in result.parts.labels[0].scores}
    for score in scores.values():
        assert score.low is not None
        assert score.high is not None
        assert score.low < score.value < score.high
    assert scores["header"].wins is None
    wins = [score.wins for score in scores.values() if score.wins is not None]
    assert len(wins) == 3
    assert sum(wins) == pytest.approx(1)


def test_scans_that_a_baseline_lacks_are_left_out_for_all(result: Result) -> None:
    radius = result.parts.labels[0]
    assert radius.scans == SCANS - 4  # two without a row, two that were not read again
    assert "Left out of the probes, because a baseline lacks them: 2 scans." in radius.notes
    assert not set(result.parts.answers[0].scans) & {7, 8}


def test_the_notes_say_sizes_and_the_permutation_control(result: Result) -> None:
    radius, contrast = result.parts.labels
    assert radius.notes[0].startswith("Values: 118 scans; 3.01 to 16.3, median ")
    assert contrast.notes == ("Values: 30 scans; no: 10, yes: 20.",)
    control = radius.notes[-1]
    assert "with the label permuted among scans 99 times" in control
    assert "(p = 0.01, over all 3 layers)." in control


def test_a_label_of_few_scans_is_refused_and_says_what_is_needed(result: Result) -> None:
    contrast = result.parts.labels[1]
    assert contrast.sentence == "No verdict for contrast: 30 scans; about 150 are needed."
    assert (contrast.is_refusal, contrast.scores, contrast.scans) == (True, (), 30)
    assert contrast.chance == 0.5
    assert "contrast: about 150 scans with a value." in result.parts.changes


def test_changes_name_the_missing_patients_and_baselines(result: Result) -> None:
    text = " ".join(result.parts.changes)
    assert "Each scan counts as one patient." in text
    assert "Missing baselines: PCA of voxels." in text
    assert "--random-weights" not in text


def test_rows_and_columns_of_the_table_that_are_not_used_are_named_without_values(result: Result) -> None:
    assert result.parts.cautions == (
        "1 of 119 rows of the table of labels are of no scan of this report.",
        "Scans without a row in the table of labels: 2.",
        "visit is no label: it holds dates.",
    )


def test_the_best_unit_of_the_recommended_layer_gives_the_extremes(result: Result) -> None:
    extremes = result.parts.extremes
    assert extremes is not None
    assert (extremes.unit, extremes.label) == ("z_mean (vector), unit 3", "radius")
    assert (len(extremes.low), len(extremes.high)) == (4, 4)
    values = [extreme.value for extreme in (*extremes.low, *extremes.high)]
    assert values == sorted(values)
    assert extremes.low[0].label_value == f"{RADIUS[extremes.low[0].scan]:.2f}"
    assert np.mean(RADIUS[[one.scan for one in extremes.high]]) > 12


def test_the_heat_maps_hold_the_units_that_follow_the_label(result: Result) -> None:
    strongest, information, shares, *histograms = result.parts.units
    assert strongest.columns == ("radius", "contrast")
    assert sum(row.startswith("conv_3 (grid)") for row in strongest.rows) >= 3
    place = strongest.rows.index("z_mean (vector), unit 3")
    assert strongest.values[place, 0] > 0.85
    assert strongest.marks is not None
    assert strongest.marks[place][0] == "*"
    assert information.rows == strongest.rows
    assert information.values[place, 0] > 0.4
    assert shares.values[1:, 0].tolist() == [25, 25]
    assert [matrix.title for matrix in histograms] == ["Best unit for radius", "Best unit for contrast"]
    assert histograms[0].values.sum() == SCANS - 2
    assert histograms[1].rows == ("no", "yes")


def test_the_page_can_be_made_of_the_parts(result: Result) -> None:
    parts, features = result.parts, result.features
    candidates = [
        Candidate(view.layer, view.view, view.units, 4 * view.units, 400 * view.units)
        for view in features.views
    ]
    names = ("labels", "units", "extremes", "changes", "cautions", "methods")
    model = PageModel(
        title="output",
        candidates=(*candidates, *parts.baselines),
        scans=Scans(features.scan_ids, parts.columns),
        **{name: getattr(parts, name) for name in names},
    )
    known = {candidate.name for candidate in model.candidates}
    assert {score.candidate for score in model.labels[0].scores} == known
    assert all(files for files in make_files(model).values())


def test_progress_grows_from_0_to_1_and_names_the_probes(result: Result) -> None:
    shares = [share for _, share in result.steps]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    texts = [text for text, _ in result.steps]
    assert "radius: probing conv_3 (grid)" in texts
    assert "radius: probing untrained conv_3 (grid)" in texts
    assert not any(text.startswith("contrast: probing") for text in texts)


def test_the_same_features_give_the_same_answers(result: Result) -> None:
    plan = plan_probes(result.features, result.table)
    twice = [
        answer_labels(result.features, result.table, plan, None, lambda *_: None).labels for _ in range(2)
    ]
    assert twice[0] == twice[1]


def test_few_scans_that_were_read_again_are_no_reason_to_leave_out_the_others(result: Result) -> None:
    rows = np.arange(20)
    file = result.features.files[0]
    parts = answer_labels(
        result.features,
        result.table,
        plan_probes(result.features, result.table),
        BaselineFeatures(rows, histogram=file),
        lambda *_: None,
    )
    assert parts.labels[0].scans == SCANS - 2
    assert any("only 20 of 118 scans could be read again" in caution for caution in parts.cautions)


def test_a_layer_that_only_holds_the_scanner_is_not_recommended_for_a_label_that_depends_on_it(
    make_set: Callable[..., FeatureSet],
) -> None:
    scanner = np.arange(SCANS) % 2
    layer = make_noise(8, 20)
    layer[:, 0] += 4 * scanner
    features = make_set({"conv": layer}, {"scanner": ["AB"[code] for code in scanner]})
    ill = np.where(np.random.default_rng(0).random(SCANS) < 0.9, scanner, 1 - scanner)
    lines = [
        "scan_id,ill",
        *(f"{scan_id},{code}" for scan_id, code in zip(features.scan_ids, ill, strict=True)),
    ]
    table = parse_labels("\n".join(lines).encode(), features.scan_ids)
    parts = answer_labels(features, table, plan_probes(features, table), None, lambda *_: None)
    assert parts.answers[0].verdict.refusal is Refusal.NO_GAIN
    assert "the baseline header" in parts.labels[0].sentence
    words = {score.candidate: score.word for score in parts.labels[0].scores}
    assert words == {"conv (vector)": "no gain", "header": "not beaten"}


def test_a_label_named_like_the_scanner_is_not_compared_with_itself(result: Result) -> None:
    table = replace(result.table, labels=(replace(result.table.labels[0], name="Kernel"),))
    scans = result.features.scans.append_column("kernel", [[f"{value:.4f}" for value in RADIUS]])
    features = replace(result.features, scans=scans)
    parts = answer_labels(features, table, plan_probes(features, table), None, lambda *_: None)
    assert parts.answers[0].verdict.refusal is None
