"""The model of an actor: it sees only GPUs that the actor claims, and a fault of its device costs no scan."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from kill import poison

from featray.engines.ray import actor_model
from featray.engines.ray.actor_model import ActorModel, ModelLoading
from featray.errors import DeviceError
from featray.schema import Decoded, ScanRecord


class ProcessEndedError(Exception):
    """Raised in the place of the end of this process."""


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise ProcessEndedError

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(actor_model, "_ANSWER_S", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")


def make_model(load: Callable[[], Any] = poison.load_sum_model, num_gpus: float = 1) -> ActorModel:
    model = ActorModel(ModelLoading(load, "r", num_gpus))
    model.load()
    return model


def make_scans(*names: str) -> list[Decoded]:
    origins = np.zeros((1, 3), np.int32)
    return [
        Decoded(ScanRecord(name, f"/{name}", "nifti"), np.ones((1, 2, 2, 2), np.float32), origins)
        for name in names
    ]


def read_records(table: pa.Table) -> list[ScanRecord]:
    return [ScanRecord.from_json(text) for text in table["record"].to_pylist()]


def fail(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    raise DeviceError("the GPU failed")


def fail_to_load() -> None:
    raise DeviceError("the GPU failed")


def test_an_actor_without_a_claim_sees_no_gpu() -> None:
    make_model(num_gpus=0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


def test_an_actor_with_a_claim_sees_the_gpus_that_ray_chose() -> None:
    make_model(num_gpus=0.5)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"


def test_a_device_that_works_gives_features_in_any_number_of_tasks() -> None:
    model = make_model()
    for _ in range(2):
        model.begin_batch(None)
        table = model.extract(make_scans("a", "b"))
        assert [record.returned for record in read_records(table)] == [None, None]
        assert [len(features) for features in table["features"].to_pylist()] == [1, 1]


@pytest.mark.parametrize("load", [lambda: fail, fail_to_load], ids=["in a call", "while the model loads"])
def test_after_a_fault_a_task_returns_its_scans_and_the_next_task_ends_the_process(load: Any) -> None:
    model = make_model(load)
    for name in ("a", "b"):  # a task may have several batches
        model.begin_batch("task 1")
        (record,) = read_records(model.extract(make_scans(name), "task 1"))
        assert (record.scan_id, record.status, record.returned) == (name, "ok", "the GPU failed")
    with pytest.raises(ProcessEndedError):
        model.begin_batch("task 2")


def test_after_a_fault_in_a_batch_that_is_a_task_of_its_own_the_next_batch_ends_the_process() -> None:
    model = make_model(lambda: fail)
    model.begin_batch(None)
    model.extract(make_scans("a"))
    with pytest.raises(ProcessEndedError):
        model.begin_batch(None)


def test_an_error_of_the_model_ends_no_process() -> None:
    def raise_error(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        raise ZeroDivisionError

    model = make_model(lambda: raise_error)
    model.begin_batch(None)
    (record,) = read_records(model.extract(make_scans("a")))
    assert (record.status, record.reason, record.returned) == ("failed", "model", None)
    model.begin_batch(None)
