"""The rows of many scans as one array for the model, in memory that is kept from batch to batch.

Pages that the kernel has to clear first cost more than the copy: together with what `tf.constant` copies,
4 % of all CPU time on two cores. Knows no scans and no model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
"""Bytes. TensorFlow uses memory as it is where it begins at a multiple of 64; more does no harm."""

_kept: list[NDArray[np.uint8]] = []
"""Memory of earlier batches that none is in: as much as was in use at once."""


def concatenate_rows(tensors: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return the rows of all tensors in one array, and the memory it lies in, for `release_buffer`."""
    shape = (sum(map(len, tensors)), *tensors[0].shape[1:])
    size = 4 * math.prod(shape)
    memory = _memory(size + ALIGNMENT)
    first = -memory.ctypes.data % ALIGNMENT
    rows = memory[first : first + size].view(np.float32).reshape(shape)
    return np.concatenate(tensors, out=rows), memory


def release_buffer(memory: NDArray[np.uint8], results: Iterable[NDArray[Any]]) -> None:
    """Keep the memory for a later batch, unless results lie in it."""
    if not any(np.may_share_memory(memory, result) for result in results):
        _kept.append(memory)


def is_aligned(array: NDArray[Any]) -> bool:
    """Return whether TensorFlow can use an array's memory as it is."""
    return array.ctypes.data % ALIGNMENT == 0


def _memory(size: int) -> NDArray[np.uint8]:
    with contextlib.suppress(IndexError):
        memory = _kept.pop()
        if len(memory) >= size:
            return memory
    return np.empty(size, np.uint8)
