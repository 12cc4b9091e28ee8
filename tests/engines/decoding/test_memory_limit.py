"""Memory limit: a scan that needs more fails, and no other scan, whichever allocation fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import nibabel as nib
import numpy as np
import pytest

from featray.config import LimitsConfig, load
from featray.engines.base import Decoding
from featray.engines.decoding.memory_limit import decode_memory, limit_memory, usable_memory
from featray.engines.decoding.process_pool import WorkerPool
from featray.engines.decoding.scan_pool import ScanDecodePool
from featray.errors import Reason
from featray.schema import Decoded
from featray.stages import decode as decode_module
from featray.stages.decode import Decoder
from featray.stages.list import list_scans

MIB = 2**20
TOO_MUCH = 7000 * MIB
"""More than malloc may have kept of the memory that earlier tests of this process freed."""
UNUSED = {"model": {"uri": "m.keras", "layers": ["z"]}, "output": {"uri": "out"}}


def decode_folder(folder: Path, memory: int, **sections: Any) -> dict[str, Decoded]:
    """Decode all scans of a folder in one worker process; return them by id."""
    preprocess = {"size": [8, 16, 16], **sections.pop("preprocess", {})}
    config = load({"source": {"uri": str(folder)}, "preprocess": preprocess, **UNUSED, **sections})
    scans = list_scans(config.source, config.policy).scans
    processes = WorkerPool(1, timeout_s=120, memory=memory)
    pool = ScanDecodePool(processes, Decoding(Decoder.from_config(config), 1, LimitsConfig()), size=2)
    try:
        batches = pool.batches(scans, threading.Event())
        return {batch[0].record.scan_id: batch[0] for batch in batches}
    finally:
        processes.close()
        pool.close()


def write_nifti(path: Path, slices: int) -> None:
    ramp = np.linspace(-1000, 1000, 256, dtype=np.int16)
    nib.save(nib.Nifti1Image(np.broadcast_to(ramp[:, None, None], (256, 256, slices)), np.eye(4)), path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_scan_above_the_memory_limit_is_too_large_and_the_other_scans_are_ok(
    tmp_path: Path, suffix: str
) -> None:
    for name, slices in (("a", 40), ("b", 2000), ("c", 40)):
        write_nifti(tmp_path / f"{name}{suffix}", slices)
    records = {name: scan.record for name, scan in decode_folder(tmp_path, 150 * MIB).items()}
    assert {name[0]: (record.status, record.reason) for name, record in records.items()} == {
        "a": ("ok", None),
        "b": ("failed", "too_large"),
        "c": ("ok", None),
    }
    failed = records[f"b{suffix}"]
    assert (failed.attempts, failed.stage) == (1, "read"), (
        "the scan must fail at the allocation, not by a crash of its process"
    )
    assert "run.decode.memory" in str(failed.message)


@pytest.mark.slow
def test_a_model_input_above_the_memory_limit_is_too_large(tmp_path: Path) -> None:
    write_nifti(tmp_path / "a.nii.gz", 40)
    [decoded] = decode_folder(tmp_path, 150 * MIB, preprocess={"size": [400, 512, 512]}).values()
    assert (decoded.record.reason, decoded.record.stage) == ("too_large", "preprocess")


def exhaust_opencv(*_: object, **__: object) -> None:
    with limit_memory(50 * MIB):
        cv2.resize(np.zeros((10, 10), np.float32), (30_000, 60_000))


def exhaust_numpy(*_: object, **__: object) -> None:
    with limit_memory(50 * MIB):
        np.ones(TOO_MUCH, np.uint8)


def report_exhaustion_as_damage(*_: object, **__: object) -> None:
    """Exhaust the memory, but raise the error of a damaged file, as some readers do."""
    try:
        exhaust_numpy()
    except Exception:
        raise decode_module.ScanError(Reason.UNREADABLE, "damaged") from None


@pytest.mark.parametrize("work", [exhaust_opencv, exhaust_numpy, report_exhaustion_as_damage])
def test_exhausted_memory_is_recognized_behind_each_error_that_it_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., None]
) -> None:
    write_nifti(tmp_path / "a.nii", 40)
    config = load({"source": {"uri": str(tmp_path)}, "preprocess": {"size": [8, 16, 16]}, **UNUSED})
    [scan] = list_scans(config.source, config.policy).scans
    monkeypatch.setattr(decode_module, "preprocess", work)
    assert Decoder.from_config(config)(scan).record.reason == "too_large"


@pytest.mark.slow
def test_the_limit_ends_with_its_block() -> None:
    with limit_memory(50 * MIB), pytest.raises(MemoryError):
        np.ones(TOO_MUCH, np.uint8)
    assert len(np.ones(400 * MIB, np.uint8)) == 400 * MIB


def test_the_default_limit_is_most_of_the_usable_memory() -> None:
    assert decode_memory(7) == 7
    assert 0.5 * usable_memory() < decode_memory(None) < usable_memory()
