"""`featray status` and `featray failures`: the content of an output, from its logs and its scans table.

No features are read.
"""

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
    """Content of an output.

    Attributes:
        ok: Number of scans with status ok.
        failed: Number of scans with status failed.
        excluded: Number of scans with status excluded.
        reasons: Number of failed and excluded scans by reason code.
        recipes: Number of ok scans by recipe id.
        layers: Rows, files and bytes of each layer.
        version: Version of each table; empty if nothing is committed yet.
        commit: Number of the last commit.
        running: The lease of the run that has locked the output, with its progress at the last heartbeat;
            None if no run has. The progress counts committed scans.
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
        """Return the result as text for the terminal."""
        lines = [_describe_run(self.running)] if self.running else []
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
    """Return the content of an output, and the progress of the run that has locked it, if there is one.

    Raises:
        ConfigError: The folder is not a featray output.
    """
    lease = read_live_lease(dataset.store)
    snapshot = dataset.open_snapshot() if lease is None else dataset.find_snapshot()
    if snapshot is None:  # the run has not committed anything yet
        return StatusResult(0, 0, 0, {}, {}, (), {}, 0, lease)
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
        running=lease,
    )


def failures(dataset: Dataset, reason: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of the scans that are not `ok`, sorted by reason and id.

    Args:
        dataset: The output.
        reason: Reason code of the scans to return; None for all reasons.

    Raises:
        ConfigError: The folder is not a featray output.
    """
    columns = ("scan_id", "uri", "status", "reason", "stage", "message", "attempts")
    condition = pads.field("status") != "ok"
    if reason is not None:
        condition = condition & (pads.field("reason") == reason)
    rows: list[dict[str, Any]] = dataset.read(SCANS, columns, condition).to_pylist()
    return sorted(rows, key=lambda row: (row["reason"], row["scan_id"]))


def _describe_run(lease: dict[str, Any]) -> str:
    run = f"running: {lease['run_id']} on host {lease['host']} (pid {lease['pid']}) since {lease['since']}"
    if not lease.get("progress"):
        return f"{run}, preparing"
    age_s = max(0.0, time.time() - lease["heartbeat"])
    return f"{run}; {age_s:.0f} s ago: {format_scans(lease['progress'])}"
