"""Features in memory: Arrow tables of one layer in, a float32 array and a table with the same rows out.

Values are in memory once: `Features.array` and the column `feature` of the table are two views of the same
memory. This module does not know stores or logs.
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
"""Maximum number of items in one Arrow list array, because its offsets are 32-bit."""
FLOATS = FEATURE_COLUMNS.field(FEATURE).type
_MAX_SHAPES_SHOWN = 3

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Features:
    """Rows of one layer, sorted by scan_id and patch; the result of `featray.read`.

    All memory is shared and read-only; copy an array before changing it.

    Attributes:
        layer: Name of the layer in the output.
        version: Version of the output that was read.
        recipe: Recipe id of all rows; None for zero rows.
        table: Arrow table with one row per feature value; with `scans=`, also with columns of the scans.
        missing: Requested scan ids that have no row, for example because the scan failed or was never found.
    """

    def __init__(  # noqa: PLR0913  # only featray.read makes this object
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
        """Return layer, version, recipe and number of rows, without the values."""
        return f"Features({self.layer!r}, version={self.version}, recipe={self.recipe!r}, rows={len(self)})"

    @cached_property
    def scan_ids(self) -> NDArray[np.object_]:
        """The scan_id (str) of each row."""
        ids: NDArray[np.object_] = self.table["scan_id"].to_numpy()
        return ids

    @property
    def array(self) -> Floats:
        """Values as float32 (rows, *shape of one value), read-only.

        Raises:
            UsageError: The values differ in shape, as happens with inputs of native size, or were not read.
        """
        values, shapes = self._get_values()
        if shapes.common is None:
            raise UsageError(
                f"layer {self.layer}: its values have {shapes.describe()}, so they cannot be one array. Use "
                "`.arrays`, a list with one array per row, or pool the layer (`pool: avg`) when extracting"
            )
        return values.reshape(len(self), *shapes.common)

    @property
    def arrays(self) -> list[Floats]:
        """One float32 array per row, each in its own shape; read-only views without a copy.

        Raises:
            UsageError: The values were not read.
        """
        values, shapes = self._get_values()
        return shapes.split(values)

    def _get_values(self) -> tuple[Floats, Shapes]:
        if self._values is None or self._shapes is None:
            raise UsageError(f"the values were not read; add {FEATURE!r} to columns, or leave columns out")
        return self._values, self._shapes


class Shapes:
    """Shapes of values that are stored one after the other in a flat array.

    Args:
        shapes: Arrow list<int32>, one shape per value.
        default: Value of `common` if `shapes` is empty.

    Attributes:
        common: Shape of all values; None if they differ in shape.
        lengths: int64 (rows,), how many numbers each value consists of.
    """

    def __init__(self, shapes: pa.ChunkedArray, default: tuple[int, ...] = ()) -> None:
        self._shapes = shapes
        matrix = make_matrix(shapes)
        if matrix is None:
            self.common: tuple[int, ...] | None = None
            self.lengths = np.array([np.prod(row, dtype=np.int64) for row in self.rows], np.int64)
            return
        first = tuple(matrix[0].tolist()) if len(matrix) else default
        self.common = first if (matrix == matrix[:1]).all() else None
        self.lengths = matrix.prod(axis=1, dtype=np.int64)

    @cached_property
    def rows(self) -> list[tuple[int, ...]]:
        """Shape of each value."""
        return [tuple(shape) for shape in self._shapes.to_pylist()]

    @cached_property
    def starts(self) -> Indices:
        """int64 (rows + 1,): position of the start of each value, and of the end of the last value."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def split(self, values: Floats) -> list[Floats]:
        """Return a flat array as one array per value, without a copy."""
        bounds = zip(self.starts[:-1], self.starts[1:], self.rows, strict=True)
        return [values[first:last].reshape(shape) for first, last, shape in bounds]

    def describe(self) -> str:
        """Return the number of different shapes and the first of them, as a text for messages."""
        distinct = list(dict.fromkeys(self.rows))
        examples = ", ".join("x".join(map(str, shape)) or "()" for shape in distinct[:_MAX_SHAPES_SHOWN])
        more = ", …" if len(distinct) > _MAX_SHAPES_SHOWN else ""
        return f"{len(distinct)} different shapes ({examples}{more})"


