"""Engine inline: scans that crash their worker process, tensors in shared memory, prefetching, and stops."""

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
from typing import Any, cast

import numpy as np
import psutil
import pytest

from featray.config import LimitsConfig, load
from featray.engines import inline
from featray.engines.base import Decoding, Stages
from featray.engines.inline import InlineEngine
from featray.hardware import count_usable_cores
from featray.output.dataset import Dataset
from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.extract import LayerExtractor
from featray.stages.write import write
from featray.storage.store import Store


class ScriptedDecoder(Decoder):
    """A decoder whose behavior depends on the scan id; it reads no file.

    `poison…` kills the process; `flaky` kills it at the first attempt only; `hang…` sleeps for a minute; `s7`
    gives a tensor of sevens.
    """

    def __call__(self, scan: Scan) -> Decoded:
        marker = Path(self.reader.source.uri) / scan.scan_id
        if scan.scan_id.startswith("poison") or (scan.scan_id == "flaky" and not marker.exists()):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if scan.scan_id.startswith("hang"):
            time.sleep(60)
        record = ScanRecord.from_scan(scan)
        record.patches = 1
        value = float(scan.scan_id.removeprefix("s")) if scan.scan_id.startswith("s") else -1.0
        return Decoded(record, np.full((1, 2, 2, 2), value, np.float32), np.zeros((1, 3), np.int32))


def make_scans(*names: str) -> list[Scan]:
    return [Scan(name, f"/{name}", "nifti", (f"/{name}",), "c") for name in names]


