"""Engine ray: the same numbers as inline, and a scan that kills its worker costs only itself."""

from __future__ import annotations

import contextlib
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

import featray
from featray.config import Config, LimitsConfig, RunConfig, load
from featray.engines.base import Stages
from featray.engines.ray import cluster, sizing
from featray.engines.ray import engine as ray_data
from featray.engines.ray.engine import RayEngine
from featray.errors import ConfigError, FeatrayError, StorageError
from featray.output.dataset import FEATURES, Dataset
from featray.schema import Receipt, Scan, ScanRecord
from featray.stages.write import write
from featray.storage.store import Store

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


def test_beside_gpus_decoding_is_apart_from_the_model(tmp_path: Path) -> None:
    actors = {"num_gpus": 0.5, "num_cpus": 0.5}
    run = RunConfig.model_validate({"actors": actors, "decode": {"num_cpus": 0.5}})
    engine = RayEngine(run, LimitsConfig())
    dataset = engine._dataset([_scan("a"), _scan("b")], _stages(tmp_path), None, alone=False)
    stats = dataset.materialize().stats()
    assert "MapBatches(DecodeBatch)" in stats
    assert "MapBatches(ExtractBatch)" in stats
    assert "->MapBatches(ExtractBatch)" not in stats


@pytest.mark.parametrize(
    ("actors", "decode_cpus"),
    [({}, 0.5), ({"num_gpus": 0.5, "num_cpus": 0.5}, 0.5), ({"num_gpus": 1}, 1)],
    ids=["cpu", "gpu", "gpu, claims that fill the machine"],
)
def test_each_scan_keeps_its_own_tensor_however_it_travels(
    tmp_path: Path, actors: dict[str, Any], decode_cpus: float
) -> None:
    run = RunConfig.model_validate({"actors": actors, "decode": {"num_cpus": decode_cpus}})
    stages = replace(_stages(tmp_path), decode=poison.Numbered.of(_config(), "r", "run"))
    receipts = RayEngine(run, LimitsConfig()).receipts(
        [replace(_scan(f"s{n}"), size=n % 7 * 20_000) for n in range(50)], stages, threading.Event()
    )
    assert sum(len(receipt.records) for receipt in receipts) == 50
    files = [str(path) for path in (tmp_path / FEATURES).rglob("*.parquet")]
    rows = pq.ParquetDataset(files).read(["scan_id", "feature"]).to_pylist()
    assert {row["scan_id"]: row["feature"] for row in rows} == {f"s{n}": [8.0 * n] for n in range(50)}


def test_a_pool_grows_under_load_and_no_further_than_there_are_gpus(tmp_path: Path) -> None:
    run = RunConfig.model_validate({"actors": {"num_gpus": 1, "num_cpus": 0.25}, "decode": {"num_cpus": 0.5}})
    stages = replace(_stages(tmp_path), load_extractor=functools.partial(poison.load_slow, str(tmp_path)))
    receipts = RayEngine(run, LimitsConfig()).receipts(
        [_scan(f"s{n}") for n in range(40)], stages, threading.Event()
    )
    assert sum(len(receipt.records) for receipt in receipts) == 40
    assert len(list(tmp_path.glob("loaded-*"))) == 2


def _scan(name: str) -> Scan:
    return Scan(name, f"/{name}", "nifti", (f"/{name}",), "c")


def _config() -> Config:
    return load({**MINIMAL, "source": {"uri": "/"}})


def _stages(folder: Path) -> Stages:
    decoder = poison.Poisoned.of(_config(), "r", "run")
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


def _refusing(table: Any) -> Receipt:
    raise StorageError(f"no room for {len(table)} scans")


def test_what_a_worker_raises_on_purpose_arrives_as_it_was_raised(tmp_path: Path) -> None:
    stages = replace(_stages(tmp_path), write=_refusing)
    with pytest.raises(StorageError, match=r"^no room for 1 scans$"):
        _records(stages, ["s0"])


def test_windows_of_scans_are_seen_to_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_data, "_WINDOW", 4)
    names = [f"s{n}" for n in range(9)]
    assert {record.status for record in _records(_stages(tmp_path), names).values()} == {"ok"}


@pytest.mark.parametrize(
    ("sizes", "tasks"),
    [
        ([60_000_000] * 30, 8),
        ([60_000_000] * 1_000, 224),
        ([1_000] * 30, 8),
        ([1_000] * 6_400, 16),
        ([1_000] * 64_000, 125),
    ],
    ids=["each fills a batch", "so many bytes", "few tiny ones", "no idle CPU", "so many tiny ones"],
)
def test_scans_share_a_task_when_they_are_small_or_many(sizes: list[int], tasks: int) -> None:
    scans = [replace(_scan(f"s{n}"), size=size) for n, size in enumerate(sizes)]
    assert sizing.task_count(scans, cpus=2, batch=4, alone=False) == tasks


def test_large_scans_claim_memory_and_are_done_apart_from_the_others() -> None:
    sizes = {"small": 10 * 2**20, "large": 500 * 2**20, "huge": 3 * 2**30, "too huge": 100 * 2**30}
    scans = [replace(_scan(name), size=size) for name, size in sizes.items()]
    groups = list(sizing.by_memory(scans, per_cpu=2 * 2**30, most=20 * 2**30))
    assert [(claim and claim / 2**30, [scan.scan_id for scan in some]) for claim, some in groups] == [
        (None, ["small"]),
        (4, ["large"]),
        (16, ["huge"]),
        (20, ["too huge"]),
    ]


@pytest.mark.parametrize(
    ("actors", "fits"),
    [({"num_cpus": 2}, True), ({"min": 2, "num_cpus": 2}, False), ({"num_cpus": 2, "num_gpus": 1}, False)],
    ids=["all for one", "too many", "no room to decode"],
)
def test_claims_that_a_local_ray_can_never_meet_are_refused(actors: dict[str, Any], fits: bool) -> None:
    run = RunConfig.model_validate({"actors": actors})
    refused = contextlib.nullcontext() if fits else pytest.raises(ConfigError, match=r"min times num_cpus")
    with refused:
        cluster.compare_claims(run, {"CPU": 2.0, "GPU": 1.0}, grows=False)


@pytest.mark.parametrize(("says", "tells"), [(None, False), ("1", True)])
def test_a_ray_that_is_started_tells_its_makers_nothing_unless_its_owner_says_so(
    monkeypatch: pytest.MonkeyPatch, says: str | None, tells: bool
) -> None:
    from ray._common.usage import usage_lib

    told = []
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    if says:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", says)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: told.append(usage_lib.usage_stats_enabled()))
    assert cluster.connect(RunConfig(), LimitsConfig())
    assert told == [tells]
