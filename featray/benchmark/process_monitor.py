"""A command in; its wall time, CPU seconds and memory out, of its whole process tree.

Knows nothing of featray. The tree is looked at five times a second: CPU seconds are the last seen of each
process, memory is the sum of proportional shares (PSS), so pages that processes share count once. Shares are
looked at when the tree holds more than ever before: that costs the kernel some 20 ms for each process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

LOOK_S = 0.2
GROWN = 1.02
"""How much more resident memory than before is worth a look at its shares."""
STORE_EVERY = 5
"""Looks at the CPU for each one at the object store."""
GRACE_S = 10.0

_STORE = "plasma"
"""In the name of the file, deleted but open, in which Ray's raylet holds its object store."""
_SPILLERS = ("SpillWorker", "SPILL_WORKER")


@dataclass(frozen=True)
class Watched:
    """What one command took.

    Attributes:
        pid: Of the command itself.
        started_s: Monotonic clock when it was started.
        wall_s: Seconds until it ended.
        exit_code: Negative is a signal's number.
        output: Its stdout.
        errors: Its stderr.
        cpu_s: User and system seconds by process.
        names: What each process is called.
        peak_bytes: Highest sum over the tree.
        peak_by_process: Highest of each process, in bytes; they need not have come at one time.
        store_bytes: Most that Ray's object store held in memory; None where no raylet was seen.
        spilled: Whether Ray started a process that moves objects to disk; None as above.
        watching_cpu_s: What the looking itself took, apart from all of this.
        others_cores: How many cores everything else on this machine kept busy meanwhile.
    """

    pid: int
    started_s: float
    wall_s: float
    exit_code: int
    output: str
    errors: str
    cpu_s: dict[int, float]
    names: dict[int, str]
    peak_bytes: int
    peak_by_process: dict[int, int]
    store_bytes: int | None
    spilled: bool | None
    watching_cpu_s: float
    others_cores: float


def watch(command: Sequence[str], given: Any, env: Mapping[str, str] | None = None) -> Watched:
    """Run a command that reads one JSON document from stdin, and watch it to its end.

    Args:
        command: Program and arguments.
        given: What it finds on stdin.
        env: Its environment; None for this one.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as asked:
        asked.write(json.dumps(given).encode())
        asked.seek(0)
        started, machine = time.monotonic(), _machine_cpu_s()
        process = subprocess.Popen(command, stdin=asked, stdout=out, stderr=err, env=env)
        looks = _Looks(process.pid)
        try:
            process.wait()
            wall, machine = time.monotonic() - started, _machine_cpu_s() - machine
        finally:
            looks.end()
            _end_tree(process, looks.pids)
        out.seek(0)
        err.seek(0)
        output, errors = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    has_store = "raylet" in looks.names.values()
    return Watched(
        pid=process.pid,
        started_s=started,
        wall_s=wall,
        exit_code=process.returncode,
        output=output,
        errors=errors,
        cpu_s={pid: seconds for (pid, _), seconds in looks.cpu_s.items()},
        names=looks.names,
        peak_bytes=looks.peak,
        peak_by_process=looks.peak_of,
        store_bytes=looks.store if has_store else None,
        spilled=looks.spilled if has_store else None,
        watching_cpu_s=looks.own_cpu_s,
        others_cores=max(0.0, machine - sum(looks.cpu_s.values()) - looks.own_cpu_s) / wall,
    )


@dataclass
class _Looks:
    """A thread that looks at a process tree until told to end."""

    root: int
    cpu_s: dict[tuple[int, float], float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    peak_of: dict[int, int] = field(default_factory=dict)
    peak: int = 0
    resident: int = 0
    store: int = 0
    spilled: bool = False
    own_cpu_s: float = 0.0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="featray-watch", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> list[tuple[int, float]]:
        """Every process seen, with when it began: a number may be given out again."""
        return list(self.cpu_s)

    def end(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        look = 0
        while not self._stop.wait(LOOK_S):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                self._look(with_store=look % STORE_EVERY == 0)
            look += 1
        self.own_cpu_s = time.thread_time()

    def _look(self, *, with_store: bool) -> None:
        root = psutil.Process(self.root)
        tree = [root, *root.children(recursive=True)]
        resident = _sum(self._look_at, tree)
        if resident > GROWN * self.resident:
            self.resident = resident
            self.peak = max(self.peak, _sum(self._share, tree))
        if with_store:
            self._look_at_store()

    def _look_at(self, process: psutil.Process) -> int:
        """Note the CPU seconds of a process; return the bytes it holds, shared ones included."""
        times = process.cpu_times()
        key = (process.pid, process.create_time())
        if key not in self.cpu_s:
            self.names[process.pid] = process.name()
            self.spilled |= any(mark in " ".join(process.cmdline()) for mark in _SPILLERS)
        self.cpu_s[key] = times.user + times.system
        return int(process.memory_info().rss)

    def _share(self, process: psutil.Process) -> int:
        used = int(process.memory_full_info().pss)
        self.peak_of[process.pid] = max(self.peak_of.get(process.pid, 0), used)
        return used

    def _look_at_store(self) -> None:
        for pid in [pid for pid, name in self.names.items() if name == "raylet"]:
            with contextlib.suppress(FileNotFoundError):  # it has ended
                self.store = max(self.store, _store_bytes(pid))


def _sum(of: Callable[[psutil.Process], int], tree: Sequence[psutil.Process]) -> int:
    """Return the sum over the processes that are still there."""
    total = 0
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            total += of(process)
    return total


def _machine_cpu_s() -> float:
    """Return the CPU seconds of all cores that were not idle, or were not ours, since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))


def _store_bytes(raylet: int) -> int:
    """Return how much memory the object store's file has taken so far, whichever process filled it."""
    total = 0
    for opened in Path(f"/proc/{raylet}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed since
            if _STORE in os.readlink(opened):
                total += 512 * opened.stat().st_blocks
    return total


def _end_tree(process: subprocess.Popen[bytes], seen: Sequence[tuple[int, float]]) -> None:
    """Wait for what the command left running, then kill what is still there."""
    if process.poll() is None:  # this process is being stopped; the command gets its chance to tidy up
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        process.kill()
        process.wait()
    left = [found for pid, began in seen if (found := _same(pid, began)) is not None]
    _, alive = psutil.wait_procs(left, timeout=GRACE_S)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def _same(pid: int, began: float) -> psutil.Process | None:
    try:
        found = psutil.Process(pid)
        return found if found.create_time() == began else None
    except psutil.NoSuchProcess:
        return None
