"""The CPU cores that this process may use, and how the model uses them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_CGROUP_CPU_LIMITS = (
    ("/sys/fs/cgroup/cpu.max",),
    ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
)
"""Files with the quota and the period of a container in microseconds: control groups version 2, version 1."""


class ModelPlace(StrEnum):
    """Where the model that a process loads runs."""

    ANY = "any"
    """In this process, on the GPUs that it sees, or on the CPU if it sees none."""
    CPU = "cpu"
    """In this process, on the CPU; TensorFlow sees no GPU."""
    ELSEWHERE = "elsewhere"
    """On the GPUs of other processes; this process only checks the model, on the CPU."""


@dataclass(frozen=True)
class ModelThreads:
    """How the model of one process uses the CPU cores.

    Attributes:
        each: CPU threads that TensorFlow's operations share, besides the threads that call the model; None
            for TensorFlow's default, one per core.
        calls: Number of calls of the model at once.
    """

    each: int | None = None
    calls: int = 1

    @classmethod
    def for_cores(cls, cores: int) -> ModelThreads:
        """Return the threads of a process that has `cores` cores: while one call waits, the other computes.

        The thread that calls the model computes too. Measured on two cores with a 3-D encoder, two calls with
        one thread each are 5 to 8 % faster than one call with two threads.
        """
        return cls(each=max(1, cores - 1), calls=2 if cores > 1 else 1)


DEFAULT_THREADS = ModelThreads()


@dataclass(frozen=True)
class Workers:
    """The maximum number of workers of an engine.

    Attributes:
        decode: Scans that are read and decoded at once.
        model: Calls of the model at once.
        cores: CPU cores of this machine or of the cluster.
        has_gpus: Whether the model runs on GPUs, so that it uses no cores.
    """

    decode: int
    model: int
    cores: float
    has_gpus: bool = False


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster on which a run may work, and its workers there.

    Attributes:
        nodes: Number of nodes.
        cores: CPU cores that decode or run the model.
        gpus: GPUs of the nodes on which the model may run.
        actors: Processes that run the model.
        workers: Workers of each kind.
    """

    nodes: int
    cores: float
    gpus: float
    actors: int
    workers: Workers


def count_usable_cores() -> int:
    """Return the number of cores that this process may use; a container or batch system may limit it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _read_cpu_limit())))


def _read_cpu_limit() -> float:
    """Return the CPU seconds per second that this container may use; infinite without a limit."""
    for files in _CGROUP_CPU_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # a file is missing, or contains `max`
            quota, period = " ".join(Path(name).read_text(encoding="ascii") for name in files).split()
            if int(quota) > 0:
                return int(quota) / int(period)
    return math.inf


def return_free_memory() -> None:
    """Return memory that Arrow and the C library keep for later use to the kernel.

    After work on large tables, a process holds up to twice the memory that it needs. Returning it takes some
    milliseconds. Without glibc (macOS, Windows, musl), only Arrow's memory is returned.
    """
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
