"""Test that the process keeps large memory blocks after `keep_large_blocks`."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
from featray.ct.malloc import keep_large_blocks

def fill():
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))

if sys.argv[1] == "keep":
    keep_large_blocks()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_page_faults(mode: str) -> int:
    """Return the number of page faults that a second large block causes in a new process."""
    result = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc returns large blocks to the kernel like this"
)
def test_a_second_large_block_causes_almost_no_page_faults() -> None:
    assert count_page_faults("keep") < count_page_faults("default") / 4
