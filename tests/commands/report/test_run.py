"""The command `report`: an output and labels in, a page with verdicts and its numbers out."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from commits import RUN, make_committer, make_decoded

import featray
from featray.cli.main import main
from featray.commands.report import Report
from featray.commands.verify import verify
from featray.errors import ConfigError, UsageError
from featray.output.dataset import Dataset
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

SCANS = 120
SECRET = "Doe^Jane"
ConfigOf = Callable[..., dict[str, Any]]

pytestmark = pytest.mark.slow


def commit_layers(dataset: Dataset, layers: dict[str, np.ndarray], ids: Sequence[str]) -> None:
    """Commit an output whose layers have these values (scans, units)."""

    def take_values(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        return layers

    recipes = {name: f"{number:016x}" for number, name in enumerate(layers)}
    committer = make_committer(dataset)
    extracted = extract(take_values, [make_decoded(scan_id, 0) for scan_id in ids], recipe="r0")
    receipt = write(extracted, dataset, ("layer",), recipes, RUN)
    receipt.set_run("i0", recipes, RUN)
    committer.commit([receipt])


def write_labels(path: Path, columns: dict[str, Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return an output of which layer `knows` holds the label `sick`, and the table of labels."""
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(5)
    ids = [f"scan-{number:03}" for number in range(SCANS)]
    sick = generator.permutation(np.arange(SCANS) % 2)
    noise = generator.standard_normal((2, SCANS, 6)).astype(np.float32)
    knows = noise[0].copy()
    knows[:, 2] += 2.5 * sick
    output = str(folder / "out")
    commit_layers(Dataset(Store(output)), {"guesses": noise[1], "knows": knows}, ids)
    columns: dict[str, Sequence[object]] = {
        "scan_id": ids,
        "patient": [f"{SECRET} {n}" for n in range(SCANS)],
    }
    columns |= {
        "sick": np.where(sick, "yes", "no").tolist(),
        "coin": generator.integers(0, 2, SCANS).tolist(),
    }
    return output, write_labels(folder / "labels.csv", columns)


@pytest.fixture(scope="module")
def planted_report(planted: tuple[str, Path]) -> Report:
    output, labels = planted
    return featray.report(output, labels)


def read_text(report: Report, name: str) -> str:
    return Path(report.page).with_name(name).read_text(encoding="utf-8")


def test_the_layer_that_holds_the_label_is_recommended_and_chance_is_refused(planted_report: Report) -> None:
    sick, coin = planted_report.sentences
    assert sick.startswith("For sick take knows (vector): AUC 0.9")
    assert coin.startswith("No verdict for coin")


def test_the_files_of_a_report_hold_the_same_verdicts_as_the_result(planted_report: Report) -> None:
    assert Path(planted_report.page).parts[-3:] == ("out", "report", "report.html")
    document = json.loads(read_text(planted_report, "report.json"))
    assert document == json.loads(json.dumps(planted_report.document))
    assert [label["sentence"] for label in document["labels"]] == list(planted_report.sentences)
    scores = {score["candidate"]: score for score in document["labels"][0]["scores"]}
    assert scores["knows (vector)"]["is_chosen"]
    assert 0.4 < scores["guesses (vector)"]["value"] < 0.65
    points = pq.read_table(Path(planted_report.page).with_name("points.parquet"))
    assert points["scan_id"].to_pylist() == [f"scan-{number:03}" for number in range(SCANS)]
    measures = pq.read_table(Path(planted_report.page).with_name("measures.parquet"))
    assert measures["candidate"].to_pylist() == ["guesses (vector)", "knows (vector)"]


def test_no_file_of_a_report_names_a_patient(planted_report: Report) -> None:
    folder = Path(planted_report.page).parent
    assert set(planted_report.files) == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        assert SECRET.encode() not in path.read_bytes()


def test_without_the_config_of_a_run_the_report_says_what_is_missing(planted_report: Report) -> None:
    cautions = " ".join(planted_report.document["cautions"])
    assert "No run of this output recorded the config of its scans. Pass the config file instead" in cautions
    assert "holds no slices of patients" in read_text(planted_report, "report.html")


