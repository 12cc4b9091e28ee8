"""Shared-memory buffers: their memory is valid as long as a tensor uses it."""

from __future__ import annotations

import subprocess
import sys

READ_AFTER_CLOSE = """
from featray.engines.decoding.shared_memory import create_buffers

for buffer in create_buffers(2, 4 * 1024 * 1024):
    tensor = buffer.tensor((64, 128, 128))
    tensor[:] = 1.0
    buffer.close()
    assert tensor.sum() == 64 * 128 * 128
"""


def test_a_tensor_is_valid_after_its_buffer_is_closed() -> None:
    # In a process of its own, because reading memory that was freed would end this one.
    process = subprocess.run([sys.executable, "-c", READ_AFTER_CLOSE], capture_output=True, timeout=60)
    assert process.returncode == 0, process.stderr.decode()
