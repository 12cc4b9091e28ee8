"""Stored numbers, slope and intercept in; Hounsfield units out, once, in the smallest right dtype.

Shared by all readers, so that a slope cannot be applied twice or rounded differently.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

VOLUME_DTYPES = (np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float32))
"""The dtypes a volume may have, narrow to wide."""


def find_extremes(stored: NDArray[Any]) -> tuple[float, float]:
    """Return minimum and maximum as Python numbers; NaN, if there is one, is both."""
    with np.errstate(invalid="ignore"):
        return stored.min().item(), stored.max().item()


def choose_dtype(
    stored: np.dtype[Any], low: float, high: float, slope: float, intercept: float
) -> np.dtype[Any]:
    """Return the narrowest of `VOLUME_DTYPES` for values between `low` and `high` after scaling.

    An integer type needs whole numbers throughout. Slope and intercept must fit it too: then
    wrap-around in between is harmless, because the result fits.
    """
    numbers = (low * slope + intercept, high * slope + intercept, slope, intercept)
    whole = stored.kind in "iu" and all(float(number).is_integer() for number in numbers)
    for dtype in VOLUME_DTYPES[:-1]:
        limits = np.iinfo(dtype)
        if whole and all(limits.min <= number <= limits.max for number in numbers):
            return dtype
    return VOLUME_DTYPES[-1]


def rescale(
    stored: NDArray[Any],
    slope: float,
    intercept: float,
    dtype: np.dtype[Any],
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Return `stored * slope + intercept` as `dtype`, computed in it; the input where nothing changes.

    `out`, if given, receives the result (same shape, `dtype`).
    """
    factor, offset = dtype.type(slope), dtype.type(intercept)
    if out is None and stored.dtype == dtype and (slope, intercept) == (1, 0):
        return stored
    if slope == 1:
        shifted: NDArray[Any] = np.add(stored, offset, out=out, dtype=dtype, casting="unsafe")
        return shifted
    scaled: NDArray[Any] = np.multiply(stored, factor, out=out, dtype=dtype, casting="unsafe")
    scaled += offset
    return scaled
