"""`featray status`: counts of the output, and the progress of the run that has locked it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commits import make_committer, make_decoded, make_failed_receipt, write_receipt

from featray.cli.main import main
from featray.commands.status import status
from featray.output.dataset import Dataset
from featray.output.lease import LEASE_FOLDER
from featray.schema import Receipt, Scan, ScanRecord
from featray.stages.commit import Committer
from featray.storage.store import Store

PROGRESS = {"total": 500, "done": 120, "failed": 2, "bytes_read": 60_000_000, "seconds": 20.0}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return an output without commits."""
    return Dataset(Store(str(tmp_path / "out")))


def write_lease(dataset: Dataset, progress: dict[str, Any]) -> None:
    """Lock the output for a run with this progress."""
    holder = {"run_id": "run-1", "host": "node-7", "machine": "m", "pid": 12, "since": "2026-11-26T22:00:00"}
    holder |= {"heartbeat": time.time() - 5, "progress": progress}
    dataset.store.write(f"{LEASE_FOLDER}/run-1.json", json.dumps(holder).encode())


def commit_two_scans(dataset: Dataset) -> None:
    """Commit two scans with status ok."""
    records = [
        replace(ScanRecord.from_scan(Scan(name, f"/{name}", "nifti", (), "c")), recipe="r", run_id="run-1")
        for name in "ab"
    ]
    Committer(dataset, ("layer",), run_id="run-1").commit([Receipt((), tuple(records))])


def test_the_progress_of_a_running_run_is_shown(dataset: Dataset) -> None:
    commit_two_scans(dataset)
    write_lease(dataset, PROGRESS)
    running, counts, *_ = status(dataset).text().splitlines()
    assert running.startswith("running: run-1 on host node-7 (pid 12) since 2026-11-26T22:00:00; 5 s ago: ")
    assert running.endswith("120/500 scans, 2 failed, 6.00 scans/s, 3 MB/s, ETA 63 s")
    assert counts == "scans: 2 ok, 0 failed, 0 excluded"


def test_a_run_without_commits_is_shown(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    write_lease(dataset, {})
    assert main(["status", dataset.store.root]) == 0
    text = capsys.readouterr().out
    assert "since 2026-11-26T22:00:00, preparing\nnothing is committed yet\n" in text
    assert main(["status", dataset.store.root, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["ok"], answer["running"]["run_id"]) == (0, "run-1")


def test_no_run_is_shown_if_none_is_running(dataset: Dataset) -> None:
    commit_two_scans(dataset)
    result = status(dataset)
    assert result.running is None
    assert "running" not in result.text()


def test_each_layer_is_shown_with_its_rows_and_the_scans_of_each_recipe(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, *(make_decoded(name, 1, patches=2) for name in "abc"))])
    committer.commit(
        [
            write_receipt(dataset, make_decoded("a", 2, 2, ["map"]), recipes={"map": "r9"}),
            make_failed_receipt("b", due_layers=["new"], recipes={"new": "r2"}),
        ]
    )
    dataset.store.write("runs/run-1/run.json", json.dumps({"layers": ["z_mean"]}).encode())
    result = status(dataset)
    assert (result.ok, result.failed, result.reasons) == (2, 1, {"truncated": 1})
    assert result.recipes == {"map": {"r1": 2, "r9": 1}, "z_mean": {"r0": 3}}
    assert result.unnamed_layers == ("map",)
    *_, of_map, z_mean = result.text().splitlines()
    assert of_map.startswith("layer map: 6 rows in ")
    assert "; 2 scans with recipe r1, 1 scans with recipe r9; the config of the newest run does" in of_map
    assert z_mean.startswith("layer z_mean: 6 rows in 1 files, ")
    assert z_mean.endswith("; 3 scans with recipe r0")
