"""Test the .npy reader: accepted arrays, and the check of everything that a header claims."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest

from featray.ct.formats.npy import apply_window, read_npy
from featray.errors import ScanError


def make_file(array: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def make_file_with_header(text: str, body: bytes = b"") -> bytes:
    padded = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded.encode("latin1") + body


def read_reason(data: bytes, *, rows: bool = False, max_values: int = 10**6) -> str:
    with pytest.raises(ScanError) as caught:
        read_npy(data, rows=rows, max_values=max_values)
    return str(caught.value.reason)


@pytest.mark.parametrize("kind", ["float64", ">f4", "int16", ">i2", "uint8", "bool", "float16"])
def test_real_numbers_of_any_dtype_and_byte_order_become_float32(kind: str) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(kind)
    samples = read_npy(make_file(array), rows=False, max_values=6)
    assert samples.values.dtype == np.float32
    assert samples.values.tolist() == [[[0, 1], [1, 0], [1, 1]]]
    assert samples.file_shape == (3, 2)


def test_an_array_in_fortran_order_keeps_its_axes() -> None:
    array = np.asfortranarray(np.arange(24.0).reshape(2, 3, 4))
    assert np.array_equal(read_npy(make_file(array), rows=False, max_values=24).values[0], array)


def test_the_first_axis_enumerates_samples_if_rows_is_true() -> None:
    samples = read_npy(make_file(np.arange(6.0).reshape(3, 2)), rows=True, max_values=6)
    assert samples.values.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (make_file(np.zeros((0, 5))), "empty"),
        (b"not an array at all", "unreadable"),
        (make_file(np.zeros(9))[:100], "unreadable"),
        (make_file(np.zeros(9))[:-1], "truncated"),
        (make_file(np.zeros(9)) + b"x", "unreadable"),
        (make_file(np.zeros(3)) + make_file(np.zeros(3)), "unreadable"),
        (make_file(np.float64(3.0)), "not_a_volume"),
        (make_file(np.array([{"a": 1}]), allow_pickle=True), "unsupported"),
        (make_file(np.zeros(3, complex)), "unsupported"),
        (make_file(np.zeros(3, [("a", "f4")])), "unsupported"),
        (make_file(np.array(["text"])), "unsupported"),
        (make_file(np.array([1.0, np.nan])), "non_finite"),
        (make_file(np.array([1e300])), "non_finite"),
        (
            make_file_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -4)}"),
            "not_a_volume",
        ),
        (
            make_file_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (30000, 30000, 30000)}"),
            "too_large",
        ),
        (make_file_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (9, 9)}"), "truncated"),
        (make_file_with_header("{'descr': '<f4', 'shape': (1,)}"), "unreadable"),
        (make_file_with_header("__import__('os').getcwd()"), "unreadable"),
        (make_file_with_header("(" * 110), "unreadable"),
        (b"\x93NUMPY\x09\x00" + make_file(np.zeros(3))[8:], "unsupported"),
    ],
)
def test_other_files_than_arrays_of_finite_numbers_are_rejected_with_a_reason(
    data: bytes, reason: str
) -> None:
    assert read_reason(data) == reason


def test_an_array_of_rows_needs_a_second_axis() -> None:
    assert read_reason(make_file(np.zeros(5)), rows=True) == "not_a_volume"


def test_an_array_above_the_limit_is_too_large() -> None:
    assert read_reason(make_file(np.zeros(11)), max_values=10) == "too_large"


def test_values_are_clipped_to_the_window_and_mapped_to_the_scale() -> None:
    values = np.array([-2000.0, -1000, 0, 1000, 5000], np.float32)
    assert apply_window(values, (-1000, 1000), (-1, 1)).tolist() == [-1, -1, 0, 1, 1]
    assert apply_window(values, None, (0, 1)) is values
