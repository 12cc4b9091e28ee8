"""Run a command and measure the wall time, CPU seconds and memory of its whole process tree.

This module knows nothing of featray. It samples the tree five times a second. The CPU seconds of a process
are those of its last sample. Memory is the sum of the proportional set sizes (PSS), in which pages that
processes share count once. The PSS is read only when the resident memory of the tree has grown, because
reading it costs the kernel about 20 ms per process.
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

SAMPLE_INTERVAL_S = 0.2
MIN_GROWTH = 1.02
"""Growth of the resident memory, as a factor, from which on the PSS is read again."""
STORE_INTERVAL = 5
"""Number of samples of the process tree for each sample of the object store."""
END_TIMEOUT_S = 10.0
"""Seconds that processes get to end by themselves before they are killed."""

_STORE = "plasma"
"""Part of the name of the file that holds Ray's object store; Ray's raylet keeps it open but deleted."""
_SPILL_WORKERS = ("SpillWorker", "SPILL_WORKER")


@dataclass(frozen=True)
class CommandUsage:
    """The output of one command and the resources that it used.

    Attributes:
        pid: Process id of the command itself.
        started_s: Monotonic clock at the start.
        wall_s: Seconds until the command ended.
        exit_code: Exit code, or a negative signal number.
        output: Text from stdout.
        errors: Text from stderr.
        cpu_s: User and system CPU seconds by process id.
        names: Process names by process id.
        peak_bytes: Largest memory of the whole tree.
        peak_by_process: Largest memory of each process in bytes; these peaks may be at different times.
        store_bytes: Largest memory of Ray's object store; None if the tree had no raylet.
        spilled: Whether Ray started a process that moves objects to disk; None if the tree had no raylet.
        monitor_cpu_s: CPU seconds of the monitoring, which `cpu_s` does not include.
        background_cores: Mean number of cores that all other processes of the machine used.
        samples: For each sample, the monotonic clock and the CPU seconds of the whole tree up to then.
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
    monitor_cpu_s: float
    background_cores: float
    samples: tuple[tuple[float, float], ...] = ()

    def get_cpu_s(self, since_start_s: float) -> float:
        """Return the CPU seconds that the tree had used that long after the start, by the next sample."""
        for clock, cpu_s in self.samples:
            if clock >= self.started_s + since_start_s:
                return cpu_s
        return sum(self.cpu_s.values())


