"""A decoder and a model that kill or hang the process they run in; importable wherever tests run them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featray.schema import Decoded, Scan, ScanRecord
from featray.stages.decode import Decoder


class Poisoned(Decoder):
    """Dies on scans named poison…, hangs in C on hang…; the sum over what killer… gives is negative."""

    def __call__(self, scan: Scan) -> Decoded:
        record = ScanRecord.from_scan(scan)
        if record.status != "ok":
            return super().__call__(scan)
        if scan.scan_id.startswith("poison"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if scan.scan_id.startswith("hang"):
            ctypes.PyDLL(None).sleep(3600)  # keeps Python's lock: none of its threads and handlers run
        record.patches = 1
        value = -1 if scan.scan_id.startswith("killer") else 1
        return Decoded(record, np.full((1, 2, 2, 2), value, np.float32), np.zeros((1, 3), np.int32))


class Numbered(Decoder):
    """Gives scan s7 a tensor of sevens, of a shape of its own."""

    def __call__(self, scan: Scan) -> Decoded:
        record, value = ScanRecord.from_scan(scan), int(scan.scan_id[1:])
        shape = ((1, 2, 2, 2), (1, 8, 1, 1))[value % 2]
        record.patches = 1
        return Decoded(record, np.full(shape, value, np.float32), np.zeros((1, 3), np.int32))


def summing(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Stand in for a model; one that a negative sum kills."""
    sums = batch.reshape(len(batch), -1).sum(axis=1, keepdims=True)
    if (sums < 0).any():
        os.kill(os.getpid(), signal.SIGKILL)
    return {"sum": sums}


def load_summing() -> object:
    """Return the model, as every process that holds it does."""
    return summing


def load_slow(folder: str) -> object:
    """Return a slow model, and leave a mark in the folder for each process that holds one."""
    (Path(folder) / f"loaded-{os.getpid()}").touch()

    def model(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        time.sleep(0.2)
        return summing(batch, seeds)

    return model
