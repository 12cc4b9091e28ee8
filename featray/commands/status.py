"""`featray status` and `featray failures`: the content of an output, from its logs and its scans table.

No features are read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pyarrow.dataset as pads

from featray.output.dataset import FEATURES, SCANS, Dataset, count_values
from featray.output.layer_totals import LayerTotals, sum_by_layer
from featray.output.lease import describe_process, read_live_lease
from featray.output.ledger import LEDGER_ROW_COLUMNS, find_stored_cells, read_newest_layers, read_newest_runs
from featray.terminal.progress import format_scans


@dataclass(frozen=True)
class StatusResult:
    """Content of an output.

    Attributes:
        ok: Number of scans with status ok.
        failed: Number of scans with status failed.
        excluded: Number of scans with status excluded.
        reasons: Number of failed and excluded scans by reason code.
        recipes: Layer → recipe id → number of scans that have the layer with this recipe.
        layers: Rows, files and bytes of each layer.
        version: Version of each table; empty if nothing is committed yet.
        commit: Number of the last commit.
        running: The lease of the run that has locked the output, with its progress at the last heartbeat;
            None if no run has. The progress counts committed scans.
        unnamed_layers: Names of the layers that the config of the newest run did not name.
        engine: Engine of the newest run; empty if it is not recorded.
        engine_reason: Why that run had this engine, in words that follow "because".
    """

    ok: int
    failed: int
    excluded: int
    reasons: dict[str, int]
    recipes: dict[str, dict[str, int]]
    layers: tuple[LayerTotals, ...]
    version: dict[str, int]
    commit: int
    running: dict[str, Any] | None = None
    unnamed_layers: tuple[str, ...] = ()
    engine: str = ""
    engine_reason: str = ""

    def text(self) -> str:
        """Return the result as text for the terminal."""
        lines = [_describe_run(self.running)] if self.running else []
        if not self.version:
            return "\n".join([*lines, "nothing is committed yet"])
        lines.append(f"scans: {self.ok} ok, {self.failed} failed, {self.excluded} excluded")
        if self.reasons:
            lines.append("reasons: " + ", ".join(f"{count} {name}" for name, count in self.reasons.items()))
        lines.append(f"version {self.version[FEATURES]}, commit {self.commit}")
        if self.engine:
            reason = f", because {self.engine_reason}" if self.engine_reason else ""
            lines.append(f"newest run: engine {self.engine}{reason}")
        lines += [self._describe_layer(layer) for layer in self.layers]
        return "\n".join(lines)

    def _describe_layer(self, layer: LayerTotals) -> str:
        size = f"{layer.rows} rows in {layer.files} files, {layer.size_bytes / 1e6:.2f} MB"
        recipes = ", ".join(
            f"{count} scans with recipe {name}" for name, count in self.recipes.get(layer.layer, {}).items()
        )
        unnamed = ""
        if layer.layer in self.unnamed_layers:
            unnamed = "; the config of the newest run does not name it, `refresh --drop-layers` removes it"
        return f"layer {layer.layer}: {size}; {recipes or 'no scan'}{unnamed}"


def status(dataset: Dataset) -> StatusResult:
    """Return the content of an output, and the progress of the run that has locked it, if there is one.

    Raises:
        ConfigError: The folder is not a featray output.
    """
    lease = read_live_lease(dataset.store)
    snapshot = dataset.open_snapshot() if lease is None else dataset.find_snapshot()
    if snapshot is None:  # the run has not committed anything yet
        return StatusResult(0, 0, 0, {}, {}, (), {}, 0, lease)
    rows = snapshot.read_scans(LEDGER_ROW_COLUMNS)
    counts, layers = count_values(rows["status"]), sum_by_layer(snapshot.files(FEATURES))
    named = read_newest_layers(dataset.store)
    newest = next(read_newest_runs(dataset.store, 1), {})
    return StatusResult(
        ok=counts["ok"],
        failed=counts["failed"],
        excluded=counts["excluded"],
        reasons=dict(count_values(rows["reason"].drop_null()).most_common()),
        recipes=find_stored_cells(snapshot, rows).count_recipes(),
        layers=layers,
        version=snapshot.versions,
        commit=snapshot.commit_number,
        running=lease,
        unnamed_layers=tuple(layer.layer for layer in layers if named and layer.layer not in named),
        engine=newest.get("engine", ""),
        engine_reason=newest.get("engine_reason", ""),
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
    run = f"running: {describe_process(lease)} since {lease['since']}"
    if not lease.get("progress"):
        return f"{run}, preparing"
    age_s = max(0.0, time.time() - lease["heartbeat"])
    return f"{run}; {age_s:.0f} s ago: {format_scans(lease['progress'])}"
