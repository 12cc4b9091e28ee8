"""Shared-memory buffers without a name, through which worker processes return tensors.

A named shared-memory segment outlives a process group that is killed. These buffers are freed with the last
process that uses them, however it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os

import numpy as np
from numpy.typing import NDArray

_numbers = itertools.count()


class SharedBuffer:
    """Memory for one float32 tensor, which another process of this machine writes and this process reads.

    Attributes:
        name: Identifies the buffer for `attach_buffer` in the other process; unique in this process.
    """

    def __init__(self, size: int) -> None:
        file = os.memfd_create("featray-buffer")
        os.ftruncate(file, size)  # the kernel allocates a page when it is first written
        self._file, self._memory = file, mmap.mmap(file, size)
        self.name = f"{next(_numbers)}:/proc/{os.getpid()}/fd/{file}"

    def tensor(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return the tensor in the buffer, not copied; valid until the buffer is written again."""
        # `np.ndarray(shape, float32, memory)` does not hold the buffer of `memory`: `close` would free it.
        return np.frombuffer(self._memory, np.float32, math.prod(shape)).reshape(shape)

    def close(self) -> None:
        """Free the memory; if a tensor still uses it, the memory is freed with the last such tensor."""
        os.close(self._file)
        with contextlib.suppress(BufferError):  # the model is computing a batch of a run that was stopped
            self._memory.close()


def create_buffers(count: int, size: int) -> list[SharedBuffer]:
    """Return `count` buffers of `size` bytes, or none if the system has no such memory (it is not Linux)."""
    if not hasattr(os, "memfd_create") or not os.path.exists(f"/proc/{os.getpid()}/fd"):
        return []
    return [SharedBuffer(size) for _ in range(count)]


def attach_buffer(name: str) -> mmap.mmap | None:
    """Open another process's buffer for writing; return None if the system does not allow it."""
    try:
        file = os.open(name.partition(":")[2], os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(file, 0)
    finally:
        os.close(file)
