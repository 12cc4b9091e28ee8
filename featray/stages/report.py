"""Report: what a run found and did, as a `Summary`, `runs/RUN_ID/run.json` and `summary.md`.

A run.json without `summary` is of a run that has not ended, or was killed.

Also keeps the books: every listed scan must have a row in the ledger, or the run is not in order.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.compute as pc

from featray.errors import ExitCode
from featray.hardware import Workers, count_usable_cores
from featray.output.dataset import RUNS, Dataset
from featray.schema import STAGE_TIMES, Receipt, UnitsSeen
from featray.stages.list import Listing
from featray.stages.plan import Plan

PACKAGES = ("featray", "keras", "tensorflow", "ray", "numpy", "pyarrow", "deltalake", "nibabel", "pydicom")
FEW_ROWS = 2
"""With a single row, a unit that is 0 says nothing."""
BUSY = 0.9
"""Share of their time from which on workers count as always at work."""


@dataclass(frozen=True)
class Run:
    """What is fixed when a run begins.

    Attributes:
        run_id: Sorts by time.
        command: `extract` or `refresh`.
        started: Seconds since the epoch, when the command began.
        engine: `inline` or `ray`.
        recipe_id: Short hash of `recipe`.
        recipe: Everything that decides a feature's value.
        layers: Output names.
        model_sha256: Of the model file and its code.
        config: As run, secrets masked.
        max_failed_fraction: Share of failed scans above which the exit code is 3.
    """

    run_id: str
    command: str
    started: float
    engine: str
    recipe_id: str
    recipe: dict[str, Any]
    layers: tuple[str, ...]
    model_sha256: str
    config: dict[str, Any]
    max_failed_fraction: float


@dataclass
class RunTotals:
    """What a run has committed so far; sums only, for there may be a million scans.

    `seconds` is how long that took, from when the plan was made; `workers` is what there was to do it with.
    """

    scans: int = 0
    removed: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    workers: Workers | None = None
    units: dict[str, UnitTotals] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGE_TIMES, 0.0))

    @property
    def changed(self) -> bool:
        """Whether this run has committed anything."""
        return bool(self.scans or self.removed)

    def add(self, receipt: Receipt) -> None:
        """Count what one commit made visible."""
        records = receipt.records
        self.scans += len(records)
        self.bytes_read += sum(record.bytes_read for record in records)
        for name in STAGE_TIMES:
            self.stage_seconds[name] += sum(getattr(record, name) for record in records)
        for seen in receipt.units:
            self.units.setdefault(seen.layer, UnitTotals()).add(seen)


@dataclass
class UnitTotals:
    """Which units of one layer were anything but 0 so far; `active` has one bit per unit."""

    width: int = 0
    rows: int = 0
    active: int = 0
    is_uneven: bool = False

    def add(self, seen: UnitsSeen) -> None:
        """Count what one file holds."""
        self.is_uneven |= not seen.width or (self.rows > 0 and seen.width != self.width)
        self.width = seen.width
        self.rows += seen.rows
        self.active |= int(seen.active or "0", 16)

    @property
    def dead(self) -> int:
        """Units that were 0 in every row, once there are rows enough for that to mean something."""
        says_something = self.rows >= FEW_ROWS and not self.is_uneven
        return self.width - self.active.bit_count() if says_something else 0


@dataclass(frozen=True)
class Summary:
    """What was found and done.

    Attributes:
        run_id: The run, empty when there was nothing to do.
        command: `extract` or `refresh`.
        engine: The engine that ran, or would have.
        recipe: Recipe id.
        layers: Output names.
        found: Scans listed.
        ok, failed, excluded: What the ledger holds of them; they add up to `found`.
        missing: Scans listed without a row in the ledger (0 unless interrupted or broken).
        done: Scans this run settled.
        removed: Scans this run dropped, for they are no longer listed.
        states: What the plan found: new, changed, stale, failed, removed and up-to-date scans.
        reasons: Failed and excluded scans by reason, over all of the collection.
        ignored: Files that are no scans, by suffix.
        seconds: Wall time of the command so far.
        stage_seconds: Sums over this run's scans.
        verdict: In plain language, what this run was bound by; empty when nothing was decoded.
        bytes_read: By this run.
        dead_units: Of each layer that has some, how many units were 0 for every scan of this run.
        interrupted: Whether it was asked to stop.
        exit_code: Of the command line.
    """

    run_id: str
    command: str
    engine: str
    recipe: str
    layers: tuple[str, ...]
    found: int
    ok: int
    failed: int
    excluded: int
    missing: int
    done: int
    removed: int
    states: dict[str, int]
    reasons: dict[str, int]
    ignored: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    bytes_read: int = 0
    dead_units: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    exit_code: int = 0

    def text(self) -> str:
        """Return the closing words for a person."""
        return "\n".join(_lines(self))


def announce(run: Run, dataset: Dataset) -> None:
    """Write the run's folder before its first commit: if it dies, what its rows were made by is known."""
    _write_json(run, dataset, {})


