"""Find layers whose name alone has changed: stored cells and layers of the config in, a map of names out."""

from __future__ import annotations

from collections.abc import Mapping

from featray.output.cells import CellColumn, CellMap


def find_renames(stored: CellColumn, layers: CellMap) -> dict[str, str]:
    """Return old name → new name of each layer that the config has under another name.

    A stored layer gets another name if some of its cells have the recipe of a layer of the config, if it is
    not itself a layer of the config with this recipe, and if no other stored layer keeps the new name.

    Args:
        stored: Cells of all rows of the scans table.
        layers: Layer of the config → its recipe id.
    """
    recipes = stored.count_recipes()
    free = [name for name in recipes if layers.get(name) not in recipes[name]]
    renames: dict[str, str] = {}
    for name, recipe in layers.items():
        if recipe in recipes.get(name, {}):
            continue
        old = next((old for old in free if recipe in recipes[old] and old not in renames), None)
        if old is not None:
            renames[old] = name
    return _drop_conflicts(renames, recipes)


def _drop_conflicts(renames: dict[str, str], recipes: Mapping[str, object]) -> dict[str, str]:
    """Return the renames whose new name no stored layer keeps."""
    while conflicts := [old for old, new in renames.items() if new in recipes and new not in renames]:
        renames = {old: new for old, new in renames.items() if old not in conflicts}
    return renames


def rename_cells(cells: CellColumn, names: Mapping[str, str]) -> CellColumn:
    """Return the column with renamed layers."""
    if not names:
        return cells
    return cells.map(lambda cell_map: {names.get(key, key): value for key, value in (cell_map or {}).items()})
