"""Decoders and models for tests of the engines; some of them kill or hang the process they run in.

They are in a module of their own, so that worker processes and Ray can import them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featray.errors import DeviceError
from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.decode import Decoder


class CrashingDecoder(Decoder):
    """A decoder whose behavior depends on the scan id; it reads no file.

    `poison…` kills the process. `hang…` hangs in C. `killer…` gives a negative tensor, which kills the
    process of the model (see `sum_voxels`). Any other id gives a tensor of ones.
    """

    def __call__(self, scan: Scan) -> Decoded:
        record = ScanRecord.from_scan(scan)
        if record.status != "ok":
            return super().__call__(scan)
        if scan.scan_id.startswith("poison"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if scan.scan_id.startswith("hang"):
            ctypes.PyDLL(None).sleep(3600)  # holds the interpreter lock: no thread and no signal handler runs
        record.patches = 1
        value = -1 if scan.scan_id.startswith("killer") else 1
        return Decoded(record, np.full((1, 2, 2, 2), value, np.float32), np.zeros((1, 3), np.int32))


class NumberingDecoder(Decoder):
    """A decoder that gives scan s7 a tensor of sevens; tensors of odd and even scans differ in shape."""

    def __call__(self, scan: Scan) -> Decoded:
        record, value = ScanRecord.from_scan(scan), int(scan.scan_id[1:])
        shape = ((1, 2, 2, 2), (1, 8, 1, 1))[value % 2]
        record.patches = 1
        return Decoded(record, np.full(shape, value, np.float32), np.zeros((1, 3), np.int32))


def sum_voxels(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the sum of each input as layer `sum`, like a model; a negative sum kills the process."""
    sums = batch.reshape(len(batch), -1).sum(axis=1, keepdims=True)
    if (sums < 0).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": sums}


def load_sum_model() -> object:
    """Return `sum_voxels`, as each process does that runs the model."""
    return sum_voxels


def load_faulty_model(folder: str, faults: int) -> object:
    """Return a model whose device has failed for the first `faults` processes that load it.

    Each process creates a file in the folder whose name tells the GPUs that it sees.
    """
    number = len(list(Path(folder).glob("gpus-*")))
    (Path(folder) / f"gpus-{os.environ.get('CUDA_VISIBLE_DEVICES')}-{os.getpid()}").touch()

    def call_or_fail(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        if number < faults:
            raise DeviceError("the GPU failed (a test)")
        return sum_voxels(batch, seeds)

    return call_or_fail


def load_waiting_model(folder: str) -> object:
    """Create the file loaded-PID in the folder, and return a model that waits for a second such file.

    Each call of the model waits for at most 3 s.
    """
    (Path(folder) / f"loaded-{os.getpid()}").touch()

    def wait_and_sum(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        deadline = time.monotonic() + 3
        while len(list(Path(folder).glob("loaded-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return sum_voxels(batch, seeds)

    return wait_and_sum
