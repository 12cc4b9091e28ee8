"""The first scans, processed in the driver with engine `inline` while a local Ray starts.

Starting Ray and its actors, each of which loads the model, takes about ten seconds; the driver has the model
loaded before that. A few scans are therefore decoded in one worker process and extracted in the driver. So
the first scan is opened, and a fault of all scans is noticed, as early as with engine `inline`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

from featray.engines.base import Decoding, Stages
from featray.engines.inline import InlineEngine
from featray.engines.prefetch import run_in_thread
from featray.hardware import ModelThreads
from featray.schema import Receipt, Scan

_BATCHES = 2
_MAX_SHARE = 8
"""At most one eighth of the scans is processed in the driver, because the user asked for Ray."""
_CLOSE_TIMEOUT_S = 5.0


class HeadStart:
    """Processes the first scans in the driver; see the module.

    Args:
        decoding: How scans are decoded.
        threads: CPU threads that this process's model was loaded with, or will be.
    """

    def __init__(self, decoding: Decoding, threads: ModelThreads) -> None:
        self._decoding = decoding
        # One scan at a time, because TensorFlow keeps the memory of the largest batch for the whole run.
        self._engine = InlineEngine(1, replace(decoding, batch_scans=1), threads)
        self._prefetched: frozenset[str] = frozenset()
        self._receipts: Future[list[Receipt]] | None = None

    def prefetch_scans(self, scans: Sequence[Scan]) -> None:
        """Begin to decode the first few scans.

        Does nothing if each scan keeps its own size: the model may then need any amount of memory for one
        scan, and the driver must not be killed for it.
        """
        count = min(_BATCHES * self._decoding.batch_scans, len(scans) // _MAX_SHARE)
        if count and self._decoding.decoder.preprocess.size is not None:
            self._prefetched = frozenset(scan.scan_id for scan in scans[:count])
            self._engine.__enter__()
            self._engine.prefetch_scans(scans[:count])

    def start(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Sequence[Scan]:
        """Start to process the prefetched scans that are among `scans`; return the other scans."""
        if not self._prefetched:
            return scans
        here = [scan for scan in scans if scan.scan_id in self._prefetched]
        self._receipts = run_in_thread(lambda scans: list(self._engine.receipts(scans, stages, stop)), here)
        return [scan for scan in scans if scan.scan_id not in self._prefetched]

    def take_receipts(self, timeout_s: float | None) -> list[Receipt]:
        """Return the receipts, once, when all are made; return none if that takes longer than `timeout_s`.

        Raises:
            FeatrayError: The model or the worker process failed, as in `InlineEngine.receipts`.
        """
        receipts = self._receipts
        if receipts is None or not wait([receipts], timeout_s).done:
            return []
        self._receipts = None
        self.close()
        return receipts.result()

    def close(self) -> None:
        """End the worker process, after waiting a few seconds at most for its scans."""
        if self._receipts is not None:
            wait([self._receipts], _CLOSE_TIMEOUT_S)
        if self._prefetched:
            self._engine.__exit__()
            self._prefetched = frozenset()
