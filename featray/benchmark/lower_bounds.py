"""Lower bounds of decoding: the fastest available functions for inflating and resizing, without any checks.

A function is used only for inputs for which it gives the right result. The results are the reference that the
pipeline is compared with; the pipeline itself does not use this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import deflate
import numpy as np
from numpy.typing import NDArray

from featray.config import Config
from featray.ct.formats.inflate import GZIP_MAGIC
from featray.ct.reorient import reorient
from featray.ct.volume import Volume

Task = Callable[[], Any]
"""Does one piece of work, which is timed."""


def make_inflaters(data: bytes) -> dict[str, Task]:
    """Return a task for each installed inflater that can inflate a gzip file; empty for other files.

    `isal` and `zlib-ng` are installed with the extra `measure`; `deflate` (libdeflate) is always installed.
    """
    if data[:2] != GZIP_MAGIC:
        return {}
    size = int.from_bytes(data[-4:], "little")
    tasks = {name: functools.partial(inflate, data, size) for name, inflate in _load_inflaters().items()}
    return {name: task for name, task in tasks.items() if _inflates_whole_file(task, size)}


def make_series_readers(paths: Sequence[str]) -> dict[str, Task]:
    """Return a task that reads the local files of one DICOM series with SimpleITK, if it is installed."""
    try:
        import SimpleITK as sitk  # noqa: N813 - the usual abbreviation
    except ImportError:
        return {}

    def read() -> Any:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(sorted(paths))
        return sitk.GetArrayViewFromImage(reader.Execute())

    return {"SimpleITK": read}


def make_resizers(volume: Volume, config: Config, expected: NDArray[np.float32]) -> dict[str, Task]:
    """Return a task for the single-pass resize, if its result equals the pipeline's for this volume.

    Args:
        volume: The volume as it was read.
        config: Its preprocessing section says how to resize.
        expected: The pipeline's result for this volume: (1, z, y, x).
    """
    steps = config.preprocess
    is_plain = steps.fit == "stretch" and steps.spacing is None and steps.window is not None
    if not is_plain or expected.ndim != 4 or len(expected) != 1:
        return {}
    voxels = reorient(volume, steps.orientation).voxels_zyx
    assert steps.window is not None
    task = functools.partial(resize_single_pass, voxels, expected.shape[1:], steps.window, steps.scale)
    is_same = np.allclose(task(), expected[0], atol=1e-4 * abs(steps.scale[1] - steps.scale[0]))
    return {"single pass": task} if is_same else {}


def resize_single_pass(
    voxels: NDArray[Any],
    size_zyx: tuple[int, ...],
    window: tuple[float, float],
    scale: tuple[float, float] = (0.0, 1.0),
) -> NDArray[np.float32]:
    """Resize linearly with half-pixel centers, and read only the source slices that contribute.

    Args:
        voxels: (z, y, x), HU, any real type.
        size_zyx: Shape of the result.
        window: Lowest and highest HU; values are clipped to them before interpolation.
        scale: The range to which the window is mapped.
    """
    (low, high), count = window, len(voxels)
    out = np.empty(size_zyx, np.float32)
    for z, plane in enumerate(out):
        source_z = min(max((z + 0.5) * count / len(out) - 0.5, 0), count - 1)
        below, weight = int(source_z), source_z - int(source_z)
        first = np.clip(voxels[below], low, high)
        second = np.clip(voxels[min(below + 1, count - 1)], low, high)
        blend = cv2.addWeighted(first, 1 - weight, second, weight, 0, dtype=cv2.CV_32F)
        cv2.resize(blend, size_zyx[:0:-1], dst=plane, interpolation=cv2.INTER_LINEAR)
    factor = (scale[1] - scale[0]) / (high - low)
    out *= factor
    out += scale[0] - low * factor
    return out


def _load_inflaters() -> dict[str, Callable[[bytes, int], Any]]:
    inflaters: dict[str, Callable[[bytes, int], Any]] = {"deflate": deflate.gzip_decompress}
    try:
        from isal import isal_zlib

        inflaters["isal"] = lambda data, size: isal_zlib.decompress(data, 31, bufsize=size)
    except ImportError:
        pass  # it is optional; the report names the inflater that was the fastest of those installed
    try:
        from zlib_ng import zlib_ng

        inflaters["zlib-ng"] = lambda data, size: zlib_ng.decompress(data, 31, bufsize=size)
    except ImportError:
        pass  # optional as well
    return inflaters


def _inflates_whole_file(task: Task, size: int) -> bool:
    """Return whether the task inflates the whole file; some inflaters stop after the first gzip member."""
    try:
        return len(task()) == size
    except deflate.DeflateError:
        return False
