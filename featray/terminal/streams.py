"""Make stdout and stderr safe for any text, also if they are closed or not UTF-8; end the process at once."""

from __future__ import annotations

import atexit
import io
import os
import sys
from typing import NoReturn, TextIO

_STANDARD_FILES = (0, 1, 2)


def make_streams_robust() -> None:
    """Make every text printable: characters that the terminal lacks are replaced, and closed streams discard.

    Call this first: a file that is opened while stdout or stderr is closed would take its place.
    """
    open_closed_files()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def open_closed_files() -> None:
    """Open the null device in place of each of stdin, stdout and stderr that is closed."""
    for number in _STANDARD_FILES:
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            os.dup2(opened, number)  # also lets child processes inherit it
            if opened != number:
                os.close(opened)


def write_line(stream: TextIO, text: str) -> None:
    """Write a line; if the reader has closed the pipe, as `| head` does, discard it and all later lines.

    The work of a command does not depend on its reader.
    """
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        discard(stream)


def discard(stream: TextIO) -> None:
    """Make a stream discard all text that is written to it, also its buffered text."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def flush_streams() -> None:
    """Write the buffered text of stdout and stderr, so that Python does not fail to do so when it ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            discard(stream)


def exit_at_once(code: int) -> NoReturn:
    """End this process with the exit code, also if threads are running or native code was interrupted."""
    atexit._run_exitfuncs()  # ends worker processes and a local Ray
    flush_streams()
    os._exit(code)
