"""Show progress on stderr: a bar on a terminal, otherwise one plain line every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tqdm import tqdm

from featray.schema import ScanRecord
from featray.terminal.streams import write_line

LINE_INTERVAL_S = 10.0


class Progress:
    """Count finished work while the `with` block lasts.

    Call it from one thread. The plain lines are printed by a thread of its own.

    Args:
        total: Number of scans, or of bytes, to process.
        unit: What `total` counts. A run counts `scan`; a command that reads files counts `B` (bytes).
        show: Whether to print progress. It is counted in any case.
    """

    def __init__(self, total: int, *, show: bool, unit: Literal["scan", "B"] = "scan") -> None:
        self._total, self._unit, self._show = total, unit, show
        self._done = self._failed = self._bytes = 0
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._bar: tqdm[Any] | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        """Show the bar, or start the thread that prints lines."""
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, unit=self._unit, unit_scale=self._unit == "B", dynamic_ncols=True
            )
        elif self._show:
            self._thread = threading.Thread(target=self._print_lines, name="featray-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the bar, or stop the thread that prints lines."""
        self._stop.set()
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()
        if self._thread is not None:
            self._thread.join()

    def add_records(self, records: Sequence[ScanRecord]) -> None:
        """Count committed scans, how many of them failed, and the bytes that were read for them."""
        self._done += len(records)
        self._failed += sum(record.status == "failed" for record in records)
        self._bytes += sum(record.bytes_read for record in records)
        if self._bar is not None:
            megabytes_s = self._bytes / 1e6 / max(time.monotonic() - self._start, 1e-9)
            self._bar.set_postfix_str(f"{self._failed} failed, {megabytes_s:.0f} MB/s", refresh=False)
            self._move_bar(len(records))

    def add_bytes(self, size: int) -> None:
        """Count the bytes of a file that was read."""
        self._done += size
        self._bytes += size
        self._move_bar(size)

    def state(self) -> dict[str, Any]:
        """Return the state as `format_scans` and `format_bytes` expect it; every value fits into JSON."""
        return {
            "total": self._total,
            "done": self._done,
            "failed": self._failed,
            "bytes_read": self._bytes,
            "seconds": time.monotonic() - self._start,
        }

    def _move_bar(self, step: int) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed; the work goes on
                self._bar.update(step)

    def _print_lines(self) -> None:
        format_line = format_bytes if self._unit == "B" else format_scans
        while not self._stop.wait(LINE_INTERVAL_S):
            write_line(sys.stderr, f"featray: {format_line(self.state())}")


class StepProgress:
    """Show which step of a command is done at present, and the share of the work that is done.

    A terminal shows a bar; otherwise a line is printed at most every ten seconds.

    Args:
        show: Whether to print anything.
    """

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._last_line = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> StepProgress:
        """Show the bar on a terminal."""
        if self._show and sys.stderr.isatty():
            layout = "{percentage:3.0f}%|{bar:20}| {elapsed} {desc}"
            self._bar = tqdm(total=1.0, bar_format=layout, dynamic_ncols=True, leave=False)
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar."""
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.close()

    def report(self, step: str, share: float) -> None:
        """Report the present step, and the share of the whole work that is done, from 0 to 1."""
        if self._bar is not None:
            with contextlib.suppress(OSError):  # the terminal was closed; the work goes on
                self._bar.n = share
                self._bar.set_description_str(step)
        elif self._show and time.monotonic() - self._last_line >= LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            write_line(sys.stderr, f"featray: {100 * share:.0f} % done. {step}")


def format_scans(state: Mapping[str, Any]) -> str:
    """Return the progress of a run as one line.

    Args:
        state: `total`, `done` and `failed` (scans), `bytes_read`, and `seconds` since the start.
    """
    seconds = max(state["seconds"], 1e-9)
    return (
        f"{state['done']}/{state['total']} scans, {state['failed']} failed, "
        f"{state['done'] / seconds:.2f} scans/s, {state['bytes_read'] / 1e6 / seconds:.0f} MB/s, "
        f"ETA {_format_eta(state)}"
    )


def format_bytes(state: Mapping[str, Any]) -> str:
    """Return the progress of reading files as one line.

    Args:
        state: `total` and `done` (bytes), and `seconds` since the start.
    """
    done, rate = state["done"], state["done"] / max(state["seconds"], 1e-9)
    return (
        f"read {done / 1e6:.0f} of {state['total'] / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s, "
        f"ETA {_format_eta(state)}"
    )


def _format_eta(state: Mapping[str, Any]) -> str:
    rate = state["done"] / max(state["seconds"], 1e-9)
    return f"{(state['total'] - state['done']) / rate:.0f} s" if rate else "unknown"
