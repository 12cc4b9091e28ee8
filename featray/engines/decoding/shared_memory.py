"""Memory that two processes share, without a name: it is gone with the last of them, however they end.

Named shared memory outlives a process group that is killed; this does not.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os

import numpy as np
from numpy.typing import NDArray

_numbers = itertools.count()


class Slot:
    """Room for one float32 tensor that another process of this machine writes and this one reads.

    Attributes:
        name: What the other process finds it by, with `attach`; unique in this process.
    """

    def __init__(self, size: int) -> None:
        file = os.memfd_create("featray-slot")
        os.ftruncate(file, size)  # pages are taken when they are first written
        self._file, self._memory = file, mmap.mmap(file, size)
        self.name = f"{next(_numbers)}:/proc/{os.getpid()}/fd/{file}"

    def tensor(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return what was written, in place; valid until the slot is written again."""
        return np.ndarray(shape, np.float32, self._memory)

    def close(self) -> None:
        """Let go of the memory, or leave that to the last tensor in it."""
        os.close(self._file)
        with contextlib.suppress(BufferError):  # a batch in use when the run was cut short
            self._memory.close()


def make_slots(count: int, size: int) -> list[Slot]:
    """Return that many slots of `size` bytes, or none where the system has no such memory (not Linux)."""
    if not hasattr(os, "memfd_create") or not os.path.exists(f"/proc/{os.getpid()}/fd"):
        return []
    return [Slot(size) for _ in range(count)]


def attach(name: str) -> mmap.mmap | None:
    """Return another process's slot for writing; None where the system does not let this one see it."""
    try:
        file = os.open(name.partition(":")[2], os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(file, 0)
    finally:
        os.close(file)
