"""Batches lie in memory of earlier ones, and nothing that is still needed lies there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featray.model import batch_buffers
from featray.model.batch_buffers import concatenate_rows, is_aligned, release_buffer
from featray.schema import Decoded, ScanRecord
from featray.stages.extract import extract


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_buffers, "_kept", [])


def tensors(*rows: int, value: float = 0) -> list[np.ndarray]:
    return [np.full((count, 2, 3, 5), value + n, np.float32) for n, count in enumerate(rows)]


def test_the_rows_of_all_tensors_are_joined_in_aligned_memory() -> None:
    rows, memory = concatenate_rows(tensors(1, 3, 2))
    np.testing.assert_array_equal(rows, np.concatenate(tensors(1, 3, 2)))
    assert rows.dtype == np.float32
    assert is_aligned(rows)
    assert rows.flags.c_contiguous
    assert np.shares_memory(rows, memory)


def test_memory_is_used_again_for_a_batch_of_the_same_or_a_smaller_size() -> None:
    _, memory = concatenate_rows(tensors(4, 4))
    release_buffer(memory, [np.zeros(3)])
    rows, again = concatenate_rows(tensors(3, value=7))
    assert again is memory
    np.testing.assert_array_equal(rows, tensors(3, value=7)[0])


def test_a_larger_batch_gets_other_memory_and_the_small_one_is_let_go() -> None:
    _, memory = concatenate_rows(tensors(1))
    release_buffer(memory, [])
    _, larger = concatenate_rows(tensors(100))
    assert larger is not memory
    assert not batch_buffers._kept


def test_batches_in_use_at_once_lie_apart() -> None:
    (first, _), (second, _) = concatenate_rows(tensors(2, value=1)), concatenate_rows(tensors(2, value=2))
    assert not np.shares_memory(first, second)


def test_memory_that_results_lie_in_is_not_used_again() -> None:
    rows, memory = concatenate_rows(tensors(2, value=1))
    release_buffer(memory, [rows[1:]])
    concatenate_rows(tensors(2, value=9))
    np.testing.assert_array_equal(rows, 1)


def test_features_that_are_the_models_input_stay_when_the_next_batch_comes() -> None:
    def scans(value: float) -> list[Decoded]:
        names = ("a", "b")
        found = [ScanRecord(name, f"/{name}", "npy", "c", "r", "run") for name in names]
        return [
            Decoded(record, tensor, np.zeros((1, 3), np.int32))
            for record, tensor in zip(found, tensors(1, 1, value=value), strict=True)
        ]

    def the_input(rows: np.ndarray, seeds: Any) -> dict[str, np.ndarray]:
        return {"input": rows}

    first = extract(the_input, scans(1))
    extract(the_input, scans(50))
    lists = first.column("features").combine_chunks().flatten().field("feature")
    assert {value for row in lists.to_pylist() for value in row} == {1.0, 2.0}
