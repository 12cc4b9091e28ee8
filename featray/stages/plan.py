"""Plan: compare the listed scans with the stored scans to find which scans must be processed. Writes nothing.

Works on whole columns, so that a plan for a million scans of which none is due takes seconds. Every scan has
one state:

new         has no row in the scans table
changed     has other content than its row, or the policy now excludes it and did not before, or vice versa
stale       has a row that was made with another recipe
failed      failed before; content and recipe are unchanged
removed     has a row, but is not listed any more
up_to_date  has a row with the same content and recipe, or is excluded and unchanged, or cannot be reached now
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
"""Columns of the scans table that planning reads; `stage` and `run_id` are only used in explanations."""

_TRANSIENT = (Reason.STORAGE.value,)
"""Reasons that may not occur again at the next attempt, although the scan is the same."""
_NEW, _CHANGED, _STALE, _FAILED, _REMOVED, _UP_TO_DATE = range(len(STATES))
_SHOWN_DIGITS = 8
"""Number of digits of a fingerprint in an explanation."""
_BLOCK = 10_000

_Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """The state of every scan, and the scans that this run processes.

    Attributes:
        counts: State → number of scans, in the order of `STATES`.
        todo: Scans that this run processes, sorted by id.
        removed: Ids of stored scans that are not listed any more, sorted.
        other_recipe: Number of ok scans with stored features of another recipe.
        refresh_todo: Number of scans that a refresh would process.
        unreachable: Number of stored scans that the listing could not reach. Their rows are kept.
    """

    counts: dict[str, int]
    todo: Sequence[Scan]
    removed: Sequence[str]
    other_recipe: int
    refresh_todo: int = 0
    unreachable: int = 0
    _explainer: _Explainer | None = field(default=None, repr=False, compare=False)

    def explain_scan(self, scan_id: str) -> str:
        """Return one sentence about a scan: its state and the facts that the state follows from.

        Raises:
            UsageError: No scan of this id is listed or stored; the message names similar ids.
        """
        return self._get_explainer().explain_scan(scan_id)

    def explain_all(self) -> Iterator[dict[str, str]]:
        """Yield scan_id, state and why of every scan: listed scans by id, then other stored scans by id."""
        return self._get_explainer().explain_all()

    def _get_explainer(self) -> _Explainer:
        assert self._explainer is not None, "only plans from make_plan can explain themselves"
        return self._explainer


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
        listing: The scans of the collection.
        ledger: Columns of the scans table: scan_id, status, reason, content, recipe, and for explanations
            also stage and run_id.
        recipe: Recipe id of this run.
        refresh: Whether changed and stale scans are processed again even if their stored status is ok.
        retry: Reason codes of failed scans to try again although they are unchanged. Scans that failed with
            `storage` are always tried again, because the store may answer now.
    """
    comparison = _compare(listing, ledger)
    states = _find_states(comparison, recipe)
    retried_reasons = {*_TRANSIENT, *(str(code) for code in retry or ())}
    due = _select_due(comparison, states, retried_reasons, refresh=refresh)
    refresh_due = _select_due(comparison, states, retried_reasons, refresh=True)
    removed = _find_removed(listing, comparison)
    counts = np.bincount(states, minlength=len(STATES))
    counts[_REMOVED] = len(removed)
    unlisted_but_kept = int(comparison.is_unlisted.sum()) - len(removed)
    counts[_UP_TO_DATE] += unlisted_but_kept
    unreachable = int(comparison.is_unreachable.sum()) + unlisted_but_kept
    if unreachable:
        log.warning(
            "%d stored scans cannot be reached now (storage); their rows and features are kept", unreachable
        )
    return Plan(
        counts=dict(zip(STATES, counts.tolist(), strict=True)),
        todo=listing.take(np.flatnonzero(due)),
        removed=removed,
        other_recipe=_count_other_recipe(ledger, recipe),
        refresh_todo=int(np.count_nonzero(refresh_due)),
        unreachable=unreachable,
        _explainer=_Explainer(listing, comparison, states, set(removed), recipe, refresh),
    )


@dataclass(frozen=True)
class _Comparison:
    """The listing next to the ledger. Arrays have one entry per listed scan unless stated otherwise.

    Attributes:
        ledger: Columns of the scans table, one row per stored scan.
        listed: The columns of the listing, one row per listed scan.
        ledger_rows: Row of each listed scan in the ledger; -1 if it has none.
        has_same_content: Whether the scan has the content that its row in the ledger records.
        is_unlisted: For each row of the ledger, whether its scan is not listed any more.
    """

    ledger: pa.Table
    listed: pa.Table
    ledger_rows: NDArray[np.int64]
    has_same_content: _Flags
    is_unlisted: _Flags

    def has_value(self, column: str, *values: str) -> _Flags:
        """Return whether the scan's row in the ledger has one of the values; false without a row."""
        flags = _to_flags(pc.is_in(self.ledger[column], value_set=pa.array(values, pa.string())))
        return np.append(flags, False)[self.ledger_rows]

    @functools.cached_property
    def is_unreachable(self) -> _Flags:
        """Whether the listing could not reach the scan and its row is ok or excluded."""
        failed_now = pc.fill_null(pc.equal(self.listed["reason"], Reason.STORAGE.value), fill_value=False)
        return _to_flags(failed_now) & self.has_value("status", "ok", "excluded")

    @functools.cached_property
    def policy_changed(self) -> _Flags:
        """Whether the policy excludes the scan now and did not before, or the other way round."""
        is_excluded, was_excluded = _to_flags(self.listed["excluded"]), self.has_value("status", "excluded")
        is_included = _to_flags(pc.is_null(self.listed["reason"])) & _to_flags(self.listed["has_files"])
        return (is_excluded & ~was_excluded) | (is_included & was_excluded)


