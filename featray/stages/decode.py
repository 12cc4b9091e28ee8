"""Decode: one listed scan in, the model's input out. Joins read and preprocess; never raises.

Runs where the voxels are: a helper process or a Ray task. Whatever goes wrong with a scan is in its
record; the tensor then has no patches.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featray.config import LimitsConfig, PreprocessConfig
from featray.ct import hu
from featray.ct.geometry import reorient
from featray.ct.memory import keep_large_blocks
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError
from featray.schema import NO_TENSOR, Decoded, Scan, ScanRecord
from featray.stages.preprocess import ModelInput, input_shape, preprocess, resampled_shape
from featray.stages.read import ReadResult, read
from featray.storage import open_url

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """Everything decoding needs besides the scan; picklable, so it travels to where it runs.

    Attributes:
        source_uri: Names the file system of the scans' files.
        source_options: Its fsspec options.
        preprocess: As configured.
        limits: As configured.
        dicom_tags: Keywords to carry into the record.
        recipe: Recipe id for the record.
        run_id: Run id for the record.
    """

    source_uri: str
    source_options: dict[str, Any]
    preprocess: PreprocessConfig
    limits: LimitsConfig
    dicom_tags: Sequence[str]
    recipe: str
    run_id: str

    def __repr__(self) -> str:
        """Name the run only: the options may hold credentials."""
        return f"Decoder(run_id={self.run_id!r})"

    def __call__(self, scan: Scan) -> Decoded:
        """Return the scan's model input, or its record with the reason why there is none."""
        _prepare_process()
        record = ScanRecord.of(scan, self.recipe, self.run_id)
        if record.status != "ok":
            return _without_tensor(record)
        try:
            result = self._read(scan)
            _describe(record, result)
        except ScanError as error:
            return _failed(record, "read", error)
        try:
            return self._preprocess(record, result.volume)
        except ScanError as error:
            return _failed(record, "preprocess", error)

    def failed(self, scan: Scan, reason: Reason, message: str, attempts: int) -> Decoded:
        """Return the outcome of a scan whose decoding could not even report one."""
        record = ScanRecord.of(scan, self.recipe, self.run_id)
        record.attempts = attempts
        return _failed(record, "read", ScanError(reason, message))

    def late(self, scan: Scan, attempts: int) -> Decoded:
        """Return the outcome of a scan that an engine gave up for taking too long."""
        message = f"no result after {self.limits.scan_timeout_s:g} s (limits.scan_timeout_s)"
        return self.failed(scan, Reason.TIMEOUT, message, attempts)

    def _read(self, scan: Scan) -> ReadResult:
        # A manifest may name scans on another file system than its own.
        fs, _ = open_url(scan.uri if "://" in scan.uri else self.source_uri, self.source_options)
        try:
            return read(scan, fs, max_voxels=self.limits.max_voxels, dicom_tags=self.dicom_tags)
        except MemoryError:
            raise ScanError(
                Reason.TOO_LARGE, "the scan does not fit into memory; lower limits.max_voxels"
            ) from None
        except ScanError:
            raise
        except Exception as error:  # a reader's bug must cost one scan, not the run
            log.debug("unexpected error while reading", exc_info=True)
            raise ScanError(Reason.UNREADABLE, f"the reader raised {type(error).__name__}") from None

    def _preprocess(self, record: ScanRecord, volume: Volume) -> Decoded:
        start = time.perf_counter()
        try:
            _check_size(volume, self.preprocess, self.limits.max_voxels)
            model_input: ModelInput = preprocess(volume, self.preprocess)
        except MemoryError:
            raise ScanError(Reason.TOO_LARGE, "the model input does not fit into memory") from None
        except ScanError:
            raise
        except Exception as error:  # as above
            log.debug("unexpected error while preprocessing", exc_info=True)
            raise ScanError(Reason.PREPROCESS, f"preprocessing raised {type(error).__name__}") from None
        record.preprocess_s = time.perf_counter() - start
        record.patches = len(model_input.tensor)
        return Decoded(record, model_input.tensor, model_input.origins)


def _describe(record: ScanRecord, result: ReadResult) -> None:
    """Fill in what the volume tells about the scan."""
    volume = result.volume
    start = time.perf_counter()
    statistics = hu.statistics(volume.voxels_zyx)
    record.hu_min, record.hu_max = statistics.minimum, statistics.maximum
    record.hu_p01, record.hu_p50, record.hu_p99 = statistics.p01, statistics.p50, statistics.p99
    record.warn(volume.warnings)
    record.warn(hu.oddities(statistics, volume.voxels_zyx))
    record.shape = [int(n) for n in volume.voxels_zyx.shape]
    record.spacing = [float(mm) for mm in volume.spacing_zyx]
    record.orientation = volume.orientation
    record.slope, record.intercept = volume.slope, volume.intercept
    record.columns |= volume.tags
    record.bytes_read, record.read_s = result.bytes_read, result.read_s
    record.decode_s = result.decode_s + time.perf_counter() - start


def _check_size(volume: Volume, config: PreprocessConfig, max_voxels: int) -> None:
    """Refuse a model input, or a resampled volume on the way to it, that is over the limit.

    A header that claims slices 100 mm apart, resampled to 1 mm, asks for a hundred times its voxels.
    """
    oriented = reorient(volume, config.orientation)
    z, y, x = oriented.voxels_zyx.shape
    for shape in (resampled_shape, input_shape):
        voxels = math.prod(shape(config, (z, y, x), oriented.spacing_zyx))
        if voxels > max_voxels:
            message = f"preprocessing would make {voxels} voxels, limits.max_voxels is {max_voxels}"
            raise ScanError(Reason.TOO_LARGE, message)


def _failed(record: ScanRecord, stage: str, error: ScanError) -> Decoded:
    record.fail(stage, error)
    return _without_tensor(record)


def _without_tensor(record: ScanRecord) -> Decoded:
    return Decoded(record, NO_TENSOR, np.zeros((0, 3), np.int32))


@functools.cache
def _prepare_process() -> None:
    """Once per process: one OpenCV thread, for there is a process per core; keep large buffers."""
    import cv2

    cv2.setNumThreads(1)
    keep_large_blocks()
