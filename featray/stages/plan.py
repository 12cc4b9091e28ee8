"""Plan: what is listed against what is stored, and so what is left to do. Changes nothing.

Works on whole columns, so that a million scans of which none is due cost seconds. A scan is of one state:

new         never taken up
changed     of other content than when it was taken up, or policy now takes (or leaves out) what it did not
stale       taken up under another recipe
failed      failed before, and neither content nor recipe differ since
removed     stored, but no longer listed
up_to_date  stored, or left out by rule, and neither differs; also what listing cannot look at just now
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.collection.listing import Listing
from featray.errors import Reason, UsageError
from featray.schema import Scan

log = logging.getLogger(__name__)

State = Literal["new", "changed", "stale", "failed", "removed", "up_to_date"]
STATES: tuple[State, ...] = ("new", "changed", "stale", "failed", "removed", "up_to_date")
PLANNING_COLUMNS = ("scan_id", "status", "reason", "content", "recipe", "stage", "run_id")
"""Columns of `scans` that planning reads; `stage` and `run_id` are only used in explanations."""

_PASSING = (Reason.STORAGE.value,)
"""Reasons that may be gone at the next try without the scan having changed."""
_NEW, _CHANGED, _STALE, _FAILED, _REMOVED, _UP_TO_DATE = range(len(STATES))
_SHOWN = 8
"""Digits of a fingerprint in a sentence."""
_BLOCK = 10_000

_Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """Every scan's state, and what this command takes up.

    Attributes:
        counts: Number of scans by state, in the order of `STATES`.
        todo: The scans to take up, by id.
        removed: Stored ids that are no longer listed, sorted.
        other_recipe: Number of ok scans whose stored features are of another recipe.
        refresh_todo: Number of scans that a refresh would take up.
        unreachable: Number of stored scans that listing could not look at; they are kept as they are.
    """

    counts: dict[str, int]
    todo: Sequence[Scan]
    removed: Sequence[str]
    other_recipe: int
    refresh_todo: int = 0
    unreachable: int = 0
    _reasons: _Reasons | None = field(default=None, repr=False, compare=False)

    def why(self, scan_id: str) -> str:
        """Return one sentence: the scan's state and what it follows from.

        Raises:
            UsageError: No scan of that id is listed or stored; names the nearest.
        """
        return self._told().why(scan_id)

    def explain(self) -> Iterator[dict[str, str]]:
        """Yield scan_id, state and why of every scan: those listed by id, then the removed."""
        return self._told().explain()

    def _told(self) -> _Reasons:
        assert self._reasons is not None, "only plans of make_plan can explain themselves"
        return self._reasons


def make_plan(
    listing: Listing,
    ledger: pa.Table,
    recipe: str,
    *,
    refresh: bool = False,
    retry: Collection[str] | None = None,
) -> Plan:
    """Return the plan for a listing.

    Args:
        listing: What there is.
        ledger: Columns scan_id, status, reason, content, recipe of `scans`; stage and run_id if wanted.
        recipe: Id of the recipe to be run.
        refresh: Whether changed and stale scans that are ok are taken up too; else an ok scan never is.
        retry: Reason codes of failed scans to try again though nothing about them changed; what may pass
            by itself (`storage`) always is.
    """
    stored = _Stored.of(listing, ledger)
    states = _states(stored, recipe)
    again = {*_PASSING, *(str(code) for code in retry or ())}
    due = _due(stored, states, refresh, again)
    removed = _removed(listing, stored)
    counts = np.bincount(states, minlength=len(STATES))
    counts[_REMOVED] = len(removed)
    counts[_UP_TO_DATE] += stored.unlisted - len(removed)
    kept = int(stored.unreachable.sum()) + stored.unlisted - len(removed)
    if kept:
        log.warning("%d stored scans cannot be looked at now (storage); what is stored of them is kept", kept)
    return Plan(
        counts=dict(zip(STATES, counts.tolist(), strict=True)),
        todo=listing.take(np.flatnonzero(due)),
        removed=removed,
        other_recipe=int(pc.sum(_other_recipe(ledger, recipe)).as_py() or 0),
        refresh_todo=int(np.count_nonzero(_due(stored, states, True, again))),
        unreachable=kept,
        _reasons=_Reasons(listing, stored, states, set(removed), recipe, refresh),
    )


@dataclass(frozen=True)
class _Stored:
    """The ledger beside the listing: arrays with one entry per listed scan.

    Attributes:
        table: The ledger.
        at: Row of each listed scan in the ledger; -1 for none.
        listed: The listing's columns.
        is_same: Whether the content is.
        is_unlisted: Of each row of the ledger, whether its scan is listed no more.
    """

    table: pa.Table
    at: NDArray[np.int64]
    listed: pa.Table
    is_same: _Flags
    is_unlisted: _Flags

    @classmethod
    def of(cls, listing: Listing, ledger: pa.Table) -> _Stored:
        ids = ledger["scan_id"].cast(pa.large_string()).combine_chunks()
        at = pc.index_in(listing.scan_ids, value_set=ids)
        content = ledger["content"].cast(pa.large_string()).take(at)
        is_same = pc.fill_null(pc.equal(listing.table["content"], content), False)
        rows = np.asarray(pc.fill_null(at, -1), np.int64)
        is_listed = _flags(pc.is_in(ids, value_set=listing.scan_ids))
        return cls(ledger, rows, listing.table, _flags(is_same), ~is_listed)

    @property
    def unlisted(self) -> int:
        """Number of stored scans that are listed no more."""
        return int(self.is_unlisted.sum())

    def has(self, column: str, *values: str) -> _Flags:
        """Return of each listed scan whether its row in the ledger has one of the values."""
        found = _flags(pc.is_in(self.table[column], value_set=pa.array(values, pa.string())))
        return np.append(found, False)[self.at]

    @functools.cached_property
    def unreachable(self) -> _Flags:
        """What listing could not look at, while the ledger has settled it: nobody knows that it changed."""
        unseen = _flags(pc.fill_null(pc.equal(self.listed["reason"], Reason.STORAGE.value), False))
        return unseen & self.has("status", "ok", "excluded")

    @functools.cached_property
    def turned(self) -> _Flags:
        """Scans that policy leaves out now and did not, or the other way round."""
        left_out, was_left_out = _flags(self.listed["excluded"]), self.has("status", "excluded")
        is_taken = _flags(pc.is_null(self.listed["reason"])) & _flags(self.listed["is_located"])
        return (left_out & ~was_left_out) | (is_taken & was_left_out)


def _states(stored: _Stored, recipe: str) -> NDArray[np.int64]:
    """Return the state of each listed scan, as a place in `STATES`; the first that holds counts."""
    left_out = stored.has("status", "excluded")  # by a rule on its header; no recipe changes that
    return np.select(
        [
            stored.at < 0,
            stored.unreachable,
            ~stored.is_same | stored.turned,
            left_out,
            ~stored.has("recipe", recipe),
            stored.has("status", "failed"),
        ],
        [_NEW, _UP_TO_DATE, _CHANGED, _UP_TO_DATE, _STALE, _FAILED],
        _UP_TO_DATE,
    )


def _due(stored: _Stored, states: NDArray[np.int64], refresh: bool, retry: set[str]) -> _Flags:
    may_be_replaced = refresh | ~stored.has("status", "ok")
    again = (states == _FAILED) & stored.has("reason", *sorted(retry))
    due: _Flags = (states == _NEW) | (np.isin(states, (_CHANGED, _STALE)) & may_be_replaced) | again
    return due


def _removed(listing: Listing, stored: _Stored) -> list[str]:
    """Return stored ids that are gone; not those inside a place that could not be looked into."""
    names: list[str] = sorted(stored.table["scan_id"].filter(pa.array(stored.is_unlisted)).to_pylist())
    unseen = pc.equal(listing.table["reason"], Reason.STORAGE.value)
    if not names or not pc.any(unseen).as_py():
        return names
    closed = set(listing.scan_ids.filter(unseen).to_pylist())
    # An archive stands for all that is in it, files that cannot be opened for the series of their folder.
    folders = {name.rpartition("/")[0] for name in closed} - {""}
    return [name for name in names if not _is_inside(name, closed, folders)]


def _is_inside(scan_id: str, closed: set[str], folders: set[str]) -> bool:
    parts = scan_id.partition("#")[0].split("/")
    above = {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return bool(above & closed) or "/".join(parts) in folders


def _other_recipe(ledger: pa.Table, recipe: str) -> pa.ChunkedArray:
    return pc.and_(pc.equal(ledger["status"], "ok"), pc.not_equal(ledger["recipe"], recipe))


def _flags(array: pa.ChunkedArray) -> _Flags:
    return np.asarray(array, bool)


@dataclass(frozen=True)
class _Reasons:
    """Puts into words what a plan found."""

    listing: Listing
    stored: _Stored
    states: NDArray[np.int64]
    removed: set[str]
    recipe: str
    refresh: bool

    def why(self, scan_id: str) -> str:
        place = pc.index(self.listing.scan_ids, pa.scalar(scan_id, pa.large_string())).as_py()
        if place >= 0:
            return str(next(self._block(place, place + 1))["why"])
        row = pc.index(self.stored.table["scan_id"], scan_id).as_py()
        if row >= 0:
            return self._of_unlisted(scan_id)["why"]
        raise UsageError(
            f"--why: no scan has the id {scan_id!r}, listed or stored; near it: "
            f"{', '.join(self.listing.find_similar_ids(scan_id))}"
        )

    def explain(self) -> Iterator[dict[str, str]]:
        for start in range(0, len(self.states), _BLOCK):
            yield from self._block(start, start + _BLOCK)
        gone = self.stored.table["scan_id"].filter(pa.array(self.stored.is_unlisted)).to_pylist()
        yield from map(self._of_unlisted, sorted(gone))

    def _block(self, start: int, stop: int) -> Iterator[dict[str, str]]:
        """Yield the explanations of some listed scans; the columns are only looked at in part."""
        at = self.stored.at[start:stop]
        rows = self.stored.table.take(pa.array(at, mask=at < 0)).to_pylist()
        listed = self.stored.listed.slice(start, stop - start).to_pylist()
        flags = self.stored.unreachable[start:stop], self.stored.turned[start:stop]
        for scan, row, state, unreachable, turned in zip(
            listed, rows, self.states[start:stop], *flags, strict=True
        ):
            name = STATES[state]
            why = _why_unreachable(row) if unreachable else _WORDS[name](self, scan, row, bool(turned))
            yield {"scan_id": scan["scan_id"], "state": name, "why": f"{name.replace('_', ' ')}: {why}"}

    def _of_unlisted(self, scan_id: str) -> dict[str, str]:
        state: State = "removed" if scan_id in self.removed else "up_to_date"
        why = "stored, but no longer listed; `refresh` drops it, `extract` keeps it"
        if state != "removed":
            why = "what holds it cannot be looked into now (storage); what is stored is kept"
        return {"scan_id": scan_id, "state": state, "why": f"{state.replace('_', ' ')}: {why}"}

    def _new(self, scan: dict[str, Any], row: dict[str, Any], turned: bool) -> str:
        return "listed, and never taken up"

    def _changed(self, scan: dict[str, Any], row: dict[str, Any], turned: bool) -> str:
        run = f"run {row['run_id']}" if row.get("run_id") else "a run"
        if turned and scan["excluded"]:
            fact = f"policy now leaves it out ({scan['reason']}), {run} did not"
        elif turned:
            fact = f"policy now takes it, {run} left it out ({row['reason']})"
        else:
            now, then = scan["content"][:_SHOWN], str(row["content"])[:_SHOWN]
            fact = f"content {now} was {then} when {run} took it up"
        return fact + self._only_refresh(row)

    def _stale(self, scan: dict[str, Any], row: dict[str, Any], turned: bool) -> str:
        run = f" by run {row['run_id']}" if row.get("run_id") else ""
        fact = f"taken up{run} under recipe {row['recipe']}, this config's is {self.recipe}"
        return fact + self._only_refresh(row)

    def _failed(self, scan: dict[str, Any], row: dict[str, Any], turned: bool) -> str:
        where = f"{row['reason']} at {row['stage']}" if row.get("stage") else str(row["reason"])
        if row["reason"] in _PASSING:
            return f"{where}; this may pass, so it is tried again"
        return f"{where}; unchanged, so only `refresh --retry-failed` tries it again"

    def _up_to_date(self, scan: dict[str, Any], row: dict[str, Any], turned: bool) -> str:
        if row["status"] == "excluded":
            return f"left out by rule ({row['reason']}), and unchanged"
        return "content and recipe are those of what is stored"

    def _only_refresh(self, row: dict[str, Any]) -> str:
        has_features = row["status"] == "ok" and not self.refresh
        return "; it has features, so only `refresh` takes it up again" if has_features else ""


_WORDS = {
    "new": _Reasons._new,
    "changed": _Reasons._changed,
    "stale": _Reasons._stale,
    "failed": _Reasons._failed,
    "up_to_date": _Reasons._up_to_date,
}


def _why_unreachable(row: dict[str, Any]) -> str:
    kept = "features are" if row["status"] == "ok" else "row is"
    return f"listing could not look at it now (storage); its stored {kept} kept"