def _compare(listing: Listing, ledger: pa.Table) -> _Comparison:
    ids = ledger["scan_id"].cast(pa.large_string()).combine_chunks()
    rows = pc.index_in(listing.scan_ids, value_set=ids)
    stored_content = ledger["content"].cast(pa.large_string()).take(rows)
    has_same_content = pc.fill_null(pc.equal(listing.table["content"], stored_content), fill_value=False)
    return _Comparison(
        ledger=ledger,
        listed=listing.table,
        ledger_rows=np.asarray(pc.fill_null(rows, -1), np.int64),
        has_same_content=_to_flags(has_same_content),
        is_unlisted=~_to_flags(pc.is_in(ids, value_set=listing.scan_ids)),
    )


def _find_states(comparison: _Comparison, recipe: str) -> NDArray[np.int64]:
    """Return the state of each listed scan as an index into `STATES`; the first true condition decides."""
    # A scan is excluded because of its headers, so another recipe does not make it stale.
    was_excluded = comparison.has_value("status", "excluded")
    return np.select(
        [
            comparison.ledger_rows < 0,
            comparison.is_unreachable,
            ~comparison.has_same_content | comparison.policy_changed,
            was_excluded,
            ~comparison.has_value("recipe", recipe),
            comparison.has_value("status", "failed"),
        ],
        [_NEW, _UP_TO_DATE, _CHANGED, _UP_TO_DATE, _STALE, _FAILED],
        _UP_TO_DATE,
    )


def _select_due(
    comparison: _Comparison, states: NDArray[np.int64], retried_reasons: set[str], *, refresh: bool
) -> _Flags:
    """Return for each listed scan whether `refresh`, or else `extract`, processes it."""
    may_be_replaced = refresh | ~comparison.has_value("status", "ok")
    is_retried = (states == _FAILED) & comparison.has_value("reason", *sorted(retried_reasons))
    due: _Flags = (states == _NEW) | (np.isin(states, (_CHANGED, _STALE)) & may_be_replaced) | is_retried
    return due


def _find_removed(listing: Listing, comparison: _Comparison) -> list[str]:
    """Return the ids of stored scans that are not listed any more, sorted.

    A scan in an archive or a folder that cannot be read now does not count as removed.
    """
    ids = comparison.ledger["scan_id"].filter(pa.array(comparison.is_unlisted))
    unlisted: list[str] = sorted(ids.to_pylist())
    is_unreadable = pc.equal(listing.table["reason"], Reason.STORAGE.value)
    if not unlisted or not pc.any(is_unreadable).as_py():
        return unlisted
    unreadable = set(listing.scan_ids.filter(is_unreadable).to_pylist())
    # An unreadable archive stands for all scans in it; an unreadable file for the DICOM series in its folder.
    folders = {scan_id.rpartition("/")[0] for scan_id in unreadable} - {""}
    return [scan_id for scan_id in unlisted if not _is_inside(scan_id, unreadable, folders)]


