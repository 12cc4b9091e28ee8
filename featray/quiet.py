"""Keep native libraries from talking over the answer: they write to stderr past Python's logging."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def hold_back(chatter: re.Pattern[bytes]) -> Iterator[None]:
    """Hold back what is written to stderr; at the end, pass on every line that `chatter` does not match."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not chatter.match(line)))
