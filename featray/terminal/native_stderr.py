"""Filter the output of native libraries on stderr, because they bypass Python's logging."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

from featray.terminal.streams import open_closed_files

_STDERR = 2
_lock = threading.Lock()
_patterns: list[re.Pattern[bytes]] = []
"""Patterns of all filters that began since stderr was captured; all of them filter the same stderr."""
_active_filters = 0
_captured: IO[bytes] | None = None
_original_stderr = -1


@contextlib.contextmanager
def filter_stderr(unwanted: re.Pattern[bytes]) -> Iterator[None]:
    """Capture stderr of this process; at the end, write out all lines that `unwanted` does not match.

    The pattern is matched at the start of each line. Several threads may filter at the same time. The last
    one to end writes out the lines that none of the patterns match.
    """
    _start_capture(unwanted)
    try:
        yield
    finally:
        _end_capture()


def _start_capture(unwanted: re.Pattern[bytes]) -> None:
    global _active_filters, _captured, _original_stderr  # the process has one stderr
    with _lock:
        _active_filters += 1
        _patterns.append(unwanted)
        if _active_filters == 1:
            open_closed_files()
            _flush_stderr()
            _original_stderr = os.dup(_STDERR)
            _captured = tempfile.TemporaryFile()  # noqa: SIM115  # the last filter to end closes it
            os.dup2(_captured.fileno(), _STDERR)


def write_captured_lines() -> None:
    """End the capture of all filters: for a process that ends while threads of it are still filtering."""
    with _lock:
        _restore_stderr()


def _end_capture() -> None:
    global _active_filters  # the process has one stderr
    with _lock:
        _active_filters -= 1
        if not _active_filters:
            _restore_stderr()


def _restore_stderr() -> None:
    """Write the captured lines that are wanted to stderr, unless that has been done."""
    global _captured  # the process has one stderr
    if _captured is None:
        return
    _flush_stderr()
    os.dup2(_original_stderr, _STDERR)
    os.close(_original_stderr)
    with _captured:
        _captured.seek(0)
        lines = [line for line in _captured if not any(pattern.match(line) for pattern in _patterns)]
    _patterns.clear()
    _captured = None
    with contextlib.suppress(OSError):  # no process reads stderr any more
        os.write(_STDERR, b"".join(lines))


def _flush_stderr() -> None:
    if sys.stderr is not None:  # a process without a terminal may have none
        with contextlib.suppress(OSError):
            sys.stderr.flush()
