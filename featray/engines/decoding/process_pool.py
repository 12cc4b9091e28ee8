"""Helper processes: tasks in, outcomes out, whatever becomes of a process.

Each helper has a pipe of its own and no lock is shared, so one that is killed or hangs takes exactly
the task it was working on with it: what waited behind that task goes to another helper. One that dies
before it could begin is no task's fault.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import popen_spawn_posix, spawn
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from featray.engines.decoding.memory_limit import bounded, go_first
from featray.errors import FeatrayError

START_S = 300.0
"""Seconds a helper may take to come up; on a busy machine importing libraries takes some."""
STARTS = 10
"""Helpers in a row that die before they have begun: the next one would, too."""
_POLL_S = 60.0
_BOUNDS, _WORK, _TASK = b"b", b"w", b"t"
"""First byte of a message: what it is that follows pickled."""
_GRACE_S = 5.0
"""A helper whose task is late by this much ends by itself: whoever should have killed it may be dead."""


@dataclass(frozen=True)
class Outcome:
    """What became of one task: its result, or how its process ended.

    Attributes:
        task: As submitted.
        result: What the work returned; None if there is none.
        error: `crash` or `timeout` when there is no result.
        exit_code: Of a process that crashed; negative is a signal's number.
    """

    task: Any
    result: Any = None
    error: str = ""
    exit_code: int | None = None


class Helpers:
    """A fixed number of processes that each run the same work on the tasks given to them, in order.

    Args:
        count: Processes.
        timeout_s: Seconds a task may take; the process is killed then.
        memory: Bytes a task may take beyond what its process holds already; None for no bound.
    """

    def __init__(self, count: int, timeout_s: float, memory: int | None = None) -> None:
        self._timeout_s, self._memory = timeout_s, memory
        self._work: bytes | None = None
        self._dead_starts = 0
        self._closed = False
        self._helpers = [self._start() for _ in range(count)]
        self._outcomes: list[Outcome] = []

    def use(self, work: bytes) -> None:
        """Set what the helpers do with a task from now on: a pickled `work(task)`.

        If it has a method `prepare`, that is called first. A helper that cannot do so has not begun.
        """
        self._work = work
        for helper in self._helpers:
            self._send_work(helper)

    def submit(self, task: Any) -> None:
        """Give a task to the helper with the fewest."""
        self._give(min(self._helpers, key=lambda helper: len(helper.tasks)), task)

    def wait(self) -> list[Outcome]:
        """Return the outcomes that have arrived since; waits for at least one. Needs a task under way.

        Raises:
            FeatrayError: Helpers die, or hang, before they can begin; no task is to blame.
        """
        while not self._outcomes:
            busy = {helper.connection: helper for helper in self._helpers if helper.tasks}
            deadline = min(helper.deadline for helper in busy.values())
            timeout = max(0.0, min(_POLL_S, deadline - time.monotonic()))
            for connection in wait(list(busy), timeout):
                self._receive(busy[connection])  # type: ignore[index]  # only connections were given
            self._stop_late()
        found, self._outcomes = self._outcomes, []
        return found

    def are_up(self) -> bool:
        """Return whether all hold their work, as far as is known from the last `wait`."""
        return not any(helper.starting for helper in self._helpers)

    def close(self) -> None:
        """End all helpers at once; a thread that waits for one of them gets an error."""
        self._closed = True
        for helper in self._helpers:
            helper.end()

    def _start(self) -> _Helper:
        if self._closed:
            raise FeatrayError("decoding was broken off")
        helper = _early.pop() if _early else _started()
        with contextlib.suppress(OSError):  # a dead helper is noticed when an outcome is waited for
            helper.connection.send_bytes(_BOUNDS + pickle.dumps((self._timeout_s, self._memory)))
        if self._work is not None:
            self._send_work(helper)
        return helper

    def _send_work(self, helper: _Helper) -> None:
        assert self._work is not None, "use comes first"
        helper.starting += 1
        with contextlib.suppress(OSError):  # as above
            helper.connection.send_bytes(_WORK + self._work)

    def _give(self, helper: _Helper, task: Any) -> None:
        if not helper.tasks:
            helper.deadline = time.monotonic() + (START_S if helper.starting else self._timeout_s)
        helper.tasks.append(task)
        with contextlib.suppress(OSError):  # as above
            helper.connection.send_bytes(_TASK + pickle.dumps(task))

    def _receive(self, helper: _Helper) -> None:
        try:
            result = helper.connection.recv()
        except (EOFError, OSError):
            self._replace(helper, "crash")
            return
        helper.deadline = time.monotonic() + self._timeout_s
        if helper.starting:  # its first message only says that it is there
            helper.starting -= 1
            self._dead_starts = 0
            return
        self._outcomes.append(Outcome(helper.tasks.popleft(), result))

    def _stop_late(self) -> None:
        now = time.monotonic()
        for helper in [helper for helper in self._helpers if helper.tasks and now > helper.deadline]:
            if not helper.connection.poll():  # a result may have come in while this process was busy
                self._replace(helper, "timeout")

    def _replace(self, helper: _Helper, error: str) -> None:
        """Settle the task a dead or late helper was working on; hand the others to a new one."""
        exit_code = helper.end(grace_s=1.0 if error == "crash" else 0.0)
        if helper.starting:
            self._refuse_dead_starts(exit_code)
        else:
            error = "timeout" if exit_code == -signal.SIGALRM else error
            self._outcomes.append(Outcome(helper.tasks.popleft(), error=error, exit_code=exit_code))
        new = self._start()
        self._helpers[self._helpers.index(helper)] = new
        for task in helper.tasks:
            self._give(new, task)

    def _refuse_dead_starts(self, exit_code: int | None) -> None:
        self._dead_starts += 1
        if self._dead_starts >= STARTS:
            raise FeatrayError(
                f"decode processes die before they can begin ({STARTS} in a row, exit code {exit_code}); no "
                "scan is to blame. Look at the memory that is left, and whether `import featray.ct.readers` "
                "works in this environment; then run again."
            )


@dataclass(eq=False)
class _Helper:
    """One process, its pipe, and the tasks it has, the first of which it is working on.

    `starting` counts the works it was given and has not said to hold yet.
    """

    process: SpawnProcess
    connection: Connection
    tasks: deque[Any] = field(default_factory=deque)
    deadline: float = 0.0
    starting: int = 0

    def end(self, grace_s: float = 0.0) -> int | None:
        """Kill the process unless it ends by itself within `grace_s`; return its exit code."""
        self.connection.close()
        self.process.join(grace_s)
        self.process.kill()
        self.process.join()
        return self.process.exitcode


_early: list[_Helper] = []


def start_early() -> None:
    """Start a helper before anything else; the first `Helpers` takes it.

    Importing what decodes takes about as long as all that comes before the first scan is due.
    """
    if not _early:
        _early.append(_started(importing=("featray.stages.decode", "featray.ct.readers")))


def end_early() -> None:
    """End what `start_early` has started, where nothing is decoded in helpers of this process."""
    while _early:
        _early.pop().end()


def _started(importing: Sequence[str] = ()) -> _Helper:
    context = _SpawnWithoutMain()
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, importing), name="featray-helper", daemon=True)
    process.start()
    theirs.close()  # so that the helper's death closes the pipe
    return _Helper(process, ours)


def _serve(connection: Connection, importing: Sequence[str]) -> None:
    """Run in the helper: take bounds and work first, then tasks, until the pipe closes.

    Args:
        connection: To the driver.
        importing: Modules to import meanwhile.
    """
    # Ctrl-C reaches the whole process group; only the driver decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, whatever C code it is in
    go_first()
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # Read ahead in a thread: were both ends to wait for the other to read, nothing would move.
    threading.Thread(target=_read_ahead, args=(connection, messages), daemon=True).start()
    for name in importing:
        importlib.import_module(name)
    work, (timeout_s, memory) = None, (0.0, None)
    while True:
        message = messages.get()
        given = pickle.loads(message[1:])
        if message[:1] == _BOUNDS:
            timeout_s, memory = given
            continue
        if message[:1] == _WORK:
            work = given
            if hasattr(work, "prepare"):
                work.prepare()
            connection.send(None)
            continue
        assert work is not None, "use comes before submit"
        signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)
        with bounded(memory):
            result = work(given)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(result)


def _read_ahead(connection: Connection, messages: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            messages.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the driver is gone; nobody waits for what is under way


_preparation_lock = threading.Lock()


class _Popen(popen_spawn_posix.Popen):
    """Spawn without importing the caller's `__main__` again.

    A user's script then need not guard its call of featray with `if __name__ == "__main__"`:
    everything a helper runs is importable from featray itself.
    """

    def _launch(self, process_obj: Any) -> None:
        with _preparation_lock:
            original = spawn.get_preparation_data
            spawn.get_preparation_data = _without_main(original)
            try:
                super()._launch(process_obj)  # type: ignore[misc]  # not in the type stubs
            finally:
                spawn.get_preparation_data = original


def _without_main(original: Any) -> Any:
    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        return {key: value for key, value in data.items() if not key.startswith("init_main")}

    return get_preparation_data


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  # the name that multiprocessing calls
        return _Popen(process_obj)


class _SpawnWithoutMain(SpawnContext):
    Process = _Process
