"""Progress on stderr: a bar on a terminal, one plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from featray.schema import ScanRecord

LINE_S = 10.0


class Progress:
    """Count committed scans while the `with` block lasts.

    Args:
        total: Scans to do.
        show: False keeps silent.
    """

    def __init__(self, total: int, *, show: bool) -> None:
        self._total, self._show = total, show
        self._done = self._failed = self._bytes = 0
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._bar: tqdm[Any] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        """Begin to show."""
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(total=self._total, unit="scan", dynamic_ncols=True)
        elif self._show:
            self._thread = threading.Thread(target=self._print_lines, name="featray-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End the bar, or the lines."""
        self._stop.set()
        if self._bar is not None:
            self._bar.close()
        if self._thread is not None:
            self._thread.join()

    def add(self, records: Sequence[ScanRecord]) -> None:
        """Count scans that are committed."""
        self._done += len(records)
        self._failed += sum(record.status == "failed" for record in records)
        self._bytes += sum(record.bytes_read for record in records)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._failed} failed, {self._megabytes_s():.0f} MB/s", refresh=False)
            self._bar.update(len(records))

    def state(self) -> dict[str, Any]:
        """Return the state, JSON-ready, as `line_of` takes it."""
        return {
            "total": self._total,
            "done": self._done,
            "failed": self._failed,
            "bytes_read": self._bytes,
            "seconds": time.monotonic() - self._start,
        }

    def _megabytes_s(self) -> float:
        return self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-9)

    def _print_lines(self) -> None:
        while not self._stop.wait(LINE_S):
            print(f"featray: {line_of(self.state())}", file=sys.stderr, flush=True)


def line_of(state: Mapping[str, Any]) -> str:
    """Return how far a run is as one plain line.

    Args:
        state: Scans in `total`, `done`, and of these `failed`; `bytes_read` by then, in so many `seconds`.
    """
    total, done, seconds = state["total"], state["done"], max(state["seconds"], 1e-9)
    rate = done / seconds
    eta = f"{(total - done) / rate:.0f} s" if rate else "unknown"
    return (
        f"{done}/{total} scans, {state['failed']} failed, {rate:.2f} scans/s, "
        f"{state['bytes_read'] / 1e6 / seconds:.0f} MB/s, ETA {eta}"
    )
