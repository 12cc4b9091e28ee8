"""Keeps the C library from giving large buffers back to the kernel; knows nothing of CT.

Each scan needs some 100 MB for a fraction of a second. By default glibc maps such blocks afresh
and unmaps them on release, so every scan pays for its page faults again.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
_KEPT_BYTES = 2**30


def keep_large_blocks() -> None:
    """Make malloc keep freed blocks of up to 1 GiB for the next scan; call once per decode process.

    Memory stays at the peak of the largest scan read, which the process needed anyway. Measured on
    a 126 MB .nii.gz: 30,700 page faults per scan become 0, `read_nifti` 0.335 CPU s becomes 0.265.
    Does nothing where there is no glibc (macOS, Windows, musl).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        if not mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES):  # glibc before 2.35 takes at most 32 MiB
            mallopt(_M_MMAP_MAX, 0)
