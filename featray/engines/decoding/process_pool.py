"""A pool of worker processes: tasks in, one result of each task out, also when processes die or hang.

Each worker process has a pipe of its own and shares no lock with others. A process that is killed or hangs
therefore loses only the task it was working on; its other tasks go to a new process. If a process dies before
it has loaded the work, no task is blamed.
"""

from __future__ import annotations

import atexit
import pickle
import signal
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any, Literal

from featray.engines.decoding.work_clock import WorkClock
from featray.engines.decoding.worker_process import (
    Message,
    TaskLimits,
    WorkerProcess,
    start_worker_process,
)
from featray.errors import FeatrayError

START_TIMEOUT_S = 300.0
"""Seconds that a worker process may take to start; imports are slow on a busy machine."""
MAX_DEAD_STARTS = 10
"""Number of processes in a row that die before they have loaded the work; then no other one is started."""
_MAX_WAIT_S = 60.0
_CRASH_GRACE_S = 1.0

Failure = Literal["", "crash", "timeout", "suspended"]


@dataclass(frozen=True)
class TaskResult:
    """The result of one task, or how its process ended.

    Attributes:
        task: As submitted.
        result: Return value of the work; None after a failure.
        failure: `crash`, `timeout` or `suspended`; empty with a result. After `suspended` nothing is known
            about the task: its process was suspended for too long, and was ended.
        exit_code: Exit code of the process after a failure; a negative number is a signal.
    """

    task: Any
    result: Any = None
    failure: Failure = ""
    exit_code: int | None = None


class WorkerPool:
    """Worker processes that run the same work on their tasks, in order.

    Args:
        count: Number of processes.
        timeout_s: Seconds that a task may take; then its process is killed.
        memory: Bytes that a task may take in addition to its process's memory; None for no limit.
    """

    def __init__(self, count: int, timeout_s: float, memory: int | None = None) -> None:
        self._limits = TaskLimits(timeout_s, memory)
        self._work: bytes | None = None
        self._dead_starts = 0
        self._closed = False
        self._clock = WorkClock()
        self._processes = [self._start() for _ in range(count)]
        self._results: list[TaskResult] = []

    def set_work(self, work: bytes) -> None:
        """Set the function that runs on each later task: a pickled `work(task)`.

        If it has a method `prepare`, that is called once in each process. A process that dies in it counts as
        not started, and no task is blamed.
        """
        self._work = work
        for process in self._processes:
            self._send_work(process)

    def grow(self, count: int) -> None:
        """Start processes until there are `count` of them."""
        self._processes += [self._start() for _ in range(count - len(self._processes))]

    def count_processes(self) -> int:
        """Return the number of processes."""
        return len(self._processes)

    def submit(self, task: Any) -> None:
        """Give a task to the process with the fewest tasks."""
        self._send_task(min(self._processes, key=lambda process: len(process.tasks)), task)

    def wait(self) -> list[TaskResult]:
        """Return the results that have arrived, after waiting for at least one.

        Call this only if a submitted task has no result yet.

        Raises:
            FeatrayError: Processes die or hang before they have loaded the work, so that no task is to blame.
        """
        while not self._results:
            busy = {process.connection: process for process in self._processes if process.tasks}
            deadline = min(process.deadline for process in busy.values())
            timeout = max(0.0, min(_MAX_WAIT_S, deadline - self._clock.now()))
            for connection in wait(list(busy), timeout):
                self._receive(busy[connection])  # type: ignore[index]  # only connections were given
            self._stop_late_processes()
        results, self._results = self._results, []
        return results

    def has_started(self) -> bool:
        """Return whether all processes have confirmed their work, as of the last `wait`."""
        return not any(process.unconfirmed for process in self._processes)

    def close(self) -> None:
        """End all processes at once; a thread that waits for a result gets an error."""
        self._closed = True
        self._clock.close()
        for process in self._processes:
            process.end()

    def _start(self) -> WorkerProcess:
        if self._closed:
            raise FeatrayError("decoding was stopped while a worker process was being started")
        process = _early_processes.pop() if _early_processes else start_worker_process()
        process.send(Message.LIMITS, pickle.dumps(self._limits))
        if self._work is not None:
            self._send_work(process)
        return process

    def _send_work(self, process: WorkerProcess) -> None:
        assert self._work is not None, "set_work comes first"
        process.unconfirmed += 1
        process.send(Message.WORK, self._work)

    def _send_task(self, process: WorkerProcess, task: Any) -> None:
        if not process.tasks:
            process.has_resumed()  # forgets a suspension before the task
            self._set_deadline(process, START_TIMEOUT_S if process.unconfirmed else self._limits.timeout_s)
        process.tasks.append(task)
        process.send(Message.TASK, pickle.dumps(task))

    def _set_deadline(self, process: WorkerProcess, allowed_s: float) -> None:
        process.deadline, process.lost_s = self._clock.now() + allowed_s, self._clock.lost_s()

    def _receive(self, process: WorkerProcess) -> None:
        try:
            result = process.connection.recv()
        except (EOFError, OSError):
            self._replace(process, "crash")
            return
        self._set_deadline(process, self._limits.timeout_s)
        if process.unconfirmed:  # the first message only confirms the work
            process.unconfirmed -= 1
            self._dead_starts = 0
            return
        self._results.append(TaskResult(process.tasks.popleft(), result))

    def _stop_late_processes(self) -> None:
        now = self._clock.now()
        for process in [process for process in self._processes if process.tasks and now > process.deadline]:
            if process.connection.poll():  # a result may have arrived while this process was busy
                continue
            if process.is_suspended():
                self._replace(process, "suspended")
            elif process.has_resumed():
                self._set_deadline(process, self._limits.timeout_s)
            else:
                self._replace(process, "timeout")

    def _replace(self, process: WorkerProcess, failure: Failure) -> None:
        """Settle the task of a dead or late process; give its other tasks to a new process."""
        exit_code = process.end(grace_s=_CRASH_GRACE_S if failure == "crash" else 0.0)
        if failure == "crash" and exit_code == -signal.SIGALRM:
            # The alarm of the worker also counts the time in which both processes were suspended.
            failure = "suspended" if self._clock.lost_s() > process.lost_s else "timeout"
        if not process.unconfirmed:
            self._results.append(TaskResult(process.tasks.popleft(), failure=failure, exit_code=exit_code))
        elif failure != "suspended":
            self._count_dead_start(exit_code)
        new = self._start()
        self._processes[self._processes.index(process)] = new
        for task in process.tasks:
            self._send_task(new, task)

    def _count_dead_start(self, exit_code: int) -> None:
        self._dead_starts += 1
        if self._dead_starts >= MAX_DEAD_STARTS:
            raise FeatrayError(
                f"decode processes die before they can begin ({MAX_DEAD_STARTS} in a row, exit code "
                f"{exit_code}); no scan is to blame. Check the free memory, and whether `import "
                "featray.ct.readers` works in this environment; then run again."
            )


_early_processes: list[WorkerProcess] = []


def start_early() -> None:
    """Start a worker process before anything else; the first `WorkerPool` takes it.

    Importing the decoder takes about as long as all other work before the first scan is decoded.
    """
    if not _early_processes:
        atexit.register(end_early)  # otherwise it would notice the end of this process only after its imports
        _early_processes.append(start_worker_process(("featray.stages.decode", "featray.ct.readers")))


def end_early() -> None:
    """End the process that `start_early` started, unless a pool has taken it."""
    while _early_processes:
        _early_processes.pop().end()
