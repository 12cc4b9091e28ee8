"""Engine `auto` takes Ray only where there is something that one process cannot use."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featray.config import RunConfig
from featray.engines import choice
from featray.engines.choice import choose_engine, count_gpus

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Make a machine of eight cores without a GPU, outside of Ray; return its folder of devices."""
    for name in ("RAY_ADDRESS", JOB_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "count_usable_cores", lambda: 8)
    monkeypatch.setattr(choice, "_DEVICES", tmp_path)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    return tmp_path


def add_gpus(devices: Path, count: int) -> None:
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(count))):
        (devices / name).touch()


@pytest.mark.parametrize("cores", [1, 8, 32])
def test_one_process_does_the_work_without_a_cluster(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "count_usable_cores", lambda: cores)
    engine, reason = choose_engine(RunConfig())
    assert engine == "inline"
    assert reason.startswith(f"no cluster is named, and one process keeps {cores} core")


@pytest.mark.parametrize(
    ("config", "variables", "reason"),
    [
        ({"address": "head:6379"}, {}, "run.address names a cluster"),
        ({}, {"RAY_ADDRESS": "head:6379"}, "RAY_ADDRESS names a cluster"),
        (
            {},
            {
                "RAY_ADDRESS": "10.0.0.1:6379",
                JOB_VARIABLE: '{"metadata": {"job_submission_id": "raysubmit_1"}}',
            },
            "inside a Ray job",
        ),
    ],
)
def test_a_named_cluster_is_used(
    config: dict[str, Any], variables: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = choose_engine(RunConfig(**config))
    assert chosen.engine == "ray"
    assert reason in chosen.reason


def test_a_process_that_is_connected_to_ray_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert choose_engine(RunConfig()) == ("ray", "this process is connected to Ray")


def test_an_address_of_this_machine_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert choose_engine(RunConfig()).engine == "inline"


def test_the_number_of_cores_above_which_ray_is_used_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "count_usable_cores", lambda: 33)
    engine, reason = choose_engine(RunConfig())
    assert engine == "ray"
    assert "33 cores" in reason
    assert choose_engine(RunConfig(inline_max_cores=33)).engine == "inline"
    assert choose_engine(RunConfig(inline_max_cores=33, engine="ray")) == ("ray", "run.engine names it")


@pytest.mark.parametrize(
    ("gpus", "num_gpus", "visible", "engine"),
    [(1, 1, None, "inline"), (2, 1, None, "ray"), (2, 0, None, "inline"), (2, 1, "1", "inline")],
)
def test_several_gpus_are_used_if_the_actors_claim_them(
    machine: Path,
    gpus: int,
    num_gpus: float,
    visible: str | None,
    engine: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add_gpus(machine, gpus)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    chosen = choose_engine(RunConfig.model_validate({"actors": {"num_gpus": num_gpus}}))
    assert chosen.engine == engine
    assert ("run.actors.num_gpus=1 uses them all" in chosen.reason) is (gpus == 2 and not num_gpus)


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,1", 2), ("", 0), ("-1", 0), ("0,-1,2", 1), ("GPU-1,GPU-2,GPU-3", 3), ("0,1,2,3,4,5", 4)],
)
def test_gpus_are_counted_as_cuda_shows_them(
    machine: Path, visible: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_gpus(machine, 4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == count
