"""The GPUs that a process uses, and how much of their memory; TensorFlow and CUDA are replaced by fakes."""

from __future__ import annotations

import ctypes
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import tensorflow as tf

from featray.hardware import ModelPlace
from featray.model import gpus, runtime

GIB = 2**30


class FakeConfig:
    """TensorFlow's functions for two GPUs, before or after TensorFlow has used them."""

    def __init__(self, patch: pytest.MonkeyPatch, *, has_run: bool = False) -> None:
        self.gpus = [SimpleNamespace(name=f"GPU:{number}", device_type="GPU") for number in range(2)]
        self.visible, self.has_run = list(self.gpus), has_run
        self.limits: dict[str, float] = {}
        self.grows: list[str] = []
        for name in ("get_visible_devices", "set_visible_devices", "list_physical_devices"):
            patch.setattr(tf.config, name, getattr(self, name))
        patch.setattr(tf.config, "get_logical_device_configuration", lambda gpu: self.limits.get(gpu.name))
        patch.setattr(tf.config, "set_logical_device_configuration", self.limit)
        patch.setattr(tf.config.experimental, "set_memory_growth", lambda gpu, enable: self.grow(gpu))

    def get_visible_devices(self, kind: str) -> list[Any]:
        return self.visible if kind == "GPU" else []

    def list_physical_devices(self, kind: str) -> list[Any]:
        return self.gpus if kind == "GPU" else []

    def set_visible_devices(self, devices: list[Any], kind: str) -> None:
        if self.has_run:
            raise RuntimeError("Visible devices cannot be modified after being initialized")
        self.visible = devices

    def limit(self, gpu: Any, configuration: list[Any]) -> None:
        self.limits[gpu.name] = configuration[0].memory_limit

    def grow(self, gpu: Any) -> None:
        if self.limits:
            raise ValueError("Cannot set memory growth on device when virtual devices configured")
        self.grows.append(gpu.name)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> FakeConfig:
    monkeypatch.setattr(gpus, "_read_total_memory", lambda number: (16 + 8 * number) * GIB)
    return FakeConfig(monkeypatch)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ})
    os.environ.pop("TF_FORCE_GPU_ALLOW_GROWTH", None)


def test_a_claim_of_no_gpu_hides_all(config: FakeConfig) -> None:
    runtime.claim_gpus(0)
    assert config.visible == config.grows == []


def test_a_claim_of_whole_gpus_lets_memory_grow(config: FakeConfig) -> None:
    runtime.claim_gpus(1)
    assert config.grows == ["GPU:0", "GPU:1"]
    assert config.limits == {}


def test_a_fraction_limits_the_memory_which_still_grows(config: FakeConfig) -> None:
    runtime.claim_gpus(0.5)
    assert config.limits == {"GPU:0": 8 * 1024 - 1536, "GPU:1": 12 * 1024 - 1536}
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
    runtime.configure()  # as the extractor does, after the limits are set
    assert config.grows == ["GPU:0", "GPU:1"]


def test_a_limit_leaves_memory_to_cuda_on_large_and_small_gpus() -> None:
    assert gpus.compute_memory_limit(80 * GIB, 0.25) == 20 * GIB - 1536 * 2**20
    assert gpus.compute_memory_limit(4 * GIB, 0.5) == 1.5 * GIB
    shares = [gpus.compute_memory_limit(40 * GIB, 1 / actors) * actors for actors in (2, 3, 4, 10)]
    assert all(total <= 40 * GIB for total in shares)


def test_a_gpu_of_unknown_memory_is_not_limited_and_that_is_logged(
    config: FakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpus, "_read_total_memory", lambda number: None)
    gpus.limit_memory(0.5)
    assert config.limits == {}
    assert "the memory of GPU:0 is unknown, so it is not limited to 0.5 of it" in caplog.text


@pytest.mark.parametrize("place", [ModelPlace.CPU, ModelPlace.ELSEWHERE])
def test_a_driver_that_needs_no_gpu_hides_all(config: FakeConfig, place: ModelPlace) -> None:
    runtime.configure(place=place)
    assert gpus.list_visible() == config.grows == []
    # A Ray that this process starts must still find the GPUs of this machine.
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "-1"


def test_gpus_that_tensorflow_already_uses_cannot_be_hidden_which_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    FakeConfig(monkeypatch, has_run=True)
    with caplog.at_level(logging.WARNING):
        gpus.hide()
    assert "it keeps its GPUs and their memory" in caplog.text


def test_float32_is_not_rounded_to_tf32() -> None:
    tf.config.experimental.enable_tensor_float_32_execution(True)
    runtime.configure()
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


class FakeCuda:
    """CUDA's driver with one GPU of 6 GiB."""

    def cuInit(self, flags: int) -> int:  # noqa: N802  # CUDA's name
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802  # CUDA's name
        device._obj.value = number + 40
        return 101 if number else 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:  # noqa: N802  # CUDA's name
        assert device.value == 40
        total._obj.value = 6 * GIB
        return 0


def test_the_memory_of_a_gpu_is_read_from_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeCuda())
    assert gpus._read_total_memory(0) == 6 * GIB
    assert gpus._read_total_memory(1) is None


def test_without_cuda_the_memory_of_a_gpu_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert gpus._read_total_memory(0) is None
