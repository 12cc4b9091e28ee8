"""Batches use the memory of earlier batches, unless values that are still needed lie in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from featray.model import batch_buffers
from featray.model.batch_buffers import concatenate_rows, is_aligned, release_buffer
from featray.schema import Decoded, ScanRecord
from featray.stages.extract import extract


@pytest.fixture(autouse=True)
def forget_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start each test without free buffers."""
    monkeypatch.setattr(batch_buffers, "_free_buffers", [])


def make_tensors(*rows: int, value: float = 0) -> list[np.ndarray]:
    return [np.full((count, 2, 3, 5), value + n, np.float32) for n, count in enumerate(rows)]


def test_the_rows_of_all_tensors_are_concatenated_in_aligned_memory() -> None:
    rows, buffer = concatenate_rows(make_tensors(1, 3, 2))
    np.testing.assert_array_equal(rows, np.concatenate(make_tensors(1, 3, 2)))
    assert rows.dtype == np.float32
    assert is_aligned(rows)
    assert rows.flags.c_contiguous
    assert np.shares_memory(rows, buffer)


def test_a_buffer_is_used_again_for_a_batch_of_the_same_or_a_smaller_size() -> None:
    _, buffer = concatenate_rows(make_tensors(4, 4))
    release_buffer(buffer, [np.zeros(3)])
    rows, again = concatenate_rows(make_tensors(3, value=7))
    assert again is buffer
    np.testing.assert_array_equal(rows, make_tensors(3, value=7)[0])


def test_a_larger_batch_gets_a_new_buffer_and_the_small_one_is_dropped() -> None:
    _, buffer = concatenate_rows(make_tensors(1))
    release_buffer(buffer, [])
    _, larger = concatenate_rows(make_tensors(100))
    assert larger is not buffer
    assert not batch_buffers._free_buffers


def test_batches_in_use_at_the_same_time_do_not_share_memory() -> None:
    (first, _), (second, _) = (
        concatenate_rows(make_tensors(2, value=1)),
        concatenate_rows(make_tensors(2, value=2)),
    )
    assert not np.shares_memory(first, second)


def test_a_buffer_that_holds_results_is_not_used_again() -> None:
    rows, buffer = concatenate_rows(make_tensors(2, value=1))
    release_buffer(buffer, [rows[1:]])
    concatenate_rows(make_tensors(2, value=9))
    np.testing.assert_array_equal(rows, 1)


def test_features_that_are_the_input_itself_do_not_change_with_the_next_batch() -> None:
    def make_scans(value: float) -> list[Decoded]:
        names = ("a", "b")
        records = [
            ScanRecord(name, f"/{name}", "npy", content="c", recipe="r", run_id="run") for name in names
        ]
        return [
            Decoded(record, tensor, np.zeros((1, 3), np.int32))
            for record, tensor in zip(records, make_tensors(1, 1, value=value), strict=True)
        ]

    def return_input(rows: np.ndarray, seeds: Any) -> dict[str, np.ndarray]:
        return {"input": rows}

    first = extract(return_input, make_scans(1), recipe="r")
    extract(return_input, make_scans(50), recipe="r")
    lists = first.column("features").combine_chunks().flatten().field("feature")
    assert {value for row in lists.to_pylist() for value in row} == {1.0, 2.0}
