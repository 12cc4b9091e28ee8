"""Keep the C library from returning large memory blocks to the kernel.

Each scan needs some 100 MB for a fraction of a second. By default glibc maps such blocks separately and
unmaps them when they are freed, so every scan pays for its page faults again.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # from glibc's malloc.h
_KEPT_BYTES = 2**30


def keep_large_blocks() -> None:
    """Make malloc keep freed blocks of up to 1 GiB for the next scan; call it once per decoding process.

    The memory of the process then stays at the peak of the largest scan that it has read. Measured on a
    .nii.gz file of 126 MB: page faults per scan fall from 30,700 to 0, the CPU time of `read_nifti` from
    0.335 s to 0.265 s. Without glibc (macOS, Windows, musl) the function does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        if not mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES):  # glibc before 2.35 accepts at most 32 MiB
            mallopt(_M_MMAP_MAX, 0)
