"""What an output holds: by layer, by status and by reason. Reads the log and the ledger, no features."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as pads

from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.layer_totals import LayerTotals, sum_by_layer
from featray.output.lease import read_live_lease
from featray.terminal.progress import format_scans


@dataclass(frozen=True)
class StatusResult:
    """What is there: scans by status and reason, `ok` scans by recipe id, layers, table versions, commits.

    `running` is what the run that holds the output says of itself, as `lease.read_live_lease`; its counts are
    of scans that are committed, as of its last heartbeat.
    """

    ok: int
    failed: int
    excluded: int
    reasons: dict[str, int]
    recipes: dict[str, int]
    layers: tuple[LayerTotals, ...]
    version: dict[str, int]
    commit: int
    running: dict[str, Any] | None = None

    def text(self) -> str:
        """Return the state for a person."""
        lines = [_running_line(self.running)] if self.running else []
        if not self.version:
            return "\n".join([*lines, "nothing is committed yet"])
        lines.append(f"scans: {self.ok} ok, {self.failed} failed, {self.excluded} excluded")
        if self.reasons:
            lines.append("reasons: " + ", ".join(f"{count} {name}" for name, count in self.reasons.items()))
        lines.append(
            "recipes: "
            + (", ".join(f"{name} ({count} scans)" for name, count in self.recipes.items()) or "-")
        )
        lines.append(f"version {self.version[FEATURES]}, commit {self.commit}")
        lines += [
            f"layer {layer.layer}: {layer.rows} rows in {layer.files} files, {layer.size_bytes / 1e6:.2f} MB"
            for layer in self.layers
        ]
        return "\n".join(lines)


def status(dataset: Dataset) -> StatusResult:
    """Return what an output holds, and how far the run is that is at work on it.

    Raises:
        ConfigError: There is no featray output here.
    """
    now = read_live_lease(dataset.store)
    snapshot = dataset.open_snapshot() if now is None else dataset.find_snapshot()
    if snapshot is None:  # the run has not committed anything yet
        return StatusResult(0, 0, 0, {}, {}, (), {}, 0, now)
    rows = snapshot.read_scans(("status", "reason", "recipe")).to_pylist()
    counts = Counter(row["status"] for row in rows)
    return StatusResult(
        ok=counts["ok"],
        failed=counts["failed"],
        excluded=counts["excluded"],
        reasons=dict(Counter(row["reason"] for row in rows if row["status"] != "ok").most_common()),
        recipes=dict(Counter(row["recipe"] for row in rows if row["status"] == "ok").most_common()),
        layers=sum_by_layer(snapshot.files(FEATURES)),
        version=snapshot.versions,
        commit=snapshot.commit_number,
        running=now,
    )


def _running_line(holder: dict[str, Any]) -> str:
    who = (
        f"running: {holder['run_id']} on host {holder['host']} (pid {holder['pid']}) since {holder['since']}"
    )
    if not holder.get("progress"):
        return f"{who}, preparing"
    ago = max(0.0, time.time() - holder["heartbeat"])
    return f"{who}; {ago:.0f} s ago: {format_scans(holder['progress'])}"


def failures(dataset: Dataset, reason: str | None = None) -> list[dict[str, Any]]:
    """Return the scans that are not `ok`, sorted by reason and id; optionally of one reason.

    Raises:
        ConfigError: There is no featray output here.
    """
    columns = ("scan_id", "uri", "status", "reason", "stage", "message", "attempts")
    where = pads.field("status") != "ok"
    if reason is not None:
        where = where & (pads.field("reason") == reason)
    rows: list[dict[str, Any]] = dataset.read(SCANS, columns, where).to_pylist()
    return sorted(rows, key=lambda row: (row["reason"], row["scan_id"]))
