"""Print answers and errors of the command line, as text or as JSON, and turn Ctrl-C into an event."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from featray.errors import ExitCode
from featray.terminal.streams import write_line

RESUME_HINT = "run the same command again to resume"
_STDERR = 2
_interrupted = threading.Event()
"""Whether a signal came to this process after `interrupt_on_signal`."""
_STOP_MESSAGE = b"\nfeatray: stopping after the scans in progress; press Ctrl-C again to stop at once\n"


def print_answer(args: argparse.Namespace, value: Any, text: str) -> None:
    """Print `text` on stdout, or with --json, `value` as one JSON document on one line."""
    write_line(sys.stdout, json.dumps(value, default=to_json_value) if args.json else text)


def print_error(args: argparse.Namespace, text: str, code: ExitCode) -> None:
    """Print an error on stderr; with --json, also print it as a JSON document on stdout."""
    print_message(text)
    if args.json:
        write_line(sys.stdout, json.dumps({"error": text, "exit_code": int(code)}))


def print_message(text: str) -> None:
    """Print a line for the user on stderr."""
    write_line(sys.stderr, f"featray: {text}")


def align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as lines with aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in padded)


def to_json_value(value: Any) -> Any:
    """Return a value that `json` can write: a dict for a dataclass, a list for a set or tuple, or a text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset | set | tuple):
        return list(value)
    return str(value)


def interrupt_on_signal() -> None:
    """Let Ctrl-C and SIGTERM raise KeyboardInterrupt in this process, and remember that one came.

    Other packages may catch the exception while they are imported; `stop_on_signal` then raises it again.
    """
    _interrupted.clear()

    def handle(_number: int, _frame: FrameType | None) -> None:
        _interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; a second one raises KeyboardInterrupt.

    Raises:
        KeyboardInterrupt: A signal came before, and the exception that it raised was lost.
    """
    if _interrupted.is_set():
        raise KeyboardInterrupt
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        signal.alarm(0)  # Ray's native handler may have run before, and would abort the process after 3 s
        stop.set()
        with contextlib.suppress(OSError):  # stderr may be closed; `print` could be running already
            os.write(_STDERR, _STOP_MESSAGE)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