def find_sort_order(rows: pa.Table) -> Indices | None:
    """Return the row numbers that sort a table by scan_id and patch; None if it is sorted already."""
    order: Indices = pc.sort_indices(rows, [(name, "ascending") for name in KEYS]).to_numpy()
    order = order.astype(np.int64)
    return None if (order == np.arange(len(order))).all() else order


def view_values(column: pa.ChunkedArray, shapes: Shapes) -> Floats | None:
    """Return all numbers of a list column as a flat array without a copy; None if it has several chunks.

    Raises:
        FeatrayError: The number of values of a row does not match its shape.
    """
    if column.num_chunks != 1:
        return None
    check_lengths(column, shapes.lengths)
    items: Floats = column.chunk(0).flatten().to_numpy()
    return items


def scatter_values(values: Floats, shapes: Shapes, positions: Indices, chunk: pa.ListArray) -> None:
    """Copy the numbers of some rows to their positions in a flat array.

    Args:
        values: Flat array for the numbers of all rows; it is changed.
        shapes: Shapes of all rows, in the order of `values`.
        positions: Row number in `values` of each row of the chunk.
        chunk: The rows to copy, a list array.

    Raises:
        FeatrayError: The number of values of a row does not match its shape.
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


def allocate_values(shapes: Shapes) -> Floats:
    """Return an uninitialized flat array for the numbers of all rows."""
    return np.empty(shapes.starts[-1], np.float32)


def flatten_values(column: pa.ChunkedArray, shapes: Shapes) -> Floats:
    """Return all numbers of a list column as a flat array; without a copy if the column has one chunk.

    Raises:
        FeatrayError: The number of values of a row does not match its shape.
    """
    values = view_values(column, shapes)
    if values is None:
        values, first = allocate_values(shapes), 0
        for chunk in column.chunks:
            scatter_values(values, shapes, np.arange(first, first + len(chunk)), chunk)
            first += len(chunk)
    return values


def make_list_column(values: Floats, shapes: Shapes) -> pa.ChunkedArray:
    """Return a flat array as a list column over the same memory, in chunks of at most MAX_ITEMS numbers."""
    starts, chunks, first = shapes.starts, [], 0
    while first < len(starts) - 1:
        last = int(np.searchsorted(starts, starts[first] + MAX_ITEMS, side="right")) - 1
        items = pa.array(values[starts[first] : starts[last]])
        offsets = pa.array((starts[first : last + 1] - starts[first]).astype(np.int32))
        chunks.append(pa.ListArray.from_arrays(offsets, items, type=FLOATS))
        first = last
    return pa.chunked_array(chunks, FLOATS)


def make_matrix(column: pa.ChunkedArray) -> NDArray[Any] | None:
    """Return a list column as an array (rows, items); None if its rows differ in length."""
    lengths = pc.list_value_length(column)
    width = lengths[0].as_py() if len(column) else 0
    if len(column) and not pc.all(pc.equal(lengths, width)).as_py():
        return None
    items: NDArray[Any] = pc.list_flatten(column).to_numpy()
    return items.reshape(len(column), width)


def check_lengths(column: pa.ChunkedArray | pa.ListArray, lengths: Indices) -> None:
    """Check that each row of a list column has the expected number of items.

    Raises:
        FeatrayError: The number of items in a row differs from the expected number.
    """
    if not np.array_equal(pc.list_value_length(column).to_numpy(zero_copy_only=False), lengths):
        raise FeatrayError(
            "the number of values of a row does not match its shape; `featray verify` reports the damaged "
            "file and how to repair the output"
        )
