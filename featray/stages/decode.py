"""Decode: one listed scan in, its model input out. Joins locate, read and preprocess, and never raises.

This stage runs in a worker process, or in the driver without worker processes. If a scan fails, its record
has the reason, and its tensor has no patches.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from dataclasses import dataclass
from typing import Self

import numpy as np

from featray.config import Config, LimitsConfig, PolicyConfig, PreprocessConfig
from featray.ct import hu_statistics, mask_crop, regrid
from featray.ct.formats.npy import Samples, apply_window
from featray.ct.malloc import keep_large_blocks
from featray.ct.reorient import reorient
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError, WarningCode
from featray.schema import NO_TENSOR, Decoded, Scan, ScanRecord
from featray.stages.input_cache import InputCache
from featray.stages.locate import locate
from featray.stages.preprocess import ModelInput, input_shape, preprocess, resampled_shape
from featray.stages.read import Reader, ReadResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoder:
    """Everything that decoding needs besides the scan: can be pickled, knows neither model nor run.

    Attributes:
        reader: Reads the files of a scan.
        policy: How unusual scans are handled.
        preprocess: The preprocessing.
        limits: Maximum number of voxels, and the timeout.
        cache: Model inputs that were decoded before; None to decode every scan.
    """

    reader: Reader
    policy: PolicyConfig
    preprocess: PreprocessConfig
    limits: LimitsConfig
    cache: InputCache | None = None

    @classmethod
    def from_config(cls, config: Config, cache: InputCache | None = None) -> Self:
        """Return the decoder of a config, with this cache or without one."""
        tags = config.privacy.dicom_tags
        reader = Reader(config.source, config.policy, config.limits.max_voxels, tags)
        return cls(reader, config.policy, config.preprocess, config.limits, cache)

    def __repr__(self) -> str:
        """Return only the name of the class, because the options may hold credentials."""
        return "Decoder()"

    def __call__(self, scan: Scan) -> Decoded:
        """Return the model input of the scan, or its record with the reason why it has none."""
        self.prepare()
        if self.cache is None or scan.reason is not None:
            return self._decode(scan)
        start = time.perf_counter()
        found = self.cache.load(scan)
        if found is not None:
            found.record.read_s = time.perf_counter() - start
            return found
        decoded = self._decode(scan)
        self.cache.save(scan, decoded)
        return decoded

    def _decode(self, scan: Scan) -> Decoded:
        scan = locate(scan, self.reader.source, self.policy)
        record = ScanRecord.from_scan(scan)
        if record.status != "ok":
            return _without_tensor(record)
        try:
            result = self._read(scan)
            _fill_record(record, result)
            self._refuse_by_policy(record)
        except ScanError as error:
            return _fail(record, "read", _find_memory_error(error) or error)
        try:
            return self._preprocess(record, scan, result)
        except ScanError as error:
            return _fail(record, "preprocess", _find_memory_error(error) or error)

    def prepare(self) -> None:
        """Prepare this process, once. A missing library raises here, so that no scan is blamed for it."""
        _prepare_process()

    def fail(self, scan: Scan, reason: Reason, message: str, attempts: int) -> Decoded:
        """Return the scan as failed; for an engine that has no result because the worker process died."""
        record = ScanRecord.from_scan(scan)
        record.attempts = attempts
        return _fail(record, "read", ScanError(reason, message))

    def fail_late(self, scan: Scan, attempts: int) -> Decoded:
        """Return the scan as failed with `timeout`; for an engine that stopped decoding it."""
        message = f"no result after {self.limits.scan_timeout_s:g} s (limits.scan_timeout_s)"
        return self.fail(scan, Reason.TIMEOUT, message, attempts)

    def _read(self, scan: Scan) -> ReadResult:
        try:
            return self.reader.read(scan)
        except ScanError:
            raise
        except Exception as error:  # a bug in a reader must cost one scan, not the run
            log.debug("unexpected error while reading", exc_info=True)
            raise ScanError(Reason.UNREADABLE, f"the reader raised {type(error).__name__}") from None

    def _refuse_by_policy(self, record: ScanRecord) -> None:
        if self.policy.not_hu == "refuse" and WarningCode.NOT_HU in record.warnings:
            message = "the values do not look like HU (policy.not_hu: refuse); check with `featray preview`"
            raise ScanError(Reason.NOT_CT, message)

    def _preprocess(self, record: ScanRecord, scan: Scan, result: ReadResult) -> Decoded:
        start = time.perf_counter()
        try:
            if isinstance(result.content, Samples):
                model_input = _make_samples_input(result.content, self.preprocess)
            else:
                volume = self._regrid_and_crop(result.content, result.mask)
                _check_size(volume, self.preprocess, self.limits.max_voxels)
                model_input = preprocess(volume, self.preprocess, center_lps=scan.center_lps)
        except ScanError:
            raise
        except Exception as error:  # a bug must cost one scan, not the run
            log.debug("unexpected error while preprocessing", exc_info=True)
            raise ScanError(Reason.PREPROCESS, f"preprocessing raised {type(error).__name__}") from None
        record.preprocess_s = time.perf_counter() - start
        record.patches = len(model_input.tensor)
        return Decoded(record, model_input.tensor, model_input.origins)

    def _regrid_and_crop(self, volume: Volume, mask: Volume | None) -> Volume:
        """Return the volume on the grid that the policy requires, cropped to its mask."""
        window = self.preprocess.window
        self._check_regridded_size(regrid.compute_upright_size(volume))
        volume = regrid.resample_upright(volume, window)
        if self.policy.oblique == "resample":
            self._check_regridded_size(regrid.compute_axes_size(volume))
            volume = regrid.resample_to_axes(volume, window)
        return volume if mask is None else mask_crop.crop_to_mask(volume, mask, self.preprocess.margin)

    def _check_regridded_size(self, shape: tuple[int, ...]) -> None:
        if math.prod(shape) > self.limits.max_voxels:
            message = f"resampling would make {math.prod(shape)} voxels, limits.max_voxels is "
            raise ScanError(Reason.TOO_LARGE, f"{message}{self.limits.max_voxels}")


def _fill_record(record: ScanRecord, result: ReadResult) -> None:
    """Fill in the facts that reading found; an array has no geometry and no HU."""
    record.bytes_read, record.read_s = result.bytes_read, result.read_s
    start = time.perf_counter()
    if isinstance(result.content, Samples):
        record.shape = list(result.content.file_shape)
    else:
        _fill_volume_record(record, result.content)
    record.decode_s = result.decode_s + time.perf_counter() - start


def _fill_volume_record(record: ScanRecord, volume: Volume) -> None:
    statistics = hu_statistics.compute_statistics(volume.voxels_zyx)
    record.hu_min, record.hu_max = statistics.minimum, statistics.maximum
    record.hu_p01, record.hu_p50, record.hu_p99 = statistics.p01, statistics.p50, statistics.p99
    record.warn(volume.warnings)
    record.warn(hu_statistics.find_hu_warnings(statistics))
    record.shape = [int(n) for n in volume.voxels_zyx.shape]
    record.spacing = [float(mm) for mm in volume.spacing_zyx]
    record.orientation = volume.orientation
    record.slope, record.intercept = volume.slope, volume.intercept
    record.columns |= volume.tags


def _make_samples_input(samples: Samples, config: PreprocessConfig) -> ModelInput:
    """Return the samples of an array file with the window applied; `size` needs samples (z, y, x)."""
    values = samples.values
    if config.size is None:
        origins = np.zeros((len(values), 3), np.int32)
        return ModelInput(apply_window(values, config.window, config.scale), origins)
    if values.ndim != 4:
        shape = values.shape[1:]
        message = f"preprocess.size needs arrays (z, y, x), but this one has shape {shape}; remove size"
        raise ScanError(Reason.PREPROCESS, message)
    inputs = [preprocess(Volume(sample, np.eye(4)), config) for sample in values]
    return ModelInput(
        np.concatenate([item.tensor for item in inputs]), np.concatenate([item.origins for item in inputs])
    )


def _check_size(volume: Volume, config: PreprocessConfig, max_voxels: int) -> None:
    """Refuse a model input, or a resampled volume on the way to it, that has more voxels than the limit.

    If a header claims slices 100 mm apart, for example, resampling to 1 mm makes a hundred times the voxels.
    """
    oriented = reorient(volume, config.orientation)
    z, y, x = oriented.voxels_zyx.shape
    for compute_shape in (resampled_shape, input_shape):
        voxels = math.prod(compute_shape(config, (z, y, x), oriented.spacing_zyx))
        if voxels > max_voxels:
            message = f"preprocessing would make {voxels} voxels, limits.max_voxels is {max_voxels}"
            raise ScanError(Reason.TOO_LARGE, message)


def _find_memory_error(error: BaseException) -> ScanError | None:
    """Return the error to report if memory ran out, even if that caused another error; otherwise None."""
    import cv2

    cause: BaseException | None = error
    while cause is not None:
        ran_out = isinstance(cause, cv2.error) and cause.code == cv2.Error.StsNoMem
        if ran_out or isinstance(cause, MemoryError):
            message = "decoding needs more memory than a process may use; raise run.decode.memory, or "
            return ScanError(Reason.TOO_LARGE, f"{message}lower limits.max_voxels to refuse such scans early")
        cause = cause.__context__
    return None


def _fail(record: ScanRecord, stage: str, error: ScanError) -> Decoded:
    record.fail(stage, error)
    return _without_tensor(record)


def _without_tensor(record: ScanRecord) -> Decoded:
    return Decoded(record, NO_TENSOR, np.zeros((0, 3), np.int32))


@functools.cache
def _prepare_process() -> None:
    """Import the readers, limit OpenCV to one thread per process, and keep large buffers."""
    import cv2

    import featray.ct.readers  # noqa: F401  # an import error while reading would be blamed on the scan

    cv2.setNumThreads(1)
    keep_large_blocks()