def monitor_command(
    command: Sequence[str], document: Any, env: Mapping[str, str] | None = None
) -> CommandUsage:
    """Run a command that reads one JSON document from stdin, and measure it until it ends.

    If this process is interrupted, the whole process tree of the command is ended.

    Args:
        command: Program and arguments.
        document: Content of stdin, JSON-ready.
        env: Environment of the command; None for that of this process.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as stdin:
        stdin.write(json.dumps(document).encode())
        stdin.seek(0)
        started, machine_start_s = time.monotonic(), _read_machine_cpu_s()
        process = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=err, env=env)
        sampler = _TreeSampler(process.pid)
        try:
            process.wait()
            wall_s, machine_s = time.monotonic() - started, _read_machine_cpu_s() - machine_start_s
        finally:
            sampler.stop()
            _end_tree(process, sampler.processes)
        out.seek(0)
        err.seek(0)
        output, errors = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    has_store = "raylet" in sampler.names.values()
    background_cpu_s = max(0.0, machine_s - sum(sampler.cpu_s.values()) - sampler.own_cpu_s)
    return CommandUsage(
        pid=process.pid,
        started_s=started,
        wall_s=wall_s,
        exit_code=process.returncode,
        output=output,
        errors=errors,
        cpu_s={pid: seconds for (pid, _), seconds in sampler.cpu_s.items()},
        names=sampler.names,
        peak_bytes=sampler.peak_bytes,
        peak_by_process=sampler.peak_by_process,
        store_bytes=sampler.store_bytes if has_store else None,
        spilled=sampler.spilled if has_store else None,
        monitor_cpu_s=sampler.own_cpu_s,
        background_cores=background_cpu_s / wall_s,
        samples=tuple(sampler.samples),
    )


@dataclass
class _TreeSampler:
    """A thread that samples a process tree until `stop` is called.

    Processes are identified by id and creation time, because the system uses ids again.
    """

    root: int
    cpu_s: dict[tuple[int, float], float] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    peak_by_process: dict[int, int] = field(default_factory=dict)
    peak_bytes: int = 0
    resident_bytes: int = 0
    store_bytes: int = 0
    spilled: bool = False
    own_cpu_s: float = 0.0
    samples: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="featray-monitor", daemon=True)
        self._thread.start()

    @property
    def processes(self) -> list[tuple[int, float]]:
        """Process id and creation time of every process that was sampled."""
        return list(self.cpu_s)

    def stop(self) -> None:
        """Stop sampling and wait for the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        sample = 0
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            with contextlib.suppress(psutil.NoSuchProcess):  # the command has just ended
                self._sample_tree(with_store=sample % STORE_INTERVAL == 0)
            sample += 1
        self.own_cpu_s = time.thread_time()

    def _sample_tree(self, *, with_store: bool) -> None:
        root = psutil.Process(self.root)
        tree = [root, *root.children(recursive=True)]
        resident_bytes = _sum_running(self._sample_process, tree)
        self.samples.append((time.monotonic(), sum(self.cpu_s.values())))
        if resident_bytes > MIN_GROWTH * self.resident_bytes:
            self.resident_bytes = resident_bytes
            self.peak_bytes = max(self.peak_bytes, _sum_running(self._sample_memory, tree))
        if with_store:
            self._sample_store()

    def _sample_process(self, process: psutil.Process) -> int:
        """Store the CPU seconds of a process; return its resident bytes, including shared pages."""
        times = process.cpu_times()
        key = (process.pid, process.create_time())
        if key not in self.cpu_s:
            self.names[process.pid] = process.name()
            self.spilled |= any(mark in " ".join(process.cmdline()) for mark in _SPILL_WORKERS)
        self.cpu_s[key] = times.user + times.system
        return int(process.memory_info().rss)

    def _sample_memory(self, process: psutil.Process) -> int:
        """Store and return the PSS of a process in bytes."""
        pss = int(process.memory_full_info().pss)
        self.peak_by_process[process.pid] = max(self.peak_by_process.get(process.pid, 0), pss)
        return pss

    def _sample_store(self) -> None:
        for pid in [pid for pid, name in self.names.items() if name == "raylet"]:
            with contextlib.suppress(FileNotFoundError):  # the raylet has ended
                self.store_bytes = max(self.store_bytes, _read_store_bytes(pid))


def _sum_running(read: Callable[[psutil.Process], int], tree: Sequence[psutil.Process]) -> int:
    """Return the sum of `read(process)` over the processes that still run."""
    total = 0
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            total += read(process)
    return total


def _read_machine_cpu_s() -> float:
    """Return the CPU seconds that all processes used since the machine started, including stolen time."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + getattr(times, "steal", 0.0))


def _read_store_bytes(raylet: int) -> int:
    """Return the memory that the file of the object store has taken so far, whichever process wrote to it.

    Args:
        raylet: Process id of the raylet.
    """
    total = 0
    for descriptor in Path(f"/proc/{raylet}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            if _STORE in os.readlink(descriptor):
                total += 512 * descriptor.stat().st_blocks
    return total


def _end_tree(process: subprocess.Popen[bytes], sampled: Sequence[tuple[int, float]]) -> None:
    """End the command if it still runs, wait for its remaining processes, then kill those that still run."""
    if process.poll() is None:  # this process is interrupted: let the command clean up first
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_TIMEOUT_S)
        process.kill()
        process.wait()
    remaining = [found for pid, created in sampled if (found := _find_running(pid, created)) is not None]
    _, alive = psutil.wait_procs(remaining, timeout=END_TIMEOUT_S)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()


def _find_running(pid: int, created: float) -> psutil.Process | None:
    """Return the process if it still runs, and None if another process has its id."""
    try:
        process = psutil.Process(pid)
        return process if process.create_time() == created else None
    except psutil.NoSuchProcess:
        return None
