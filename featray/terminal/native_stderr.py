"""Keep native libraries from talking over the answer: they write to stderr past Python's logging."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

_lock = threading.Lock()
_patterns: list[re.Pattern[bytes]] = []
"""Of those who hold stderr back just now, and of who has since they began: it is one for all threads."""
_users = 0
_held: IO[bytes] | None = None
_kept = -1


@contextlib.contextmanager
def hold_back(chatter: re.Pattern[bytes]) -> Iterator[None]:
    """Hold back what is written to stderr; at the end, pass on every line that `chatter` does not match.

    Threads may do so at the same time; the last one to end passes on what none of them wanted to hold back.
    """
    _begin(chatter)
    try:
        yield
    finally:
        _end()


def _begin(chatter: re.Pattern[bytes]) -> None:
    global _users, _held, _kept  # there is one stderr
    with _lock:
        _users += 1
        _patterns.append(chatter)
        if _users == 1:
            sys.stderr.flush()
            _kept, _held = os.dup(2), tempfile.TemporaryFile()  # noqa: SIM115  # closed by the last to end
            os.dup2(_held.fileno(), 2)


def _end() -> None:
    global _users, _held  # as above
    with _lock:
        _users -= 1
        if _users:
            return
        sys.stderr.flush()
        os.dup2(_kept, 2)
        os.close(_kept)
        assert _held is not None, "_begin has opened it"
        with _held:
            _held.seek(0)
            lines = [line for line in _held if not any(pattern.match(line) for pattern in _patterns)]
        os.write(2, b"".join(lines))
        _patterns.clear()
        _held = None
