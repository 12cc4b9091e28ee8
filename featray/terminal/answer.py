"""Answers to the terminal: words or one JSON document on stdout, complaints on stderr, Ctrl-C as an event."""

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

RESUME = "run the same command again to resume"


def answer(args: argparse.Namespace, value: Any, text: str) -> None:
    """Print the answer: words for a person, or one JSON document as the last line."""
    try:
        print(json.dumps(value, default=plain) if args.json else text, flush=True)
    except BrokenPipeError:  # whoever read the answer has left, as `| head` does; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(args: argparse.Namespace, text: str, code: ExitCode) -> None:
    """Say on stderr what went wrong; with --json, as the answer too."""
    print(f"featray: {text}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text, "exit_code": int(code)}), flush=True)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in padded)


def plain(value: Any) -> Any:
    """Return what JSON has no word for as what it has one for."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset | set | tuple):
        return list(value)
    return str(value)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C (or SIGTERM) sets; the second one raises at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print(
            "\nfeatray: stopping after what is in flight; again to stop at once", file=sys.stderr, flush=True
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
