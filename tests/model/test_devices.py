"""Models on devices: on GPUs (a fake), with XLA, elsewhere, and with too little memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import featray
from featray.errors import InputMemoryError
from featray.hardware import ModelPlace
from featray.model import Extractor, batch_runner, gpus
from featray.model.inputs import make_tensor
from featray.output.dataset import Dataset
from featray.schema import Decoded, ScanRecord
from featray.stages.extract import extract
from featray.storage.store import Store

INPUT_ZYX = (8, 32, 32)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the list of the sizes of all calls of a model."""
    found: list[int] = []

    def record(batch: np.ndarray) -> Any:
        found.append(len(batch))
        return make_tensor(batch)

    monkeypatch.setattr(batch_runner, "make_tensor", record)
    return found


@pytest.fixture
def section(vae_file: Path) -> dict[str, Any]:
    custom = ["featray.synthetic.vae:Sampling"]
    return {"uri": str(vae_file), "custom_objects": custom, "layers": ["encoder/z_mean"]}


def pretend_to_have_a_gpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpus, "list_visible", lambda: ["GPU:0"])
    patch.setattr(gpus, "allocate_on_demand", lambda: None)


def make_inputs(extractor: Extractor, count: int) -> np.ndarray:
    return np.random.default_rng(0).random((count, *extractor.input_shape), np.float32)


@pytest.mark.slow
def test_on_a_gpu_all_calls_have_the_size_of_the_batch_from_the_warm_up_on(
    section: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = Extractor(section)
    x = make_inputs(on_cpu, 6)
    expected = on_cpu(x)["encoder.z_mean"]
    pretend_to_have_a_gpu(monkeypatch)
    sizes.clear()
    values = Extractor(section)(x)["encoder.z_mean"]
    assert {*sizes} == {4}
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_on_a_gpu_random_numbers_are_those_of_the_seeds(
    section: dict[str, Any], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    section |= {"layers": ["encoder/z"], "allow_stochastic": True}
    on_cpu = Extractor(section)
    x, seeds = make_inputs(on_cpu, 3), ["a", "b", "c"]
    expected = on_cpu(x, seeds)["encoder.z"]
    pretend_to_have_a_gpu(monkeypatch)
    extractor = Extractor(section)
    sizes.clear()
    np.testing.assert_array_equal(extractor(x, seeds)["encoder.z"], expected)
    assert sizes == [1, 1, 1]


@pytest.mark.slow
def test_a_model_that_is_compiled_is_compiled_for_one_size(section: dict[str, Any], sizes: list[int]) -> None:
    extractor = Extractor({**section, "jit_compile": True})
    extractor(make_inputs(extractor, 5))
    assert {*sizes} == {4}


def test_a_model_on_a_cpu_is_not_padded(section: dict[str, Any], sizes: list[int]) -> None:
    if gpus.list_visible():
        pytest.skip("this process uses a GPU")
    extractor = Extractor(section)
    sizes.clear()
    extractor(make_inputs(extractor, 5))
    assert sizes == [4, 1]


def test_a_driver_checks_a_half_precision_model_in_float32_and_keeps_its_recipe(tmp_path: Path) -> None:
    import keras

    chain = [
        keras.layers.Conv3D(3, 3, dtype="mixed_float16"),
        keras.layers.MaxPool3D(2, dtype="mixed_float16"),  # not on CPUs in half precision
        keras.layers.Flatten(dtype="mixed_float16"),
        keras.layers.Dense(2, dtype="mixed_float16", name="code"),
    ]
    keras.Sequential([keras.Input((6, 6, 6, 1)), *chain]).save(tmp_path / "m.keras")
    extractor = Extractor({"uri": str(tmp_path / "m.keras"), "layers": ["code"]}, place=ModelPlace.ELSEWHERE)
    assert extractor.recipe_part()["compute_dtype"] == ["float16"]
    assert extractor.layers[0].shape == (2,)


def fail_above(limit: int) -> Callable[[np.ndarray], Any]:
    def make_or_fail(batch: np.ndarray) -> Any:
        if len(batch) > limit:
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")
        return make_tensor(batch)

    return make_or_fail


@pytest.mark.slow
def test_a_run_that_lacks_memory_uses_smaller_batches_and_says_so(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = featray.extract(config_of())
    assert summary.reduced_batch is None
    monkeypatch.setattr(batch_runner, "make_tensor", fail_above(1))
    other = featray.extract(config_of(), [f"output.uri={tmp_path / 'small'}"])
    assert (other.ok, other.reduced_batch) == (summary.ok, 1)
    assert "memory was too short for model.batch_size, so the model ran with as few as 1" in other.text()
    for layer in other.layers:
        expected, values = (featray.read(str(tmp_path / name), layer).array for name in ("out", "small"))
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)


def test_without_memory_for_a_single_input_nothing_is_extracted_and_no_scan_fails(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_runner, "make_tensor", fail_above(0))
    with pytest.raises(featray.FeatrayError, match=r"one input of .* choose a smaller preprocess\.size"):
        featray.extract(config_of())
    assert len(Dataset(Store(str(tmp_path / "out"))).read_scans(("scan_id",))) == 0


def test_a_scan_for_which_memory_is_too_short_fails_with_advice_and_the_others_do_not() -> None:
    def sum_small(batch: np.ndarray, seeds: list[str]) -> dict[str, np.ndarray]:
        if batch.max() > 1:
            raise InputMemoryError("memory is too short; choose a smaller preprocess.size")
        return {"sum": batch.sum(axis=(1, 2, 3))[:, None]}

    decoded = [
        Decoded(ScanRecord(name, name, "nifti"), np.full((1, 2, 2, 2), value, np.float32), np.zeros((1, 3)))
        for name, value in (("a", 1), ("large", 2), ("b", 1))
    ]
    table = extract(sum_small, decoded, recipe="r")
    assert [scan.record.status for scan in decoded] == ["ok", "failed", "ok"]
    assert [len(features) for features in table["features"].to_pylist()] == [1, 0, 1]
    record = decoded[1].record
    assert (record.reason, record.message) == (
        "model",
        "memory is too short; choose a smaller preprocess.size",
    )


def test_a_gpu_that_fails_during_a_run_stops_it_and_keeps_what_is_committed(
    config_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_later(batch: np.ndarray) -> Any:
        calls.append(len(batch))
        if len(calls) > 2:  # the trial runs come first
            raise tf.errors.InternalError(None, None, "CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure")
        return make_tensor(batch)

    monkeypatch.setattr(batch_runner, "make_tensor", fail_later)
    with pytest.raises(featray.FeatrayError, match=r"the GPU failed .*CUDA_ERROR_LAUNCH_FAILED"):
        featray.extract(config_of())
    monkeypatch.undo()
    summary = featray.extract(config_of())
    assert (summary.ok, summary.failed) == (12, 0)
