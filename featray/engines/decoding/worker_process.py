"""One worker process: its start, the messages to it, and the loop that runs in it.

The process is started with `python -c` and one end of a pipe, not with `multiprocessing`: a user's script
then need not guard its call of featray with `if __name__ == "__main__"`, because nothing imports it again.
The functions that a worker runs come from featray, or are pickled by value.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.connection import Connection, Pipe
from typing import Any

import psutil

from featray.engines.decoding.memory_limit import limit_memory, prefer_oom_kill
from featray.terminal.streams import open_closed_files

GRACE_S = 5.0
"""A worker whose Python code stands still during a task ends itself when the task is late by this much: the
driver that should kill it may be dead."""
_RENEW_S = 1.0
_BOOTSTRAP = (
    "import json, signal, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "from featray.engines.decoding.worker_process import main; main(int(sys.argv[1]), sys.argv[3:])"
)
"""Program of the process. Ctrl-C, `ray job stop` and schedulers signal all processes of a run, and only its
driver decides how to react. A worker process ends when its pipe is closed."""


class Message(Enum):
    """Kinds of messages to a worker process; the value is the first byte of a message."""

    LIMITS = b"l"
    WORK = b"w"
    TASK = b"t"


@dataclass(frozen=True)
class TaskLimits:
    """Limits of one task: seconds, and bytes in addition to the memory of its process (None: no limit)."""

    timeout_s: float
    memory: int | None


@dataclass(eq=False)
class WorkerProcess:
    """A worker process, its pipe, and its tasks in order; the process works on the first of them.

    Attributes:
        process: The process.
        connection: This process's end of the pipe.
        tasks: Tasks without a result so far.
        deadline: Time of the pool's work clock at which the first task is late.
        lost_s: Reading of `WorkClock.lost_s` when the deadline was set.
        unconfirmed: Number of work functions sent that the process has not confirmed yet; it confirms one
            when it has loaded and prepared it.
    """

    process: subprocess.Popen[bytes]
    connection: Connection[bytes, Any]
    tasks: deque[Any] = field(default_factory=deque)
    deadline: float = 0.0
    lost_s: float = 0.0
    unconfirmed: int = 0

    def send(self, kind: Message, content: bytes) -> None:
        """Send a message with pickled content.

        A dead process is not reported here: the pool notices it when it waits for results.
        """
        with contextlib.suppress(OSError):
            self.connection.send_bytes(kind.value + content)

    def is_suspended(self) -> bool:
        """Return whether the process is stopped by a signal, so that it cannot run."""
        with contextlib.suppress(psutil.NoSuchProcess):
            status = psutil.Process(self.process.pid).status()
            return status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        return False

    def has_resumed(self) -> bool:
        """Return whether the process was stopped and continued by signals since the last call."""
        if not hasattr(os, "waitid"):  # some systems do not report it
            return False
        with contextlib.suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.process.pid, os.WCONTINUED | os.WNOHANG) is not None
        return False

    def end(self, grace_s: float = 0.0) -> int:
        """Kill the process unless it ends by itself within `grace_s` seconds; return its exit code."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(grace_s)
        self.process.kill()
        return self.process.wait()


def start_worker_process(modules: Sequence[str] = ()) -> WorkerProcess:
    """Start a worker process.

    Args:
        modules: Modules that it imports before it takes messages.
    """
    open_closed_files()  # otherwise the pipe could become the stderr of the process
    ours, theirs = Pipe()
    path = json.dumps([entry or os.getcwd() for entry in sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", _BOOTSTRAP, str(theirs.fileno()), path, *modules],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"},  # decoding needs no GPU
    )
    theirs.close()  # so that the pipe is closed when the worker dies
    return WorkerProcess(process, ours)


def main(file: int, modules: Sequence[str]) -> None:
    """Run in the worker process: take limits and work first, then tasks, until the pipe is closed.

    Args:
        file: File descriptor of this process's end of the pipe.
        modules: Modules to import first.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside of C code
    prefer_oom_kill()
    connection: Connection[Any, bytes] = Connection(file)
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    alarm = _Alarm()
    # A thread reads ahead, because the driver and the worker could otherwise both wait to send.
    threading.Thread(target=_read_messages, args=(connection, messages, alarm), daemon=True).start()
    for name in modules:
        importlib.import_module(name)
    _process_messages(connection, messages, alarm)


class _Alarm:
    """Ends this process if, during a task, no Python code has run for the time of the task and GRACE_S.

    A signal does this, because it also reaches C code that holds the interpreter lock. The alarm is set again
    while Python code runs, because its time passes also while this process is suspended.
    """

    def __init__(self) -> None:
        self._lock, self._seconds = threading.Lock(), 0.0

    def set(self, seconds: float) -> None:
        """Set the alarm to this time from now; 0 ends it."""
        with self._lock:
            self._seconds = seconds
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def renew(self) -> None:
        """Set the alarm again to its full time, if it is set."""
        with self._lock:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)


def _process_messages(
    connection: Connection[Any, bytes], messages: queue.SimpleQueue[bytes], alarm: _Alarm
) -> None:
    limits, work = TaskLimits(0.0, None), None
    while True:
        message = messages.get()
        kind, content = Message(message[:1]), pickle.loads(message[1:])
        if kind is Message.LIMITS:
            limits = content
        elif kind is Message.WORK:
            work = content
            if hasattr(work, "prepare"):
                work.prepare()
            connection.send(None)
        else:
            assert work is not None, "the driver sends the work before the first task"
            alarm.set(limits.timeout_s + GRACE_S)
            with limit_memory(limits.memory):
                result = work(content)
            alarm.set(0.0)
            connection.send(result)


def _read_messages(
    connection: Connection[Any, bytes], messages: queue.SimpleQueue[bytes], alarm: _Alarm
) -> None:
    while True:
        try:
            if connection.poll(_RENEW_S):
                messages.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the driver is dead, so no process waits for a result
        alarm.renew()
