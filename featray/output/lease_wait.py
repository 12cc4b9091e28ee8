"""Wait until no active run holds an output (`--wait`)."""

from __future__ import annotations

import logging
import math
import threading
import time

from featray.errors import HeldOutputError, InterruptedWaitError
from featray.output.lease import raise_if_locked
from featray.storage.store import Store

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between two looks at the leases of an output."""
REPORT_S = 60.0
"""Seconds between two messages about the same holder."""


class LeaseWait:
    """How long one command waits for an output that other runs hold, over all its attempts together.

    Args:
        wait_s: Seconds to wait for; 0 to give up at once, infinity to wait without an end.
        stop: Event that ends the wait.
    """

    def __init__(self, wait_s: float, stop: threading.Event | None = None) -> None:
        self._wait_s, self._stop = wait_s, stop or threading.Event()
        self._end = time.monotonic() + wait_s
        self._holder, self._next_report = "", 0.0

    def wait(self, store: Store, error: HeldOutputError) -> None:
        """Return when no active run holds the output any more. Another one may take it before the caller.

        Args:
            store: The output folder.
            error: The error that names the run which holds the output.

        Raises:
            HeldOutputError: The time is over, and a run still holds the output.
            InterruptedWaitError: The event was set.
        """
        while True:
            left_s = self._end - time.monotonic()
            if left_s <= 0:
                raise error if self._wait_s <= 0 else error.add_wait(self._wait_s)
            self._report(error.holder, left_s)
            if self._stop.wait(min(POLL_S, left_s)):
                raise InterruptedWaitError(
                    "stopped while waiting for the output, before any work; run the same command again"
                )
            try:
                raise_if_locked(store)
            except HeldOutputError as still_held:
                error = still_held
            else:
                log.info("the output is free")
                return

    def _report(self, holder: str, left_s: float) -> None:
        """Log who holds the output: at once if that is news, otherwise at intervals."""
        now = time.monotonic()
        if holder == self._holder and now < self._next_report:
            return
        limit = "" if math.isinf(left_s) else f" for at most {left_s:.0f} s"
        still = "still " if holder == self._holder else ""
        log.info("%s; %swaiting%s", holder, still, limit)
        self._holder, self._next_report = holder, now + REPORT_S