def _is_inside(scan_id: str, unreadable: set[str], folders: set[str]) -> bool:
    """Return whether a scan lies in an unreadable archive or folder, or is a series in one of the folders."""
    path = scan_id.partition("#")[0]
    parts = path.split("/")
    path_and_parents = {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return bool(path_and_parents & unreadable) or path in folders


def _count_other_recipe(ledger: pa.Table, recipe: str) -> int:
    has_other = pc.and_(pc.equal(ledger["status"], "ok"), pc.not_equal(ledger["recipe"], recipe))
    return int(pc.sum(has_other).as_py() or 0)


def _to_flags(array: pa.ChunkedArray) -> _Flags:
    return np.asarray(array, bool)


@dataclass(frozen=True)
class _Facts:
    """The facts about one listed scan that its state follows from.

    Attributes:
        state: The state of the scan.
        scan: Its row in the listing.
        row: Its row in the ledger; every value is None if it has none.
        is_unreachable: As in `_Comparison`.
        policy_changed: As in `_Comparison`.
    """

    state: State
    scan: dict[str, Any]
    row: dict[str, Any]
    is_unreachable: bool
    policy_changed: bool


@dataclass(frozen=True)
class _Explainer:
    """Explains in words why scans have their states."""

    listing: Listing
    comparison: _Comparison
    states: NDArray[np.int64]
    removed: set[str]
    recipe: str
    refresh: bool

    def explain_scan(self, scan_id: str) -> str:
        position = pc.index(self.listing.scan_ids, pa.scalar(scan_id, pa.large_string())).as_py()
        if position >= 0:
            return next(self._explain_block(position, position + 1))["why"]
        row = pc.index(self.comparison.ledger["scan_id"], scan_id).as_py()
        if row >= 0:
            return self._explain_unlisted(scan_id)["why"]
        similar_ids = ", ".join(self.listing.find_similar_ids(scan_id))
        raise UsageError(
            f"--why: no scan has the id {scan_id!r}, listed or stored; similar ids: {similar_ids}"
        )

    def explain_all(self) -> Iterator[dict[str, str]]:
        for start in range(0, len(self.states), _BLOCK):
            yield from self._explain_block(start, start + _BLOCK)
        unlisted = self.comparison.ledger["scan_id"].filter(pa.array(self.comparison.is_unlisted))
        yield from map(self._explain_unlisted, sorted(unlisted.to_pylist()))

    def _explain_block(self, start: int, stop: int) -> Iterator[dict[str, str]]:
        """Yield the explanations of the listed scans at the positions from `start` to before `stop`."""
        comparison = self.comparison
        rows = comparison.ledger_rows[start:stop]
        all_facts = map(
            _Facts,
            [STATES[state] for state in self.states[start:stop]],
            comparison.listed.slice(start, stop - start).to_pylist(),
            comparison.ledger.take(pa.array(rows, mask=rows < 0)).to_pylist(),
            comparison.is_unreachable[start:stop].tolist(),
            comparison.policy_changed[start:stop].tolist(),
        )
        for facts in all_facts:
            yield _make_explanation(facts.scan["scan_id"], facts.state, self._explain_state(facts))

    def _explain_unlisted(self, scan_id: str) -> dict[str, str]:
        if scan_id in self.removed:
            why = "stored, but no longer listed; `refresh` deletes it, `extract` keeps it"
            return _make_explanation(scan_id, "removed", why)
        why = "its folder or archive cannot be read now (storage), so what is stored of the scan is kept"
        return _make_explanation(scan_id, "up_to_date", why)

    def _explain_state(self, facts: _Facts) -> str:
        if facts.is_unreachable:
            return _explain_unreachable(facts.row)
        if facts.state == "new":
            return "listed, and not stored yet"
        if facts.state == "changed":
            return self._explain_changed(facts)
        if facts.state == "stale":
            return self._explain_stale(facts.row)
        if facts.state == "failed":
            return _explain_failed(facts.row)
        return _explain_up_to_date(facts.row)

    def _explain_changed(self, facts: _Facts) -> str:
        scan, row = facts.scan, facts.row
        run = f"run {row['run_id']}" if row.get("run_id") else "an earlier run"
        if facts.policy_changed and scan["excluded"]:
            change = f"the policy now excludes it ({scan['reason']}), {run} did not"
        elif facts.policy_changed:
            change = f"the policy now includes it, {run} excluded it ({row['reason']})"
        else:
            now, before = scan["content"][:_SHOWN_DIGITS], str(row["content"])[:_SHOWN_DIGITS]
            change = f"content is {now}, and was {before} when {run} processed it"
        return change + self._explain_kept_features(row)

    def _explain_stale(self, row: dict[str, Any]) -> str:
        run = f" by run {row['run_id']}" if row.get("run_id") else ""
        change = f"processed{run} with recipe {row['recipe']}, and this config's recipe is {self.recipe}"
        return change + self._explain_kept_features(row)

    def _explain_kept_features(self, row: dict[str, Any]) -> str:
        is_kept = row["status"] == "ok" and not self.refresh
        return "; it has features, so only `refresh` processes it again" if is_kept else ""


def _make_explanation(scan_id: str, state: State, why: str) -> dict[str, str]:
    return {"scan_id": scan_id, "state": state, "why": f"{state.replace('_', ' ')}: {why}"}


def _explain_unreachable(row: dict[str, Any]) -> str:
    kept = "features are" if row["status"] == "ok" else "row is"
    return f"the listing could not reach it now (storage); its stored {kept} kept"


def _explain_failed(row: dict[str, Any]) -> str:
    failure = f"{row['reason']} at {row['stage']}" if row.get("stage") else str(row["reason"])
    if row["reason"] in _TRANSIENT:
        return f"{failure}; the cause may be gone, so it is tried again"
    return f"{failure}; unchanged, so only `refresh --retry-failed` tries it again"


def _explain_up_to_date(row: dict[str, Any]) -> str:
    if row["status"] == "excluded":
        return f"excluded by a rule ({row['reason']}), and unchanged"
    return "content and recipe are the same as those stored"
