"""Compare the listed scans with the ledger, and select the scans and layers that a run computes.

Works on whole columns, so that a plan for a million scans of which none is due takes seconds. Every scan has
one state:

new         has no row in the scans table
changed     has other content than its row, or the policy now excludes it and did not before, or vice versa
stale       has cells that were made with another recipe, or failed with another recipe or with other layers
failed      failed before; content and recipe are unchanged, or it failed before it came to any model
incomplete  has a row with the same content, and lacks layers of the config
removed     has a row, but is not listed any more
up_to_date  has all cells of the config, or is excluded and unchanged, or cannot be reached now

A scan that failed when a layer was added keeps its other cells. If the config no longer names that layer, the
scan is up to date, and the run only has to clear its failure.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.collection.listing import Listing
from featray.errors import Reason
from featray.hardware import return_free_memory
from featray.output.ledger import Ledger
from featray.recipe import RecipeIds
from featray.schema import Scan
from featray.stages.plan.cell_states import FAILED, MISSING, STALE, CellStates, compare_cells
from featray.stages.plan.comparison import Comparison, compare, find_removed
from featray.stages.plan.explain import Explainer
from featray.stages.plan.layer_work import LayerWork, count_layer_work, describe_work
from featray.stages.plan.renames import find_renames, rename_cells

log = logging.getLogger(__name__)

State = Literal["new", "changed", "stale", "failed", "incomplete", "removed", "up_to_date"]
STATES: tuple[State, ...] = ("new", "changed", "stale", "failed", "incomplete", "removed", "up_to_date")

_TRANSIENT = (Reason.STORAGE.value,)
"""Reasons that may not occur again at the next attempt, although the scan is the same."""
_NEW, _CHANGED, _STALE, _FAILED, _INCOMPLETE, _REMOVED, _UP_TO_DATE = range(len(STATES))

_Flags = NDArray[np.bool_]
_Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The state of every scan, and the work of this run.

    Attributes:
        counts: State → number of scans, in the order of `STATES`.
        todo: Scans that this run processes with their due layers; scans with the same due layers follow each
            other, sorted by id.
        removed: Ids of stored scans that are not listed any more, sorted.
        cleared_failures: Ids of failed scans that have all cells of the config, sorted. The run sets their
            status to ok without reading them.
        other_recipe: Number of stored scans with cells of another recipe.
        refresh_todo: Number of scans that a refresh would process.
        unreachable: Number of stored scans that the listing could not reach. Their rows are kept.
        layers: Layer of the config → the states of its cells, sorted by name.
        other_layers: Stored layer that the config does not name → number of scans that have it.
        lost_layers: The same layers → number of scans whose cell a refresh removes, because their content
            has changed.
        incompatible_layers: The same layers → number of scans whose cell a refresh would remove, because it
            replaces the scans, which were read or preprocessed in another way.
        renames: Stored layer → its name in the config, for layers that only have another name.
        earlier_recipes: Recipe id of rows of featray 0.1.0 → the ids that their layers have now.
        can_keep_both: Whether the cells of another recipe differ only in the model, so that an output can
            hold both under different names.
    """

    counts: dict[str, int]
    todo: Sequence[Scan]
    removed: Sequence[str]
    other_recipe: int
    cleared_failures: Sequence[str] = ()
    refresh_todo: int = 0
    unreachable: int = 0
    layers: Mapping[str, LayerWork] = field(default_factory=dict)
    other_layers: Mapping[str, int] = field(default_factory=dict)
    lost_layers: Mapping[str, int] = field(default_factory=dict)
    incompatible_layers: Mapping[str, int] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    earlier_recipes: Mapping[str, RecipeIds] = field(default_factory=dict)
    can_keep_both: bool = True
    _explainer: Explainer | None = field(default=None, repr=False, compare=False)

    @property
    def has_table_changes(self) -> bool:
        """Whether a run changes stored rows before it processes scans."""
        return bool(self.earlier_recipes or self.renames or self.cleared_failures)

    def describe_work(self) -> str:
        """Return one sentence about the work to do and the up-to-date layers; empty without work."""
        return describe_work(self.counts["new"], self.counts["changed"], self.layers)

    def count_cells(self) -> dict[str, int]:
        """Return state → number of cells of listed scans: scans x layers of the config."""
        work = self.layers.values()
        return {
            "new": self.counts["new"] * len(work),
            "changed": self.counts["changed"] * len(work),
            "missing": sum(layer.missing for layer in work),
            "stale": sum(layer.stale for layer in work),
            "failed": sum(layer.failed for layer in work),
            "up_to_date": sum(layer.up_to_date for layer in work),
        }

    def explain_scan(self, scan_id: str) -> str:
        """Return one sentence about a scan: its state and the facts that the state follows from.

        Raises:
            UsageError: No scan of this id is listed or stored; the message names similar ids.
        """
        return self._get_explainer().explain_scan(scan_id)

    def explain_all(self) -> Iterator[dict[str, str]]:
        """Yield scan_id, state and why of every scan: listed scans by id, then other stored scans by id."""
        return self._get_explainer().explain_all()

    def _get_explainer(self) -> Explainer:
        assert self._explainer is not None, "only plans from make_plan can explain themselves"
        return self._explainer


