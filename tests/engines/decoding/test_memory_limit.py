"""Memory: a scan that takes more than it may fails alone, wherever the allocation fails that is too much."""

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
from featray.engines.decoding.memory_limit import bounded, decode_memory, usable_memory
from featray.engines.decoding.process_pool import Helpers
from featray.engines.decoding.scan_pool import Attempts
from featray.errors import Reason
from featray.schema import Decoded
from featray.stages import decode as decode_module
from featray.stages.decode import Decoder
from featray.stages.list import list_scans

MIB = 2**20
UNUSED = {"model": {"uri": "m.keras", "layers": ["z"]}, "output": {"uri": "out"}}


def _decoded(folder: Path, memory: int, **sections: Any) -> dict[str, Decoded]:
    """Decode what is in a folder, in one helper."""
    preprocess = {"size": [8, 16, 16], **sections.pop("preprocess", {})}
    config = load({"source": {"uri": str(folder)}, "preprocess": preprocess, **UNUSED, **sections})
    scans = list_scans(config.source, config.policy).scans
    helpers = Helpers(1, timeout_s=120, memory=memory)
    attempts = Attempts(helpers, Decoder.of(config), LimitsConfig(), size=2)
    try:
        batches = attempts.batches(scans, 1, threading.Event())
        return {batch[0].record.scan_id: batch[0] for batch in batches}
    finally:
        helpers.close()
        attempts.close()


def _put_nifti(path: Path, slices: int) -> None:
    ramp = np.linspace(-1000, 1000, 256, dtype=np.int16)
    nib.save(nib.Nifti1Image(np.broadcast_to(ramp[:, None, None], (256, 256, slices)), np.eye(4)), path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_scan_that_takes_more_memory_than_it_may_is_too_large_and_those_around_it_are_not(
    tmp_path: Path, suffix: str
) -> None:
    for name, slices in (("a", 40), ("b", 2000), ("c", 40)):
        _put_nifti(tmp_path / f"{name}{suffix}", slices)
    found = {name: scan.record for name, scan in _decoded(tmp_path, 150 * MIB).items()}
    assert {name[0]: (record.status, record.reason) for name, record in found.items()} == {
        "a": ("ok", None),
        "b": ("failed", "too_large"),
        "c": ("ok", None),
    }
    failed = found[f"b{suffix}"]
    assert (failed.attempts, failed.stage) == (1, "read"), "it was found at once, not by its process's death"
    assert "run.decode.memory" in str(failed.message)


def test_a_model_input_that_takes_more_memory_than_it_may_is_too_large(tmp_path: Path) -> None:
    _put_nifti(tmp_path / "a.nii.gz", 40)
    [found] = _decoded(tmp_path, 150 * MIB, preprocess={"size": [400, 512, 512]}).values()
    assert (found.record.reason, found.record.stage) == ("too_large", "preprocess")


def _out_of_opencv(*_: object, **__: object) -> None:
    with bounded(50 * MIB):
        cv2.resize(np.zeros((10, 10), np.float32), (10_000, 10_000))


def _out_of_numpy(*_: object, **__: object) -> None:
    with bounded(50 * MIB):
        np.ones(400 * MIB, np.uint8)


def _taken_for_damage(*_: object, **__: object) -> None:
    try:
        _out_of_numpy()
    except Exception:
        raise decode_module.ScanError(Reason.UNREADABLE, "damaged") from None


@pytest.mark.parametrize("work", [_out_of_opencv, _out_of_numpy, _taken_for_damage])
def test_memory_that_ran_out_is_known_whatever_the_error_was_taken_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[..., None]
) -> None:
    _put_nifti(tmp_path / "a.nii", 40)
    config = load({"source": {"uri": str(tmp_path)}, "preprocess": {"size": [8, 16, 16]}, **UNUSED})
    [scan] = list_scans(config.source, config.policy).scans
    monkeypatch.setattr(decode_module, "preprocess", work)
    assert Decoder.of(config)(scan).record.reason == "too_large"


def test_the_bound_is_gone_when_the_work_is_done() -> None:
    with bounded(50 * MIB), pytest.raises(MemoryError):
        np.ones(400 * MIB, np.uint8)
    assert len(np.ones(400 * MIB, np.uint8)) == 400 * MIB


def test_without_a_bound_of_its_own_a_scan_may_take_most_of_what_the_machine_has() -> None:
    assert decode_memory(7) == 7
    assert 0.5 * usable_memory() < decode_memory(None) < usable_memory()
