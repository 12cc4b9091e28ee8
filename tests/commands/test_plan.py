"""`featray plan`: what each command would do, and why, in words and as JSON. The model is left out here."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from featray.cli.main import main
from featray.commands import plan as estimate
from featray.commands.plan import Estimate
from featray.config import SourceConfig
from featray.hardware import ModelThreads
from featray.job import Job
from featray.output.dataset import Dataset
from featray.schema import Decoded, Receipt, Scan, ScanRecord
from featray.stages.commit import Committer
from featray.stages.list import list_scans
from featray.storage.store import Store

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a config whose four scans are stored as ok, by recipe `r`, which is also the config's."""

    def prepare(config: Any, engine: Any) -> Any:
        job = SimpleNamespace(run=SimpleNamespace(recipe_id="r", layers=("z",)), config=config)
        job.make_plan = lambda *args: Job.make_plan(job, *args)
        return job

    monkeypatch.setattr(estimate.Job, "prepare", prepare)
    monkeypatch.setattr(estimate, "_estimate", lambda *_: Estimate())
    write_manifest(tmp_path, dict.fromkeys(NAMES, "1"))
    records = [
        replace(ScanRecord.from_scan(scan), recipe="r", run_id="run-1")
        for scan in list_scans(SourceConfig(uri=str(tmp_path / "m.csv"))).scans
    ]
    committer = Committer(Dataset(Store(str(tmp_path / "out"))), ("layer",), run_id="run-1")
    committer.commit([Receipt((), tuple(records))])
    sections = {
        "source": {"uri": str(tmp_path / "m.csv")},
        "model": {"uri": "none.keras", "layers": ["z"]},
        "output": {"uri": str(tmp_path / "out")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path / "config.yaml"


def write_manifest(folder: Path, versions: dict[str, str]) -> None:
    lines = [f"{name}.nii,{version}" for name, version in versions.items()]
    (folder / "m.csv").write_text("\n".join(["uri,version", *lines]))


def answer(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["plan", *words]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


def test_an_unchanged_collection_leaves_nothing_to_do(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = answer(capsys, str(config))
    assert text.startswith("found 4 scans: 0 new, 0 changed, 0 stale, 0 failed, 0 removed, 4 up to date\n")
    assert "nothing to do" in text


def test_a_plan_says_what_extract_and_what_refresh_would_do(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_manifest(config.parent, {"a": "1", "b": "2", "new": "1"})
    text = answer(capsys, str(config))
    assert "found 3 scans: 1 new, 1 changed, 0 stale, 0 failed, 2 removed, 1 up to date" in text
    assert "extract: would take up 1\nrefresh: would take up 2, drop 2\n" in text
    plan = json.loads(answer(capsys, str(config), "--json").splitlines()[-1])
    assert (plan["todo"], plan["refresh_todo"], plan["removed"]) == (1, 2, 2)
    assert {found["scan_id"]: found["state"] for found in plan["scans"]} == {
        "a.nii": "up_to_date",
        "b.nii": "changed",
        "c.nii": "removed",
        "d.nii": "removed",
        "new.nii": "new",
    }
    assert all(found["why"].startswith(found["state"].replace("_", " ")) for found in plan["scans"])


def test_why_answers_for_one_scan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(config.parent, {"a": "1", "b": "2"})
    assert "when run run-1 processed it" in answer(capsys, str(config), "--why", "b.nii")
    assert answer(capsys, str(config), "--why", "c.nii").startswith("removed: stored, but no longer listed")
    found = json.loads(answer(capsys, str(config), "--why", "a.nii", "--json"))
    assert found == {
        "scan_id": "a.nii",
        "why": "up to date: content and recipe are the same as those stored",
    }
    assert "similar ids: a.nii" in answer(capsys, str(config), "--why", "aa.nii", code=2)


def test_before_the_first_run_everything_is_new(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = answer(capsys, str(config), "--set", f"output.uri={config.parent / 'nowhere'}")
    assert "4 new" in text
    assert "extract: would take up 4\nrefresh: would take up 4, drop 0\n" in text
    assert not (config.parent / "nowhere").exists()


def timed(size: int, seconds: float, status: str = "ok") -> tuple[Scan, Decoded]:
    scan = Scan("s", "/s", "nifti", ("/s",), "c", size=size)
    record = replace(ScanRecord.from_scan(scan), recipe="r", run_id="run")
    record.decode_s, record.status = seconds, status  # type: ignore[assignment]  # a literal
    return scan, Decoded(record, np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 3), np.int32))


def test_decoding_is_estimated_by_size_where_sizes_are_known() -> None:
    sample = [timed(100, 1.0), timed(300, 3.0), timed(900, 50.0, "failed")]
    collection = [timed(size, 0.0)[0] for size in (100, 100, 700)]
    assert estimate._decode_seconds(sample, collection) == pytest.approx(3.0)
    assert estimate._decode_seconds(sample, [*collection, timed(0, 0.0)[0]]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("threads", "gpus", "rate"),
    [
        (ModelThreads(), [], 2 / (0.5 + 2 * 0.25)),  # the model has both cores, then decoding has them
        (ModelThreads(each=1, calls=2), [], 2 / (0.5 + 2 * 0.25)),
        (ModelThreads(each=1), [], 2 / (0.5 + 0.25)),  # as many actors as cores, each on one
        (ModelThreads(), ["a GPU"], 4.0),
        (ModelThreads(calls=2), ["a GPU"], 4.0),
    ],
)
def test_the_rate_is_what_the_cores_allow(
    monkeypatch: pytest.MonkeyPatch, threads: ModelThreads, gpus: list[str], rate: float
) -> None:
    monkeypatch.setattr(estimate, "count_usable_cores", lambda: 2)
    monkeypatch.setattr(estimate, "list_gpu_names", lambda: gpus)
    assert estimate._rate(0.5, 0.25, threads) == pytest.approx(rate)


def test_the_model_is_timed_as_the_engine_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    def slow(batch: Any, seeds: Any) -> dict[str, Any]:
        rows.append(len(batch))
        time.sleep(0.1)
        return {"z": batch[:, 0, 0, :1]}

    stages = SimpleNamespace(extractor=slow, recipe="r")
    decoded = [timed(1, 0.0)[1]] * 3
    seconds = estimate._model_seconds(stages, decoded, batch_scans=5, calls=2)  # type: ignore[arg-type]
    assert rows == [5] * (2 * estimate._MODEL_ROUNDS)
    assert 0.1 / 10 <= seconds < 0.1 / 5, "calls are not at once"


def test_sampling_ends_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "SAMPLE_SECONDS", 0.0)
    scan, decoded = timed(1, 0.1)
    decoding = SimpleNamespace(decoder=lambda scan: decoded)
    assert estimate._decoded(decoding, [scan] * 3) == [(scan, decoded)]  # type: ignore[arg-type]
