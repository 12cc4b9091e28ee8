"""Features in memory: Arrow tables of one layer's files in, one float32 array aligned with one table out.

Knows no store and no log. Values are held once: `Features.array` and the table's column `feature` are two
views of the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.errors import FeatrayError, UsageError
from featray.schema import FEATURE_COLUMNS

FEATURE = "feature"
KEYS = ("scan_id", "patch")
MAX_ITEMS = 2**31 - 1
"""Values that one Arrow list array can hold: its offsets are 32-bit."""
FLOATS = FEATURE_COLUMNS.field(FEATURE).type
_SHOWN = 3

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Features:
    """Rows of one layer, sorted by scan_id and patch; what `featray.read` returns.

    All memory is shared and read-only; copy an array before changing it.

    Attributes:
        layer: As the output calls it.
        version: The version of the output that was read.
        recipe: Recipe id of every row; None when there are no rows.
        table: Arrow table, one row per value; with `scans=`, also columns of the scans.
        missing: Scan ids that were asked for and have no row, because they failed or were never found.
    """

    def __init__(
        self,
        layer: str,
        version: int,
        recipe: str | None,
        table: pa.Table,
        missing: Sequence[str] = (),
        *,
        values: Floats | None = None,
        shapes: Shapes | None = None,
    ) -> None:
        self.layer, self.version, self.recipe, self.table = layer, version, recipe, table
        self.missing = list(missing)
        self._values, self._shapes = values, shapes

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.table)

    def __repr__(self) -> str:
        """Say what it is, not what is in it."""
        return f"Features({self.layer!r}, version={self.version}, recipe={self.recipe!r}, rows={len(self)})"

    @cached_property
    def scan_ids(self) -> NDArray[np.object_]:
        """One scan_id (str) per row."""
        ids: NDArray[np.object_] = self.table["scan_id"].to_numpy()
        return ids

    @property
    def array(self) -> Floats:
        """float32 (rows, *shape of one value), read-only.

        Raises:
            UsageError: Values differ in shape, as those of native-size inputs do, or were not read.
        """
        values, shapes = self._loaded()
        if shapes.common is None:
            raise UsageError(
                f"layer {self.layer}: its values have {shapes.distinct()}, so they are no one array; take "
                "`.arrays`, a list with one array per row, or pool the layer (`pool: avg`) when extracting"
            )
        return values.reshape(len(self), *shapes.common)

    @property
    def arrays(self) -> list[Floats]:
        """One float32 array per row, each in its own shape; views without a copy, read-only.

        Raises:
            UsageError: The values were not read.
        """
        values, shapes = self._loaded()
        return shapes.split(values)

    def _loaded(self) -> tuple[Floats, Shapes]:
        if self._values is None or self._shapes is None:
            raise UsageError(f"the values were not read; add {FEATURE!r} to columns, or leave columns out")
        return self._values, self._shapes


class Shapes:
    """Shapes of values that lie one behind the other in one flat array.

    Args:
        shapes: Arrow list<int32>, one shape per value.
        otherwise: Shape to assume when there are no values.

    Attributes:
        common: The shape of all of them; None when they differ.
        lengths: int64 (rows,), how many numbers each has.
    """

    def __init__(self, shapes: pa.ChunkedArray, otherwise: tuple[int, ...] = ()) -> None:
        self._shapes = shapes
        matrix = matrix_of(shapes)
        if matrix is None:
            self.common: tuple[int, ...] | None = None
            self.lengths = np.array([np.prod(row, dtype=np.int64) for row in self.rows], np.int64)
            return
        first = tuple(matrix[0].tolist()) if len(matrix) else otherwise
        self.common = first if (matrix == matrix[:1]).all() else None
        self.lengths = matrix.prod(axis=1, dtype=np.int64)

    @cached_property
    def rows(self) -> list[tuple[int, ...]]:
        """Each value's shape."""
        return [tuple(shape) for shape in self._shapes.to_pylist()]

    @cached_property
    def starts(self) -> Indices:
        """int64 (rows + 1,): where each value begins, and the end of the last."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def split(self, values: Floats) -> list[Floats]:
        """Return flat numbers as one array per value, without a copy."""
        bounds = zip(self.starts[:-1], self.starts[1:], self.rows, strict=True)
        return [values[first:last].reshape(shape) for first, last, shape in bounds]

    def distinct(self) -> str:
        """Return in words how many shapes there are and what the first ones look like."""
        found = list(dict.fromkeys(self.rows))
        some = ", ".join("x".join(map(str, shape)) or "()" for shape in found[:_SHOWN])
        return f"{len(found)} different shapes ({some}{', …' if len(found) > _SHOWN else ''})"


def sorted_order(rows: pa.Table) -> Indices | None:
    """Return the row numbers that put a table in order of scan_id and patch; None when it is already."""
    found: Indices = pc.sort_indices(rows, [(name, "ascending") for name in KEYS]).to_numpy()
    found = found.astype(np.int64)
    return None if (found == np.arange(len(found))).all() else found


def values_of(column: pa.ChunkedArray, shapes: Shapes) -> Floats | None:
    """Return all numbers of a list column as one flat array without a copy; None when it is in pieces.

    Raises:
        FeatrayError: A row has not as many numbers as its shape says.
    """
    if column.num_chunks != 1:
        return None
    check_lengths(column, shapes.lengths)
    items: Floats = column.chunk(0).flatten().to_numpy()
    return items


def put(values: Floats, shapes: Shapes, positions: Indices, chunk: pa.ListArray) -> None:
    """Copy the numbers of some rows to their places.

    Args:
        values: The numbers of all rows, flat, in their final order.
        shapes: Of all rows.
        positions: Row numbers of the chunk's rows.
        chunk: A list array.

    Raises:
        FeatrayError: A row has not as many numbers as its shape says.
    """
    check_lengths(chunk, shapes.lengths[positions])
    items: Floats = chunk.flatten().to_numpy()
    if shapes.common is not None:
        width = int(np.prod(shapes.common, dtype=np.int64))
        values.reshape(len(shapes.lengths), width)[positions] = items.reshape(len(chunk), width)
        return
    first = 0
    for start, length in zip(shapes.starts[positions], shapes.lengths[positions], strict=True):
        values[start : start + length] = items[first : first + length]
        first += length


def empty_values(shapes: Shapes) -> Floats:
    """Return room for the numbers of all rows."""
    return np.empty(shapes.starts[-1], np.float32)


def flat_values(column: pa.ChunkedArray, shapes: Shapes) -> Floats:
    """Return all numbers of a list column as one flat array, without a copy if it is in one piece."""
    values = values_of(column, shapes)
    if values is None:
        values, first = empty_values(shapes), 0
        for chunk in column.chunks:
            put(values, shapes, np.arange(first, first + len(chunk)), chunk)
            first += len(chunk)
    return values


def list_column(values: Floats, shapes: Shapes) -> pa.ChunkedArray:
    """Return flat numbers as a list column over the same memory, in chunks that Arrow can address."""
    starts, chunks, first = shapes.starts, [], 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + MAX_ITEMS, side="right")) - 1
        items = pa.array(values[starts[first] : starts[last]])
        offsets = pa.array((starts[first : last + 1] - starts[first]).astype(np.int32))
        chunks.append(pa.ListArray.from_arrays(offsets, items, type=FLOATS))
        first = last
    return pa.chunked_array(chunks, FLOATS)


def matrix_of(column: pa.ChunkedArray) -> NDArray[Any] | None:
    """Return a list column as (rows, items); None when its rows differ in length."""
    lengths = pc.list_value_length(column)
    width = lengths[0].as_py() if len(column) else 0
    if len(column) and not pc.all(pc.equal(lengths, width)).as_py():
        return None
    items: NDArray[Any] = pc.list_flatten(column).to_numpy()
    return items.reshape(len(column), width)


def check_lengths(column: pa.ChunkedArray | pa.ListArray, lengths: Indices) -> None:
    """Make sure that every row of a list column has as many items as expected.

    Raises:
        FeatrayError: One has not.
    """
    if not np.array_equal(pc.list_value_length(column).to_numpy(zero_copy_only=False), lengths):
        raise FeatrayError(
            "a row has another number of values than its shape says; `featray verify` tells which file is "
            "damaged, and how to mend it"
        )
