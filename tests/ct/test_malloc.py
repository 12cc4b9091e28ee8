"""Large blocks stay with the process once it was asked to keep them."""

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


def faults(mode: str) -> int:
    ran = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True
    )
    return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives blocks back this way")
def test_a_second_large_block_costs_hardly_any_page_faults() -> None:
    assert faults("keep") < faults("let go") / 4
