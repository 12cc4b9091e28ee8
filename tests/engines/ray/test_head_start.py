"""A few scans are seen to by the driver while its own Ray comes up: once, and no crash is too much."""

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
from featray.engines.base import Stages
from featray.engines.ray import cluster
from featray.engines.ray import head_start as meanwhile_module
from featray.engines.ray.engine import RayEngine
from featray.engines.ray.head_start import Meanwhile
from featray.errors import FeatrayError
from featray.hardware import ModelThreads
from featray.output.dataset import Dataset
from featray.schema import Scan
from featray.stages.decode import Decoder
from featray.stages.write import write
from featray.storage.store import Store

SCANS = [
    Scan(name, f"/{name}", "nifti", (f"/{name}",), "c") for name in ["poison0", *(f"s{n}" for n in range(31))]
]


def _decoder(**preprocess: Any) -> Decoder:
    model = {"uri": "m.keras", "layers": ["sum"]}
    config = {"source": {"uri": "/"}, "preprocess": preprocess, "model": model, "output": {"uri": "out"}}
    return poison.Poisoned.of(load(config), "r", "run")


@pytest.fixture
def stages(tmp_path: Path) -> Stages:
    put = functools.partial(
        write, dataset=Dataset(Store(str(tmp_path))), partition_by=("layer",), recipe="r", run_id="run"
    )
    return Stages(_decoder(), poison.summing, poison.load_summing, put, batch_scans=2, scans_per_file=3)


def _begun(decoder: Decoder, batch_scans: int = 2, scans: list[Scan] = SCANS) -> Meanwhile:
    meanwhile = Meanwhile(LimitsConfig(attempts=2), None, ModelThreads(each=1))
    meanwhile.begin(scans, decoder, batch_scans)
    return meanwhile


def test_what_was_begun_comes_through_here_and_the_others_are_left(stages: Stages) -> None:
    meanwhile = _begun(stages.decode)
    others = meanwhile.start(SCANS, stages, threading.Event())
    assert others == SCANS[4:]
    records = [record for receipt in meanwhile.taken(60) for record in receipt.records]
    found = {record.scan_id: (record.status, record.attempts) for record in records}
    assert found == {"poison0": ("failed", 2), "s0": ("ok", 1), "s1": ("ok", 1), "s2": ("ok", 1)}
    assert not meanwhile.taken(0)
    assert not _helpers()


def test_a_scan_that_is_no_longer_asked_for_is_left_out(stages: Stages) -> None:
    meanwhile = _begun(stages.decode)
    asked = [SCANS[0], *SCANS[2:]]
    assert meanwhile.start(asked, stages, threading.Event()) == SCANS[4:]
    records = [record.scan_id for receipt in meanwhile.taken(60) for record in receipt.records]
    assert sorted(records) == ["poison0", "s1", "s2"]


@pytest.mark.parametrize(
    ("preprocess", "scans"), [({"size": None}, SCANS), ({}, SCANS[:7])], ids=["any size of input", "so few"]
)
def test_nothing_is_begun_where(preprocess: dict[str, Any], scans: list[Scan], stages: Stages) -> None:
    meanwhile = _begun(_decoder(**preprocess), scans=scans)
    assert meanwhile.start(scans, stages, threading.Event()) == scans
    assert not meanwhile.taken(None)
    assert not _helpers()


def test_what_has_not_come_through_in_time_comes_later(stages: Stages) -> None:
    meanwhile, go_on = _begun(stages.decode), threading.Event()

    def held(scans: Any) -> Any:
        go_on.wait(60)
        return stages.write(scans)

    meanwhile.start(SCANS, replace(stages, write=held), threading.Event())
    assert not meanwhile.taken(0.05)
    go_on.set()
    assert sum(len(receipt.records) for receipt in meanwhile.taken(60)) == 4


def test_closed_before_they_are_through_no_helper_is_left(
    stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meanwhile_module, "_PATIENCE_S", 0.1)
    scans = [replace(SCANS[0], scan_id="hang"), *SCANS[1:]]
    meanwhile = _begun(stages.decode, scans=scans)
    meanwhile.start(scans, stages, threading.Event())
    meanwhile.close()
    assert not _helpers()
    with pytest.raises((FeatrayError, OSError)):
        meanwhile.taken(60)


@pytest.mark.parametrize(
    ("run", "environment", "starts"),
    [({}, {}, True), ({"address": "ray://head:10001"}, {}, False), ({}, {"RAY_ADDRESS": "auto"}, False)],
    ids=["local", "an address", "an address in the environment"],
)
def test_only_where_a_ray_is_to_be_started(
    run: dict[str, Any], environment: dict[str, str], starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(cluster.sys.modules, "ray", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.is_to_start(RunConfig.model_validate(run)) == starts


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_run_has_every_scan_once_wherever_it_was_seen_to(
    config_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not cluster.is_to_start(RunConfig()), "it has been joined already"
    monkeypatch.setattr(cluster, "is_to_start", lambda run: True)
    here: list[str] = []
    taken = Meanwhile.taken

    def noted(self: Meanwhile, timeout_s: float | None) -> Any:
        found = taken(self, timeout_s)
        here.extend(record.scan_id for receipt in found for record in receipt.records)
        return found

    monkeypatch.setattr(Meanwhile, "taken", noted)
    config = config_of()
    summary = featray.extract(config, ["run.engine=ray"])
    assert (summary.ok, summary.failed, summary.exit_code, len(here)) == (12, 0, 0, 1)
    assert featray.verify(config["output"]["uri"]).exit_code == 0


def test_with_gpus_none_is_begun_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "is_to_start", lambda run: True)
    monkeypatch.setattr(cluster, "connect", lambda run, limits: False)
    run = RunConfig.model_validate({"actors": {"num_gpus": 1}})
    with RayEngine(run, LimitsConfig()) as engine:
        engine.begin(SCANS, _decoder(), 2)
        assert not _helpers()


def _helpers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if any("spawn_main" in word for word in child.cmdline())]
