"""NumPy array files: the samples of one `.npy` file in memory, for models that take no CT.

In: the bytes of a file, whose header may lie. Out: float samples. Never unpickles anything, knows no
paths and no model.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.errors import Reason, ScanError

SUFFIX = ".npy"
_REAL = "iufb"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Samples:
    """What one file holds.

    Attributes:
        values: float32 (n, *sample shape), all finite; n is 1 unless rows were asked for.
        file_shape: Of the array as stored.
    """

    values: NDArray[np.float32]
    file_shape: tuple[int, ...]


def read_npy(data: bytes, *, rows: bool, max_values: int) -> Samples:
    """Return the samples of one file.

    Args:
        data: The whole file.
        rows: Whether the first axis enumerates samples; else the file is one sample.
        max_values: More are refused from the header, before anything is allocated.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume` or
            `non_finite`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    stream = io.BytesIO(data)
    shape, in_columns, dtype = _header(stream)
    _check_claims(shape, dtype, len(data) - stream.tell(), rows=rows, max_values=max_values)
    flat = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    array = flat.reshape(shape, order="F" if in_columns else "C")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is found below
        values = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(values).all():
        raise ScanError(Reason.NON_FINITE, "the array holds NaN, infinity or numbers beyond float32")
    return Samples(values if rows else values[np.newaxis], shape)


def apply_window(
    values: NDArray[np.float32], window: tuple[float, float] | None, scale: tuple[float, float]
) -> NDArray[np.float32]:
    """Return the values clipped to `window` and mapped linearly onto `scale`; as they are if it is null."""
    if window is None:
        return values
    low, high = window
    first, last = scale
    mapped: NDArray[np.float32] = np.clip(values, low, high)
    mapped -= low
    mapped *= (last - first) / (high - low)
    mapped += first
    return mapped


def _header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Return shape, whether columns come first, and type."""
    try:
        version = np.lib.format.read_magic(stream)
        if version in _HEADERS:
            shape, in_columns, dtype = _HEADERS[version](stream)
            return tuple(shape), bool(in_columns), dtype
    except Exception as error:  # NumPy evaluates the header as Python literals, which may raise anything
        raise ScanError(
            Reason.UNREADABLE, f"no .npy file, or its header is damaged ({type(error).__name__})"
        ) from None
    raise ScanError(Reason.UNSUPPORTED, f"a .npy file of version {version[0]}.{version[1]}; save it anew")


def _check_claims(
    shape: tuple[int, ...], dtype: np.dtype[np.generic], there: int, *, rows: bool, max_values: int
) -> None:
    if dtype.kind not in _REAL:
        what = "Python objects, which are never loaded" if dtype.hasobject else f"{dtype.kind!r} values"
        raise ScanError(Reason.UNSUPPORTED, f"the array holds {what}; save real numbers")
    if len(shape) < (2 if rows else 1) or min(shape) < 0:
        wanted = "samples along its first axis" if rows else "at least one axis"
        raise ScanError(Reason.NOT_A_VOLUME, f"an array of shape {shape}; expected {wanted}")
    values = math.prod(shape)
    if values == 0:
        raise ScanError(Reason.EMPTY, f"an array of shape {shape} holds no value")
    if values > max_values:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the header claims {values} values, more than limits.max_voxels ({max_values})",
        )
    expected = values * dtype.itemsize
    if there < expected:
        raise ScanError(Reason.TRUNCATED, f"expected {expected} bytes of values, the file has {there}")
    if there > expected:
        raise ScanError(
            Reason.UNREADABLE, f"{there - expected} bytes follow the array (several arrays in one file?)"
        )
