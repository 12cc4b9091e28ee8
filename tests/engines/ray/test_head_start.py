"""The head start: the driver processes the first scans while its local Ray starts, and each scan once."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from kill import poison

import featray
from featray.config import LimitsConfig, RunConfig, load
from featray.engines.base import Decoding, Stages
from featray.engines.ray import cluster
from featray.engines.ray import head_start as head_start_module
from featray.engines.ray.engine import RayEngine
from featray.engines.ray.head_start import HeadStart
from featray.errors import FeatrayError
from featray.hardware import ModelThreads
from featray.output.dataset import Dataset
from featray.schema import Scan
from featray.stages.write import write
from featray.storage.store import Store

SCANS = [
    Scan(name, f"/{name}", "nifti", (f"/{name}",), "c") for name in ["poison0", *(f"s{n}" for n in range(31))]
]


def make_decoding(**preprocess: Any) -> Decoding:
    model = {"uri": "m.keras", "layers": ["sum"]}
    config = {"source": {"uri": "/"}, "preprocess": preprocess, "model": model, "output": {"uri": "out"}}
    decoder = poison.CrashingDecoder.from_config(load(config))
    return Decoding(decoder, batch_scans=2, limits=LimitsConfig(attempts=2))


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    dataset = Dataset(Store(str(tmp_path)))
    write_run = functools.partial(
        write, dataset=dataset, partition_by=("layer",), recipes={"sum": "r"}, run_id="run"
    )
    return Stages(poison.sum_voxels, poison.load_sum_model, "r", write_run, scans_per_file=3, run_id="run")


def start_prefetch(scans: list[Scan] = SCANS, **preprocess: Any) -> HeadStart:
    head_start = HeadStart(make_decoding(**preprocess), ModelThreads(each=1))
    head_start.prefetch_scans(scans)
    return head_start


@pytest.mark.slow
def test_prefetched_scans_are_processed_in_the_driver_and_the_others_are_returned(stages: Stages) -> None:
    head_start = start_prefetch()
    others = head_start.start(SCANS, stages, threading.Event())
    assert others == SCANS[4:]
    records = [record for receipt in head_start.take_receipts(60) for record in receipt.records]
    outcomes = {record.scan_id: (record.status, record.attempts) for record in records}
    assert outcomes == {"poison0": ("failed", 2), "s0": ("ok", 1), "s1": ("ok", 1), "s2": ("ok", 1)}
    assert not head_start.take_receipts(0)
    assert not find_worker_processes()


@pytest.mark.slow
def test_a_prefetched_scan_that_is_not_due_is_dropped(stages: Stages) -> None:
    head_start = start_prefetch()
    due = [SCANS[0], *SCANS[2:]]
    assert head_start.start(due, stages, threading.Event()) == SCANS[4:]
    records = [record.scan_id for receipt in head_start.take_receipts(60) for record in receipt.records]
    assert sorted(records) == ["poison0", "s1", "s2"]


@pytest.mark.parametrize(
    ("preprocess", "scans"),
    [({"size": None}, SCANS), ({}, SCANS[:7])],
    ids=["inputs of any size", "few scans"],
)
def test_no_scan_is_prefetched_if_inputs_vary_in_size_or_scans_are_few(
    preprocess: dict[str, Any], scans: list[Scan], stages: Stages
) -> None:
    before = find_worker_processes()  # those of tests of other files, which end a moment later
    head_start = start_prefetch(scans, **preprocess)
    assert head_start.start(scans, stages, threading.Event()) == scans
    assert not head_start.take_receipts(None)
    assert set(find_worker_processes()) <= set(before)


@pytest.mark.slow
def test_receipts_that_are_not_ready_within_the_timeout_are_returned_later(stages: Stages) -> None:
    head_start, resume = start_prefetch(), threading.Event()

    def wait_and_write(scans: Any) -> Any:
        resume.wait(60)
        return stages.write(scans)

    head_start.start(SCANS, replace(stages, write=wait_and_write), threading.Event())
    assert not head_start.take_receipts(0.05)
    resume.set()
    assert sum(len(receipt.records) for receipt in head_start.take_receipts(60)) == 4


def test_closing_early_leaves_no_worker_process(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start_module, "_CLOSE_TIMEOUT_S", 0.1)
    scans = [replace(SCANS[0], scan_id="hang"), *SCANS[1:]]
    head_start = start_prefetch(scans)
    head_start.start(scans, stages, threading.Event())
    head_start.close()
    assert not find_worker_processes()
    with pytest.raises((FeatrayError, OSError)):
        head_start.take_receipts(60)


@pytest.mark.parametrize(
    ("run", "environment", "starts"),
    [({}, {}, True), ({"address": "ray://head:10001"}, {}, False), ({}, {"RAY_ADDRESS": "auto"}, False)],
    ids=["local", "an address", "an address in the environment"],
)
def test_a_local_ray_is_started_only_without_an_address(
    run: dict[str, Any], environment: dict[str, str], starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(cluster.sys.modules, "ray", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.is_to_start(RunConfig.model_validate(run)) == starts


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_run_with_a_head_start_stores_every_scan_once(
    config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not cluster.is_to_start(RunConfig()), "this process has joined a cluster"
    monkeypatch.setattr(cluster, "is_to_start", lambda run: True)
    in_driver: list[str] = []
    take_receipts = HeadStart.take_receipts

    def take_and_note(self: HeadStart, timeout_s: float | None) -> Any:
        receipts = take_receipts(self, timeout_s)
        in_driver.extend(record.scan_id for receipt in receipts for record in receipt.records)
        return receipts

    monkeypatch.setattr(HeadStart, "take_receipts", take_and_note)
    config = config_of(run={"address": "local"})
    summary = featray.extract(config, ["run.engine=ray"])
    assert (summary.ok, summary.failed, summary.exit_code, len(in_driver)) == (12, 0, 0, 1)
    assert featray.verify(config["output"]["uri"]).exit_code == 0


def test_with_gpus_there_is_no_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "is_to_start", lambda run: True)
    monkeypatch.setattr(cluster, "connect", lambda run, limits: False)
    run = RunConfig.model_validate({"actors": {"num_gpus": 1}})
    with RayEngine(run, make_decoding()) as engine:
        engine.prefetch_scans(SCANS)
        assert not find_worker_processes()


def find_worker_processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if any("worker_process" in word for word in child.cmdline())]
