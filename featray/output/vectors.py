"""Fixed-size vectors: a list column of one layer in, an Arrow FixedSizeList of float32 or float16 out.

This module does not know stores or logs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from featray.errors import UsageError
from featray.output.features import Floats, check_lengths

LARGEST_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Rounding:
    """Effect of rounding to float16.

    Attributes:
        values: Number of values.
        largest: Largest absolute value before rounding.
        max_error: Largest absolute difference that rounding made.
        zeroed: Number of values other than 0 that became 0, because they are smaller than 3e-8.
    """

    values: int = 0
    largest: float = 0.0
    max_error: float = 0.0
    zeroed: int = 0

    def merge(self, other: Rounding) -> Rounding:
        """Return the rounding of both sets of values."""
        return Rounding(
            self.values + other.values,
            max(self.largest, other.largest),
            max(self.max_error, other.max_error),
            self.zeroed + other.zeroed,
        )

    def describe(self) -> str:
        """Return the rounding as a text for users."""
        zeroed = f"; {self.zeroed} of {self.values} values became 0" if self.zeroed else ""
        return f"values up to {self.largest:.4g} changed by at most {self.max_error:.2g}{zeroed}"


def make_vector_type(width: int, *, float16: bool) -> pa.DataType:
    """Return the Arrow type of vectors with `width` numbers."""
    return pa.list_(pa.float16() if float16 else pa.float32(), width)


def make_vectors(column: pa.ChunkedArray, width: int) -> pa.FixedSizeListArray:
    """Return a list column as vectors of float32.

    Args:
        column: Arrow list<float>, at most 2**31 - 1 numbers.
        width: Number of values of each row.

    Raises:
        FeatrayError: A row has another number of values.
    """
    check_lengths(column, np.full(len(column), width, np.int64))
    values = column.combine_chunks().flatten()
    return pa.FixedSizeListArray.from_arrays(values, type=make_vector_type(width, float16=False))


def round_vectors(vectors: pa.FixedSizeListArray, layer: str) -> tuple[pa.FixedSizeListArray, Rounding]:
    """Return vectors as float16, and the effect of rounding.

    Args:
        vectors: Vectors of float32.
        layer: Name of the layer, for the message.

    Raises:
        UsageError: A value is larger than float16 can hold.
    """
    values: Floats = vectors.flatten().to_numpy()
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16)
    largest = float(np.abs(values).max(initial=0))
    overflowed = int(np.count_nonzero(np.isinf(rounded) & np.isfinite(values)))
    if overflowed:
        raise UsageError(
            f"layer {layer}: it has values up to {largest:.4g}, but float16 holds at most "
            f"{LARGEST_FLOAT16:.0f}. Export it as float32, or export other layers"
        )
    rounding = Rounding(
        values=len(values),
        largest=largest,
        max_error=float(np.abs(rounded.astype(np.float32) - values).max(initial=0)),
        zeroed=int(np.count_nonzero((rounded == 0) & (values != 0))),
    )
    kind = make_vector_type(vectors.type.list_size, float16=True)
    return pa.FixedSizeListArray.from_arrays(pa.array(rounded), type=kind), rounding