def report(
    run: Run,
    dataset: Dataset,
    listing: Listing,
    plan: Plan,
    done: RunTotals,
    *,
    interrupted: bool,
) -> Summary:
    """Balance the books and, if anything was done, write the run's folder.

    Args:
        run: What began.
        dataset: The output after the last commit.
        listing: Every scan found.
        plan: What was to be done.
        done: What this run committed.
        interrupted: Whether the run was asked to stop before it was done.
    """
    ledger = dataset.read_scans(("scan_id", "status", "reason"))
    summary = _summarise(run, ledger, listing, plan, done, interrupted)
    if done.changed:
        _write_folder(run, summary, dataset)
    return summary


def _summarise(
    run: Run, ledger: pa.Table, listing: Listing, plan: Plan, done: RunTotals, interrupted: bool
) -> Summary:
    listed = listing.scan_ids
    wide = listed.type  # offsets of 64 bits: a million ids may be more than 2 GB
    rows = ledger.filter(pc.is_in(ledger["scan_id"].cast(wide), value_set=listed.combine_chunks()))
    status = _counts(rows["status"])
    found, missing = len(listed), len(listed) - len(rows)
    unfinished = interrupted and (missing > 0 or done.scans < len(plan.todo))
    return Summary(
        run_id=run.run_id if done.changed else "",
        command=run.command,
        engine=run.engine,
        recipe=run.recipe_id,
        layers=run.layers,
        found=found,
        ok=status["ok"],
        failed=status["failed"],
        excluded=status["excluded"],
        missing=missing,
        done=done.scans,
        removed=done.removed,
        states=plan.counts,
        reasons=dict(_counts(rows["reason"].drop_null()).most_common()),
        ignored=listing.ignored,
        seconds=time.time() - run.started,
        stage_seconds=done.stage_seconds,
        verdict=verdict(done),
        bytes_read=done.bytes_read,
        dead_units={layer: units.dead for layer, units in done.units.items() if units.dead},
        interrupted=unfinished,
        exit_code=_exit_code(found, status, missing, unfinished, run.max_failed_fraction),
    )


def verdict(done: RunTotals) -> str:
    """Return in plain language what a run was bound by, from how much of its workers' time was work.

    Start-up, such as that of actors, is part of the time: short runs are bound by it.
    """
    found = done.stage_seconds
    preparing = found["read_s"] + found["decode_s"] + found["preprocess_s"]
    if done.workers is None or not done.seconds or not preparing:
        return ""
    decoding, calling = preparing / done.seconds, found["infer_s"] / done.seconds
    at_work = (
        f"on average {decoding:.1f} of {done.workers.decode} decode workers and {calling:.1f} of "
        f"{done.workers.model} calls of the model were at work, on {done.workers.cores:g} cores"
    )
    return f"{_bound(done.workers, decoding, calling, found['read_s'] / preparing)}; {at_work}"


def _bound(workers: Workers, decoding: float, calling: float, reading: float) -> str:
    """Return what workers were bound by.

    Args:
        workers: At most.
        decoding: Of them that decoded, on average.
        calling: That were in the model.
        reading: Share of reading in decoding.
    """
    on_cores = decoding + (0.0 if workers.has_gpus else calling)
    if on_cores >= BUSY * workers.cores and workers.decode + workers.model > workers.cores:
        return f"bound by the cores: {100 * decoding / on_cores:.0f} % of their time went into decoding"
    if calling >= BUSY * workers.model:
        return "bound by the model: more actors, or faster devices, would help"
    if decoding >= BUSY * workers.decode:
        what = "reading from the store" if reading > 0.5 else "decoding"
        return f"bound by {what}: more decode workers would help"
    return "bound by neither decoding nor the model: the rest went into start-up, or waiting"


