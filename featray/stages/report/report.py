"""The report step: reconcile the listing with the scans table, and write the folder of the run."""

from __future__ import annotations

import time
from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from featray.errors import ExitCode
from featray.output.dataset import Dataset, count_values
from featray.stages.list import Listing
from featray.stages.plan import Plan
from featray.stages.report.run_folder import Run, write_start, write_summary
from featray.stages.report.summary import Summary
from featray.stages.report.totals import RunTotals, describe_bottleneck


def announce(run: Run, dataset: Dataset) -> None:
    """Write the folder of a run before its first commit, so that a run that is killed has one too."""
    write_start(run, dataset)


def report(run: Run, dataset: Dataset, listing: Listing, plan: Plan, totals: RunTotals) -> Summary:
    """Count the listed scans in the scans table and, if the run changed anything, write its folder.

    The exit code is 3 if too many scans failed, or if a listed scan has no row in the scans table. For a run
    that was interrupted before it had processed all scans, it is 130 instead.

    Args:
        run: Facts of the run that were known at its beginning.
        dataset: The output after the last commit.
        listing: Every scan of the collection.
        plan: Which scans were due.
        totals: Sums over the receipts that this run committed.
    """
    stored = dataset.read_scans(("scan_id", "status", "reason"))
    summary = _summarize(run, _select_listed(stored, listing), listing, plan, totals)
    if totals.has_changes:
        write_summary(run, summary, dataset)
    return summary


def _select_listed(stored: pa.Table, listing: Listing) -> pa.Table:
    """Return the rows of listed scans."""
    ids = listing.scan_ids
    wide = ids.type  # with 64-bit offsets, because a million ids may be more than 2 GB
    return stored.filter(pc.is_in(stored["scan_id"].cast(wide), value_set=ids.combine_chunks()))


def _summarize(run: Run, rows: pa.Table, listing: Listing, plan: Plan, totals: RunTotals) -> Summary:
    status = count_values(rows["status"])
    found = len(listing.scan_ids)
    missing = found - len(rows)
    unfinished = totals.is_interrupted and (missing > 0 or totals.scans < len(plan.todo))
    has_dropped = totals.dropped_layers > 0
    lost_layers = {} if run.command != "refresh" or unfinished or has_dropped else plan.lost_layers
    other_layers = {} if has_dropped else Counter(plan.other_layers) - Counter(lost_layers)
    has_all_rows = missing == 0 and status.total() == found
    has_few_failures = status["failed"] <= run.max_failed_fraction * found
    return Summary(
        run_id=run.run_id if totals.has_changes else "",
        command=run.command,
        engine=run.engine,
        recipe=run.recipe_id,
        layers=run.layers,
        layer_recipes=run.layer_recipes,
        work=plan.describe_work() if totals.has_changes else "",
        renamed_layers=dict(plan.renames),
        dropped_layers=tuple(plan.other_layers) if has_dropped else (),
        other_layers=dict(other_layers),
        lost_layers=dict(lost_layers),
        found=found,
        ok=status["ok"],
        failed=status["failed"],
        excluded=status["excluded"],
        missing=missing,
        done=totals.scans,
        cleared_failures=len(plan.cleared_failures),
        removed=totals.removed,
        states=plan.counts,
        reasons=dict(count_values(rows["reason"].drop_null()).most_common()),
        ignored=listing.ignored,
        seconds=time.time() - run.started,
        stage_seconds=totals.stage_seconds,
        verdict=describe_bottleneck(totals),
        bytes_read=totals.bytes_read,
        from_cache=totals.from_cache,
        dead_units={layer: units.dead for layer, units in totals.units.items() if units.dead},
        reduced_batch=totals.reduced_batch,
        interrupted=unfinished,
        exit_code=_choose_exit_code(unfinished=unfinished, is_complete=has_all_rows and has_few_failures),
        output=str(run.config["output"]["uri"]),
    )


def _choose_exit_code(*, unfinished: bool, is_complete: bool) -> ExitCode:
    if unfinished:
        return ExitCode.INTERRUPTED
    return ExitCode.OK if is_complete else ExitCode.TOO_MANY_FAILED
