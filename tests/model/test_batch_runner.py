"""Calls of the model: padded, halved if memory is short, and never repeated with other random numbers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from featray.errors import DeviceError, InputMemoryError
from featray.model import batch_runner
from featray.model.batch_runner import MAX_MEMORY_FAILURES, BatchRunner

BATCH = np.random.default_rng(0).random((7, 3, 2), np.float32)


def raise_out_of_memory() -> None:
    raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor with shape[7,3,2]")


def make_runner(size: int = 4, *, is_padded: bool = False, is_uniform: bool = True) -> BatchRunner:
    return BatchRunner(size, is_padded=is_padded, is_uniform=is_uniform)


def make_function(
    limit: int = 100, largest: int = 10**6
) -> tuple[Callable[[Any], dict[str, Any]], list[int]]:
    """Return a function that sums each input, and the list of the sizes of its calls.

    Memory is too short for more than `limit` inputs, and for an input of more than `largest` values.
    """
    sizes: list[int] = []

    def call(batch: Any) -> dict[str, Any]:
        sizes.append(len(batch))
        if len(batch) > limit or tf.size(batch[0]) > largest:
            raise_out_of_memory()
        return {"sum": tf.reduce_sum(batch, axis=(1, 2))}

    return call, sizes


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("limit", [100, 3, 2, 1])
def test_values_are_the_same_for_any_memory(limit: int, is_padded: bool) -> None:
    function, _ = make_function(limit)
    values = make_runner(is_padded=is_padded).run(function, BATCH)
    np.testing.assert_allclose(values["sum"], BATCH.sum(axis=(1, 2)), rtol=1e-6)


def test_a_reduced_size_is_kept_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    function, sizes = make_function(limit=1)
    runner = make_runner()
    with caplog.at_level(logging.WARNING):
        runner.run(function, BATCH)
        runner.run(function, BATCH)
    assert sizes == [4, 2, *[1] * 14]
    assert (runner.size, runner.is_reduced) == (1, True)
    assert [record.getMessage() for record in caplog.records] == [
        "memory is too short for 4 inputs in a call of the model; this process now runs 2"
    ]


def test_padded_calls_have_one_size_and_only_rows_of_inputs_are_returned() -> None:
    function, sizes = make_function()
    assert len(make_runner(is_padded=True).run(function, BATCH)["sum"]) == 7
    assert sizes == [4, 4]


def test_a_function_that_draws_random_numbers_is_not_padded() -> None:
    function, sizes = make_function()
    make_runner(is_padded=True).run(function, BATCH, is_random=True)
    assert sizes == [4, 3]


def test_an_output_with_another_number_of_rows_is_not_cut() -> None:
    runner = make_runner(is_padded=True)
    values = runner.run(lambda batch: {"wrong": tf.zeros((5, 1)), "right": batch}, BATCH[:2])
    assert {name: len(array) for name, array in values.items()} == {"wrong": 5, "right": 2}


def test_an_input_that_does_not_fit_beside_another_call_is_run_again_alone() -> None:
    runner, running, failed = make_runner(1), threading.Semaphore(0), threading.Event()
    entered: list[str] = []

    def call(batch: Any) -> dict[str, Any]:
        name = threading.current_thread().name
        entered.append(name)
        if name == "first":
            running.release()
            failed.wait(5)
        elif len(entered) == 2:
            failed.set()
            raise_out_of_memory()
        return {"sum": batch}

    first = threading.Thread(target=runner.run, args=(call, BATCH[:1]), name="first")
    first.start()
    running.acquire()
    assert len(runner.run(call, BATCH[:1])["sum"]) == 1
    first.join()
    assert entered == ["first", "MainThread", "MainThread"]


def test_a_call_of_one_input_that_draws_random_numbers_is_not_repeated() -> None:
    function, sizes = make_function(limit=0)
    with pytest.raises(DeviceError):
        make_runner().run(function, BATCH[:1], is_random=True)
    assert sizes == [1]


def test_if_all_inputs_have_one_size_and_none_fits_the_run_stops_with_advice() -> None:
    function, _ = make_function(limit=0)
    with pytest.raises(DeviceError, match=r"one input of 3x2.*choose a smaller preprocess\.size"):
        make_runner().run(function, BATCH)


def test_a_single_large_input_costs_only_itself() -> None:
    function, _ = make_function(largest=6)
    runner = make_runner(is_uniform=False)
    runner.run(function, BATCH)
    for _ in range(MAX_MEMORY_FAILURES + 1):
        with pytest.raises(InputMemoryError, match="one input of 9x9"):
            runner.run(function, np.ones((1, 9, 9), np.float32))
        runner.run(function, BATCH)


def test_many_large_inputs_in_a_row_stop_the_run() -> None:
    function, _ = make_function(limit=0)
    runner = make_runner(is_uniform=False)
    for _ in range(MAX_MEMORY_FAILURES - 1):
        with pytest.raises(InputMemoryError):
            runner.run(function, BATCH[:1])
    with pytest.raises(DeviceError):
        runner.run(function, BATCH[:1])


def test_memory_that_was_there_before_is_missed_as_a_fault_of_the_device() -> None:
    limits = [100]

    def call(batch: Any) -> dict[str, Any]:
        return {"sum": batch} if len(batch) <= limits[0] else raise_out_of_memory()  # type: ignore[dict-item]

    runner = make_runner(is_uniform=False)
    runner.run(call, BATCH)
    limits[0] = 0
    with pytest.raises(DeviceError, match="other programs have probably taken the memory"):
        runner.run(call, BATCH)


def test_a_fault_of_the_device_is_no_error_of_the_model() -> None:
    def call(batch: Any) -> dict[str, Any]:
        raise tf.errors.InternalError(None, None, "CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access")

    with pytest.raises(DeviceError, match=r"the GPU failed .*CUDA_ERROR_ILLEGAL_ADDRESS.*No scan is to"):
        make_runner().run(call, BATCH)


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    def call(batch: Any) -> dict[str, Any]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        make_runner().run(call, BATCH)


def test_a_padded_batch_is_contiguous_and_repeats_its_last_row() -> None:
    rows = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    for count, expected in ((1, [0, 0, 0, 0]), (2, [0, 1, 1, 1])):
        padded = batch_runner._pad(rows[:count], 4)
        assert padded.flags.c_contiguous
        np.testing.assert_array_equal(padded, rows[expected])
