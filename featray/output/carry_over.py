"""Carry over: rows of featray 0.1.0 in, rows of the present version out. The values stay as they are.

Version 0.1.0 had one recipe for all layers of a run, and did not list the layers of a scan.
`ledger.py` finds the recipes of the layers; `stages/commit.py` commits all changed files at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from featray.output.ledger import Ledger
from featray.recipe import RecipeIds
from featray.schema import SCAN_COLUMNS, DataFile


def carry_over_features(file: DataFile, rows: pa.Table, translation: Mapping[str, RecipeIds]) -> pa.Table:
    """Return rows of `features` with the recipe of their layer; the same object if nothing changes."""
    layer = str(file.partition_values["layer"])
    encoded = rows["recipe"].combine_chunks().dictionary_encode()
    earlier = encoded.dictionary.to_pylist()
    ids = [translation[name].layers.get(layer, name) if name in translation else name for name in earlier]
    if ids == earlier:
        return rows
    recipes = pa.array(ids, pa.string()).take(encoded.indices)
    return rows.set_column(rows.column_names.index("recipe"), "recipe", recipes)


def carry_over_scans(_: DataFile, rows: pa.Table, translation: Mapping[str, RecipeIds]) -> pa.Table:
    """Return rows of `scans` with their cells; the same object if no row is of featray 0.1.0."""
    complete = rows
    for name in ("layers", "failed_layers"):
        if name not in rows.column_names:
            complete = complete.append_column(name, pa.nulls(len(rows), SCAN_COLUMNS.field(name).type))
    if not pc.any(pc.is_null(complete["layers"])).as_py():
        return rows
    ledger = Ledger.from_rows(complete, translation)
    changed = {
        "recipe": ledger.table["recipe"],
        "layers": ledger.cells.decode(),
        "failed_layers": ledger.failed.decode(),
    }
    for name, column in changed.items():
        complete = complete.set_column(complete.column_names.index(name), name, column)
    return complete
