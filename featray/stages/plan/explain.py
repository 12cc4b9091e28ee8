"""Explain a plan: the state of a scan in, the facts that it follows from in words out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featray.collection.listing import Listing
from featray.errors import Reason, UsageError
from featray.stages.plan.cell_states import FAILED, MISSING, STALE, CellStates
from featray.stages.plan.comparison import Comparison

_SHOWN_DIGITS = 8
"""Number of digits of a fingerprint in an explanation."""
_BLOCK = 10_000
_MAX_LAYERS_SHOWN = 5


@dataclass(frozen=True)
class _Facts:
    """The facts about one listed scan that its state follows from.

    Attributes:
        state: The state of the scan.
        scan: Its row in the listing.
        row: Its row in the ledger; every value is None if it has none.
        kind: Its kind in `CellStates`; meaningless without a row.
        has_features: As in `Comparison`; so are the following.
        is_unreachable: Whether the listing could not reach the scan.
        policy_changed: Whether the policy decides otherwise about the scan than before.
    """

    state: str
    scan: dict[str, Any]
    row: dict[str, Any]
    kind: int
    has_features: bool
    is_unreachable: bool
    policy_changed: bool


@dataclass(frozen=True)
class Explainer:
    """Explains in words why scans have their states.

    Attributes:
        listing: The scans of the collection.
        comparison: The listing next to the ledger.
        cells: States of the cells of the ledger.
        states: State of each listed scan.
        removed: Ids of stored scans that are not listed any more.
        inputs_recipe: Recipe id of reading and preprocessing of this run.
        refresh: Whether the plan is that of a refresh.
    """

    listing: Listing
    comparison: Comparison
    cells: CellStates
    states: Sequence[str]
    removed: set[str]
    inputs_recipe: str
    refresh: bool

    def explain_scan(self, scan_id: str) -> str:
        """Return one sentence about a listed or stored scan; raises as `Plan.explain_scan`."""
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
        """Yield scan_id, state and why of every scan, as `Plan.explain_all`."""
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
            self.states[start:stop],
            comparison.listed.slice(start, stop - start).to_pylist(),
            comparison.ledger.take(pa.array(rows, mask=rows < 0)).to_pylist(),
            comparison.of_rows(self.cells.kinds)[start:stop].tolist(),
            comparison.has_features[start:stop].tolist(),
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
            kept = "features are" if facts.has_features else "row is"
            return f"the listing could not reach it now (storage); its stored {kept} kept"
        if facts.state == "new":
            return "listed, and not stored yet"
        if facts.state == "changed":
            return self._explain_changed(facts)
        if facts.state == "stale":
            return self._explain_stale(facts)
        if facts.state == "failed":
            return self._explain_failed(facts)
        if facts.state == "incomplete":
            return f"content is unchanged; it lacks {_name_layers(self._list_layers(facts, MISSING))}"
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
        return change + self._explain_kept_features(facts)

    def _explain_stale(self, facts: _Facts) -> str:
        row = facts.row
        run = f" by run {row['run_id']}" if row.get("run_id") else ""
        stale = self._list_layers(facts, STALE)
        if row["recipe"] != self.inputs_recipe:
            change = (
                f"read and preprocessed{run} with recipe {row['recipe']}, and this config's recipe is "
                f"{self.inputs_recipe}"
            )
        elif stale:
            change = f"processed{run} with another recipe of {_name_layers(stale)} than this config's"
        else:
            missing = _name_layers(self._list_layers(facts, MISSING))
            attempt = f"that run tried other layers, or another recipe of {missing}"
            return f"failed{run} ({row['reason']}); tried again, because {attempt}"
        return change + self._explain_kept_features(facts)

    def _explain_failed(self, facts: _Facts) -> str:
        row, failed = facts.row, self._list_layers(facts, FAILED)
        missing = self._list_layers(facts, MISSING)
        failure = f"{row['reason']} at {row['stage']}" if row.get("stage") else str(row["reason"])
        if facts.has_features:
            failure += f", for {_name_layers(failed)}"
        if row["reason"] == Reason.STORAGE.value:
            return f"{failure}; the cause may be gone, so it is tried again"
        if missing:
            return f"{failure}; tried again, because no run has tried {_name_layers(missing)}"
        return f"{failure}; unchanged, so only `refresh --retry-failed` tries it again"

    def _list_layers(self, facts: _Facts, state: int) -> list[str]:
        """Return the layers whose cell of this scan has a state."""
        states = self.cells.states[facts.kind].tolist()
        return [name for name, found in zip(self.cells.layers, states, strict=True) if found == state]

    def _explain_kept_features(self, facts: _Facts) -> str:
        is_kept = facts.has_features and not self.refresh
        return "; it has features, so only `refresh` processes it again" if is_kept else ""


def _make_explanation(scan_id: str, state: str, why: str) -> dict[str, str]:
    return {"scan_id": scan_id, "state": state, "why": f"{state.replace('_', ' ')}: {why}"}


def _explain_up_to_date(row: dict[str, Any]) -> str:
    if row["status"] == "excluded":
        return f"excluded by a rule ({row['reason']}), and unchanged"
    same = "content and recipes are the same as those stored"
    if row["status"] == "failed":
        failed = f"it failed ({row['reason']}) for a layer that this config does not name"
        return f"{same}; {failed}, so the next run sets it to ok without computing"
    return same


def _name_layers(names: Sequence[str]) -> str:
    """Return the names of layers for a sentence, at most a few."""
    shown = ", ".join(names[:_MAX_LAYERS_SHOWN])
    more = len(names) - _MAX_LAYERS_SHOWN
    return f"layer{'s' if len(names) > 1 else ''} {shown}{f' and {more} more' if more > 0 else ''}"
