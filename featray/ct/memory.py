"""Keeps the C library from giving large buffers back to the kernel; knows nothing of CT.

Each scan needs some 100 MB for a fraction of a second. By default glibc maps such blocks afresh
and unmaps them on release, so every scan pays for its page faults again.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h
_KEPT_BYTES = 2**30


def keep_large_blocks() -> None:
    """Make malloc keep freed blocks of up to 1 GiB for the next scan; call once per decode process.

    Memory stays at the peak of the largest scan read, which the process needed anyway. Does
    nothing where there is no glibc (macOS, Windows, musl).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