def take_corner(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    return {"corner": batch[:, 0, 0, :1].copy()}


@pytest.fixture
def decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """Return a `ScriptedDecoder` whose folder for marks of earlier attempts is its source."""
    # So that worker processes can import ScriptedDecoder.
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_inline

    (tmp_path / "marks").mkdir()
    sections = {"source": {"uri": str(tmp_path / "marks")}, "preprocess": {"size": [2, 2, 2]}}
    unused = {"model": {"uri": "m.keras", "layers": ["corner"]}, "output": {"uri": "out"}}
    decoder: Decoder = test_inline.ScriptedDecoder.from_config(load({**sections, **unused}))
    return decoder


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    """Return stages with a model that gives the first voxel of each tensor as layer `corner`."""
    dataset = Dataset(Store(str(tmp_path / "out")))
    write_run = functools.partial(
        write, dataset=dataset, partition_by=("layer",), recipes={"corner": "r"}, run_id="run"
    )
    return Stages(take_corner, lambda: take_corner, "r", write_run, scans_per_file=5, run_id="run")


def make_engine(decoder: Decoder, workers: int = 2, batch_scans: int = 3, **limits: Any) -> InlineEngine:
    return InlineEngine(workers, Decoding(decoder, batch_scans, LimitsConfig(**limits)))


def run_scans(engine: InlineEngine, stages: Stages, names: list[str]) -> dict[str, ScanRecord]:
    with engine:
        receipts = list(engine.receipts(make_scans(*names), stages, threading.Event()))
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted(names)
    return {record.scan_id: record for record in records}


@pytest.mark.slow
def test_scans_that_kill_or_hang_their_process_do_not_affect_other_scans(
    decoder: Decoder, stages: Stages
) -> None:
    names = [*(f"s{n}" for n in range(12)), "poison", "hang", "flaky"]
    records = run_scans(make_engine(decoder, attempts=2, scan_timeout_s=3), stages, names)
    assert {name: record.reason for name, record in records.items() if record.reason} == {
        "poison": "worker_crash",
        "hang": "timeout",
    }
    assert (records["poison"].attempts, records["flaky"].attempts, records["s0"].attempts) == (2, 2, 1)


@pytest.mark.slow
def test_several_scans_that_kill_their_process_do_not_affect_other_scans(
    decoder: Decoder, stages: Stages
) -> None:
    poison = ["poison0", "poison1", "poison2"]
    names = [*poison[:1], *(f"s{n}" for n in range(12)), *poison[1:], "s12"]
    records = run_scans(make_engine(decoder, attempts=2), stages, names)
    assert sorted(name for name, record in records.items() if record.reason == "worker_crash") == poison
    assert {records[name].attempts for name in poison} == {2}
    assert sum(record.status == "ok" for record in records.values()) == 13


def take_corner_late(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    time.sleep(0.01)  # so that further scans are decoded before the model reads the tensors
    return take_corner(batch, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("batch_scans", [1, 3])  # with 1, the model reads the tensor in shared memory
@pytest.mark.parametrize("model", [take_corner, pytest.param(take_corner_late, marks=pytest.mark.slow)])
def test_each_scan_keeps_its_own_tensor_through_shared_memory(
    decoder: Decoder, stages: Stages, model: LayerExtractor, batch_scans: int
) -> None:
    values: dict[str, float] = {}
    names = [f"s{n}" for n in range(40)]
    with make_engine(decoder, batch_scans=batch_scans) as engine:
        tables = []
        watched = replace(stages, extractor=model, write=tables.append)
        list(engine.receipts(make_scans(*names), watched, threading.Event()))
    for table in tables:
        for row in table["features"].to_pylist():
            values[row[0]["scan_id"]] = row[0]["feature"][0]
    assert values == {f"s{n}": float(n) for n in range(40)}


@pytest.mark.slow
@pytest.mark.skipif(count_usable_cores() < 2, reason="with one core, one call of the model runs at a time")
def test_two_calls_of_the_model_run_at_once(decoder: Decoder, stages: Stages) -> None:
    both_calls = threading.Barrier(2, timeout=30)

    def wait_for_other_call(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        both_calls.wait()
        return take_corner(batch, seeds)

    names = [f"s{n}" for n in range(12)]  # four batches
    records = run_scans(make_engine(decoder), replace(stages, extractor=wait_for_other_call), names)
    assert {record.status for record in records.values()} == {"ok"}


@pytest.mark.slow
def test_prefetched_scans_are_processed_once_and_those_that_are_not_due_are_dropped(
    decoder: Decoder, stages: Stages
) -> None:
    names = [f"s{n}" for n in range(12)]
    with make_engine(decoder) as engine:
        engine.prefetch_scans(make_scans(*names, "not due"))
        receipts = list(engine.receipts(make_scans(*names[2:], "late"), stages, threading.Event()))
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted([*names[2:], "late"])


@pytest.mark.slow
def test_prefetched_scans_get_the_layers_that_are_due_when_the_output_is_locked(
    decoder: Decoder, stages: Stages
) -> None:
    def take_due(batch: np.ndarray, seeds: Sequence[str], *due: tuple[str, ...]) -> dict[str, np.ndarray]:
        return dict.fromkeys(due[0] if due else ("corner", "other"), batch[:, 0, 0, 0])

    names = [f"s{n}" for n in range(12)]
    scans = [replace(scan, due_layers=("corner",)) for scan in make_scans(*names)]
    with make_engine(decoder) as engine:
        engine.prefetch_scans(make_scans(*names))
        receipts = list(engine.receipts(scans, replace(stages, extractor=take_due), threading.Event()))
    assert {file.partition_values["layer"] for receipt in receipts for file in receipt.files} == {"corner"}
    records = [record for receipt in receipts for record in receipt.records]
    assert {record.scan_id: record.due_layers for record in records} == {name: ["corner"] for name in names}


@pytest.mark.slow
def test_prefetched_scans_that_kill_or_hang_their_process_fail_like_others(
    decoder: Decoder, stages: Stages
) -> None:
    names = ["poison", "s1", "hang", "flaky", "s2"]
    with make_engine(decoder, attempts=2, scan_timeout_s=3) as engine:
        engine.prefetch_scans(make_scans(*names))
        receipts = list(engine.receipts(make_scans(*names), stages, threading.Event()))
    records = {record.scan_id: record for receipt in receipts for record in receipt.records}
    assert {name: record.reason for name, record in records.items()} == {
        **dict.fromkeys(["s1", "s2", "flaky"]),
        "poison": "worker_crash",
        "hang": "timeout",
    }


@pytest.mark.slow
def test_of_tiny_scans_that_share_a_message_only_those_that_kill_or_hang_fail(
    decoder: Decoder, stages: Stages
) -> None:
    names = [*(f"s{n}" for n in range(50)), "poison", "flaky", *(f"s{n}" for n in range(50, 100)), "hang"]
    tiny = [replace(scan, size=100) for scan in make_scans(*names)]
    with make_engine(decoder, attempts=3, scan_timeout_s=3) as engine:
        receipts = list(engine.receipts(tiny, stages, threading.Event()))
    records = {record.scan_id: record for receipt in receipts for record in receipt.records}
    assert records.keys() == set(names)
    failed = {name: (record.reason, record.attempts) for name, record in records.items() if record.reason}
    assert failed == {"poison": ("worker_crash", 3), "hang": ("timeout", 2)}
    assert records["s99"].attempts <= 2


@pytest.mark.slow
def test_shared_memory_has_no_name_in_dev_shm_that_could_outlive_the_run(
    decoder: Decoder, stages: Stages
) -> None:
    before = set(os.listdir("/dev/shm"))
    with make_engine(decoder, workers=1) as engine:
        receipts = engine.receipts(make_scans(*(f"s{n}" for n in range(20))), stages, threading.Event())
        next(receipts)
        assert set(os.listdir("/dev/shm")) <= before
        receipts.close()


def test_after_a_stop_no_further_scan_is_submitted(decoder: Decoder, stages: Stages) -> None:
    stop = threading.Event()
    stop.set()
    with make_engine(decoder) as engine:
        assert list(engine.receipts(make_scans("s1", "s2"), stages, stop)) == []


def test_a_ray_job_that_decodes_in_its_own_process_gives_up_the_scan_in_progress(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, end = threading.Event(), threading.Event()

    def decode(_: Scan) -> Decoded:
        stop.set()  # as `ray job stop` does while the scan is being decoded
        end.wait(60)
        raise RuntimeError("the scan was not given up")

    monkeypatch.setattr(inline, "find_stop_limit_s", lambda: 0.1)
    with make_engine(cast(Decoder, decode), workers=0) as engine:
        start = time.monotonic()
        assert list(engine.receipts(make_scans("s1"), stages, stop)) == []
        assert time.monotonic() - start < 30
    end.set()


@pytest.mark.slow
def test_a_script_without_a_main_guard_may_use_worker_processes(config_of: Any, tmp_path: Path) -> None:
    config = config_of(run={"decode": {"workers": 2}})
    script = tmp_path / "script.py"
    script.write_text(f"import featray\nprint(featray.extract({config!r}).ok)\n")
    completed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert completed.stdout == "12\n", completed.stderr


@pytest.mark.slow
def test_a_daemonic_process_may_use_worker_processes(config_of: Any, tmp_path: Path) -> None:
    """Job queues run their tasks in daemonic processes, which `multiprocessing` allows no children."""
    config = config_of(run={"decode": {"workers": 2}})
    script = tmp_path / "script.py"
    script.write_text(
        "import featray, multiprocessing\n"
        "context = multiprocessing.get_context('fork')\n"
        "results = context.SimpleQueue()\n"
        f"task = context.Process(target=lambda: results.put(featray.extract({config!r}).ok), daemon=True)\n"
        "task.start(); print(results.get()); task.join()\n"
    )
    completed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert completed.stdout == "12\n", completed.stderr


def count_worker_processes() -> int:
    return sum("worker_process" in " ".join(child.cmdline()) for child in psutil.Process().children())


def wait_for_worker_processes(count: int) -> None:
    """Wait until `count` worker processes are there; a new child has its command line only after its exec."""
    deadline = time.monotonic() + 30
    while count_worker_processes() != count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count_worker_processes() == count


@pytest.mark.slow
def test_there_are_never_more_worker_processes_than_scans(decoder: Decoder, stages: Stages) -> None:
    with make_engine(decoder, workers=4, batch_scans=1) as engine:
        assert count_worker_processes() == 0
        engine.prefetch_scans(make_scans("s1"))
        wait_for_worker_processes(1)
        receipts = engine.receipts(make_scans("s1", "s2", "s3"), stages, threading.Event())
        records = [record for receipt in receipts for record in receipt.records]
        assert count_worker_processes() == engine.workers().decode == 3
    assert sorted(record.scan_id for record in records) == ["s1", "s2", "s3"]
    assert count_worker_processes() == 0
