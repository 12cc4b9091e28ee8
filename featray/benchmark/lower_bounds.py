"""The least that decoding can cost: single-purpose ways that check nothing, taken only where they are right.

Bytes or voxels in, bytes, voxels or a tensor out. They are the yardstick for the pipeline, not part of it.
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

Way = Callable[[], Any]


def inflaters(data: bytes) -> dict[str, Way]:
    """Return every installed way to inflate one gzip file; empty where it is none.

    `isal` and `zlib-ng` come with the extra `measure`; `deflate` (libdeflate) is always there.
    """
    if data[:2] != GZIP_MAGIC:
        return {}
    size = int.from_bytes(data[-4:], "little")
    ways = {name: functools.partial(way, data, size) for name, way in _installed().items()}
    return {name: way for name, way in ways.items() if _gives(way, size)}


def series_readers(paths: Sequence[str]) -> dict[str, Way]:
    """Return SimpleITK's reader of the local files of one DICOM series, if it is installed."""
    try:
        import SimpleITK as sitk  # noqa: N813 - the name its users know
    except ImportError:
        return {}

    def read() -> Any:
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(sorted(paths))
        return sitk.GetArrayViewFromImage(reader.Execute())

    return {"SimpleITK": read}


def resizers(volume: Volume, config: Config, wanted: NDArray[np.float32]) -> dict[str, Way]:
    """Return the single-pass resize, if it gives what the pipeline gives for this volume.

    Args:
        volume: As read.
        config: The preprocessing to do.
        wanted: What the pipeline made of the volume.
    """
    steps = config.preprocess
    is_plain = steps.fit == "stretch" and steps.spacing is None and steps.window is not None
    if not is_plain or wanted.ndim != 4 or len(wanted) != 1:
        return {}
    turned = reorient(volume, steps.orientation).voxels_zyx
    assert steps.window is not None
    way = functools.partial(single_pass, turned, wanted.shape[1:], steps.window, steps.scale)
    is_same = np.allclose(way(), wanted[0], atol=1e-4 * abs(steps.scale[1] - steps.scale[0]))
    return {"single pass": way} if is_same else {}


def single_pass(
    voxels: NDArray[Any],
    size_zyx: tuple[int, ...],
    window: tuple[float, float],
    scale: tuple[float, float] = (0.0, 1.0),
) -> NDArray[np.float32]:
    """Resize linearly, half-pixel centres, touching as few source slices as can be.

    Args:
        voxels: (z, y, x), any real type.
        size_zyx: Of the result.
        window: HU, clipped before interpolation.
        scale: What the window becomes.
    """
    (low, high), count = window, len(voxels)
    out = np.empty(size_zyx, np.float32)
    for z, plane in enumerate(out):
        at = min(max((z + 0.5) * count / len(out) - 0.5, 0), count - 1)
        below, part = int(at), at - int(at)
        first = np.clip(voxels[below], low, high)
        second = np.clip(voxels[min(below + 1, count - 1)], low, high)
        blend = cv2.addWeighted(first, 1 - part, second, part, 0, dtype=cv2.CV_32F)
        cv2.resize(blend, size_zyx[:0:-1], dst=plane, interpolation=cv2.INTER_LINEAR)
    factor = (scale[1] - scale[0]) / (high - low)
    out *= factor
    out += scale[0] - low * factor
    return out


def _installed() -> dict[str, Callable[[bytes, int], Any]]:
    ways: dict[str, Callable[[bytes, int], Any]] = {"deflate": deflate.gzip_decompress}
    try:
        from isal import isal_zlib

        ways["isal"] = lambda data, size: isal_zlib.decompress(data, 31, bufsize=size)
    except ImportError:
        pass  # what is not installed is not among the ways, and the report names the one that was fastest
    try:
        from zlib_ng import zlib_ng

        ways["zlib-ng"] = lambda data, size: zlib_ng.decompress(data, 31, bufsize=size)
    except ImportError:
        pass  # as above
    return ways


def _gives(way: Way, size: int) -> bool:
    """Return whether it inflates all of the file: several members in one are more than some can do."""
    try:
        return len(way()) == size
    except deflate.DeflateError:
        return False
