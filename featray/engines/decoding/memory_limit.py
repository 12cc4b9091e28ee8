"""The memory that a process may use, and a limit for one task. Knows no scans."""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files with the memory limit of a container: control groups version 2, and version 1."""
_HIGHEST_OOM_SCORE = "1000"
"""Highest oom_score_adj; the kernel kills such a process first when memory runs out."""
_DECODE_SHARE = 0.8
"""Share of the usable memory that decoding one scan may take by default; more could exhaust the machine."""


def decode_memory(configured: int | None) -> int:
    """Return the bytes that decoding one scan may take: the configured number, or most of the memory."""
    return int(_DECODE_SHARE * usable_memory()) if configured is None else configured


def usable_memory() -> int:
    """Return the bytes of memory of this machine, or the limit of this container if that is lower."""
    limits = [psutil.virtual_memory().total]
    for name in _CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the file is missing, or contains `max`
            limits.append(int(Path(name).read_text(encoding="ascii")))
    return min(limits)


@contextlib.contextmanager
def limit_memory(limit: int | None) -> Iterator[None]:
    """Limit this process to `limit` bytes more than it uses now; allocations beyond that fail.

    NumPy, zlib, OpenCV and Python then raise MemoryError or their own error for it, instead of the kernel
    killing this process or another one. Memory shared with other processes does not count. Without a limit
    (None), and on systems other than Linux, this does nothing.
    """
    if limit is None or not sys.platform.startswith("linux"):
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = _used_data_bytes() + limit
    soft = allowed if hard == resource.RLIM_INFINITY else min(allowed, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def prefer_oom_kill() -> None:
    """Ask the kernel to kill this process before others when memory runs out; this needs no privilege."""
    with contextlib.suppress(OSError):  # the system is not Linux, or /proc cannot be written
        Path("/proc/self/oom_score_adj").write_text(_HIGHEST_OOM_SCORE, encoding="ascii")


def _used_data_bytes() -> int:
    """Return the bytes that count against RLIMIT_DATA now, including freed blocks that malloc keeps."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024
