"""The ledger: the scans table as planning needs it, with the cells of each scan as codes.

Rows that featray 0.1.0 has written have one recipe for all layers and do not list their layers. They are read
as the rows that the present version would have written: `translate_recipes` finds the recipes of their layers
in the runs that wrote them. `carry_over.py` changes the tables in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.hardware import return_free_memory
from featray.output.cells import CellColumn, CellMap
from featray.output.dataset import FEATURES, RUNS, Snapshot
from featray.recipe import RecipeIds, make_recipe_ids, recipe_id, select_recipe_layers
from featray.schema import SCAN_COLUMNS
from featray.storage.store import Store

LEDGER_COLUMNS = ("scan_id", "status", "reason", "content", "recipe", "stage", "run_id")
"""Columns of a ledger besides its cells."""
LEDGER_ROW_COLUMNS = (*LEDGER_COLUMNS, "layers", "failed_layers")
"""Columns of `scans` from which a ledger is made."""
MAX_RUNS_PER_RECIPE = 20
"""Number of runs to try for one recipe; a run that was killed may have no run.json."""


@dataclass(frozen=True)
class EncodedRows:
    """Rows of `scans` with the cells of each row as codes, which take a hundredth of the memory.

    Attributes:
        table: The columns `LEDGER_COLUMNS`.
        cells: The column `layers`; None in a row of featray 0.1.0.
        failed: The column `failed_layers`.
    """

    table: pa.Table
    cells: CellColumn
    failed: CellColumn

    @classmethod
    def encode(cls, rows: pa.Table) -> EncodedRows:
        """Return rows with the columns `LEDGER_ROW_COLUMNS`."""
        cells, failed = CellColumn.encode(rows["layers"]), CellColumn.encode(rows["failed_layers"])
        return cls(rows.select(LEDGER_COLUMNS), cells, failed)

    @classmethod
    def concatenate(cls, parts: Sequence[EncodedRows]) -> EncodedRows:
        """Return all rows of one or more parts."""
        return cls(
            pa.concat_tables([part.table for part in parts]),
            CellColumn.concatenate([part.cells for part in parts]),
            CellColumn.concatenate([part.failed for part in parts]),
        )


@dataclass(frozen=True)
class Ledger:
    """Rows of the scans table.

    Attributes:
        table: The columns `LEDGER_COLUMNS`; `recipe` is that of reading and preprocessing.
        cells: Which cells `features` holds for each scan.
        failed: Which cells of each scan were tried and failed.
        earlier_recipes: Recipe id of rows of featray 0.1.0 → the ids that their layers have now.
    """

    table: pa.Table
    cells: CellColumn
    failed: CellColumn
    earlier_recipes: Mapping[str, RecipeIds] = field(default_factory=dict)

    @classmethod
    def read(cls, snapshot: Snapshot | None, recipe: Mapping[str, Any]) -> Ledger:
        """Return the ledger of a snapshot; empty without a snapshot.

        Args:
            snapshot: The output.
            recipe: Recipe of the present run, for rows of featray 0.1.0 whose runs have no run.json.
        """
        parts = [] if snapshot is None else snapshot.convert_scans(LEDGER_ROW_COLUMNS, EncodedRows.encode)
        rows = EncodedRows.concatenate([EncodedRows.encode(SCAN_COLUMNS.empty_table()), *parts])
        return_free_memory()  # of the maps of cells
        return cls.from_rows(rows, translate_recipes(snapshot, rows, recipe))

    @classmethod
    def from_rows(cls, rows: EncodedRows, translation: Mapping[str, RecipeIds]) -> Ledger:
        """Return the ledger of rows of `scans`.

        Args:
            rows: The rows.
            translation: Recipe id of featray 0.1.0 → the ids that its layers have now.
        """
        table = rows.table
        is_earlier = find_earlier_rows(rows.cells)
        if not is_earlier.any():
            return cls(table, rows.cells, rows.failed)
        recipes = table["recipe"].combine_chunks().dictionary_encode()
        unknown = RecipeIds("", {}, "")
        ids = {name: translation.get(name, unknown) for name in recipes.dictionary.to_pylist()}
        inputs = pa.array([value.inputs or name for name, value in ids.items()], pa.string())
        now = pc.if_else(pa.array(is_earlier), inputs.take(recipes.indices), table["recipe"])
        layers = [value.layers for value in ids.values()]
        has_status = {name: np.asarray(pc.equal(table["status"], name), bool) for name in ("ok", "failed")}
        return cls(
            table.set_column(table.column_names.index("recipe"), "recipe", now),
            _fill_cells(rows.cells, is_earlier & has_status["ok"], recipes.indices, layers),
            _fill_cells(rows.failed, is_earlier & has_status["failed"], recipes.indices, layers),
            translation,
        )


def find_stored_cells(snapshot: Snapshot, rows: pa.Table) -> CellColumn:
    """Return the cells that `features` holds for each scan, with the recipe ids that are in its files.

    Args:
        snapshot: The output.
        rows: Rows of `scans` with the columns `LEDGER_ROW_COLUMNS`.
    """
    encoded = EncodedRows.encode(rows.select(LEDGER_ROW_COLUMNS))
    translation = translate_recipes(snapshot, encoded, {})
    as_stored = {
        name: RecipeIds(name, dict.fromkeys(ids.layers, name), "") for name, ids in translation.items()
    }
    return Ledger.from_rows(encoded, as_stored).cells


def list_layers(snapshot: Snapshot) -> list[str]:
    """Return the names of the layers that have files in `features`, sorted."""
    return sorted({file.partition_values["layer"] or "" for file in snapshot.files(FEATURES)})


def find_earlier_rows(cells: CellColumn) -> NDArray[np.bool_]:
    """Return which rows featray 0.1.0 has written; they have no map of layers."""
    is_null = np.array([cell_map is None for cell_map in cells.maps], bool)
    return is_null[cells.codes] if len(is_null) else np.zeros(len(cells.codes), bool)


def translate_recipes(
    snapshot: Snapshot | None, rows: EncodedRows, recipe: Mapping[str, Any]
) -> dict[str, RecipeIds]:
    """Return the ids that the layers of rows of featray 0.1.0 have now, by the recipe id in the rows.

    A recipe that neither a run.json nor the present config explains keeps its id for every layer, so that its
    cells count as made with another recipe.

    Args:
        snapshot: The output.
        rows: Rows of `scans`.
        recipe: Recipe of the present run; empty without one.
    """
    is_earlier = find_earlier_rows(rows.cells)
    if snapshot is None or not is_earlier.any():
        return {}
    keys = ["recipe", "run_id"]
    earlier = rows.table.select(keys).filter(pa.array(is_earlier)).group_by(keys).aggregate([])
    runs_by_recipe: dict[str, list[str]] = {}
    for row in earlier.to_pylist():
        runs_by_recipe.setdefault(row["recipe"], []).append(row["run_id"])
    layers = list_layers(snapshot)
    translation = {}
    for earlier_id, run_ids in runs_by_recipe.items():
        candidates = [recipe, select_recipe_layers(recipe, layers)] if recipe else []
        candidates += _read_recipes(snapshot.store, sorted(run_ids, reverse=True))
        matching = next((found for found in candidates if recipe_id(found) == earlier_id), None)
        unexplained = RecipeIds(earlier_id, dict.fromkeys(layers, earlier_id), "")
        translation[earlier_id] = make_recipe_ids(matching) if matching else unexplained
    return translation


def _read_recipes(store: Store, run_ids: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the recipes that the newest runs recorded."""
    for run_id in run_ids[:MAX_RUNS_PER_RECIPE]:
        run = read_run(store, run_id)
        if isinstance(run.get("recipe"), dict):
            yield run["recipe"]


