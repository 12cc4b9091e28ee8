"""Test the map columns of cells as codes and maps."""

from __future__ import annotations

import pyarrow as pa
import pytest

from featray.output.cells import CellColumn
from featray.schema import CELLS

ROWS = [
    {"a": "r1", "b": "r2"},
    None,
    {"b": "r2", "a": "r1"},
    {},
    {"a": None},
    {"a": "r1", "b": "r3"},
    {"a": ""},
]


def encode(*chunks: list[dict[str, str | None] | None]) -> CellColumn:
    arrays = [
        pa.array([None if row is None else list(row.items()) for row in rows], CELLS) for rows in chunks
    ]
    return CellColumn.encode(pa.chunked_array(arrays, CELLS))


def list_maps(column: CellColumn) -> list[object]:
    return [column.maps[code] for code in column.codes]


@pytest.mark.parametrize("split", [0, 2, len(ROWS)])
def test_rows_have_one_code_if_and_only_if_their_maps_are_equal(split: int) -> None:
    column = encode(ROWS[:split], ROWS[split:])
    assert list_maps(column) == ROWS
    assert len(column.maps) == len(set(column.codes.tolist())) == len(ROWS) - 1
    assert column.decode().to_pylist(maps_as_pydicts="strict") == ROWS


def test_a_map_that_names_a_layer_twice_is_read() -> None:
    twice = pa.chunked_array([[[("a", "r1"), ("a", None)], [("a", "r1")]]], CELLS)
    assert len(CellColumn.encode(twice).codes) == 2


def test_columns_are_concatenated_with_each_map_once() -> None:
    column = CellColumn.concatenate([encode(ROWS), encode([]), encode(list(reversed(ROWS)))])
    assert list_maps(column) == [*ROWS, *reversed(ROWS)]
    assert len(column.maps) == len(ROWS) - 1
    assert list_maps(CellColumn.concatenate([])) == []


def test_rows_are_taken_and_found_by_their_maps() -> None:
    column = encode(ROWS)
    is_found = column.find_rows(lambda cells: bool(cells) and "b" in cells)
    assert is_found.tolist() == ["b" in (row or {}) for row in ROWS]
    assert list_maps(column.take(is_found)) == [row for row in ROWS if "b" in (row or {})]
    assert encode([]).find_rows(bool).tolist() == []


def test_rows_without_cells_are_found() -> None:
    assert encode(ROWS).has_cells().tolist() == [bool(row) for row in ROWS]
    assert encode([]).has_cells().tolist() == []


def test_the_recipes_of_each_layer_are_counted_with_the_most_frequent_first() -> None:
    column = encode([{"b": "r2", "a": "r1"}, {"b": "r3"}, None, {}, {"b": "r3"}, {"a": "r0"}])
    counts = {layer: list(recipes.items()) for layer, recipes in column.count_recipes().items()}
    assert list(counts.items()) == [("a", [("r0", 1), ("r1", 1)]), ("b", [("r3", 2), ("r2", 1)])]
