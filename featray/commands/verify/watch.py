"""Progress of a long reading: a bar on a terminal, one plain line every ten seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

LINE_S = 10.0

log = logging.getLogger(__name__)


class Watch:
    """Count bytes read back while the `with` block lasts.

    Args:
        total: Bytes to read.
        show: False keeps silent.
    """

    def __init__(self, total: int, *, show: bool) -> None:
        self._total, self._show, self._read = total, show, 0
        self._start = self._said = time.monotonic()
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Watch:
        """Begin to show."""
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(total=self._total, unit="B", unit_scale=True, dynamic_ncols=True)
        return self

    def __exit__(self, *error: object) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()

    def add(self, size: int) -> None:
        """Count a file that was read."""
        self._read += size
        if self._bar is not None:
            self._bar.update(size)
        elif self._show and time.monotonic() - self._said >= LINE_S:
            self._said = time.monotonic()
            log.info("%s", self.line())

    def line(self) -> str:
        """Return the state as one plain line."""
        rate = self._read / max(time.monotonic() - self._start, 1e-9)
        eta = f"{(self._total - self._read) / rate:.0f} s" if rate else "unknown"
        done = f"{self._read / 1e6:.0f} of {self._total / 1e6:.0f} MB"
        return f"read back {done}, {rate / 1e6:.0f} MB/s, ETA {eta}"
