"""Cells: the map columns `layers` and `failed_layers` of the scans table, as a code per row and a few dicts.

A million rows have only a few different maps. So code that looks at cells works on the codes and on each
different map once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.schema import CELLS

CellMap = Mapping[str, str]
"""Layer → recipe id."""

_PAIRS = pa.list_(
    pa.field("entries", pa.struct([pa.field("key", pa.string(), nullable=False), ("value", pa.string())]))
)
_LARGEST = 2**62


@dataclass(frozen=True)
class CellColumn:
    """One map column.

    Attributes:
        codes: int32 (rows,), position of each row's map in `maps`.
        maps: Every map that occurs, each once; None for a null, which only rows of featray 0.1.0 have.
    """

    codes: NDArray[np.int32]
    maps: Sequence[CellMap | None]

    @classmethod
    def encode(cls, column: pa.ChunkedArray) -> CellColumn:
        """Return a map column as codes and maps."""
        maps: dict[tuple[tuple[str, str], ...] | None, int] = {}
        parts = [_encode_chunk(chunk, maps) for chunk in column.chunks]
        decoded = [None if items is None else dict(items) for items in maps]
        return cls(np.concatenate([np.zeros(0, np.int32), *parts]), decoded)

    @classmethod
    def concatenate(cls, columns: Sequence[CellColumn]) -> CellColumn:
        """Return the rows of several columns as one column."""
        codes: dict[tuple[tuple[str, str], ...] | None, int] = {}
        parts = [np.zeros(0, np.int32)]
        for column in columns:
            keys = [None if cells is None else tuple(sorted(cells.items())) for cells in column.maps]
            new_codes = np.array([codes.setdefault(key, len(codes)) for key in keys], np.int32)
            parts.append(new_codes[column.codes])
        return cls(np.concatenate(parts), [None if key is None else dict(key) for key in codes])

    def take(self, rows: NDArray[np.int64] | NDArray[np.bool_]) -> CellColumn:
        """Return some rows, selected by number or by a mask."""
        return CellColumn(self.codes[rows], self.maps)

    def find_rows(self, condition: Callable[[CellMap | None], bool]) -> NDArray[np.bool_]:
        """Return for each row whether its map fulfills a condition."""
        fulfills = np.array([*(condition(cells) for cells in self.maps), False], bool)
        return fulfills[self.codes]

    def decode(self) -> pa.Array:
        """Return the column as Arrow maps, sorted by layer."""
        items = [None if cells is None else sorted(cells.items()) for cells in self.maps]
        return pa.array(items, CELLS).take(pa.array(self.codes))

    def map(self, change: Callable[[CellMap | None], CellMap | None]) -> CellColumn:
        """Return the column with `change` applied to each map."""
        return CellColumn(self.codes, [change(cells) for cells in self.maps])

    def map_rows(
        self, rows: NDArray[np.bool_], change: Callable[[CellMap | None], CellMap | None]
    ) -> CellColumn:
        """Return the column with `change` applied to the maps of some rows, selected by a mask."""
        codes = np.where(rows, self.codes + len(self.maps), self.codes).astype(np.int32)
        return CellColumn(codes, [*self.maps, *map(change, self.maps)])

    def has_cells(self) -> NDArray[np.bool_]:
        """Return for each row whether its map names any layer."""
        return self.find_rows(bool)

    def count_recipes(self) -> dict[str, dict[str, int]]:
        """Return layer → recipe id → number of rows with this cell.

        Layers are sorted by name; the most frequent recipe of a layer comes first.
        """
        counts: dict[str, dict[str, int]] = {}
        for cells, rows in zip(self.maps, np.bincount(self.codes, minlength=len(self.maps)), strict=True):
            for layer, recipe in (cells or {}).items():
                by_recipe = counts.setdefault(layer, {})
                by_recipe[recipe] = by_recipe.get(recipe, 0) + int(rows)
        return {
            layer: dict(sorted(counts[layer].items(), key=lambda item: (-item[1], item[0])))
            for layer in sorted(counts)
        }


def leave_out_layers(cells: CellMap, layers: Collection[str]) -> CellMap:
    """Return the cells of the other layers."""
    return {layer: recipe for layer, recipe in cells.items() if layer not in layers}


def _encode_chunk(
    chunk: pa.MapArray, maps: dict[tuple[tuple[str, str], ...] | None, int]
) -> NDArray[np.int32]:
    """Return the code of each row; add maps that are not known yet to `maps`."""
    _, first, inverse = np.unique(_number_rows(chunk), return_index=True, return_inverse=True)
    different = chunk.take(pa.array(first)).to_pylist()
    keys = [None if items is None else tuple(sorted(items, key=lambda item: item[0])) for items in different]
    codes = np.array([maps.setdefault(key, len(maps)) for key in keys], np.int32)
    return np.asarray(codes[inverse], np.int32)


def _number_rows(chunk: pa.MapArray) -> NDArray[np.int64]:
    """Return one number per row; rows with equal numbers have equal maps, in the same order of layers."""
    lists = chunk.cast(_PAIRS)
    lengths = pc.fill_null(pc.list_value_length(lists), -1).to_numpy().astype(np.int64)
    widths = np.maximum(lengths, 0)
    starts = np.cumsum(widths) - widths
    pairs = lists.flatten()
    columns = [
        pc.fill_null(pairs.field(index).dictionary_encode().indices, -1).to_numpy() for index in (0, 1)
    ]
    numbers = lengths + 1
    for position in range(int(widths.max(initial=0))):
        has_pair = np.flatnonzero(widths > position)
        for column in columns:
            item = np.zeros(len(chunk), np.int64)
            item[has_pair] = column[starts[has_pair] + position] + 1
            numbers = _combine(numbers, item)
    return np.asarray(numbers, np.int64)


def _combine(numbers: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return numbers that are equal for two rows only if both arguments are equal for them."""
    base = int(items.max(initial=0)) + 1
    if int(numbers.max(initial=0)) >= _LARGEST // base:
        numbers = np.unique(numbers, return_inverse=True)[1].astype(np.int64)
    combined: NDArray[np.int64] = numbers * base + items
    return combined
