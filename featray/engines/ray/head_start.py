"""Scans that a driver sees to itself while its local Ray comes up, as engine `inline` does.

Starting a Ray, and the actors on it that each load the model, takes some ten seconds; this process holds the
model before that. So a few scans are decoded in one helper and go through the model here: the first is
opened as soon as with engine `inline`, and what is wrong with all scans shows as soon.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait

from featray.config import LimitsConfig
from featray.engines.base import Stages
from featray.engines.inline import InlineEngine
from featray.engines.prefetch import begun
from featray.hardware import ModelThreads
from featray.schema import Receipt, Scan
from featray.stages.decode import Decoder

_BATCHES = 2
_SHARE = 8
"""At most one in so many scans is seen to here: Ray is what was asked for."""
_PATIENCE_S = 5.0


class Meanwhile:
    """See the module.

    Args:
        limits: As configured.
        memory: Bytes decoding one scan may take; None for most of what the machine has.
        threads: What the model of this process was, or will be, loaded with.
    """

    def __init__(self, limits: LimitsConfig, memory: int | None, threads: ModelThreads) -> None:
        self._engine = InlineEngine(1, limits, memory, threads)
        self._begun: frozenset[str] = frozenset()
        self._done: Future[list[Receipt]] | None = None

    def begin(self, scans: Sequence[Scan], decode: Decoder, batch_scans: int) -> None:
        """Begin to decode a few of these scans; arguments as of `Engine.begin`.

        Where inputs have no size of their own the model may take any amount of memory for one, and the
        driver must not die of it: nothing is begun then.
        """
        few = scans[: min(_BATCHES * batch_scans, len(scans) // _SHARE)]
        if few and decode.preprocess.size is not None:
            self._begun = frozenset(scan.scan_id for scan in few)
            self._engine.__enter__()
            self._engine.begin(few, decode, batch_scans)

    def start(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Sequence[Scan]:
        """Start to see to those that were begun and are still asked for; return the others."""
        if not self._begun:
            return scans
        here = [scan for scan in scans if scan.scan_id in self._begun]
        self._done = begun(lambda some: list(self._engine.receipts(some, stages, stop)), here)
        return [scan for scan in scans if scan.scan_id not in self._begun]

    def taken(self, timeout_s: float | None) -> list[Receipt]:
        """Return the receipts, once, as soon as they are complete; none if they are not in that time.

        Raises:
            FeatrayError: As `InlineEngine.receipts`.
        """
        done = self._done
        if done is None or not wait([done], timeout_s).done:
            return []
        self._done = None
        self.close()
        return done.result()

    def close(self) -> None:
        """End the helper, once what it is at is done or has taken a few seconds."""
        if self._done is not None:
            wait([self._done], _PATIENCE_S)
        if self._begun:
            self._engine.__exit__()
            self._begun = frozenset()
