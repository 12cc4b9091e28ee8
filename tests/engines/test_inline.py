"""Engine inline: helpers, their crashes, and shared memory that is given back."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featray.config import LimitsConfig, load
from featray.engines.base import Stages
from featray.engines.inline import InlineEngine
from featray.hardware import count_usable_cores
from featray.output.dataset import Dataset
from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.extract import Extractor
from featray.stages.write import write
from featray.storage.store import Store


class Poisoned(Decoder):
    """A decoder that dies on scans named poison, hangs on hang, and dies once on flaky."""

    def __call__(self, scan: Scan) -> Decoded:
        marker = Path(self.reader.source.uri) / scan.scan_id
        if scan.scan_id.startswith("poison") or (scan.scan_id == "flaky" and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if scan.scan_id.startswith("hang"):
            time.sleep(60)
        record = ScanRecord.of(scan, self.recipe, self.run_id)
        record.patches = 1
        value = float(scan.scan_id.removeprefix("s")) if scan.scan_id.startswith("s") else -1.0
        return Decoded(record, np.full((1, 2, 2, 2), value, np.float32), np.zeros((1, 3), np.int32))


def scans(*names: str) -> list[Scan]:
    return [Scan(name, f"/{name}", "nifti", (f"/{name}",), "c") for name in names]


def corner(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    return {"corner": batch[:, 0, 0, :1].copy()}


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))  # so that helpers can import Poisoned
    import test_inline

    (tmp_path / "marks").mkdir()
    sections = {"source": {"uri": str(tmp_path / "marks")}, "preprocess": {"size": [2, 2, 2]}}
    unused = {"model": {"uri": "m.keras", "layers": ["corner"]}, "output": {"uri": "out"}}
    decoder = test_inline.Poisoned.of(load({**sections, **unused}), "r", "run")
    dataset = Dataset(Store(str(tmp_path / "out")))
    put = functools.partial(write, dataset=dataset, partition_by=("layer",), recipe="r", run_id="run")
    return Stages(decoder, corner, lambda: corner, put, batch_scans=3, scans_per_file=5)


def run(stages: Stages, names: list[str], **limits: Any) -> dict[str, ScanRecord]:
    with InlineEngine(2, LimitsConfig(**limits)) as engine:
        receipts = list(engine.receipts(scans(*names), stages, threading.Event()))
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted(names)
    return {record.scan_id: record for record in records}


def test_scans_that_kill_or_hang_their_helper_cost_no_other(stages: Stages) -> None:
    names = [*(f"s{n}" for n in range(12)), "poison", "hang", "flaky"]
    records = run(stages, names, attempts=2, scan_timeout_s=3)
    assert {name: record.reason for name, record in records.items() if record.reason} == {
        "poison": "worker_crash",
        "hang": "timeout",
    }
    assert (records["poison"].attempts, records["flaky"].attempts, records["s0"].attempts) == (2, 2, 1)


def test_several_scans_that_kill_their_helper_cost_no_other(stages: Stages) -> None:
    poison = ["poison0", "poison1", "poison2"]
    records = run(stages, [*poison[:1], *(f"s{n}" for n in range(12)), *poison[1:], "s12"], attempts=2)
    assert sorted(name for name, record in records.items() if record.reason == "worker_crash") == poison
    assert {records[name].attempts for name in poison} == {2}
    assert sum(record.status == "ok" for record in records.values()) == 13


def late_corner(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    time.sleep(0.01)  # decoding is far ahead when the values are looked at
    return corner(batch, seeds)


@pytest.mark.parametrize("batch_scans", [1, 3])  # one alone is seen by the model where decoding put it
@pytest.mark.parametrize("model", [corner, late_corner])
def test_each_scan_keeps_its_own_tensor_through_shared_memory(
    stages: Stages, model: Extractor, batch_scans: int
) -> None:
    seen: dict[str, float] = {}
    names = [f"s{n}" for n in range(40)]
    with InlineEngine(2, LimitsConfig()) as engine:
        tables = []
        watched = replace(stages, extractor=model, write=tables.append, batch_scans=batch_scans)
        list(engine.receipts(scans(*names), watched, threading.Event()))
    for table in tables:
        for row in table["features"].to_pylist():
            seen[row[0]["scan_id"]] = row[0]["feature"][0]
    assert seen == {f"s{n}": float(n) for n in range(40)}


@pytest.mark.skipif(count_usable_cores() < 2, reason="with one core the model is called once at a time")
def test_the_model_is_called_twice_at_once(stages: Stages) -> None:
    together = threading.Barrier(2, timeout=30)

    def paired(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        together.wait()
        return corner(batch, seeds)

    paired_stages = replace(stages, extractor=paired)
    records = run(paired_stages, [f"s{n}" for n in range(12)])  # four batches
    assert {record.status for record in records.values()} == {"ok"}


def test_what_was_begun_before_the_model_was_there_is_done_once_and_in_the_name_of_the_run(
    stages: Stages,
) -> None:
    names = [f"s{n}" for n in range(12)]
    early = replace(stages.decode, recipe="", run_id="")
    with InlineEngine(2, LimitsConfig()) as engine:
        engine.begin(scans(*names, "unwanted"), early, stages.batch_scans)
        receipts = list(engine.receipts(scans(*names[2:], "late"), stages, threading.Event()))
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted([*names[2:], "late"])
    assert {(record.recipe, record.run_id) for record in records} == {("r", "run")}


def test_begun_scans_that_kill_or_hang_their_helper_are_settled_like_any_other(stages: Stages) -> None:
    names = ["poison", "s1", "hang", "flaky", "s2"]
    with InlineEngine(2, LimitsConfig(attempts=2, scan_timeout_s=3)) as engine:
        engine.begin(scans(*names), stages.decode, stages.batch_scans)
        receipts = list(engine.receipts(scans(*names), stages, threading.Event()))
    records = {record.scan_id: record for receipt in receipts for record in receipt.records}
    assert {name: record.reason for name, record in records.items()} == {
        **dict.fromkeys(["s1", "s2", "flaky"]),
        "poison": "worker_crash",
        "hang": "timeout",
    }


def test_tiny_scans_travel_together_and_the_guilty_one_is_found(stages: Stages) -> None:
    names = [*(f"s{n}" for n in range(50)), "poison", "flaky", *(f"s{n}" for n in range(50, 100)), "hang"]
    tiny = [replace(scan, size=100) for scan in scans(*names)]
    with InlineEngine(2, LimitsConfig(attempts=3, scan_timeout_s=3)) as engine:
        receipts = list(engine.receipts(tiny, stages, threading.Event()))
    records = {record.scan_id: record for receipt in receipts for record in receipt.records}
    assert records.keys() == set(names)
    bad = {name: (record.reason, record.attempts) for name, record in records.items() if record.reason}
    assert bad == {"poison": ("worker_crash", 3), "hang": ("timeout", 2)}
    assert records["s99"].attempts <= 2


def test_shared_memory_has_no_name_under_which_it_could_be_left(stages: Stages) -> None:
    before = set(os.listdir("/dev/shm"))
    with InlineEngine(1, LimitsConfig()) as engine:
        receipts = engine.receipts(scans(*(f"s{n}" for n in range(20))), stages, threading.Event())
        next(receipts)
        assert set(os.listdir("/dev/shm")) <= before
        receipts.close()


def test_a_set_stop_yields_only_what_was_in_flight(stages: Stages) -> None:
    stop = threading.Event()
    stop.set()
    with InlineEngine(2, LimitsConfig()) as engine:
        assert list(engine.receipts(scans("s1", "s2"), stages, stop)) == []


def test_a_script_without_a_main_guard_may_use_helpers(config_of: Any, tmp_path: Path) -> None:
    config = config_of(run={"decode": {"workers": 2}})
    script = tmp_path / "script.py"
    script.write_text(f"import featray\nprint(featray.extract({config!r}).ok)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.stdout == "12\n", done.stderr
