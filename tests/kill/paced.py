"""The command line at a pace that a kill can meet in the middle, and with points where it kills itself.

    python -m kill.paced POINT NTH MARKER GROUP extract config.yaml --set run.engine=ray

Only the pace differs from `featray`: pauses, few scans per file, a commit for each file. The process kills
itself the NTH time it comes to POINT (`-`: never); with GROUP `1` its whole process group. MARKER is a path
that writers in other processes count at.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

import featray.stages.write
from featray import job, pipeline
from featray.output.delta_log import TableLog
from featray.schema import Decoded, Receipt, Scan
from featray.stages.commit import Committer
from featray.stages.decode import Decoder
from featray.storage.store import Store

DECODE_S, WRITE_S, COMMIT_S = 0.15, 0.05, 0.15
SCANS_PER_FILE = 3


class PacedDecoder(Decoder):
    """A decoder that takes a while."""

    def __call__(self, scan: Scan) -> Decoded:
        time.sleep(DECODE_S)
        return super().__call__(scan)


def write(extracted: pa.Table, *, marker: str, nth: int, **how: Any) -> Receipt:
    """Write, and die the NTH time when the files are there and nobody was told: `nth` 0 never does."""
    time.sleep(WRITE_S)
    receipt = featray.stages.write.write(extracted, **how)
    if nth and _count(marker) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return receipt


def _count(marker: str) -> int:
    """Return the how-manieth caller this is, over all processes."""
    number = 1
    while True:
        try:
            os.close(os.open(f"{marker}.{number}", os.O_CREAT | os.O_EXCL))
            return number
        except FileExistsError:
            number += 1


class _Point:
    """Kills this process the `nth` time that one of its points is passed under the chosen name."""

    def __init__(self, name: str, nth: int, group: bool) -> None:
        self._name, self._nth, self._group = name, nth, group

    def pass_by(self, name: str) -> None:
        if name != self._name:
            return
        self._nth -= 1
        if self._nth == 0:
            os.killpg(0, signal.SIGKILL) if self._group else os.kill(os.getpid(), signal.SIGKILL)

    def comes_next(self, name: str) -> bool:
        return name == self._name and self._nth == 1


def main(argv: Sequence[str]) -> None:
    """Run the command line with the patches of the module's text."""
    name, nth, marker, group, *command = argv
    point = _Point(name, int(nth), group == "1")
    _slow_down(marker, int(nth) if name == "writer" else 0)
    _put_points(point)
    from featray.cli import main as cli

    sys.argv[1:] = command
    cli.console()


def _slow_down(marker: str, nth: int) -> None:
    patched: Any = job
    patched.Decoder = PacedDecoder
    patched.write = functools.partial(write, marker=marker, nth=nth)
    patched._scans_per_file = lambda scans, values: SCANS_PER_FILE
    pipeline.COMMIT_INTERVAL = 0


def _put_points(point: _Point) -> None:
    committer, table_log, store = Committer, TableLog, Store
    _before(committer, "commit", lambda: (time.sleep(COMMIT_S), point.pass_by("after files")))
    _before(committer, "_write_commit", lambda: point.pass_by("before commit"))
    _before(committer, "_delete_superseded", lambda: point.pass_by("after commit"))
    _before(committer, "delete_orphans", lambda: point.pass_by("before sweep"))
    _at_second_table(table_log, point)
    _amid_deletes(store, point)


def _before(kind: Any, name: str, step: Callable[[], object]) -> None:
    original = getattr(kind, name)

    def stepping(self: Any, *args: Any, **kwargs: Any) -> Any:
        step()
        return original(self, *args, **kwargs)

    setattr(kind, name, stepping)


def _at_second_table(table_log: Any, point: _Point) -> None:
    """The entry without a pending commit is the second of the two that make a commit."""
    original = table_log.append

    def append(self: Any, *args: Any, pending: Any = None, **kwargs: Any) -> None:
        if pending is None:
            point.pass_by("between tables")
        original(self, *args, pending=pending, **kwargs)

    table_log.append = append


def _amid_deletes(store: Any, point: _Point) -> None:
    """Delete half of what a commit has superseded, at least one file, and die."""
    original = store.delete

    def delete(self: Any, names: Sequence[str]) -> None:
        data = [name for name in names if name.endswith(".parquet")]
        if data:
            if point.comes_next("amid deletes"):
                original(self, data[: (len(data) + 1) // 2])
            point.pass_by("amid deletes")
        original(self, names)

    store.delete = delete


if __name__ == "__main__":
    # Once more under the module's own name, so that helpers and Ray find its classes there.
    from kill import paced

    paced.main(sys.argv[1:])
