"""Compare the stored cells of each scan with the layers of the config.

Scans with equal cells are one kind. A million scans are of a few kinds, so each kind is compared once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.output.cells import CellMap
from featray.output.ledger import Ledger
from featray.recipe import RecipeIds

MISSING, STALE, FAILED, UP_TO_DATE = range(4)
"""States of one cell of a stored scan: it was never computed; it has another recipe; it was tried with this
recipe and failed; it is there."""

_Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class CellStates:
    """The states of all cells of the rows of a ledger.

    Attributes:
        layers: Layers of the config.
        kinds: int64 (rows,), kind of each row.
        states: int8 (kinds, layers), state of each cell.
        has_other_inputs: bool (kinds,), whether the rows were read or preprocessed with another recipe.
    """

    layers: tuple[str, ...]
    kinds: NDArray[np.int64]
    states: NDArray[np.int8]
    has_other_inputs: _Flags

    def has_any(self, state: int) -> _Flags:
        """Return for each row whether one of its cells has this state."""
        has: _Flags = (self.states == state).any(axis=1)
        return has[self.kinds]

    def list_due_layers(self) -> list[tuple[str, ...]]:
        """Return for each kind the layers that are computed if its scans are processed.

        Empty for kinds with other inputs: all cells of such a scan are replaced.
        """
        due = self.states != UP_TO_DATE
        names = [tuple(name for name, flag in zip(self.layers, row, strict=True) if flag) for row in due]
        return [() if other else layers for layers, other in zip(names, self.has_other_inputs, strict=True)]


def compare_cells(ledger: Ledger, recipes: RecipeIds) -> CellStates:
    """Return the states of all cells of a ledger."""
    has_same_inputs = pc.fill_null(pc.equal(ledger.table["recipe"], recipes.inputs), fill_value=False)
    has_other_inputs = ~np.asarray(has_same_inputs, bool)
    columns = (ledger.cells.codes, ledger.failed.codes, has_other_inputs)
    combined = np.stack([np.asarray(column, np.int64) for column in columns], axis=1)
    number = combined[:, 0] * (len(ledger.failed.maps) + 1) * 2 + combined[:, 1] * 2 + combined[:, 2]
    _, first, kinds = np.unique(number, return_index=True, return_inverse=True)
    stored, failed = [[cells or {} for cells in column.maps] for column in (ledger.cells, ledger.failed)]
    rows = [
        _compare_kind(stored[cells_code], failed[failed_code], recipes, has_other_inputs=bool(other))
        for cells_code, failed_code, other in combined[first].tolist()
    ]
    return CellStates(
        tuple(recipes.layers),
        kinds.astype(np.int64),
        np.array(rows, np.int8).reshape(len(rows), len(recipes.layers)),
        combined[first, 2].astype(bool),
    )


def _compare_kind(
    cells: CellMap, failed: CellMap, recipes: RecipeIds, *, has_other_inputs: bool
) -> list[int]:
    """Return the state of each cell of a kind of scan."""
    states = []
    for layer, recipe in recipes.layers.items():
        if has_other_inputs:
            states.append(STALE if cells else MISSING)
        elif layer in cells:
            states.append(UP_TO_DATE if cells[layer] == recipe else STALE)
        else:
            states.append(FAILED if failed.get(layer) == recipe else MISSING)
    return states