def test_a_report_below_the_output_disturbs_no_other_command(
    planted: tuple[str, Path], planted_report: Report
) -> None:
    verification = verify(Dataset(Store(planted[0])))
    assert verification.exit_code == 0, verification.text()
    assert Path(planted_report.page).exists()


def test_a_report_without_labels_recommends_nothing(planted: tuple[str, Path], tmp_path: Path) -> None:
    report = featray.report(planted[0], directory=tmp_path / "report", layers=["knows"])
    (sentence,) = report.sentences
    assert sentence.startswith("No labels were given, so no layer can be recommended")
    assert [candidate["layer"] for candidate in report.document["candidates"]] == ["knows"]


def test_wrong_arguments_are_refused_before_anything_is_written(
    planted: tuple[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    with pytest.raises(UsageError, match=r"--labels: .*missing\.csv does not exist"):
        featray.report(planted[0], tmp_path / "missing.csv", out)
    with pytest.raises(UsageError, match="no layer 'knowz'"):
        featray.report(planted[0], directory=out, layers=["knowz"])
    with pytest.raises(ConfigError):
        featray.report(tmp_path / "nothing", directory=out)
    assert not out.exists() or not list(out.iterdir())


@pytest.fixture(scope="module")
def extracted(
    vae_file: Path, phantoms: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return the config of an output of twelve phantoms, as a file and as a dict."""
    folder = tmp_path_factory.mktemp("extracted")
    config = {
        "source": {"uri": str(phantoms)},
        "preprocess": {"size": [8, 32, 32]},
        "model": {
            "uri": str(vae_file),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": [
                "encoder/z_mean",
                "encoder/z_log_var",
                {"layer": "encoder/conv_2", "pool": "grid", "grid": [2, 2, 2], "as": "conv_2_grid"},
                {"layer": "encoder/conv_2", "as": "conv_2"},
            ],
        },
        "output": {"uri": str(folder / "out")},
        "run": {"engine": "inline", "decode": {"workers": 1}},
    }
    featray.extract(config)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path, config


def test_the_page_shows_slices_of_the_scans_and_candidates_in_network_order(
    extracted: tuple[Path, dict[str, Any]], phantoms: Path, tmp_path: Path
) -> None:
    report = featray.report(extracted[1]["output"]["uri"], phantoms / "labels.csv", tmp_path)
    assert "holds 12 slices of patients" in read_text(report, "report.html")
    names = [candidate["name"] for candidate in report.document["candidates"]]
    assert names == [
        "conv_2_grid (grid)",
        "conv_2 (mean)",
        "encoder.z_mean (vector)",
        "encoder.z_log_var (vector)",
    ]
    assert {sentence.partition(": ")[2] for sentence in report.sentences} == {
        "12 scans; about 150 are needed."
    }


def test_no_images_leaves_all_slices_out(extracted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    report = featray.report(extracted[0], directory=tmp_path, images=False)
    page = read_text(report, "report.html")
    assert "holds no slices of patients" in page
    assert "data:image" not in page


def test_stability_is_a_table_with_a_row_per_layer(
    extracted: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    report = featray.report(extracted[0], directory=tmp_path, images=False, stability=True)
    table = report.document["stability"]
    assert [row[0] for row in table["rows"]] == [
        "conv_2_grid (grid)",
        "conv_2 (mean)",
        "encoder.z_mean (vector)",
        "encoder.z_log_var (vector)",
    ]
    column = table["columns"].index("Cosine, noise")
    assert all(0.5 < row[column] <= 1 for row in table["rows"])


def test_the_command_makes_the_same_report_and_prints_json_as_its_last_line(
    planted: tuple[str, Path], planted_report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r" / "report.html"
    command = ["report", planted[0], "--labels", str(planted[1]), "--out", str(page.parent), "--quiet"]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer["page"] == str(page)
    assert answer["sentences"] == list(planted_report.sentences)
    assert answer["document"] == planted_report.document


def test_the_command_prints_the_sentences_and_the_page(
    planted: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", planted[0], "--layer", "knows", "--out", str(tmp_path), "--quiet"]) == 0
    sentence, page = capsys.readouterr().out.splitlines()
    assert sentence.startswith("No labels were given")
    assert page == f"page: {tmp_path / 'report.html'}"
