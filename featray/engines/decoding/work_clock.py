"""A clock that stands still while this process is suspended: by Ctrl-Z, a batch system, a paused container.

Time limits of scans are measured with it, so that a suspended run does not fail healthy scans. The monotonic
clock of the system is not enough: it stands still only while the whole machine sleeps.
"""

from __future__ import annotations

import threading
import time

_TICK_S = 0.25
_MAX_STEP_S = 1.0
"""Largest step between two readings that counts as time of work. A longer one means that this process could
not run, because the clock is read every quarter of a second."""


class WorkClock:
    """Count the seconds in which this process could run, until `close` is called.

    A thread reads the clock regularly. A suspension therefore adds one second at most.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last, self._worked_s, self._lost_s = time.monotonic(), 0.0, 0.0
        self._closed = threading.Event()
        threading.Thread(target=self._read_regularly, name="featray-clock", daemon=True).start()

    def close(self) -> None:
        """End the thread that reads the clock."""
        self._closed.set()

    def now(self) -> float:
        """Return the seconds of work since the clock was made."""
        with self._lock:
            self._read()
            return self._worked_s

    def lost_s(self) -> float:
        """Return the seconds since the clock was made in which this process could not run."""
        with self._lock:
            self._read()
            return self._lost_s

    def _read(self) -> None:
        now = time.monotonic()
        step, self._last = now - self._last, now
        self._worked_s += min(step, _MAX_STEP_S)
        self._lost_s += max(0.0, step - _MAX_STEP_S)

    def _read_regularly(self) -> None:
        while not self._closed.wait(_TICK_S):
            self.now()
