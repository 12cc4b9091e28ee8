"""Carry over: rows of featray 0.1.0 in, rows of the present version out. The values stay as they are.

Version 0.1.0 had one recipe for all layers of a run, and did not list the layers of a scan.
`ledger.py` finds the recipes of the layers; `stages/commit.py` commits all changed files at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from featray.output.dataset import Snapshot
from featray.output.ledger import EncodedRows, Ledger
from featray.recipe import RecipeIds
from featray.schema import SCAN_COLUMNS, DataFile


def find_earlier_scans(snapshot: Snapshot) -> pa.Array:
    """Return the ids of the scans whose rows featray 0.1.0 has written."""
    rows = snapshot.read_scans(("scan_id", "layers"))
    return rows["scan_id"].filter(pc.is_null(rows["layers"])).combine_chunks()


def carry_over_features(
    file: DataFile, rows: pa.Table, translation: Mapping[str, RecipeIds], earlier_scans: pa.Array
) -> pa.Table:
    """Return rows of `features` with the recipe of their layer; the same object if nothing changes.

    If featray 0.1.0 computes a failed scan again, it does not remove the cells that the present version has
    kept. So rows of these scans with other recipes than those of featray 0.1.0 are left out.

    Args:
        file: The file that holds the rows.
        rows: Its rows.
        translation: Recipe id of featray 0.1.0 → the ids that its layers have now.
        earlier_scans: Result of `find_earlier_scans`.
    """
    layer = str(file.partition_values["layer"])
    is_of_earlier_scan = pc.is_in(rows["scan_id"], earlier_scans)
    is_translated = pc.is_in(rows["recipe"], pa.array(translation, pa.string()))
    if not pc.any(pc.or_(is_of_earlier_scan, is_translated)).as_py():
        return rows
    valid = rows.filter(pc.or_(pc.invert(is_of_earlier_scan), is_translated))
    encoded = valid["recipe"].combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    ids = [translation[name].layers.get(layer, name) if name in translation else name for name in names]
    if ids == names and len(valid) == len(rows):
        return rows
    recipes = pa.array(ids, pa.string()).take(encoded.indices)
    return valid.set_column(valid.column_names.index("recipe"), "recipe", recipes)


def carry_over_scans(_: DataFile, rows: pa.Table, translation: Mapping[str, RecipeIds]) -> pa.Table:
    """Return rows of `scans` with their cells; the same object if no row is of featray 0.1.0."""
    complete = rows
    for name in ("layers", "failed_layers"):
        if name not in rows.column_names:
            complete = complete.append_column(name, pa.nulls(len(rows), SCAN_COLUMNS.field(name).type))
    if not pc.any(pc.is_null(complete["layers"])).as_py():
        return rows
    ledger = Ledger.from_rows(EncodedRows.encode(complete), translation)
    changed = {
        "recipe": ledger.table["recipe"],
        "layers": ledger.cells.decode(),
        "failed_layers": ledger.failed.decode(),
    }
    for name, column in changed.items():
        complete = complete.set_column(complete.column_names.index(name), name, column)
    return complete
