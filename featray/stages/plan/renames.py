"""Find layers that only have another name: stored cells and layers of the config in, a map of names out."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from featray.output.cells import CellColumn, CellMap


def find_renames(stored: CellColumn, layers: CellMap) -> dict[str, str]:
    """Return old name → new name of each layer that the config has under another name.

    A stored layer gets another name if most of its cells have the recipe of a layer of the config, if the
    config does not give this recipe to its present name, and if no other stored layer keeps the new name.
    Cells of other recipes, which a killed refresh leaves, are renamed with it.

    Args:
        stored: Cells of all rows of the scans table.
        layers: Layer of the config → its recipe id.
    """
    recipes = {
        name: max(counts, key=lambda recipe: (counts[recipe], recipe == layers.get(name), recipe))
        for name, counts in stored.count_recipes().items()
    }
    free = [name for name, recipe in recipes.items() if layers.get(name) != recipe]
    renames: dict[str, str] = {}
    for name, recipe in layers.items():
        if recipes.get(name) == recipe:
            continue
        old = next((old for old in free if recipes[old] == recipe and old not in renames), None)
        if old is not None:
            renames[old] = name
    return _drop_conflicts(renames, recipes)


def _drop_conflicts(renames: dict[str, str], stored: Collection[str]) -> dict[str, str]:
    """Return the renames whose new name no stored layer keeps."""
    while conflicts := [old for old, new in renames.items() if new in stored and new not in renames]:
        renames = {old: new for old, new in renames.items() if old not in conflicts}
    return renames


def rename_cells(cells: CellColumn, names: Mapping[str, str]) -> CellColumn:
    """Return the column with renamed layers."""
    if not names:
        return cells
    return cells.map(lambda cell_map: {names.get(key, key): value for key, value in (cell_map or {}).items()})
