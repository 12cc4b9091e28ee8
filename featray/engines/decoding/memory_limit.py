"""What memory a process may use, and a bound on what one piece of work may take of it. Knows no scans."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where version 2 and version 1 say what a container may use."""
_FIRST_TO_GO = "1000"
"""Highest oom_score_adj: what the kernel kills first when memory runs out."""
_SHARE = 0.8
"""Of all memory that one scan may take unless told otherwise: more would bring the machine down."""


def decode_memory(asked: int | None) -> int:
    """Return the bytes that decoding one scan may take: as configured, or most of what there is."""
    return int(_SHARE * usable_memory()) if asked is None else asked


def usable_memory() -> int:
    """Return the bytes this machine has, or this container may use."""
    limits = [psutil.virtual_memory().total]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # not there, or `max`
            limits.append(int(Path(name).read_text(encoding="ascii")))
    return min(limits)


@contextlib.contextmanager
def bounded(limit: int | None) -> Iterator[None]:
    """Let this process take `limit` bytes more than it holds now; beyond them allocations fail.

    NumPy, zlib, OpenCV and Python itself then raise MemoryError (or their own kind of it), where the kernel
    would have killed this process or another. Memory shared with other processes does not count. Does
    nothing for None, and where the kernel does not count (anything but Linux).
    """
    if limit is None or not sys.platform.startswith("linux"):
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = _held() + limit
    soft = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def go_first() -> None:
    """Ask the kernel to kill this process before others when memory runs out; that needs no rights."""
    with contextlib.suppress(OSError):  # no Linux, or /proc is closed
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")


def _held() -> int:
    """Return the bytes that count against RLIMIT_DATA now, freed blocks that malloc keeps among them."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024
