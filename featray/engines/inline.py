"""Engine `inline`: worker processes decode, and this process runs the model and writes. No Ray.

Each scan is decoded in one of a few worker processes, so that a decoder that crashes or hangs costs only its
own scan. Tensors return through shared memory. The model runs in threads of its own, so that it need not wait
while results are written and committed. With 0 workers everything runs in this thread, so that a debugger can
follow it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import time
from collections.abc import Generator, Iterator, Sequence

import pyarrow as pa

from featray.engines.base import Decoding, Stages
from featray.engines.decoding.memory_limit import decode_memory
from featray.engines.decoding.process_pool import WorkerPool, end_early
from featray.engines.decoding.scan_pool import ScanDecodePool
from featray.engines.prefetch import EXTRA_RESULTS, parallel_map, prefetch
from featray.hardware import DEFAULT_THREADS, ModelPlace, ModelThreads, Workers, count_usable_cores
from featray.schema import Decoded, Receipt, Scan
from featray.stages.extract import extract
from featray.storage.ray_job import find_stop_limit_s

BATCHES_AHEAD = 2
"""Batches of decoded scans besides those in the model: one is ready for it, and the next one is being made.
"""
FLUSH_S = 10.0
"""Seconds after which finished scans are written although their file is not full, so that a kill loses little
work."""


class InlineEngine:
    """Runs all stages on this machine; see the module.

    Args:
        workers: Largest number of worker processes that decode; None for one per core, 0 for none.
        decoding: How scans are decoded.
        threads: CPU threads of the model; None for the fastest choice on this machine.
    """

    name = "inline"

    def __init__(self, workers: int | None, decoding: Decoding, threads: ModelThreads | None = None) -> None:
        cores = count_usable_cores()
        self._decode_workers = cores if workers is None else workers
        default_threads = ModelThreads.for_cores(cores) if self._decode_workers else DEFAULT_THREADS
        self.threads = threads or default_threads
        self.place = ModelPlace.ANY
        self._decoding = decoding
        self._decoding_since: float | None = None
        self._processes: WorkerPool | None = None
        self._scan_pool: ScanDecodePool | None = None

    def __enter__(self) -> InlineEngine:
        """Do nothing yet: the number of worker processes depends on the number of scans."""
        if not self._decode_workers:
            end_early()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the worker processes."""
        end_early()
        if self._processes is not None:
            self._processes.close()
        if self._scan_pool is not None:
            self._scan_pool.close()

    def connect(self) -> None:
        """Do nothing, because this engine needs no cluster."""

    def workers(self) -> Workers:
        """Return the number of workers on this machine."""
        decode = 1 if self._processes is None else self._processes.count_processes()
        return Workers(decode, model=self.threads.calls, cores=count_usable_cores())

    def decoding_since(self) -> float | None:
        """Return when the first scan was submitted."""
        return self._decoding_since

    def measure_capacity(self) -> None:
        """Return None: this engine uses this machine alone."""

    def prefetch_scans(self, scans: Sequence[Scan]) -> None:
        """Decode as many of the scans as there is room for, while this process loads the model."""
        if self._decode_workers:
            self._open_scan_pool(len(scans)).prefetch(scans)

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield a receipt for every full file of features, or every ten seconds.

        After a stop, scans in progress are finished; in a Ray job, only those that are done before Ray would
        kill this process.
        """
        tables = self._extract_tables(scans, stages, stop)
        stop_limit_s = find_stop_limit_s()
        if self._decode_workers or math.isfinite(stop_limit_s):  # no debugger follows a Ray job
            tables = prefetch(tables, stop=stop, grace_s=stop_limit_s)
        for table in tables:
            yield stages.write(table)

    def _extract_tables(
        self, scans: Sequence[Scan], stages: Stages, stop: threading.Event
    ) -> Generator[pa.Table]:
        """Yield the features of one file of scans at a time."""
        stages.load_here()
        tables: list[pa.Table] = []
        flushed = time.monotonic()
        with contextlib.closing(self.decode_batches(scans, stop)) as batches:
            run_model = functools.partial(extract, stages.extractor, recipe=stages.recipe)
            for table in parallel_map(run_model, batches, self.threads.calls):
                tables.append(table)
                is_full = sum(len(table) for table in tables) >= stages.scans_per_file
                # A run that is stopped may be killed soon, so it keeps nothing back.
                if is_full or stop.is_set() or time.monotonic() - flushed > FLUSH_S:
                    yield pa.concat_tables(tables)
                    tables, flushed = [], time.monotonic()
        if tables:
            yield pa.concat_tables(tables)

    def decode_batches(self, scans: Sequence[Scan], stop: threading.Event) -> Generator[list[Decoded]]:
        """Yield decoded scans in lists of `batch_scans`, in order of completion.

        The tensors of a list are valid until two later lists were asked for; the last lists stay valid.
        """
        if not self._decode_workers:
            self._decoding_since = time.monotonic()
            return _decode_here(scans, self._decoding, stop)
        pool = self._open_scan_pool(len(scans))
        # A thread submits scans to the processes also while the model runs, so that no process is idle.
        return prefetch(pool.batches(scans, stop, self._batches_in_use))

    def _open_scan_pool(self, scans: int) -> ScanDecodePool:
        """Return the pool with one worker process per scan, up to the configured number."""
        processes = min(self._decode_workers, scans)
        if self._processes is None or self._scan_pool is None:
            self._decoding_since = time.monotonic()
            memory = decode_memory(self._decoding.memory)
            self._processes = WorkerPool(processes, self._decoding.limits.scan_timeout_s, memory)
            # Besides the scans for the model, each process works on one scan, and has the next one waiting.
            size = 2 * self._decode_workers + (self._batches_in_use + 1) * self._decoding.batch_scans
            self._scan_pool = ScanDecodePool(self._processes, self._decoding, size)
        self._processes.grow(processes)
        return self._scan_pool

    @property
    def _batches_in_use(self) -> int:
        return self.threads.calls + EXTRA_RESULTS + BATCHES_AHEAD


def _decode_here(
    scans: Sequence[Scan], decoding: Decoding, stop: threading.Event
) -> Generator[list[Decoded]]:
    """Yield batches of scans that are decoded in this thread."""
    for first in range(0, len(scans), decoding.batch_scans):
        if stop.is_set():
            return
        yield [decoding.decoder(scan) for scan in scans[first : first + decoding.batch_scans]]
