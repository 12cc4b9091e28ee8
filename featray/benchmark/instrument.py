"""Record each call of a stage during a run, and read the records afterwards.

Each process appends one line per call to a file of its own, so the calls of a killed process are not lost.
Times are of the machine's monotonic clock, which all processes share.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

STAGES = ("decode", "model", "write")


@dataclass(frozen=True)
class StageCalls:
    """All calls of one stage in one run, over all processes.

    Attributes:
        calls: Number of calls.
        wall_s: Sum of the wall seconds of the calls.
        cpu_s: Sum of the CPU seconds. For `model`, the CPU seconds of the whole process while at least one
            call runs; for the other stages, those of the calling threads.
        first_s: Monotonic clock at the start of the first call.
        last_s: Monotonic clock at the end of the last call.
        max_concurrent: Largest number of calls that ran at the same time.
        pids: The processes that made the calls.
    """

    calls: int
    wall_s: float
    cpu_s: float
    first_s: float
    last_s: float
    max_concurrent: int
    pids: frozenset[int]


@dataclass(frozen=True)
class StageRecorder:
    """The instrument of a measured run: it records each call of a stage in a file in `folder`."""

    folder: str

    def __call__(self, name: str, stage: Callable[..., Any]) -> Any:
        """Return a callable that calls `stage` and records each call."""
        return _RecordedStage(stage, name, self.folder)


def read_recordings(folder: Path) -> dict[str, StageCalls]:
    """Return the recorded calls by stage; a stage that was never called is not included."""
    calls_by_stage: dict[str, list[_Call]] = {stage: [] for stage in STAGES}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            stage, *times = json.loads(line)
            calls_by_stage[stage].append(_Call(int(path.stem), *times))
    return {
        stage: _sum_calls(calls, process_clock=stage == "model")
        for stage, calls in calls_by_stage.items()
        if calls
    }


class _Call(NamedTuple):
    """One call: monotonic clock and CPU clock at its start and at its end."""

    pid: int
    start: float
    end: float
    cpu_start: float
    cpu_end: float


def _sum_calls(calls: list[_Call], *, process_clock: bool) -> StageCalls:
    """Return the totals of the calls.

    Args:
        calls: At least one call.
        process_clock: Whether the CPU clock is that of the process, which counts the CPU seconds of all calls
            that run at the same time, or that of the calling thread.
    """
    return StageCalls(
        calls=len(calls),
        wall_s=sum(call.end - call.start for call in calls),
        cpu_s=sum(
            call.cpu_end - call.cpu_start for call in (_merge_overlapping(calls) if process_clock else calls)
        ),
        first_s=min(call.start for call in calls),
        last_s=max(call.end for call in calls),
        max_concurrent=_count_max_concurrent(calls),
        pids=frozenset(call.pid for call in calls),
    )


def _merge_overlapping(calls: Iterable[_Call]) -> list[_Call]:
    """Merge the calls of one process that overlap in time, so that its CPU clock is not counted twice."""
    merged: list[_Call] = []
    for call in sorted(calls):
        last = merged[-1] if merged else None
        if last is None or call.pid != last.pid or call.start > last.end:
            merged.append(call)
        elif call.end > last.end:
            merged[-1] = last._replace(end=call.end, cpu_end=call.cpu_end)
    return merged


def _count_max_concurrent(calls: Iterable[_Call]) -> int:
    """Return the largest number of calls that ran at the same time."""
    changes = sorted([(call.start, 1) for call in calls] + [(call.end, -1) for call in calls])
    return max(itertools.accumulate(step for _, step in changes))


class _RecordedStage:
    """A stage whose calls are recorded; all other attributes are those of the stage itself."""

    def __init__(self, stage: Callable[..., Any], name: str, folder: str) -> None:
        self._stage, self._name, self._folder = stage, name, folder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        read_cpu_clock = time.process_time if self._name == "model" else time.thread_time
        start, cpu_start = time.monotonic(), read_cpu_clock()
        try:
            return self._stage(*args, **kwargs)
        finally:
            _append_line(self._folder, [self._name, start, time.monotonic(), cpu_start, read_cpu_clock()])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while this object is unpickled and has no `_stage` yet
            raise AttributeError(name)
        return getattr(self._stage, name)


def _append_line(folder: str, line: list[str | float]) -> None:
    os.write(_open_recording(folder, os.getpid()), (json.dumps(line) + "\n").encode())


@functools.cache
def _open_recording(folder: str, pid: int) -> int:
    """Return the descriptor of this process's file, which stays open until the process ends."""
    return os.open(f"{folder}/{pid}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
