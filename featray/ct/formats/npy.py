"""Read the samples of one `.npy` file, for models whose input is not CT.

In: the content of a file. Out: float32 samples. The header is checked before any data are read, and pickled
objects are never loaded. This module must not know paths or models.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.errors import Reason, ScanError

SUFFIX = ".npy"
_REAL_KINDS = "iufb"
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class Samples:
    """The samples of one file.

    Attributes:
        values: float32 (n, *shape of a sample), all finite. n is 1 if the whole file is one sample.
        file_shape: Shape of the stored array.
    """

    values: NDArray[np.float32]
    file_shape: tuple[int, ...]


def read_npy(data: bytes, *, rows: bool, max_values: int) -> Samples:
    """Return the samples of one file.

    Args:
        data: Content of the file.
        rows: Whether the first axis enumerates samples. If false, the whole array is one sample.
        max_values: Largest accepted number of values, checked before memory is allocated.

    Raises:
        ScanError: `empty`, `unreadable`, `truncated`, `unsupported`, `too_large`, `not_a_volume` or
            `non_finite`.
    """
    if not data:
        raise ScanError(Reason.EMPTY, "the file has no bytes")
    stream = io.BytesIO(data)
    shape, is_fortran_order, dtype = _parse_header(stream)
    _check_array(shape, dtype, len(data) - stream.tell(), rows=rows, max_values=max_values)
    flat = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    array = flat.reshape(shape, order="F" if is_fortran_order else "C")
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and fail the next check
        values = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(values).all():
        raise ScanError(Reason.NON_FINITE, "the array holds NaN, infinity or numbers beyond float32")
    return Samples(values if rows else values[np.newaxis], shape)


def apply_window(
    values: NDArray[np.float32], window: tuple[float, float] | None, scale: tuple[float, float]
) -> NDArray[np.float32]:
    """Return the values, clipped to `window` and mapped linearly from there to `scale`.

    If `window` is None, the values are returned unchanged.
    """
    if window is None:
        return values
    low, high = window
    first, last = scale
    mapped: NDArray[np.float32] = np.clip(values, low, high)
    mapped -= low
    mapped *= (last - first) / (high - low)
    mapped += first
    return mapped


def _parse_header(stream: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Return the shape, whether the array is stored in Fortran order, and the dtype."""
    try:
        version = np.lib.format.read_magic(stream)
        if version in _HEADER_READERS:
            shape, is_fortran_order, dtype = _HEADER_READERS[version](stream)
            return tuple(shape), bool(is_fortran_order), dtype
    except Exception as error:  # NumPy evaluates the header as a Python literal, which can raise any error
        raise ScanError(
            Reason.UNREADABLE,
            f"the file is not a .npy file, or its header is damaged ({type(error).__name__})",
        ) from None
    raise ScanError(
        Reason.UNSUPPORTED, f"a .npy file of version {version[0]}.{version[1]}; save the array again"
    )


def _check_array(
    shape: tuple[int, ...], dtype: np.dtype[np.generic], data_bytes: int, *, rows: bool, max_values: int
) -> None:
    """Raise a ScanError if the header does not fit the data or claims an array that cannot be used."""
    if dtype.kind not in _REAL_KINDS:
        content = "Python objects, which are never loaded" if dtype.hasobject else f"{dtype.kind!r} values"
        raise ScanError(Reason.UNSUPPORTED, f"the array holds {content}; save real numbers")
    if len(shape) < (2 if rows else 1) or min(shape) < 0:
        expected_shape = "samples along its first axis" if rows else "at least one axis"
        raise ScanError(Reason.NOT_A_VOLUME, f"an array of shape {shape}; expected {expected_shape}")
    values = math.prod(shape)
    if values == 0:
        raise ScanError(Reason.EMPTY, f"an array of shape {shape} holds no values")
    if values > max_values:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the header claims {values} values, more than limits.max_voxels ({max_values})",
        )
    expected = values * dtype.itemsize
    if data_bytes < expected:
        raise ScanError(Reason.TRUNCATED, f"expected {expected} bytes of values, the file has {data_bytes}")
    if data_bytes > expected:
        raise ScanError(
            Reason.UNREADABLE, f"{data_bytes - expected} bytes follow the array (several arrays in one file?)"
        )
