"""Plan: what is listed against what is stored, and so what is left to do. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from featray.errors import Reason
from featray.schema import Scan

State = Literal["new", "changed", "stale", "failed", "removed", "up_to_date"]
STATES: tuple[State, ...] = ("new", "changed", "stale", "failed", "removed", "up_to_date")

_PASSING = (Reason.STORAGE,)
"""Reasons that may be gone at the next try without the scan having changed."""


@dataclass(frozen=True)
class Plan:
    """Every scan's state, and the scans that `extract` would take up.

    Attributes:
        states: scan_id → state. `stale` means stored under another recipe.
        todo: Scans that have no features yet and may get some.
        other_recipe: Scans whose stored features are of another recipe.
    """

    states: Mapping[str, State]
    todo: tuple[Scan, ...]
    other_recipe: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of scans by state, in a fixed order."""
        found = Counter(self.states.values())
        return {state: found[state] for state in STATES}


def make_plan(scans: Sequence[Scan], ledger: pa.Table, recipe: str) -> Plan:
    """Return the plan for listed scans.

    Args:
        scans: The listing.
        ledger: Columns scan_id, status, reason, content, recipe of `scans`.
        recipe: Id of the recipe to be run.
    """
    stored = {row["scan_id"]: row for row in ledger.to_pylist()}
    states = {scan.scan_id: _state(scan, stored.get(scan.scan_id), recipe) for scan in scans}
    states |= dict.fromkeys((name for name in stored if name not in states), "removed")
    kept = [name for name, row in stored.items() if row["status"] == "ok"]
    todo = tuple(scan for scan in scans if _is_due(scan, states[scan.scan_id], stored.get(scan.scan_id)))
    other = tuple(name for name in kept if stored[name]["recipe"] != recipe)
    return Plan(states, todo, other)


def _state(scan: Scan, row: Mapping[str, str] | None, recipe: str) -> State:
    if row is None:
        return "new"
    if row["content"] != scan.content:
        return "changed"
    if row["status"] == "excluded":
        return "up_to_date"  # left out by a rule on its header; no recipe changes that
    if row["recipe"] != recipe:
        return "stale"
    return "failed" if row["status"] == "failed" else "up_to_date"


def _is_due(scan: Scan, state: State, row: Mapping[str, str] | None) -> bool:
    if row is None:
        return True
    if row["status"] == "ok":
        return False
    return state in ("changed", "stale") or (state == "failed" and row["reason"] in _PASSING)