def make_plan(
    listing: Listing,
    ledger: Ledger,
    recipes: RecipeIds,
    *,
    refresh: bool = False,
    retry: Collection[str] | None = None,
) -> Plan:
    """Return the plan for a listing.

    Args:
        listing: The scans of the collection.
        ledger: The rows of the scans table.
        recipes: Recipe ids of this run.
        refresh: Whether changed scans and stale cells are computed again even if the stored status is ok.
        retry: Reason codes of failed scans to try again although they are unchanged. Scans that failed with
            `storage` are always tried again, because the store may answer now.
    """
    renames = find_renames(ledger.cells, recipes.layers)
    ledger = _rename_layers(ledger, renames)
    comparison, cells = compare(listing, ledger), compare_cells(ledger, recipes)
    return_free_memory()  # of the comparison
    states = _find_states(comparison, cells)
    retried_reasons = {*_TRANSIENT, *(str(code) for code in retry or ())}
    due = _select_due(comparison, cells, states, retried_reasons, refresh=refresh)
    refresh_due = _select_due(comparison, cells, states, retried_reasons, refresh=True)
    removed = find_removed(listing, comparison)
    counts = np.bincount(states, minlength=len(STATES))
    counts[_REMOVED] = len(removed)
    unlisted_but_kept = int(comparison.is_unlisted.sum()) - len(removed)
    counts[_UP_TO_DATE] += unlisted_but_kept
    stored_layers = ledger.cells.count_recipes()
    is_incompatible = refresh_due & (states == _STALE)
    is_incompatible &= comparison.of_rows(cells.has_other_inputs[cells.kinds])
    return Plan(
        counts=dict(zip(STATES, counts.tolist(), strict=True)),
        todo=_list_due_scans(listing, comparison, cells, states, due),
        removed=removed,
        cleared_failures=_find_cleared_failures(listing, comparison, states),
        other_recipe=int(np.count_nonzero(cells.has_any(STALE))),
        refresh_todo=int(np.count_nonzero(refresh_due)),
        unreachable=_count_unreachable(comparison, unlisted_but_kept),
        layers=_count_layer_work(comparison, cells, states, stored_layers),
        other_layers=_leave_out_config(stored_layers, recipes),
        lost_layers=_count_lost_layers(comparison, ledger, refresh_due & (states == _CHANGED), recipes),
        incompatible_layers=_count_lost_layers(comparison, ledger, is_incompatible, recipes),
        renames=renames,
        earlier_recipes=ledger.earlier_recipes,
        can_keep_both=not bool(((cells.states == STALE).any(axis=1) & cells.has_other_inputs).any()),
        _explainer=Explainer(
            listing=listing,
            comparison=comparison,
            cells=cells,
            states=[STATES[state] for state in states.tolist()],
            removed=set(removed),
            inputs_recipe=recipes.inputs,
            refresh=refresh,
        ),
    )


def _rename_layers(ledger: Ledger, renames: Mapping[str, str]) -> Ledger:
    """Return the ledger with other names of layers."""
    cells, failed = (rename_cells(column, renames) for column in (ledger.cells, ledger.failed))
    return replace(ledger, cells=cells, failed=failed)


def _count_unreachable(comparison: Comparison, unlisted_but_kept: int) -> int:
    """Return the number of stored scans that the listing could not reach, and warn of them."""
    count = int(comparison.is_unreachable.sum()) + unlisted_but_kept
    if count:
        log.warning(
            "%d stored scans cannot be reached now (storage); their rows and features are kept", count
        )
    return count


