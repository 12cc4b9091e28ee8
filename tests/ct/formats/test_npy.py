"""One .npy file to samples: what it may hold, and that every claim of its header is checked."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest

from featray.ct.formats.npy import apply_window, read_npy
from featray.errors import ScanError


def saved(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def with_header(text: str, body: bytes = b"") -> bytes:
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin1") + body


def reason_of(data: bytes, *, rows: bool = False, max_values: int = 10**6) -> str:
    with pytest.raises(ScanError) as caught:
        read_npy(data, rows=rows, max_values=max_values)
    return str(caught.value.reason)


@pytest.mark.parametrize("kind", ["float64", ">f4", "int16", ">i2", "uint8", "bool", "float16"])
def test_real_numbers_of_any_type_and_byte_order_become_float32(kind: str) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(kind)
    found = read_npy(saved(array), rows=False, max_values=6)
    assert found.values.dtype == np.float32
    assert found.values.tolist() == [[[0, 1], [1, 0], [1, 1]]]
    assert found.file_shape == (3, 2)


def test_an_array_stored_by_columns_keeps_its_axes() -> None:
    array = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    assert np.array_equal(read_npy(saved(array), rows=False, max_values=24).values[0], array)


def test_with_rows_the_first_axis_enumerates_samples() -> None:
    found = read_npy(saved(np.arange(6.0).reshape(3, 2)), rows=True, max_values=6)
    assert found.values.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (saved(np.zeros((0, 5))), "empty"),
        (b"not an array at all", "unreadable"),
        (saved(np.zeros(9))[:100], "unreadable"),
        (saved(np.zeros(9))[:-1], "truncated"),
        (saved(np.zeros(9)) + b"x", "unreadable"),
        (saved(np.zeros(3)) + saved(np.zeros(3)), "unreadable"),
        (saved(np.float64(3.0)), "not_a_volume"),
        (saved(np.array([{"a": 1}]), allow_pickle=True), "unsupported"),
        (saved(np.zeros(3, complex)), "unsupported"),
        (saved(np.zeros(3, [("a", "f4")])), "unsupported"),
        (saved(np.array(["text"])), "unsupported"),
        (saved(np.array([1.0, np.nan])), "non_finite"),
        (saved(np.array([1e300])), "non_finite"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}"), "not_a_volume"),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (30000, 30000, 30000)}"),
            "too_large",
        ),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 9)}"), "truncated"),
        (with_header("{'descr': '<f4', 'shape': (1,)}"), "unreadable"),
        (with_header("__import__('os').getcwd()"), "unreadable"),
        (with_header("(" * 110), "unreadable"),
        (b"\x93NUMPY\x09\x00" + saved(np.zeros(3))[8:], "unsupported"),
    ],
)
def test_what_is_no_plain_array_of_finite_numbers_has_its_reason(data: bytes, reason: str) -> None:
    assert reason_of(data) == reason


def test_rows_need_a_second_axis() -> None:
    assert reason_of(saved(np.zeros(5)), rows=True) == "not_a_volume"


def test_the_limit_holds_before_anything_is_allocated() -> None:
    assert reason_of(saved(np.zeros(11)), max_values=10) == "too_large"


def test_the_window_is_clipped_and_mapped_onto_the_scale() -> None:
    values = np.array([-2000.0, -1000, 0, 1000, 5000], np.float32)
    assert apply_window(values, (-1000, 1000), (-1, 1)).tolist() == [-1, -1, 0, 1, 1]
    assert apply_window(values, None, (0, 1)) is values
