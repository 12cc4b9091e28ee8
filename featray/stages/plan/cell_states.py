"""Compare the stored cells of each scan with the layers of the config.

Scans with equal cells are one kind. A million scans are of a few kinds, so each kind is compared once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.errors import Reason
from featray.output.cells import CellMap
from featray.output.ledger import Ledger
from featray.recipe import RecipeIds

MISSING, STALE, FAILED, UP_TO_DATE = range(4)
"""States of one cell of a stored scan: it was never computed, or only tried together with layers that the
config does not name; it has another recipe; it was tried with this recipe and failed, or the scan has failed
before it came to any model; it is there."""
_BEFORE_MODEL = ("list", "read", "preprocess")
"""Stages in which a scan fails in the same way for every layer and every model."""

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
    columns = (ledger.cells.codes, ledger.failed.codes, has_other_inputs, _find_undecodable(ledger))
    combined = np.stack([np.asarray(column, np.int64) for column in columns], axis=1)
    sizes = (len(ledger.cells.maps) + 1, len(ledger.failed.maps) + 1, 2, 2)
    number = np.ravel_multi_index(tuple(combined.T), sizes)
    _, first, kinds = np.unique(number, return_index=True, return_inverse=True)
    stored, failed = [[cells or {} for cells in column.maps] for column in (ledger.cells, ledger.failed)]
    rows = [
        _compare_kind(
            stored[cells_code],
            failed[failed_code],
            recipes,
            has_other_inputs=bool(other),
            is_undecodable=bool(undecodable),
        )
        for cells_code, failed_code, other, undecodable in combined[first].tolist()
    ]
    return CellStates(
        tuple(recipes.layers),
        kinds.astype(np.int64),
        np.array(rows, np.int8).reshape(len(rows), len(recipes.layers)),
        combined[first, 2].astype(bool),
    )


def _find_undecodable(ledger: Ledger) -> _Flags:
    """Return for each row whether the scan failed before it came to any model.

    A worker that crashes may have run the model.
    """
    table = ledger.table
    is_before = pc.is_in(table["stage"], value_set=pa.array(_BEFORE_MODEL))
    has_crashed = pc.fill_null(pc.equal(table["reason"], Reason.WORKER_CRASH.value), fill_value=False)
    is_failed = pc.fill_null(pc.equal(table["status"], "failed"), fill_value=False)
    return np.asarray(pc.and_(is_failed, pc.and_not(is_before, has_crashed)), bool)


def _compare_kind(
    cells: CellMap, failed: CellMap, recipes: RecipeIds, *, has_other_inputs: bool, is_undecodable: bool
) -> list[int]:
    """Return the state of each cell of a kind of scan."""
    is_undecodable = is_undecodable and not cells  # a scan with cells has been decoded before
    if any(recipes.layers.get(layer) != recipe for layer, recipe in failed.items()):
        failed = {}  # a layer that the config does not name may have been the one that failed
    states = []
    for layer, recipe in recipes.layers.items():
        if has_other_inputs:
            states.append(STALE if cells else MISSING)
        elif layer in cells:
            states.append(UP_TO_DATE if cells[layer] == recipe else STALE)
        else:
            is_failed = is_undecodable or failed.get(layer) == recipe
            states.append(FAILED if is_failed else MISSING)
    return states
