"""This machine: the cores and the memory a process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the cores this process may run on, which a container or batch system may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
