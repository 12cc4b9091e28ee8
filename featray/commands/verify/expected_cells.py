"""The cells that `features` must hold: the scans table in, the recipe of each scan in each layer out.

A million scans have only a few different maps of layers. So each scan has the code of its map, and the
recipes of one layer are looked up when the layer is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.commands.verify.findings import Fault, FindingKind
from featray.commands.verify.read_scans import ScansTable, find_codes
from featray.commands.verify.run_files import RecipeFacts
from featray.output.cells import CellMap

NO_CELL = -1
"""Code of the recipe of a cell that `features` must not hold."""


@dataclass(frozen=True)
class ExpectedCells:
    """The cells that `features` must hold.

    Attributes:
        scans: All scans.
        codes: int32 (scans,), position of the map of each scan in `maps`.
        maps: Layer → recipe id.
        is_assumed: bool (maps,), whether no run recorded the layers, so that a map names each layer that has
            files. This is so for some rows of featray 0.1.0.
        has_fixed_size: bool (scans,), whether the inputs of all scans with the recipe have the same size, so
            that all features of a layer have one shape.
    """

    scans: ScansTable
    codes: NDArray[np.int32]
    maps: Sequence[CellMap]
    is_assumed: NDArray[np.bool_]
    has_fixed_size: NDArray[np.bool_]

    @cached_property
    def layers(self) -> set[str]:
        """Names of the layers that a scan must have."""
        return {layer for cells in self.maps for layer in cells}

    @cached_property
    def recipe_ids(self) -> list[str]:
        """Recipe ids of all cells; a code of a recipe is a position in this list."""
        return sorted({recipe for cells in self.maps for recipe in cells.values()})

    def find_recipe_codes(self, recipe_ids: pa.Array) -> NDArray[np.int32]:
        """Return the code of each recipe id; -1 for a recipe that no cell must have."""
        return find_codes(recipe_ids, self.recipe_ids)

    def get_recipe_codes(self, layer: str) -> NDArray[np.int32]:
        """Return int32 (scans,), code of the recipe of each scan in a layer; NO_CELL without a cell."""
        code_of = {recipe: code for code, recipe in enumerate(self.recipe_ids)}
        by_map = [code_of[cells[layer]] if layer in cells else NO_CELL for cells in self.maps]
        return np.array([*by_map, NO_CELL], np.int32)[self.codes]


def make_expected_cells(
    scans: ScansTable, facts: Mapping[int, RecipeFacts], stored_layers: Collection[str]
) -> tuple[ExpectedCells, list[Fault]]:
    """Return the cells that `features` must hold, and the faults of rows that do not list their layers.

    A row of featray 0.1.0 lists no layers. All its layers have the recipe of the row.

    Args:
        scans: All scans.
        facts: Facts about each recipe, by its code in `ScansTable.recipe`.
        stored_layers: Layers that have files.
    """
    maps, recipe = scans.cells.maps, scans.recipe
    has_no_map = scans.has_no_map
    is_wrong = has_no_map & np.isin(recipe.codes, _find_recipes_by_layer(scans, facts))
    earlier_layers = [facts[code].layers or frozenset(stored_layers) for code in range(len(recipe.values))]
    earlier_maps = [
        dict.fromkeys(names, id_) for names, id_ in zip(earlier_layers, recipe.values, strict=True)
    ]
    is_earlier = has_no_map & ~is_wrong & scans.is_ok
    cells = ExpectedCells(
        scans=scans,
        codes=np.where(is_earlier, len(maps) + recipe.codes, scans.cells.codes).astype(np.int32),
        maps=[*({layer: id_ or "" for layer, id_ in (cells or {}).items()} for cells in maps), *earlier_maps],
        is_assumed=np.array([*(False for _ in maps), *(not facts[code].layers for code in facts)], bool),
        has_fixed_size=np.array([fact.is_fixed_size for fact in facts.values()], bool)[recipe.codes],
    )
    if not is_wrong.any():
        return cells, []
    ids = scans.get_ids(np.flatnonzero(is_wrong))
    return cells, [Fault(FindingKind.NULL_VALUE, ids, f"{ids[0].as_py()}: column layers")]


def _find_recipes_by_layer(scans: ScansTable, facts: Mapping[int, RecipeFacts]) -> list[int]:
    """Return the codes of recipes whose rows must list their layers.

    featray 0.1.0 made recipe ids in another way, and the present version changes all its rows in one commit.
    So the rows must list their layers if another row of the same recipe does, or if the run with the recipe
    gave each layer a recipe of its own.
    """
    in_rows = set(np.unique(scans.recipe.codes[~scans.has_no_map]).tolist())
    return [
        code
        for code, fact in facts.items()
        if fact.has_layer_recipes or (code in in_rows and not fact.layers)
    ]