def _count_lost_layers(
    comparison: Comparison, ledger: Ledger, is_replaced: _Flags, recipes: RecipeIds
) -> dict[str, int]:
    """Return the layers that some listed scans lose if they are replaced, with their number of scans."""
    stored = ledger.cells.take(comparison.ledger_rows[is_replaced])
    return _leave_out_config(stored.count_recipes(), recipes)


def _leave_out_config(stored: Mapping[str, Mapping[str, int]], recipes: RecipeIds) -> dict[str, int]:
    """Return the layers that the config does not name, with their number of scans."""
    counts = {name: sum(by_recipe.values()) for name, by_recipe in stored.items()}
    return {name: count for name, count in counts.items() if count and name not in recipes.layers}


def _find_states(comparison: Comparison, cells: CellStates) -> _Numbers:
    """Return the state of each listed scan as an index into `STATES`; the first true condition decides."""
    # A scan is excluded because of its headers, so another recipe does not make it stale.
    was_excluded = comparison.has_value("status", "excluded")
    has_missing = comparison.of_rows(cells.has_any(MISSING))
    return np.select(
        [
            comparison.ledger_rows < 0,
            comparison.is_unreachable,
            ~comparison.has_same_content | comparison.policy_changed,
            was_excluded,
            comparison.of_rows(cells.has_any(STALE)),
            comparison.of_rows(cells.has_any(FAILED)),
            has_missing & comparison.has_value("status", "failed"),
            has_missing,
        ],
        [_NEW, _UP_TO_DATE, _CHANGED, _UP_TO_DATE, _STALE, _FAILED, _STALE, _INCOMPLETE],
        _UP_TO_DATE,
    )


def _select_due(
    comparison: Comparison,
    cells: CellStates,
    states: _Numbers,
    retried_reasons: set[str],
    *,
    refresh: bool,
) -> _Flags:
    """Return for each listed scan whether `refresh`, or else `extract`, processes it."""
    # Only `refresh` replaces features that are there.
    loses_features = np.where(
        states == _CHANGED, comparison.has_features, comparison.of_rows(cells.has_any(STALE))
    )
    has_new_layers = comparison.of_rows(cells.has_any(MISSING))
    is_retried = comparison.has_value("reason", *sorted(retried_reasons)) | has_new_layers
    due: _Flags = (
        np.isin(states, (_NEW, _INCOMPLETE))
        | (np.isin(states, (_CHANGED, _STALE)) & (refresh | ~loses_features))
        | ((states == _FAILED) & is_retried)
    )
    return due


def _find_cleared_failures(listing: Listing, comparison: Comparison, states: _Numbers) -> list[str]:
    """Return the ids of failed scans that are up to date; the layer that failed is not in the config."""
    is_cleared = (states == _UP_TO_DATE) & ~comparison.is_unreachable
    is_cleared &= comparison.has_value("status", "failed")
    ids: list[str] = listing.scan_ids.filter(pa.array(is_cleared)).to_pylist()
    return ids


def _list_due_scans(
    listing: Listing, comparison: Comparison, cells: CellStates, states: _Numbers, due: _Flags
) -> Sequence[Scan]:
    """Return the due scans with their due layers."""
    number_of: dict[tuple[str, ...], int] = {(): 0}
    codes_of_kinds = [number_of.setdefault(names, len(number_of)) for names in cells.list_due_layers()]
    layers = list(number_of)
    codes_of_rows = np.array(codes_of_kinds, np.int64)[cells.kinds]
    is_replaced = np.isin(states, (_NEW, _CHANGED))
    codes = np.where(is_replaced, 0, comparison.of_rows(codes_of_rows))
    positions = np.flatnonzero(due)
    order = np.argsort(codes[positions], kind="stable")
    due_layers = [layers[code] for code in codes[positions[order]].tolist()]
    return listing.take(positions[order], due_layers if any(due_layers) else None)


def _count_layer_work(
    comparison: Comparison,
    cells: CellStates,
    states: _Numbers,
    stored_layers: Mapping[str, Mapping[str, int]],
) -> dict[str, LayerWork]:
    """Return the states of the cells of each layer, over the listed scans that can be reached."""
    is_compared = (comparison.ledger_rows >= 0) & ~comparison.is_unreachable & (states != _CHANGED)
    is_compared &= ~comparison.has_value("status", "excluded")
    kinds = comparison.of_rows(cells.kinds)[is_compared]
    return count_layer_work(cells, np.bincount(kinds, minlength=len(cells.states)), set(stored_layers))
