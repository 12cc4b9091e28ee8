"""`featray plan`: counts and explanations. The tests replace the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from featray.cli.main import main
from featray.commands import plan as plan_module
from featray.commands.plan import PlanResult
from featray.commands.run_estimate import Estimate
from featray.config import SourceConfig
from featray.job import Job
from featray.output.dataset import Dataset
from featray.recipe import RecipeIds
from featray.schema import Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.list import list_scans
from featray.storage.store import Store

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a config with the layer `z`, with which its four scans are stored."""

    def prepare(config: Any, engine: Any) -> Any:
        """Make a job without loading a model; the layer `NAME=ID` of the config has the recipe ID."""
        layers = dict(layer.layer.split("=") for layer in config.model.layers)
        run = SimpleNamespace(recipe_id="r", recipe={}, layers=tuple(layers))
        job = SimpleNamespace(run=run, recipes=RecipeIds("r", layers, "s"), config=config)
        job.make_plan = lambda *args: Job.make_plan(job, *args)
        return job

    monkeypatch.setattr(plan_module.Job, "prepare", prepare)
    monkeypatch.setattr(plan_module, "estimate_run", lambda *_: Estimate(sampled=1))
    write_manifest(tmp_path, dict.fromkeys(NAMES, "1"))
    records = [
        replace(ScanRecord.from_scan(scan), recipe="r", layers={"z": "z1"}, run_id="run-1")
        for scan in list_scans(SourceConfig(uri=str(tmp_path / "m.csv"))).scans
    ]
    committer = Committer(Dataset(Store(str(tmp_path / "out"))), ("layer",), run_id="run-1")
    committer.commit([Receipt((), tuple(records))])
    sections = {
        "source": {"uri": str(tmp_path / "m.csv")},
        "model": {"uri": "none.keras", "layers": ["z=z1"]},
        "output": {"uri": str(tmp_path / "out")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "config.yaml"


def write_manifest(folder: Path, versions: dict[str, str]) -> None:
    """Write a manifest of the scans with these names and versions."""
    lines = [f"{name}.nii,{version}" for name, version in versions.items()]
    (folder / "m.csv").write_text("\n".join(["uri,version", *lines]))


def set_layers(*layers: str) -> tuple[str, str]:
    """Return the arguments that give the config these layers, `NAME=ID` each."""
    return "--set", f"model.layers={json.dumps(layers)}"


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run `featray plan`; return its stdout, or its stderr if the expected exit code is an error."""
    assert main(["plan", *arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_an_unchanged_collection_leaves_nothing_to_do(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run_plan(capsys, str(config))
    states = "0 new, 0 changed, 0 stale, 0 failed, 0 incomplete, 0 removed, 4 up to date"
    assert text == f"found 4 scans: {states}\ncells (scan x layer): 4 up to date\nnothing to do\n"


def test_a_plan_says_what_extract_and_refresh_would_do(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(config.parent, {"a": "1", "b": "2", "new": "1"})
    text = run_plan(capsys, str(config))
    assert "found 3 scans: 1 new, 1 changed, 0 stale, 0 failed, 0 incomplete, 2 removed, 1 up to date" in text
    assert "to compute: 1 new scan; 1 changed scan; 1 layer is up to date and stays as it is\n" in text
    assert "extract: would process 1 scans\nrefresh: would process 2 scans and remove 2\n" in text
    plan = json.loads(run_plan(capsys, str(config), "--json", "--scans").splitlines()[-1])
    assert (plan["todo"], plan["refresh_todo"], plan["removed"]) == (1, 2, 2)
    assert {scan["scan_id"]: scan["state"] for scan in plan["scans"]} == {
        "a.nii": "up_to_date",
        "b.nii": "changed",
        "c.nii": "removed",
        "d.nii": "removed",
        "new.nii": "new",
    }
    assert all(scan["why"].startswith(scan["state"].replace("_", " ")) for scan in plan["scans"])


def test_why_explains_the_state_of_one_scan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(config.parent, {"a": "1", "b": "2"})
    assert "when run run-1 processed it" in run_plan(capsys, str(config), "--why", "b.nii")
    assert run_plan(capsys, str(config), "--why", "c.nii").startswith("removed: stored, but no longer listed")
    explanation = json.loads(run_plan(capsys, str(config), "--why", "a.nii", "--json"))
    assert explanation == {
        "scan_id": "a.nii",
        "why": "up to date: content and recipes are the same as those stored",
    }
    assert "similar ids: a.nii" in run_plan(capsys, str(config), "--why", "aa.nii", code=2)


def test_a_plan_says_which_layers_are_new_and_that_the_others_stay(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = set_layers("z=z1", "y=y1", "x=x1")
    assert run_plan(capsys, str(config), *layers).splitlines()[1:5] == [
        "cells (scan x layer): 8 missing, 4 up to date",
        "to compute: 2 new layers for 4 scans; 1 layer is up to date and stays as it is",
        "extract: would process 4 scans",
        "refresh: would process 4 scans and remove 0",
    ]
    plan = json.loads(run_plan(capsys, str(config), *layers, "--json").splitlines()[-1])
    assert plan["work"] == "2 new layers for 4 scans; 1 layer is up to date and stays as it is"
    assert plan["cells"] == {
        "new": 0,
        "changed": 0,
        "missing": 8,
        "stale": 0,
        "failed": 0,
        "up_to_date": 4,
    }
    assert plan["layer_recipes"] == {"z": "z1", "y": "y1", "x": "x1"}
    assert (plan["incomplete"], plan["todo"], plan["other_layers"]) == (4, 4, {})
    why = run_plan(capsys, str(config), *layers, "--why", "a.nii")
    assert why == "incomplete: content is unchanged; it lacks layers y, x\n"


def test_a_plan_names_stored_layers_that_are_not_in_the_config(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run_plan(capsys, str(config), *set_layers("y=y1"))
    assert "these layers, so they stay: z (4 scans); `refresh --drop-layers` removes them\n" in text
    assert "to compute: 1 new layer for 4 scans\n" in text
    plan = json.loads(run_plan(capsys, str(config), *set_layers("y=y1"), "--json").splitlines()[-1])
    assert plan["other_layers"] == {"z": 4}


def test_a_plan_renames_a_layer_whose_name_alone_has_changed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan(capsys, str(config), *set_layers("zz=z1")).splitlines()[1:5] == [
        "cells (scan x layer): 4 up to date",
        "to rename, without computing: layer z to zz",
        "extract: would process 0 scans",
        "refresh: would process 0 scans and remove 0",
    ]
    plan = json.loads(run_plan(capsys, str(config), *set_layers("zz=z1"), "--json").splitlines()[-1])
    assert (plan["renamed_layers"], plan["todo"], plan["other_layers"]) == ({"z": "zz"}, 0, {})


def test_a_plan_says_that_extract_refuses_to_mix_recipes(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(config.parent, dict.fromkeys((*NAMES, "new"), "1"))
    text = run_plan(capsys, str(config), *set_layers("z=z2", "y=y1"))
    assert "to compute: 1 new scan; 1 new layer for 4 scans; 1 stale layer for 4 scans\n" in text
    assert (
        "extract: refuses, because 4 scans have features of another recipe, which `featray refresh` "
        "replaces; to keep both, give the layers of this config other names\n"
    ) in text
    assert "refresh: would process 5 scans and remove 0\n" in text
    why = run_plan(capsys, str(config), *set_layers("z=z2", "y=y1"), "--why", "a.nii")
    assert why.startswith("stale: processed by run run-1 with another recipe of layer z than this config's; ")
    assert "estimate of refresh from 1 scans: " in text, "extract would refuse, so its time is of no use"


def test_before_the_first_run_every_scan_is_new(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_plan(capsys, str(config), "--set", f"output.uri={config.parent / 'nowhere'}")
    assert "4 new" in text
    assert "extract: would process 4 scans\nrefresh: would process 4 scans and remove 0\n" in text
    assert not (config.parent / "nowhere").exists()


def test_the_text_names_the_nodes_that_the_estimate_counts_on() -> None:
    result = PlanResult(*[1] * 11, can_keep_both=True, unreachable=0, recipe="r", engine="ray", layers=("z",))
    estimate = Estimate(sampled=1, nodes=3, cores=24, gpus=2, actors=2)
    text = replace(result, estimate=estimate).text()
    assert "from 1 scans on 3 nodes with 24 cores, 2 GPUs and 2 actors: " in text
