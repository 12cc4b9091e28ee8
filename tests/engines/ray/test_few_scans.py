"""A run of a few scans on one machine starts no Ray; all other runs do."""

from __future__ import annotations

from typing import Any

import pytest

import featray
from featray.config import RunConfig, load
from featray.engines.base import Decoding
from featray.engines.ray import cluster, few_scans
from featray.engines.ray.engine import RayEngine
from featray.errors import ConfigError
from featray.output.dataset import Dataset
from featray.schema import Scan
from featray.stages.decode import Decoder
from featray.storage.store import Store

MOST = few_scans.MAX_SCANS


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look as if it had joined no cluster, and refuse to start one."""

    def refuse(*_: object) -> bool:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(cluster.sys.modules, "ray", None)
    monkeypatch.setattr(cluster, "connect", refuse)


def make_decoding(**preprocess: Any) -> Decoding:
    model = {"uri": "m.keras", "layers": ["sum"]}
    config = load(
        {"source": {"uri": "/"}, "preprocess": preprocess, "model": model, "output": {"uri": "out"}}
    )
    return Decoding(Decoder.from_config(config), batch_scans=2, limits=config.limits)


@pytest.mark.parametrize(
    ("scans", "run", "preprocess", "expected"),
    [
        (1, {}, {}, True),
        (MOST, {}, {}, True),
        (MOST + 1, {}, {}, False),
        (1, {"address": "local"}, {}, False),
        (1, {"address": "head:6379"}, {}, False),
        (1, {"actors": {"num_gpus": 1}}, {}, False),
        (1, {"decode": {"memory": 1}}, {}, False),
        (1, {}, {"size": None}, False),
    ],
)
def test_only_a_small_run_on_this_machine_is_without_ray(
    scans: int, run: dict[str, Any], preprocess: dict[str, Any], expected: bool
) -> None:
    decoding = make_decoding(**preprocess)
    assert few_scans.is_without_ray(RunConfig.model_validate(run), decoding, scans) is expected


@pytest.mark.parametrize("address", ["local", "auto", "head:6379"])
def test_an_address_in_the_environment_always_means_ray(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert not few_scans.is_without_ray(RunConfig(), make_decoding(), 1)


def test_claims_that_a_local_ray_could_not_meet_are_refused_without_it() -> None:
    run = RunConfig.model_validate({"actors": {"num_cpus": 9999}})
    with pytest.raises(ConfigError, match=r"run\.actors\.num_cpus: 9999 is claimed, Ray has"):
        few_scans.is_without_ray(run, make_decoding(), 1)


def test_if_more_scans_are_due_than_the_few_new_ones_ray_processes_all() -> None:
    scans = [Scan(name, f"/{name}", "nifti", (f"/{name}",), "c") for name in "ab"]
    with RayEngine(RunConfig(), make_decoding()) as engine:
        engine.prefetch_scans(scans)
        assert engine._choose_driver(MOST)
        assert engine._choose_driver(MOST + 1) is None


@pytest.mark.slow
def test_a_small_run_gives_the_values_of_engine_inline(config_of: Any, tmp_path: Any) -> None:
    config = config_of()
    by_ray = config_of(output={"uri": str(tmp_path / "ray")}, run={"engine": "ray", "decode": {"workers": 1}})
    featray.extract(config)
    summary = featray.extract(by_ray)
    assert (summary.engine, summary.ok, summary.exit_code) == ("ray", 12, 0)
    tables = [
        Dataset(Store(one["output"]["uri"])).read("features", ("scan_id", "layer", "feature"))
        for one in (config, by_ray)
    ]
    rows = [sorted(map(str, table.to_pylist())) for table in tables]
    assert rows[0] == rows[1]
