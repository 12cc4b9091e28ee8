"""Stages in, the same stages out that also write down when they worked; and what was written down.

Each process appends to a file of its own, one line per call, so that what a killed process did is known
too. The clock is the machine's monotonic one, which all processes share.
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
class Work:
    """What all processes together did in one stage.

    Attributes:
        calls: Number of calls.
        wall_s: Seconds inside of them, summed over processes.
        cpu_s: CPU seconds, likewise; of `model` those of its process while any call is under way, else those
            of the calling threads.
        first_s: Monotonic clock when the first call began.
        last_s: When the last one ended.
        at_once: Most calls under way at one time.
        pids: The processes.
    """

    calls: int
    wall_s: float
    cpu_s: float
    first_s: float
    last_s: float
    at_once: int
    pids: frozenset[int]


@dataclass(frozen=True)
class StageRecorder:
    """The instrument of a measured run: each call of a stage is recorded in a file of `folder`."""

    folder: str

    def __call__(self, name: str, stage: Callable[..., Any]) -> Any:
        """Return the stage with every call recorded."""
        return _Observed(stage, name, self.folder)


def noted(folder: Path) -> dict[str, Work]:
    """Return what `observed` stages have written down, by stage; a stage never called is left out."""
    lines: dict[str, list[_Call]] = {stage: [] for stage in STAGES}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            stage, *clocks = json.loads(line)
            lines[stage].append(_Call(int(path.stem), *clocks))
    return {stage: _summed(calls, shared=stage == "model") for stage, calls in lines.items() if calls}


class _Call(NamedTuple):
    """One call: monotonic clock and CPU clock when it began and when it ended."""

    pid: int
    start: float
    end: float
    cpu_start: float
    cpu_end: float


def _summed(calls: list[_Call], *, shared: bool) -> Work:
    return Work(
        calls=len(calls),
        wall_s=sum(call.end - call.start for call in calls),
        cpu_s=sum(call.cpu_end - call.cpu_start for call in (_merged(calls) if shared else calls)),
        first_s=min(call.start for call in calls),
        last_s=max(call.end for call in calls),
        at_once=_at_once(calls),
        pids=frozenset(call.pid for call in calls),
    )


def _merged(calls: Iterable[_Call]) -> list[_Call]:
    """Return calls of one process that overlap as one: its CPU clock counts what all of them use."""
    merged: list[_Call] = []
    for call in sorted(calls):
        last = merged[-1] if merged else None
        if last is None or call.pid != last.pid or call.start > last.end:
            merged.append(call)
        elif call.end > last.end:
            merged[-1] = last._replace(end=call.end, cpu_end=call.cpu_end)
    return merged


def _at_once(calls: Iterable[_Call]) -> int:
    """Return how many of the calls overlap at most."""
    changes = sorted([(call.start, 1) for call in calls] + [(call.end, -1) for call in calls])
    return max(itertools.accumulate(step for _, step in changes))


class _Observed:
    """One stage's callable; whatever else is asked of it is answered by the stage itself."""

    def __init__(self, stage: Callable[..., Any], name: str, folder: str) -> None:
        self._stage, self._name, self._folder = stage, name, folder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clock = time.process_time if self._name == "model" else time.thread_time
        start, cpu = time.monotonic(), clock()
        try:
            return self._stage(*args, **kwargs)
        finally:
            _note(self._folder, [self._name, start, time.monotonic(), cpu, clock()])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # also while it is unpickled and has no `_stage` yet
            raise AttributeError(name)
        return getattr(self._stage, name)


def _note(folder: str, line: list[str | float]) -> None:
    os.write(_opened(folder, os.getpid()), (json.dumps(line) + "\n").encode())


@functools.cache
def _opened(folder: str, pid: int) -> int:
    """Return this process's file; it stays open as long as the process lives."""
    return os.open(f"{folder}/{pid}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