def read_run(store: Store, run_id: str) -> dict[str, Any]:
    """Return the content of a run's run.json; empty if it is missing or cannot be parsed."""
    if not run_id or "/" in run_id:  # not the id of a run; the path must not lead out of the folder
        return {}
    try:
        run = json.loads(store.read(f"{RUNS}/{run_id}/run.json"))
    except (FileNotFoundError, ValueError):
        return {}
    return run if isinstance(run, dict) else {}


def read_newest_runs(store: Store, limit: int) -> Iterator[dict[str, Any]]:
    """Yield the run.json of at most `limit` runs, the newest first; empty for a run without one."""
    names = store.list_files(RUNS)
    run_ids = sorted({parts[1] for name in names if len(parts := name.split("/")) == 3}, reverse=True)
    for run_id in run_ids[:limit]:
        yield read_run(store, run_id)


def read_newest_layers(store: Store) -> list[str]:
    """Return the layers that the config of the newest run named; empty if no run recorded them."""
    runs = read_newest_runs(store, MAX_RUNS_PER_RECIPE)
    return next((list(run["layers"]) for run in runs if run.get("layers")), [])


def _fill_cells(
    column: CellColumn, mask: NDArray[np.bool_], recipes: pa.Array, layers: Sequence[CellMap]
) -> CellColumn:
    """Return the column with the cells of a recipe in some rows, and no cells in the other rows with null.

    Args:
        column: The column.
        mask: (rows,), rows to fill.
        recipes: int (rows,), position of each row's recipe in `layers`.
        layers: The cells of each recipe.
    """
    numbers = recipes.to_numpy()
    codes = np.where(mask, len(column.maps) + numbers, column.codes).astype(np.int32)
    return CellColumn(codes, [*(cells or {} for cells in column.maps), *layers])
