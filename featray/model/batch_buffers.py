"""Put the rows of many scans into one array for the model, in memory that later batches reuse.

New memory pages cost more than the copy, because the kernel clears them first. Together with the copies of
`tf.constant` they took 4 % of all CPU time on two cores. This module knows nothing of scans and models.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
"""Bytes. TensorFlow can use an array without a copy if its address is a multiple of 64, as multiples of 256
are."""

_free_buffers: list[NDArray[np.uint8]] = []
"""Buffers of earlier batches that no batch uses. There are at most as many as were in use at one time."""


def concatenate_rows(tensors: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return the rows of all tensors in one aligned array, and its buffer, to pass to `release_buffer`.

    Args:
        tensors: Arrays (n, …) that differ in n only; at least one.
    """
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    size = 4 * math.prod(shape)
    buffer = _take_buffer(size + ALIGNMENT)
    first = -buffer.ctypes.data % ALIGNMENT
    rows = buffer[first : first + size].view(np.float32).reshape(shape)
    return np.concatenate(tensors, out=rows), buffer


def release_buffer(buffer: NDArray[np.uint8], results: Iterable[NDArray[Any]]) -> None:
    """Make a buffer available to later batches, unless one of `results` is a view of its memory."""
    if not any(np.may_share_memory(buffer, result) for result in results):
        _free_buffers.append(buffer)


def is_aligned(array: NDArray[Any]) -> bool:
    """Return whether an array begins at an address that TensorFlow can use without a copy."""
    return array.ctypes.data % ALIGNMENT == 0


def _take_buffer(size: int) -> NDArray[np.uint8]:
    """Return a buffer of at least `size` bytes: the last free one, or a new one.

    If the last free buffer is too small, it is dropped.
    """
    with contextlib.suppress(IndexError):
        buffer = _free_buffers.pop()
        if len(buffer) >= size:
            return buffer
    return np.empty(size, np.uint8)
