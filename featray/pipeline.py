"""START HERE: the path of a scan: list → read → preprocess → extract → write → commit → report.

`run` shows it on one screen. Each step is one file of `featray/stages`. The engines run the middle steps, in
worker processes or on Ray; only this file knows the order of the steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.checks import (
    check,
    check_stores,
    refuse_layer_loss,
    refuse_mass_removal,
    refuse_mixed_recipes,
    save_listing_caches,
)
from featray.config import Config, ConfigInput
from featray.engines.base import Engine
from featray.engines.decoding.process_pool import end_early
from featray.engines.source_outage import SourceOutageDetector
from featray.errors import HeldOutputError
from featray.job import Job, RunOptions, RunScope, make_engine
from featray.output.dataset import Dataset, Snapshot
from featray.output.lease import Lease
from featray.output.lease_wait import LeaseWait
from featray.schema import Receipt, Scan, ScanRecord
from featray.stages.commit import Committer
from featray.stages.decode import Decoder
from featray.stages.list import Listing
from featray.stages.plan import Plan
from featray.stages.report import RunTotals, Summary, announce, report
from featray.terminal.progress import Progress

PREFETCH_LIMIT = 1_000
"""Maximum number of scans that are offered to the engine while the model is loaded; it takes some of them."""
COMMIT_INTERVAL = 20
"""After a commit, the next one waits this many times as long as the commit took, so that commits take at most
5 % of the time."""


def extract(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    show: bool = False,
    stop: threading.Event | None = None,
    wait: float = 0,
) -> Summary:
    """Extract the cells that are missing: new scans, and layers that stored scans lack.

    A second call resumes or does nothing.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts that override the config.
        show: Whether to show progress on stderr.
        stop: Set this event from another thread to stop cleanly: finished scans are committed, with engine
            `inline` also those that are being processed.
        wait: Seconds to wait for an output that another run holds, before the run begins.

    Returns:
        The counts, times and exit code of the run.

    Raises:
        UsageError: The config, the source, the model or the output cannot be used.
        OutputBusyError: Another run holds the output.
        InterruptedWaitError: `stop` was set while the run waited for the output.
        StorageError: The store of the output does not answer; committed scans are kept.
    """
    options = RunOptions.create(show=show, stop=stop, wait_s=wait)
    return _run_when_free(config, overrides, RunScope(), options)


def refresh(  # noqa: PLR0913  # public as featray.refresh
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    retry: Collection[str] | None = None,
    drop_layers: bool = False,
    show: bool = False,
    stop: threading.Event | None = None,
    wait: float = 0,
) -> Summary:
    """Update the output to match the collection; if nothing has changed, commit nothing.

    New scans and missing layers are added. Scans with other content and cells of another recipe are replaced.
    Scans that are no longer listed are removed.

    Args:
        config: As for `extract`; the same holds for overrides, show, stop, wait, the result and the errors.
        overrides: `key.path=value` texts.
        retry: Reason codes of failed scans to try again although neither content nor recipe has changed;
            scans that failed with `storage` are always tried again.
        drop_layers: Whether to remove stored layers that the config does not name.
        show: Whether to show progress.
        stop: Set this event to stop cleanly.
        wait: Seconds to wait for the output.
    """
    scope = RunScope(refresh=True, retry=retry, drop_layers=drop_layers)
    options = RunOptions.create(show=show, stop=stop, wait_s=wait)
    return _run_when_free(config, overrides, scope, options)


def _run_when_free(
    config: ConfigInput, overrides: list[str] | None, scope: RunScope, options: RunOptions
) -> Summary:
    """Check the config and run; if another run holds the output, wait as long as the options allow.

    After a wait, the source is listed again. With the earlier listing, a refresh would remove the scans that
    the other run has added since.
    """
    waiting = LeaseWait(options.wait_s, options.stop)
    checked, listing = check(config, overrides, show=options.show)
    while True:
        try:
            return run(checked, listing, scope, options)
        except HeldOutputError as error:
            end_early()
            waiting.wait(Dataset.open(checked.output).store, error)
        checked, listing = check(checked, show=options.show)


def run(config: Config, listing: Listing, scope: RunScope, options: RunOptions) -> Summary:
    """Process the listed scans that are due, from opening the output to the report.

    Args:
        config: Checked config.
        listing: Every scan of the collection.
        scope: Which scans are due.
        options: How the caller watches, stops and measures the run.
    """
    dataset = Dataset.open(config.output)
    check_stores(dataset.store, config)
    with make_engine(config, options.instrument) as engine:
        if new_scans := _find_new_scans(listing, dataset):
            engine.prefetch_scans(new_scans)
        job = Job.prepare(config, engine, scope, options)
        with Lease(dataset.store, job.run.run_id) as lease:
            committer = job.open_committer(dataset, listing, lease)
            if lease.was_taken_over:
                committer.exclude_earlier_driver()
            plan = job.make_plan(listing, committer.snapshot())
            refuse_mixed_recipes(plan, refresh=scope.refresh)
            refuse_layer_loss(plan, refresh=scope.refresh, drop_layers=scope.drop_layers)
            refuse_mass_removal(plan, config.limits, refresh=scope.refresh)
            committer.delete_orphans()
            save_listing_caches(listing, dataset.store)
            progress = Progress(len(plan.todo), show=options.show)
            lease.set_progress_source(progress.state)
            totals = _process(engine, plan, job, committer, progress)
            return report(job.run, dataset, listing, plan, totals)


def _process(engine: Engine, plan: Plan, job: Job, committer: Committer, progress: Progress) -> RunTotals:
    """Extract and commit the scans that are due, delete the removed ones, and compact; return the totals."""
    totals, stop = RunTotals(), job.options.stop
    removed = plan.removed if job.scope.refresh else ()
    dropped = plan.other_layers if job.scope.drop_layers else {}
    if not (plan.todo or removed or dropped or plan.has_table_changes):
        totals.is_interrupted = stop.is_set()
        return totals
    announce(job.run, committer.dataset)
    committer.carry_over(plan.earlier_recipes)
    committer.rename_layers(plan.renames)
    committer.clear_failures(plan.cleared_failures)
    totals.has_changed_tables = plan.has_table_changes
    with progress:
        _extract_scans(engine, plan.todo, job, _CommitQueue(committer, progress, totals))
        since = engine.decoding_since()
        totals.seconds = 0.0 if since is None else time.monotonic() - since
        totals.workers = engine.workers()
    if not stop.is_set():
        committer.delete_scans(removed)
        committer.drop_layers(dropped)  # last, so that a run that is stopped or killed has lost no layer
        totals.removed, totals.dropped_layers = len(removed), len(dropped)
        committer.compact()
    committer.delete_orphans()
    totals.is_interrupted = stop.is_set()
    return totals


def _extract_scans(engine: Engine, scans: Sequence[Scan], job: Job, queue: _CommitQueue) -> None:
    """Put the receipts of all scans into the queue; first those of scans that listing excluded or failed."""
    settled: list[Scan] = []
    readable: list[Scan] = []
    for scan in scans:  # one pass, because each access builds the scan, and there may be a million
        (settled if scan.reason else readable).append(scan)
    outage = SourceOutageDetector(readable, Decoder.from_config(job.config).reader)
    with queue:
        if settled:
            queue.put(job.identify(Receipt((), tuple(ScanRecord.from_scan(scan) for scan in settled))))
        if readable:
            stages = job.make_stages(queue.dataset, len(readable))
            for receipt in engine.receipts(readable, stages, job.options.stop):
                queue.put(job.identify(receipt))
                outage.check(receipt)


class _CommitQueue:
    """Commits receipts as they come, several at once if commits are slow; counts committed scans.

    At the end of the `with` block the waiting receipts are committed, also when the engine has failed.
    """

    def __init__(self, committer: Committer, progress: Progress, totals: RunTotals) -> None:
        self.dataset = committer.dataset
        self._committer, self._progress, self._totals = committer, progress, totals
        self._waiting: list[Receipt] = []
        self._next_commit = 0.0

    def __enter__(self) -> _CommitQueue:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._waiting and (kind is None or issubclass(kind, Exception)):
            self._commit()

    def put(self, receipt: Receipt) -> None:
        """Add a receipt, and commit all waiting ones unless the last commit was too recent."""
        self._waiting.append(receipt)
        start = time.monotonic()
        if start >= self._next_commit:
            self._commit()
            self._next_commit = start + (1 + COMMIT_INTERVAL) * (time.monotonic() - start)

    def _commit(self) -> None:
        receipts, self._waiting = self._waiting, []
        self._committer.commit(receipts)
        for receipt in receipts:
            self._progress.add_records(receipt.records)
            self._totals.add(receipt)


def _find_new_scans(listing: Listing, dataset: Dataset) -> list[Scan]:
    """Return the readable ones of the first scans without a row in `scans`; they are due with any model."""
    new = _find_new_positions(listing, dataset.find_snapshot())[:PREFETCH_LIMIT]
    return [scan for scan in listing.take(new) if scan.reason is None]


def _find_new_positions(listing: Listing, stored: Snapshot | None) -> NDArray[np.int64]:
    """Return the positions in the listing of scans that have no row in `scans`."""
    if stored is None:  # uses no Arrow column, because pyarrow imports pandas for the first one (0.2 s)
        return np.arange(len(listing.scans))
    ids = listing.scan_ids  # an Arrow column, so that comparing a million ids takes a fraction of a second
    known = stored.read_scans(("scan_id",))["scan_id"].cast(ids.type).combine_chunks()
    return np.flatnonzero(~pc.is_in(ids, value_set=known).to_numpy())
