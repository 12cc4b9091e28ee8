"""The estimate of `featray plan`: its parts, and whole for real scans and a real model.

How close it comes to the time of a run is measured on an idle machine; see deploy/README.md.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import featray
from featray.commands import run_estimate
from featray.config import RunConfig
from featray.engines.base import Engine
from featray.errors import ConfigError
from featray.hardware import Capacity, ModelThreads, Workers, count_usable_cores
from featray.job import Job
from featray.schema import Decoded, Scan, ScanRecord
from featray.synthetic.phantom import make_collection

ConfigOf = Callable[..., dict[str, Any]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape_zyx", "input_zyx", "slower"),
    [
        pytest.param((96, 256, 256), (8, 32, 32), "decode_s", id="decoding_is_slower"),
        pytest.param((8, 32, 32), (16, 128, 128), "infer_s", id="the_model_is_slower"),
    ],
)
def test_the_estimate_contains_the_slower_stage(
    shape_zyx: tuple[int, int, int], input_zyx: tuple[int, int, int], slower: str, tmp_path: Path
) -> None:
    from featray.synthetic.vae import build_encoder

    build_encoder(input_zyx).save(tmp_path / "encoder.keras")
    make_collection(tmp_path / "source", 3, shape_zyx=shape_zyx, seed=2, dicom_count=0)
    estimate = featray.plan(
        {
            "source": {"uri": str(tmp_path / "source")},
            "preprocess": {"size": list(input_zyx)},
            "model": {
                "uri": str(tmp_path / "encoder.keras"),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": ["z_mean"],
            },
            "output": {"uri": str(tmp_path / "out")},
            "run": {"engine": "inline"},
        }
    ).estimate
    assert estimate.sampled == 3
    other = {"decode_s": "infer_s", "infer_s": "decode_s"}[slower]
    assert getattr(estimate, slower) > getattr(estimate, other)
    work_s = 3 * (estimate.decode_s + estimate.infer_s)
    assert work_s / count_usable_cores() * 0.999 <= estimate.seconds <= work_s * 1.001


@pytest.mark.slow
def test_the_estimate_is_for_the_layers_that_the_scans_lack(config_of: ConfigOf) -> None:
    config = config_of(model={"layers": ["encoder/z_mean"]})
    featray.extract(config)
    config["model"]["layers"] = ["encoder/z_mean", "encoder/pre_latent"]
    result = featray.plan(config)
    assert result.work == "1 new layer for 12 scans; 1 layer is up to date and stays as it is"
    assert (result.estimate.command, result.estimate.output_bytes) == ("extract", 4 * 16 * 12)
    assert featray.extract(config).done == 12
    assert featray.plan(config).estimate.sampled == 0


def test_the_average_number_of_values_is_that_of_the_due_layers() -> None:
    layers = [SimpleNamespace(name="z", values=4), SimpleNamespace(name="y", values=10)]
    scan = make_timed_scan(1, 0.0)[0]
    due: list[tuple[str, ...]] = [(), ("y",), ("z",), ("z", "y")]
    scans = [replace(scan, due_layers=names) for names in due]
    assert run_estimate._average_values(layers, scans) == (14 + 10 + 4 + 14) / 4  # type: ignore[arg-type]


def make_timed_scan(size: int, seconds: float, status: str = "ok") -> tuple[Scan, Decoded]:
    """Return a scan of this size in bytes whose decoding took this time."""
    scan = Scan("s", "/s", "nifti", ("/s",), "c", size=size)
    record = replace(ScanRecord.from_scan(scan), recipe="r", run_id="run")
    record.decode_s, record.status = seconds, status  # type: ignore[assignment]  # a literal
    return scan, Decoded(record, np.zeros((1, 1, 1, 1), np.float32), np.zeros((1, 3), np.int32))


def test_decode_time_scales_with_size_if_all_sizes_are_known() -> None:
    sample = [make_timed_scan(100, 1.0), make_timed_scan(300, 3.0), make_timed_scan(900, 50.0, "failed")]
    collection = [make_timed_scan(size, 0.0)[0] for size in (100, 100, 700)]
    assert run_estimate._estimate_decode_s(sample, collection) == pytest.approx(3.0)
    of_unknown_size = [*collection, make_timed_scan(0, 0.0)[0]]
    assert run_estimate._estimate_decode_s(sample, of_unknown_size) == pytest.approx(2.0)


def test_decode_time_does_not_scale_with_size_if_inputs_come_from_the_cache() -> None:
    sample = [make_timed_scan(100, 1.0), make_timed_scan(300, 3.0)]
    sample[0][1].record.is_from_cache = True
    assert run_estimate._estimate_decode_s(sample, [make_timed_scan(700, 0.0)[0]]) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("threads", "gpus", "rate"),
    [
        (ModelThreads(), [], 2 / (0.5 + 2 * 0.25)),  # model and decoding take turns on both cores
        (ModelThreads(each=1, calls=2), [], 2 / (0.5 + 2 * 0.25)),
        (ModelThreads(each=1), [], 2 / (0.5 + 0.25)),  # one actor per core, with one thread each
        (ModelThreads(), ["a GPU"], 4.0),
        (ModelThreads(calls=2), ["a GPU"], 4.0),
    ],
)
def test_the_estimated_rate_follows_from_cores_and_threads(
    monkeypatch: pytest.MonkeyPatch, threads: ModelThreads, gpus: list[str], rate: float
) -> None:
    monkeypatch.setattr(run_estimate, "count_usable_cores", lambda: 2)
    monkeypatch.setattr(run_estimate, "list_gpu_names", lambda: gpus)
    assert run_estimate._estimate_rate(0.5, 0.25, threads) == pytest.approx(rate)


def test_the_model_is_timed_with_as_many_calls_at_once_as_in_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: list[int] = []
    calls_at_once = threading.Barrier(2)

    def wait(batch: Any, seeds: Any) -> dict[str, Any]:
        rows.append(len(batch))
        calls_at_once.wait(timeout=60)  # fails if the calls run one after the other
        time.sleep(0.1)
        return {"z": batch[:, 0, 0, :1]}

    stages = SimpleNamespace(extractor=wait, recipe="r")
    decoded = [make_timed_scan(1, 0.0)[1]] * 3
    seconds = run_estimate._measure_infer_s(stages, decoded, batch_scans=5, calls=2)  # type: ignore[arg-type]
    assert rows == [5] * (2 * run_estimate._MODEL_ROUNDS)
    assert seconds >= 0.1 / 10, "the wall time of both calls belongs to their ten scans"


def test_no_scan_is_sampled_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_estimate, "SAMPLE_SECONDS", 0.0)
    scan, decoded = make_timed_scan(1, 0.1)
    decoding = SimpleNamespace(decoder=lambda scan: decoded)
    assert run_estimate._decode_sample(decoding, [scan] * 3) == [(scan, decoded)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("run", "capacity", "rate"),
    [
        ({"actors": {"num_cpus": 2}}, Capacity(2, 16, 0, 8, Workers(16, 8, 16)), 16 / (0.5 + 2 * 0.25)),
        ({"actors": {"max": 1}}, Capacity(2, 16, 0, 1, Workers(1, 1, 16)), 1 / (0.5 + 2 * 0.25)),
        ({"actors": {"num_gpus": 1}}, Capacity(2, 16, 2, 2, Workers(14, 4, 16, has_gpus=True)), 2 / 0.25),
        ({"actors": {"num_gpus": 1}}, Capacity(2, 4, 2, 2, Workers(2, 4, 4, has_gpus=True)), 2 / 0.5),
    ],
    ids=["all cores", "one actor", "the model on GPUs is slower", "decoding is slower"],
)
def test_the_estimated_rate_of_a_cluster_follows_from_its_nodes(
    run: dict[str, Any], capacity: Capacity, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_estimate, "count_usable_cores", lambda: 2)
    config = SimpleNamespace(run=RunConfig.model_validate(run))
    job = cast(Job, SimpleNamespace(config=config, threads=ModelThreads(each=2)))
    assert run_estimate._estimate_cluster_rate(0.5, 0.25, job, capacity) == pytest.approx(rate)


@pytest.mark.parametrize("nodes", [None, 0])
def test_a_cluster_that_cannot_be_rated_yet_is_a_message_and_this_machine_is_rated(
    nodes: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    def measure() -> Capacity:
        if nodes is None:
            raise ConfigError("nothing answers")
        return Capacity(nodes, 0, 0, 1, Workers(1, 1, 0))

    engine = cast(Engine, SimpleNamespace(measure_capacity=measure))
    assert run_estimate._find_capacity(engine) is None
    assert "the estimate is for this machine" in caplog.text
