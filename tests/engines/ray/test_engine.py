"""Engine ray: the same values as engine inline, scans that kill a process, and errors of stages."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from kill import poison
from ray.data.exceptions import ExecutionTimeoutError

import featray
from featray.config import LimitsConfig, RunConfig, load
from featray.engines.base import Decoding, Stages
from featray.engines.decoding.work_clock import WorkClock
from featray.engines.ray import engine as engine_module
from featray.engines.ray import passes
from featray.engines.ray.dataset import PassPipeline
from featray.engines.ray.engine import RayEngine
from featray.engines.ray.passes import Pass
from featray.errors import DeviceError, FeatrayError, StorageError
from featray.output.dataset import FEATURES, Dataset
from featray.schema import Receipt, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.write import write
from featray.storage.store import Store

MINIMAL = {"model": {"uri": "m.keras", "layers": ["sum"]}, "output": {"uri": "out"}}

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def read_features(uri: str) -> dict[tuple[str, str, int], np.ndarray]:
    """Return (scan_id, layer, patch) → feature; check that each has one row."""
    rows = Dataset(Store(uri)).read(FEATURES, ("scan_id", "layer", "patch", "feature")).to_pylist()
    features = {(row["scan_id"], row["layer"], row["patch"]): np.array(row["feature"]) for row in rows}
    assert len(features) == len(rows), "a row occurs twice"
    return features


@pytest.mark.parametrize(
    ("preprocess", "actors"),
    [({}, 2), ({"fit": "patches", "stride": [8, 16, 16]}, 1)],
    ids=["whole volumes", "patches"],
)
def test_engines_ray_and_inline_give_the_same_values(
    config_of: Any,
    vae_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preprocess: dict[str, Any],
    actors: int,
) -> None:
    inline = config_of(preprocess=preprocess, run={"decode": {"workers": 2}})
    monkeypatch.chdir(vae_file.parent)  # which is not the working directory of Ray's workers
    model = {"batch_size": 3, "uri": vae_file.name}
    by_ray = config_of(preprocess=preprocess, output={"uri": str(tmp_path / "ray")}, model=model)
    featray.extract(inline)
    summary = featray.extract(by_ray, ["run.engine=ray", f"run.actors.max={actors}"])
    assert (summary.engine, summary.ok, summary.exit_code) == ("ray", 12, 0)
    expected, actual = read_features(inline["output"]["uri"]), read_features(by_ray["output"]["uri"])
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))


def test_with_gpus_decoding_and_the_model_run_in_different_processes(tmp_path: Path) -> None:
    actors = {"num_gpus": 0.5, "num_cpus": 0.5}
    run = RunConfig.model_validate({"actors": actors, "decode": {"num_cpus": 0.5}})
    pipeline = PassPipeline(run, make_decoding(), make_stages(tmp_path), Pass.STRICT, None)
    stats = pipeline._build([make_scan("a"), make_scan("b")]).materialize().stats()
    assert "MapBatches(DecodeBatch)" in stats
    assert "MapBatches(ExtractBatch)" in stats
    assert "->MapBatches(ExtractBatch)" not in stats


@pytest.mark.parametrize(
    ("actors", "decode_cpus"),
    [
        ({}, 0.5),
        ({"num_cpus": 2}, 0.5),
        ({"num_gpus": 0.5, "num_cpus": 0.5}, 0.5),
        ({"num_gpus": 1}, 1),
    ],
    ids=["cpu", "cpu, two calls at once", "gpu", "gpu, all CPUs claimed"],
)
def test_each_scan_keeps_its_own_tensor_between_processes(
    tmp_path: Path, actors: dict[str, Any], decode_cpus: float
) -> None:
    run = RunConfig.model_validate({"actors": actors, "decode": {"num_cpus": decode_cpus}})
    decoding = make_decoding(poison.NumberingDecoder)
    receipts = RayEngine(run, decoding).receipts(
        [replace(make_scan(f"s{n}"), size=n % 7 * 20_000) for n in range(50)],
        make_stages(tmp_path),
        threading.Event(),
    )
    assert sum(len(receipt.records) for receipt in receipts) == 50
    files = [str(path) for path in (tmp_path / FEATURES).rglob("*.parquet")]
    rows = pq.ParquetDataset(files).read(["scan_id", "feature"]).to_pylist()
    assert {row["scan_id"]: row["feature"] for row in rows} == {f"s{n}": [8.0 * n] for n in range(50)}


def test_a_pool_of_actors_grows_under_load_to_the_number_of_gpus(tmp_path: Path) -> None:
    run = RunConfig.model_validate({"actors": {"num_gpus": 1, "num_cpus": 0.25}, "decode": {"num_cpus": 0.5}})
    stages = replace(
        make_stages(tmp_path), load_extractor=functools.partial(poison.load_waiting_model, str(tmp_path))
    )
    receipts = RayEngine(run, make_decoding()).receipts(
        [make_scan(f"s{n}") for n in range(40)], stages, threading.Event()
    )
    assert sum(len(receipt.records) for receipt in receipts) == 40
    assert len(list(tmp_path.glob("loaded-*"))) == 2


@pytest.mark.slow
def test_after_faults_of_a_device_actors_restart_and_every_scan_is_processed(tmp_path: Path) -> None:
    actors = {"num_gpus": 1, "num_cpus": 0.5, "max": 1}
    run = RunConfig.model_validate({"actors": actors, "decode": {"num_cpus": 0.5}})
    names = [f"s{number}" for number in range(12)]
    engine = RayEngine(run, make_decoding())
    receipts = engine.receipts(
        [make_scan(name) for name in names], make_faulty_stages(tmp_path, faults=1), threading.Event()
    )
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted(names)
    assert {record.status for record in records} == {"ok"}
    processes = [path.name.split("-", 1)[1].rsplit("-", 1)[0] for path in tmp_path.glob("gpus-*")]
    assert len(processes) >= 2
    assert {*processes} <= {"0", "1"}, "each process sees one GPU"


@pytest.mark.slow
def test_a_fault_of_all_devices_stops_the_run_and_fails_no_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "MAX_FAULTS", 2)  # each further process would take seconds
    actors = {"num_gpus": 1, "num_cpus": 0.5, "max": 1}
    run = RunConfig.model_validate({"actors": actors, "decode": {"num_cpus": 0.5}})
    receipts = RayEngine(run, make_decoding()).receipts(
        [make_scan(f"s{number}") for number in range(50)],
        make_faulty_stages(tmp_path, faults=1000),
        threading.Event(),
    )
    with pytest.raises(DeviceError, match=r"the GPU failed \(a test\) \(2 processes in a row"):
        next(receipts)  # stops before the first receipt


def make_faulty_stages(folder: Path, faults: int) -> Stages:
    load_faulty = functools.partial(poison.load_faulty_model, str(folder), faults)
    return replace(make_stages(folder), load_extractor=load_faulty)


def make_scan(name: str) -> Scan:
    return Scan(name, f"/{name}", "nifti", (f"/{name}",), "c")


def make_decoding(decoder: type[Decoder] = poison.CrashingDecoder, **limits: Any) -> Decoding:
    config = load({**MINIMAL, "source": {"uri": "/"}})
    return Decoding(decoder.from_config(config), batch_scans=2, limits=LimitsConfig(**limits))


def make_stages(folder: Path) -> Stages:
    dataset = Dataset(Store(str(folder)))
    write_run = functools.partial(
        write, dataset=dataset, partition_by=("layer",), recipes={"sum": "r"}, run_id="run"
    )
    return Stages(poison.sum_voxels, poison.load_sum_model, "r", write_run, scans_per_file=4, run_id="run")


def run_scans(stages: Stages, names: list[str], num_cpus: int = 1, **limits: Any) -> dict[str, ScanRecord]:
    # With one actor, because each new process imports for seconds.
    run = RunConfig.model_validate({"actors": {"max": 1, "num_cpus": num_cpus}})
    engine = RayEngine(run, make_decoding(**limits))
    receipts = list(engine.receipts([make_scan(name) for name in names], stages, threading.Event()))
    records = [record for receipt in receipts for record in receipt.records]
    assert sorted(record.scan_id for record in records) == sorted(names)
    return {record.scan_id: record for record in records}


def test_scans_that_crash_or_hang_their_process_affect_no_other_scan_and_cause_no_second_pass(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"poison{n}" if n % 20 == 6 else f"s{n}" for n in range(60)] + ["hang"]
    records = run_scans(make_stages(tmp_path), names, attempts=2, scan_timeout_s=3)
    assert {name: (record.reason, record.attempts) for name, record in records.items() if record.reason} == {
        **{f"poison{n}": ("worker_crash", 2) for n in range(6, 60, 20)},
        "hang": ("timeout", 1),
    }
    assert "a pass ended early" not in caplog.text


@pytest.mark.parametrize("num_cpus", [1, 2], ids=["one task at once", "two tasks at once"])
def test_a_scan_that_kills_the_process_of_the_model_does_not_affect_other_scans(
    tmp_path: Path, num_cpus: int
) -> None:
    names = [*(f"s{n}" for n in range(9)), "killer"]
    records = run_scans(make_stages(tmp_path), names, num_cpus, attempts=2)
    assert {name: (record.reason, record.attempts) for name, record in records.items() if record.reason} == {
        "killer": ("worker_crash", 2)
    }


def test_a_single_scan_that_kills_the_process_of_the_model_fails_as_worker_crash(tmp_path: Path) -> None:
    assert run_scans(make_stages(tmp_path), ["killer"], attempts=1)["killer"].reason == "worker_crash"


@pytest.mark.parametrize("error", ["ActorDiedError", "WorkerCrashedError"])
def test_if_all_workers_die_the_run_ends_with_an_error_of_the_cluster_and_no_scan_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    def fail_like_ray(self: PassPipeline, scans: Any) -> Any:  # Ray raises this after a minute or more
        passes.append(error)
        raise getattr(ray.exceptions, error)
        yield

    passes: list[str] = []
    monkeypatch.setattr(PassPipeline, "receipts", fail_like_ray)
    with pytest.raises(FeatrayError, match="the cluster is to blame"):
        run_scans(make_stages(tmp_path), ["s0", "s1"])
    assert len(passes) == {"ActorDiedError": 1, "WorkerCrashedError": 3}[error]


def test_a_pass_that_ends_because_the_driver_was_suspended_is_repeated_and_blames_no_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_like_ray(self: PassPipeline, scans: Any) -> Any:
        passes.append(self._pass)
        if len(passes) in (1, 3, 4):  # the second one dies
            lost.append(3600.0)
            raise ExecutionTimeoutError
        if len(passes) == 2:
            raise ray.exceptions.WorkerCrashedError
        yield from original(self, scans)

    passes: list[Pass] = []
    lost: list[float] = []
    original = PassPipeline.receipts
    monkeypatch.setattr(PassPipeline, "receipts", fail_like_ray)
    monkeypatch.setattr(WorkClock, "lost_s", lambda self: sum(lost))
    records = run_scans(make_stages(tmp_path), ["s0", "s1"])
    assert {record.status for record in records.values()} == {"ok"}
    assert passes == [Pass.STRICT, Pass.STRICT, *[Pass.TOLERANT] * 3]


def refuse_to_write(table: Any) -> Receipt:
    raise StorageError(f"no room for {len(table)} scans")


def test_an_error_of_a_stage_is_raised_in_the_driver_with_its_type_and_message(tmp_path: Path) -> None:
    stages = replace(make_stages(tmp_path), write=refuse_to_write)
    with pytest.raises(StorageError, match=r"^no room for 1 scans$"):
        run_scans(stages, ["s0"])


def test_windows_of_scans_are_processed_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_WINDOW_SCANS", 4)
    names = [f"s{n}" for n in range(5)]
    assert {record.status for record in run_scans(make_stages(tmp_path), names).values()} == {"ok"}
