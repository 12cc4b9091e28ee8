"""START HERE. The way of a scan: listed → read → preprocessed → extracted → written → committed → reported.

`_run` shows it on one screen. Each step is one file of `featray/stages`; the engines run the middle
ones, on helper processes or on Ray; this file alone knows their order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.checks import check, check_output, refuse_mass_removal, refuse_other_recipe, remember
from featray.config import Config, ConfigInput
from featray.engines.base import Engine
from featray.engines.source_outage import stop_when_source_is_gone
from featray.job import (
    Job,
    RunScope,
    _batch_scans,
    choose_engine,
    early_decoder,
)
from featray.output.dataset import Dataset, Snapshot
from featray.output.lease import Lease
from featray.schema import Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.decode import Decoder
from featray.stages.list import Listing
from featray.stages.plan import Plan
from featray.stages.report import RunTotals, Summary, announce, report
from featray.terminal.progress import Progress

log = logging.getLogger(__name__)

PREFETCH_LIMIT = 1_000
"""Scans that an engine may start on while the model is loaded; it has room for fewer."""
COMMIT_SHARE = 20
"""After a commit nothing is committed for this many times as long as it took: commits cost 5 % at most."""


def extract(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    show: bool = False,
    stop: threading.Event | None = None,
) -> Summary:
    """Extract the features of every scan that has none yet; a second call resumes or does nothing.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts that win over the file.
        show: Whether to report progress on stderr.
        stop: Set it from another thread to stop cleanly after what is in flight.

    Returns:
        What was found and done; its `exit_code` is the one of the command line.

    Raises:
        UsageError: The config, the source or the model cannot be used; lists every problem.
        OutputBusyError: Another run holds the output.
        StorageError: The output's store does not answer; what was committed is kept.
    """
    return _run(config, overrides, RunScope(), show, stop or threading.Event())


def refresh(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    retry: Collection[str] | None = None,
    show: bool = False,
    stop: threading.Event | None = None,
) -> Summary:
    """Bring the output in step with the collection; when nothing has changed, write nothing.

    New scans are added, those of other content or another recipe replaced, those no longer listed dropped.

    Args:
        config: As for `extract`, and so are overrides, show and stop, the result and the errors.
        overrides: `key.path=value` texts.
        retry: Reason codes of failed scans to try again although nothing about them has changed.
        show: Whether to report progress.
        stop: Set it to stop cleanly.
    """
    return _run(config, overrides, RunScope(refresh=True, retry=retry), show, stop or threading.Event())


def _run(
    config: ConfigInput, overrides: list[str] | None, wanted: RunScope, show: bool, stop: threading.Event
) -> Summary:
    started = time.time()
    config, listing = check(config, overrides)
    dataset = Dataset.open(config.output)
    check_output(dataset.store)
    with choose_engine(config, len(listing.scans)) as engine:
        _begin(engine, config, listing, dataset)
        job = Job.prepare(config, engine.name, started, wanted.command, engine.threads)
        with Lease(dataset.store, job.run.run_id) as lease:
            committer = job.committer(dataset, listing, lease)
            plan = job.plan(listing, committer.snapshot(), wanted)
            refuse_other_recipe(plan, job.run.recipe_id, refresh=wanted.refresh)
            refuse_mass_removal(plan, config.limits, refresh=wanted.refresh)
            committer.delete_orphans()
            remember(listing, dataset.store)
            gone = plan.removed if wanted.refresh else ()
            progress = Progress(len(plan.todo), show=show)
            lease.set_progress_source(progress.state)
            done = _bring_in_step(engine, plan, gone, job, committer, progress, stop)
            return report(job.run, dataset, listing, plan, done, interrupted=stop.is_set())


def _begin(engine: Engine, config: Config, listing: Listing, dataset: Dataset) -> None:
    """Let the engine start on scans that no run has met yet: they are due whatever the model is."""
    due = _unmet(listing, dataset.find_snapshot())[:PREFETCH_LIMIT]
    if scans := [scan for scan in listing.take(due) if scan.reason is None]:
        engine.begin(scans, early_decoder(config), _batch_scans(config))


def _unmet(listing: Listing, stored: Snapshot | None) -> NDArray[np.int64]:
    """Return the places of the scans that are in no ledger."""
    if stored is None:  # without columns: for the first of them pyarrow imports pandas, 0.2 s
        return np.arange(len(listing.scans))
    ids = listing.scan_ids  # columns: a million known scans are looked at in no time
    known = stored.read_scans(("scan_id",))["scan_id"].cast(ids.type).combine_chunks()
    return np.flatnonzero(~pc.is_in(ids, value_set=known).to_numpy())


def _bring_in_step(
    engine: Engine,
    plan: Plan,
    gone: Sequence[str],
    job: Job,
    committer: Committer,
    progress: Progress,
    stop: threading.Event,
) -> RunTotals:
    """Extract and commit what is to do, drop what is gone, tidy up; return what was committed."""
    dataset, done = committer.dataset, RunTotals()
    if not plan.todo and not gone:
        return done
    announce(job.run, dataset)
    with progress:
        for receipt in _committed(_receipts(engine, plan, job, dataset, stop), committer.commit):
            progress.add_records(receipt.records)
            done.add(receipt)
        done.seconds, done.workers = progress.state()["seconds"], engine.workers()
    if not stop.is_set():
        committer.delete_scans(gone)
        done.removed = len(gone)
        committer.compact()
    committer.delete_orphans()
    return done


def _receipts(
    engine: Engine, plan: Plan, job: Job, dataset: Dataset, stop: threading.Event
) -> Iterator[Receipt]:
    """Yield the receipts of scans that listing has settled, then those of the engine's."""
    settled = [scan for scan in plan.todo if scan.reason is not None]
    readable = [scan for scan in plan.todo if scan.reason is None]
    if settled:
        yield Receipt((), tuple(ScanRecord.of(scan, job.run.recipe_id, job.run.run_id) for scan in settled))
    if readable:
        receipts = engine.receipts(readable, job.stages(dataset, len(readable)), stop)
        yield from stop_when_source_is_gone(receipts, readable, Decoder.of(job.config).reader)


def _committed(receipts: Iterator[Receipt], commit: Callable[[Sequence[Receipt]], None]) -> Iterator[Receipt]:
    """Commit receipts as they come, several at once where commits are slow; yield what was committed.

    When the engine fails, what it has finished is committed before the error goes on.
    """
    waiting: list[Receipt] = []
    not_before = 0.0
    try:
        for receipt in receipts:
            waiting.append(receipt)
            start = time.monotonic()
            if start >= not_before:
                finished, waiting = waiting, []
                commit(finished)
                not_before = start + (1 + COMMIT_SHARE) * (time.monotonic() - start)
                yield from finished
    except Exception:
        if waiting:
            commit(waiting)
        raise
    if waiting:
        commit(waiting)
        yield from waiting
