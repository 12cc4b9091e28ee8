"""The command line of featray, slowed down, and with points at which the process kills itself.

    python -m kill.paced POINT NTH MARKER GROUP extract config.yaml --set run.engine=ray

The arguments after GROUP are those of `featray`, and the run gives the same output. It differs from `featray`
in two ways, both made by replacing functions of featray before the command line starts:

- It is slow enough that a kill meets it in the middle: decoding, writing and committing are preceded by
  pauses, few scans share a file, and each file is committed at once.
- When it reaches POINT for the NTH time, it sends SIGKILL to itself, or, if GROUP is `1`, to its whole
  process group. If NTH is 0, it does so when it reaches POINT while it drops layers. If POINT is `-`, it
  never does.

The points of `kill.rounds.POINTS` are in the driver; `writer` is in the process that writes features, right
after it has written them. On Ray several processes write, so they count how often they have reached the point
with files whose names begin with the path MARKER.
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

DECODE_S, WRITE_S, COMMIT_S = float(os.environ.get("FEATRAY_TEST_DECODE_S", "0.15")), 0.05, 0.15
"""Pauses before each scan is decoded, each file is written, and each commit."""
SCANS_PER_FILE = 3


class PacedDecoder(Decoder):
    """A decoder that pauses before each scan."""

    def __call__(self, scan: Scan) -> Decoded:
        time.sleep(DECODE_S)
        return super().__call__(scan)


def write(extracted: pa.Table, *, marker: str, nth: int, **options: Any) -> Receipt:
    """Write features; the `nth` call of all processes then kills its process, before it returns the receipt.

    Args:
        extracted: As for `featray.stages.write.write`.
        marker: Path with which the names of the counting files begin.
        nth: Number of the call that kills its process; 0 for none.
        options: As for `featray.stages.write.write`.
    """
    time.sleep(WRITE_S)
    receipt = featray.stages.write.write(extracted, **options)
    if nth and _count_call(marker) == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return receipt


def _count_call(marker: str) -> int:
    """Return the number of calls of this function in all processes, including this call."""
    number = 1
    while True:
        try:
            os.close(os.open(f"{marker}.{number}", os.O_CREAT | os.O_EXCL))
            return number
        except FileExistsError:
            number += 1


class _KillPoint:
    """Kills this process, or its group, when the point `name` is reached for the `nth` time."""

    def __init__(self, name: str, nth: int, *, kills_group: bool) -> None:
        self._name, self._nth, self._kills_group = name, nth, kills_group

    def reach(self, name: str) -> None:
        """Kill the process if this is the chosen point and the chosen time."""
        if name != self._name:
            return
        self._nth -= 1
        if self._nth == 0:
            os.killpg(0, signal.SIGKILL) if self._kills_group else os.kill(os.getpid(), signal.SIGKILL)

    def begin_dropping(self) -> None:
        """Note that layers are dropped now."""
        if self._nth <= 0:
            self._nth = 1

    def is_deadly(self, name: str) -> bool:
        """Return whether the process dies the next time that it reaches this point."""
        return name == self._name and self._nth == 1


def main(argv: Sequence[str]) -> None:
    """Slow featray down, insert the points, and run the command line.

    Args:
        argv: POINT, NTH, MARKER, GROUP, and the arguments of `featray`.
    """
    name, nth, marker, group, *command = argv
    point = _KillPoint(name, int(nth), kills_group=group == "1")
    _slow_down(marker, int(nth) if name == "writer" else 0)
    _insert_points(point)
    from featray.cli import main as cli

    sys.argv[1:] = command
    cli.console()


def _slow_down(marker: str, nth: int) -> None:
    patched: Any = job
    patched.Decoder = PacedDecoder
    patched.write = functools.partial(write, marker=marker, nth=nth)
    patched._scans_per_file = lambda scans, values: SCANS_PER_FILE
    pipeline.COMMIT_INTERVAL = 0


def _insert_points(point: _KillPoint) -> None:
    """Insert the points of `kill.rounds.POINTS`, in the order in which a run reaches them.

    `after files`: features are written, but not committed.
    `before commit`: the new rows of the scans table are written too.
    `between tables`: the log of one of the two tables has its entry.
    `after commit`: both logs have their entries, and no superseded file is deleted.
    `during deletes`: half of the superseded files are deleted.
    `before orphan deletion`: everything is committed, and files that no table refers to may be left.
    """
    _call_before(Committer, "commit", lambda: (time.sleep(COMMIT_S), point.reach("after files")))
    _call_before(Committer, "_write_commit", lambda: point.reach("before commit"))
    _kill_between_tables(TableLog, point)
    _call_before(Committer, "_delete_superseded", lambda: point.reach("after commit"))
    _kill_during_deletes(Store, point)
    _call_before(Committer, "drop_layers", point.begin_dropping)
    _call_before(Committer, "delete_orphans", lambda: point.reach("before orphan deletion"))


def _call_before(kind: type, name: str, step: Callable[[], object]) -> None:
    """Make a method of a class call `step` first."""
    original = getattr(kind, name)

    def call_both(self: Any, *args: Any, **kwargs: Any) -> Any:
        step()
        return original(self, *args, **kwargs)

    setattr(kind, name, call_both)


def _kill_between_tables(table_log: Any, point: _KillPoint) -> None:
    """Put the point before the second log entry of a commit, the one without a pending commit."""
    original = table_log.append

    def append(self: Any, *args: Any, pending: Any = None, **kwargs: Any) -> None:
        if pending is None:
            point.reach("between tables")
        original(self, *args, pending=pending, **kwargs)

    table_log.append = append


def _kill_during_deletes(store: Any, point: _KillPoint) -> None:
    """Put the point into the deletion of data files, after half of them, and at least one, are deleted."""
    original = store.delete

    def delete(self: Any, names: Sequence[str]) -> None:
        data = [name for name in names if name.endswith(".parquet")]
        if data:
            if point.is_deadly("during deletes"):
                original(self, data[: (len(data) + 1) // 2])
            point.reach("during deletes")
        original(self, names)

    store.delete = delete


if __name__ == "__main__":
    # Import this module under its own name, because worker processes and Ray cannot find classes of __main__.
    from kill import paced

    paced.main(sys.argv[1:])