def _counts(column: pa.ChunkedArray) -> Counter[str]:
    return Counter({item["values"]: item["counts"] for item in column.value_counts().to_pylist()})


def _exit_code(found: int, status: Counter[str], missing: int, unfinished: bool, limit: float) -> int:
    if unfinished:
        return ExitCode.INTERRUPTED
    balanced = missing == 0 and status.total() == found
    return ExitCode.OK if balanced and status["failed"] <= limit * found else ExitCode.TOO_MANY_FAILED


def _write_folder(run: Run, summary: Summary, dataset: Dataset) -> None:
    _write_json(run, dataset, {"summary": asdict(summary)})
    dataset.store.write(f"{RUNS}/{run.run_id}/summary.md", _markdown(run, summary).encode())


def _write_json(run: Run, dataset: Dataset, more: dict[str, Any]) -> None:
    content = {**asdict(run), **more, "versions": _versions(), "machine": _machine()}
    dataset.store.write(f"{RUNS}/{run.run_id}/run.json", json.dumps(content, indent=2).encode())


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpus": count_usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "peak_driver_bytes": _peak(resource.RUSAGE_SELF),
        "peak_largest_child_bytes": _peak(resource.RUSAGE_CHILDREN),
    }


def _peak(who: int) -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit


def _lines(summary: Summary) -> list[str]:
    lines = [
        _first_line(summary),
        f"found {summary.found} = {summary.ok} ok + {summary.failed} failed + {summary.excluded} excluded"
        + (f" + {summary.missing} not yet done" if summary.missing else ""),
    ]
    if summary.removed:
        lines.append(f"{summary.removed} scans are no longer in the collection and were dropped")
    lines += _left_to_refresh(summary)
    if summary.reasons:
        lines.append(
            "reasons: " + ", ".join(f"{count} {reason}" for reason, count in summary.reasons.items())
        )
    if summary.done:
        times = ", ".join(f"{name[:-2]} {seconds:.1f} s" for name, seconds in summary.stage_seconds.items())
        lines.append(f"stage times, summed over scans: {times}")
    if summary.verdict:
        lines.append(summary.verdict)
    for layer, dead in summary.dead_units.items():
        lines.append(
            f"warning: {dead} units of layer {layer} were 0 for every scan of this run (dead_units_possible: "
            "a ReLU?); `featray layers` shows what feeds it"
        )
    if summary.ignored:
        lines.append(
            "ignored files: " + ", ".join(f"{count} {suffix}" for suffix, count in summary.ignored.items())
        )
    return lines


def _first_line(summary: Summary) -> str:
    if not summary.run_id:
        current = summary.states["up_to_date"]
        return f"nothing to do: {current} scans are up to date (recipe {summary.recipe})"
    rate = summary.done / summary.seconds if summary.seconds else 0.0
    return (
        f"run {summary.run_id}: {summary.done} scans in {summary.seconds:.1f} s ({rate:.2f} scans/s with "
        f"start-up, {summary.bytes_read / 1e6:.0f} MB read), engine {summary.engine}"
    )


def _left_to_refresh(summary: Summary) -> list[str]:
    """Return what `extract` has seen and leaves as it is."""
    if summary.command == "refresh":
        return []
    lines = []
    if changed := summary.states["changed"]:
        lines.append(
            f"{changed} scans have changed since; `featray refresh` replaces features of earlier ones"
        )
    if removed := summary.states["removed"]:
        lines.append(f"{removed} stored scans are no longer in the collection; `featray refresh` drops them")
    return lines


def _markdown(run: Run, summary: Summary) -> str:
    lines = "\n".join(f"- {line}" for line in _lines(summary))
    layers = "\n".join(f"- `{name}`" for name in summary.layers)
    return (
        f"# Run {run.run_id}\n\n{lines}\n\n## Layers\n\n{layers}\n\n## Recipe {run.recipe_id}\n\n"
        f"```json\n{json.dumps(run.recipe, indent=2)}\n```\n\nModel sha256 `{run.model_sha256}`.\n"
    )
