"""Engine ray: the same numbers as inline, and a scan that kills its worker costs only itself."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from kill import poison

import featray
from featray.config import LimitsConfig, RunConfig, load
from featray.dataset import FEATURES, Dataset
from featray.engines import Stages, ray_data
from featray.engines.ray_data import RayEngine, _DecodeRow
from featray.errors import ConfigError, FeatrayError
from featray.schema import Scan, ScanRecord
from featray.stages.write import write
from featray.storage import Store

MINIMAL = {"model": {"uri": "m.keras", "layers": ["sum"]}, "output": {"uri": "out"}}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def features(uri: str) -> dict[tuple[str, str, int], np.ndarray]:
    rows = Dataset(Store(uri)).read(FEATURES, ("scan_id", "layer", "patch", "feature")).to_pylist()
    found = {(row["scan_id"], row["layer"], row["patch"]): np.array(row["feature"]) for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


@pytest.mark.parametrize(
    "preprocess", [{}, {"fit": "patches", "stride": [8, 16, 16]}], ids=["whole volumes", "patches"]
)
def test_ray_and_inline_agree(config_of: Any, tmp_path: Path, preprocess: dict[str, Any]) -> None:
    inline = config_of(preprocess=preprocess, run={"decode": {"workers": 2}})
    by_ray = config_of(preprocess=preprocess, output={"uri": str(tmp_path / "ray")}, model={"batch_size": 3})
    featray.extract(inline)
    summary = featray.extract(by_ray, ["run.engine=ray"])
    assert (summary.engine, summary.ok, summary.exit_code) == ("ray", 12, 0)
    expected, found = features(inline["output"]["uri"]), features(by_ray["output"]["uri"])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))


def test_decoding_is_not_fused_into_the_model(tmp_path: Path) -> None:
    engine = RayEngine(RunConfig(), LimitsConfig())
    stages = _stages(tmp_path)
    decode = _DecodeRow(stages.decode, LimitsConfig(), None)
    stats = engine._dataset([_scan("a"), _scan("b")], stages, decode, alone=False).materialize().stats()
    assert "Map(_DecodeRow)" in stats
    assert "MapBatches(_ExtractBatch)" in stats
    assert "->MapBatches(_ExtractBatch)" not in stats


def _scan(name: str) -> Scan:
    return Scan(name, f"/{name}", "nifti", (f"/{name}",), "c")


def _stages(folder: Path) -> Stages:
    decoder = poison.Poisoned.of(load({**MINIMAL, "source": {"uri": "/"}}), "r", "run")
    dataset = Dataset(Store(str(folder)))
    put = functools.partial(write, dataset=dataset, partition_by=("layer",), recipe="r", run_id="run")
    return Stages(decoder, poison.summing, poison.load_summing, put, batch_scans=2, scans_per_file=4)


def _records(stages: Stages, names: list[str], **limits: Any) -> dict[str, ScanRecord]:
    engine = RayEngine(RunConfig(), LimitsConfig(**limits))
    receipts = list(engine.receipts([_scan(name) for name in names], stages, threading.Event()))
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted(names)
    return {record.scan_id: record for record in records}


def test_scans_that_crash_or_hang_their_decoder_cost_no_other_and_no_second_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"poison{n}" if n % 20 == 6 else f"s{n}" for n in range(60)] + ["hang"]
    records = _records(_stages(tmp_path), names, attempts=2, scan_timeout_s=3)
    assert {name: (record.reason, record.attempts) for name, record in records.items() if record.reason} == {
        **{f"poison{n}": ("worker_crash", 2) for n in range(6, 60, 20)},
        "hang": ("timeout", 1),
    }
    assert "a pass stopped early" not in caplog.text


def test_a_scan_that_kills_the_models_process_is_found_and_costs_no_other(tmp_path: Path) -> None:
    names = [*(f"s{n}" for n in range(9)), "killer"]
    records = _records(_stages(tmp_path), names, attempts=2)
    assert {name: (record.reason, record.attempts) for name, record in records.items() if record.reason} == {
        "killer": ("worker_crash", 2)
    }


def test_a_lone_scan_that_kills_the_models_process_is_given_up(tmp_path: Path) -> None:
    assert _records(_stages(tmp_path), ["killer"], attempts=1)["killer"].reason == "worker_crash"


@pytest.mark.parametrize("error", ["ActorDiedError", "WorkerCrashedError"])
def test_where_no_worker_can_live_no_scan_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def dying(self: RayEngine, *_: Any) -> Any:  # as Ray says it, which takes it a minute or more
        passes.append(error)
        raise getattr(ray.exceptions, error)
        yield

    passes: list[str] = []
    monkeypatch.setattr(RayEngine, "_pass", dying)
    with pytest.raises(FeatrayError, match="the cluster is to blame"):
        _records(_stages(tmp_path), ["s0", "s1"])
    assert len(passes) == {"ActorDiedError": 1, "WorkerCrashedError": 3}[error]


def test_windows_of_scans_are_seen_to_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_data, "_WINDOWS", (2, 4))
    names = [f"s{n}" for n in range(9)]
    assert {record.status for record in _records(_stages(tmp_path), names).values()} == {"ok"}


def test_windows_hold_all_scans_in_order_and_grow() -> None:
    found = list(ray_data._windows(range(50_001)))  # type: ignore[arg-type]
    assert [len(window) for window in found] == [2_000, 8_000, 20_000, 20_000, 1]
    assert [scan for window in found for scan in window] == list(range(50_001))


@pytest.mark.parametrize(
    ("sizes", "tasks"),
    [([60_000_000] * 30, 30), ([1_000] * 30, 16), ([1_000] * 6_400, 100), ([4 * 2**20] * 1_000, 500)],
    ids=["one large scan each", "no idle CPU", "many tiny ones share", "as many as fill a block"],
)
def test_scans_share_a_task_when_they_are_small_and_many(sizes: list[int], tasks: int) -> None:
    scans = [replace(_scan(f"s{n}"), size=size) for n, size in enumerate(sizes)]
    assert ray_data._tasks(scans, cpus=2) == tasks


def test_claims_that_leave_a_local_ray_no_room_to_decode_are_refused() -> None:
    run = RunConfig.model_validate({"actors": {"num_cpus": 2}})
    with pytest.raises(ConfigError, match=r"beside run\.decode"):
        ray_data._compare_claims(run, {"CPU": 2.0}, grows=False)
    ray_data._compare_claims(RunConfig(), {"CPU": 2.0}, grows=False)
