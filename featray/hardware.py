"""This machine: the cores a process may use, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelThreads:
    """How the model of one process uses the cores.

    Attributes:
        each: CPU threads that operations share beside those that call them; None: TensorFlow's own choice,
            as many as it sees cores.
        calls: Times that the model is called at once.
    """

    each: int | None = None
    calls: int = 1

    @classmethod
    def for_whole_machine(cls) -> ModelThreads:
        """Return those of a process that has all cores: while one call waits, the other works.

        A thread that calls an operation takes part in it. Measured on two cores, with a 3-D encoder: two
        calls of one thread each are 5 to 8 % faster than one call of two threads.
        """
        cores = count_usable_cores()
        return cls(each=max(1, cores - 1), calls=min(2, cores))


DEFAULT_THREADS = ModelThreads()


@dataclass(frozen=True)
class Workers:
    """What an engine has, or had at most, to work with.

    Attributes:
        decode: Scans that are read and decoded at once.
        model: Calls of the model at once.
        cores: Of this machine or of the cluster.
        has_gpus: Whether the model is on GPUs, so that it takes no cores.
    """

    decode: int
    model: int
    cores: float
    has_gpus: bool = False


def count_usable_cores() -> int:
    """Return the cores this process may run on, which a container or batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
