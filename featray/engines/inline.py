"""Engine `inline`: helper processes decode, this process holds the model and writes. No Ray.

Each scan is decoded by one of a few helpers, so a decoder that crashes or hangs takes only its own scan
with it. Tensors come back through shared memory. The model has threads of its own, so that it need not wait
for what was found to be written and committed. With no helpers everything happens in this thread, for a
debugger.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Generator, Iterator, Sequence

import pyarrow as pa

from featray.config import LimitsConfig
from featray.engines.base import Stages
from featray.engines.decoding.memory_limit import decode_memory
from featray.engines.decoding.process_pool import Helpers, end_early
from featray.engines.decoding.scan_pool import Attempts
from featray.engines.prefetch import SPARE, ahead, mapped
from featray.hardware import DEFAULT_THREADS, ModelThreads, Workers, count_usable_cores
from featray.schema import Decoded, Receipt, Scan
from featray.stages.decode import Decoder
from featray.stages.extract import extract

AHEAD = 2
"""Batches of decoded scans beside those in the model: one ready for it, and one that is made next."""
FLUSH_S = 10.0
"""Write what is finished at least this often, so a kill costs little."""


class InlineEngine:
    """See the module.

    Args:
        workers: Helpers; None for one per core, 0 for none at all.
        limits: As configured.
        memory: Bytes decoding one scan may take in a helper; None for most of what the machine has.
        threads: Of the model; None for what makes the most of this machine.
    """

    name = "inline"

    def __init__(
        self,
        workers: int | None,
        limits: LimitsConfig,
        memory: int | None = None,
        threads: ModelThreads | None = None,
    ) -> None:
        self._workers = count_usable_cores() if workers is None else workers
        all_cores = ModelThreads.for_whole_machine() if self._workers else DEFAULT_THREADS
        self.threads = threads or all_cores
        self._limits, self._memory = limits, memory
        self._helpers: Helpers | None = None
        self._attempts: Attempts | None = None

    def __enter__(self) -> InlineEngine:
        """Start the helpers; they import their libraries while this process loads the model."""
        if not self._workers:
            end_early()
        else:
            self._helpers = Helpers(self._workers, self._limits.scan_timeout_s, decode_memory(self._memory))
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the helpers."""
        if self._helpers is not None:
            self._helpers.close()
        if self._attempts is not None:
            self._attempts.close()

    @property
    def _kept(self) -> int:
        return self.threads.calls + SPARE + AHEAD

    def workers(self) -> Workers:
        """Return what this machine gives."""
        return Workers(decode=max(1, self._workers), model=self.threads.calls, cores=count_usable_cores())

    def connect(self) -> None:
        """Do nothing: there is nothing to join."""

    def begin(self, scans: Sequence[Scan], decode: Decoder, batch_scans: int) -> None:
        """Let the helpers decode as many scans as there is room for, while this process loads the model."""
        if self._helpers is not None:
            # Beside those there are for the model, each helper has one at work and one to go on with.
            size = 2 * self._workers + (self._kept + 1) * batch_scans
            self._attempts = Attempts(self._helpers, decode, self._limits, size)
            self._attempts.begin(scans)

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield a receipt for every file's worth of scans, or every ten seconds."""
        tables = self._tables(scans, stages, stop)
        for table in tables if self._helpers is None else ahead(tables):
            yield stages.write(table)

    def _tables(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Generator[pa.Table]:
        rows: list[pa.Table] = []
        flushed = time.monotonic()
        with contextlib.closing(self._batches(scans, stages, stop)) as batches:
            run_model = functools.partial(extract, stages.extractor)
            for table in mapped(run_model, batches, self.threads.calls):
                rows.append(table)
                full = sum(len(table) for table in rows) >= stages.scans_per_file
                if full or time.monotonic() - flushed > FLUSH_S:
                    yield pa.concat_tables(rows)
                    rows, flushed = [], time.monotonic()
        if rows:
            yield pa.concat_tables(rows)

    def _batches(
        self, scans: Sequence[Scan], stages: Stages, stop: threading.Event
    ) -> Generator[list[Decoded]]:
        """Yield decoded scans in lists of `batch_scans`, in order of completion."""
        if self._helpers is None:
            return _decode_here(scans, stages, stop)
        if self._attempts is None:
            self.begin((), stages.decode, stages.batch_scans)
        assert self._attempts is not None, "begin has made it"
        # A thread hands scans to the helpers also while the model works: none of them runs dry.
        return ahead(self._attempts.batches(scans, stages.batch_scans, stop, stages.decode, self._kept))


def _decode_here(scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Generator[list[Decoded]]:
    for first in range(0, len(scans), stages.batch_scans):
        if stop.is_set():
            return
        yield [stages.decode(scan) for scan in scans[first : first + stages.batch_scans]]
