"""Apply rescale slope and intercept to stored values, once, in the smallest suitable dtype.

All readers use these functions, so that no reader applies a slope twice or rounds differently.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

VOLUME_DTYPES = (np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float32))
"""The dtypes that a volume can have, from narrow to wide."""


def find_extremes(stored: NDArray[Any]) -> tuple[float, float]:
    """Return the minimum and the maximum as Python numbers; both are NaN if the array holds a NaN."""
    with np.errstate(invalid="ignore"):
        return stored.min().item(), stored.max().item()


def choose_dtype(
    stored: np.dtype[Any], low: float, high: float, slope: float, intercept: float
) -> np.dtype[Any]:
    """Return the narrowest of `VOLUME_DTYPES` that holds `value * slope + intercept` of all stored values.

    An integer dtype is returned only if the stored values, the slope and the intercept are whole numbers and
    the slope and the intercept fit the dtype as well. Intermediate results may then wrap around without harm,
    because the final result fits.

    Args:
        stored: The dtype of the stored values.
        low: The smallest stored value.
        high: The largest stored value.
        slope: Rescale slope.
        intercept: Rescale intercept.
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
    """Return `stored * slope + intercept`, computed in `dtype`.

    The result is `stored` itself if it already has `dtype`, slope and intercept change nothing, and there is
    no `out`. If `out` is given, the result is written into it; it must have the shape of `stored` and the
    dtype `dtype`.
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
