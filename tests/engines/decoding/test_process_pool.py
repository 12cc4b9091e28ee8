"""The process pool: every task has exactly one result, also when its process dies or hangs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from featray.config import LimitsConfig, PreprocessConfig, RunConfig
from featray.engines.base import Decoding
from featray.engines.decoding import process_pool, work_clock
from featray.engines.decoding.process_pool import TaskResult, WorkerPool, end_early, start_early
from featray.engines.decoding.worker_process import GRACE_S
from featray.engines.inline import InlineEngine
from featray.engines.ray.engine import RayEngine
from featray.errors import FeatrayError


def work(task: tuple[str, int]) -> int:
    """Do one kind of task; worker processes can import this, because this folder is on their path."""
    kind, value = task
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(3600)
    if kind == "hang in C":
        ctypes.PyDLL(None).sleep(3600)  # holds the interpreter lock: no thread and no signal handler runs
    if kind == "nap":
        time.sleep(0.05)
    if kind == "short":
        time.sleep(1.0)
    if kind == "gpus":
        return int(os.environ["CUDA_VISIBLE_DEVICES"])
    return value


def allocate(size: int) -> str:
    """Return `fits` if `size` bytes can be allocated, or the name of the error."""
    try:
        return "fits" if np.ones(size, np.uint8).all() else "impossible"
    except MemoryError:
        return "MemoryError"


class Unloadable:
    """Work that ends the process that unpickles it, like a broken library."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


class Unpreparable:
    """Work that cannot be prepared in the worker process, because a library is missing."""

    def prepare(self) -> None:
        raise ImportError("no library")

    def __call__(self, task: Any) -> Any:
        return task


def make_environment() -> dict[str, str]:
    """Return an environment in which a script can import this file, and the same featray as this process."""
    path = [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def wait_for_all(pool: WorkerPool, count: int) -> list[TaskResult]:
    results: list[TaskResult] = []
    while len(results) < count:
        results += pool.wait()
    return results


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a pool of two processes that do `work`, with a timeout of 3 s."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_process_pool

    pool = WorkerPool(2, timeout_s=3.0)
    pool.set_work(pickle.dumps(test_process_pool.work))
    yield pool
    pool.close()


@pytest.mark.slow
def test_every_task_has_one_result(pool: WorkerPool) -> None:
    for value in range(50):
        pool.submit(("plain", value))
    assert sorted(result.result for result in wait_for_all(pool, 50)) == list(range(50))


@pytest.mark.slow
def test_a_process_that_decodes_sees_no_gpu(pool: WorkerPool) -> None:
    pool.submit(("gpus", 0))
    assert [result.result for result in wait_for_all(pool, 1)] == [-1]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "code"), [("die", -9), ("segfault", -11)])
def test_a_task_that_kills_its_process_does_not_affect_other_tasks(
    pool: WorkerPool, kind: str, code: int
) -> None:
    for value in range(6):
        pool.submit(("plain", value))
    pool.submit((kind, 99))
    for value in range(6, 12):
        pool.submit(("plain", value))
    results = wait_for_all(pool, 13)
    crashed = [(result.task, result.exit_code) for result in results if result.failure == "crash"]
    assert crashed == [((kind, 99), code)]
    assert sorted(result.result for result in results if not result.failure) == list(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hang", "hang in C"])
def test_a_task_that_hangs_times_out_and_does_not_affect_other_tasks(pool: WorkerPool, kind: str) -> None:
    pool.submit((kind, 99))
    for value in range(6):
        pool.submit(("plain", value))
    results = wait_for_all(pool, 7)
    assert [result.task for result in results if result.failure == "timeout"] == [(kind, 99)]
    assert sorted(result.result for result in results if not result.failure) == list(range(6))


@pytest.mark.slow
def test_closing_the_pool_while_a_thread_waits_starts_no_process(pool: WorkerPool) -> None:
    pool.submit(("plain", 0))
    pool.submit(("hang", 1))
    pool.wait()  # until the processes have started
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.wait)
        time.sleep(0.2)  # until the thread waits; if it does not wait yet, it finds the pipes closed
        pool.close()
        with pytest.raises((FeatrayError, OSError)):
            waiting.result(60)
    assert not any("worker_process" in " ".join(child.cmdline()) for child in psutil.Process().children())


@pytest.mark.slow
def test_no_task_is_lost_when_processes_are_killed_at_random(pool: WorkerPool) -> None:
    rng = np.random.default_rng(0)
    for value in range(60):
        pool.submit(("nap", value))
    results: Counter[int] = Counter()
    while results.total() < 60:
        for result in pool.wait():
            if result.failure:
                pool.submit(result.task)
            else:
                results[result.result] += 1
        if rng.random() < 0.2:
            psutil.Process(int(rng.choice([process.process.pid for process in pool._processes]))).kill()
    assert results == Counter(range(60))


def test_closing_leaves_no_process(pool: WorkerPool) -> None:
    pool.submit(("hang in C", 0))
    pids = [process.process.pid for process in pool._processes]
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)


@pytest.mark.slow
def test_a_process_whose_task_hangs_in_c_ends_after_its_driver_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_DYING_DRIVER)
    environment = make_environment()
    driver = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    worker = int(driver.stdout)
    deadline = time.monotonic() + 1.0 + GRACE_S + 20
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker process outlives its driver"
        time.sleep(0.1)


_DYING_DRIVER = """
import os, pickle, signal, test_process_pool
from featray.engines.decoding.process_pool import WorkerPool
pool = WorkerPool(1, timeout_s=1.0)
pool.set_work(pickle.dumps(test_process_pool.work))
pool.submit(("plain", 1))
pool.wait()
pool.submit(("hang in C", 1))
print(pool._processes[0].process.pid, flush=True)
test_process_pool.time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_task_above_the_memory_limit_fails_and_the_next_task_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_process_pool

    pool = WorkerPool(1, timeout_s=60.0, memory=200 * 2**20)
    try:
        pool.set_work(pickle.dumps(test_process_pool.allocate))
        for size in (100, 300, 100):
            pool.submit(size * 2**20)
        assert [result.result for result in wait_for_all(pool, 3)] == ["fits", "MemoryError", "fits"]
    finally:
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Unloadable", "Unpreparable"])
def test_if_processes_never_start_the_pool_raises_and_no_task_fails(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_process_pool

    monkeypatch.setattr("featray.engines.decoding.process_pool.MAX_DEAD_STARTS", 2)
    pool = WorkerPool(1, timeout_s=60.0)
    try:
        pool.set_work(pickle.dumps(getattr(test_process_pool, name)()))
        pool.submit("anything")
        with pytest.raises(FeatrayError, match="die before they can begin"):
            pool.wait()
    finally:
        pool.close()


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return the process that `start_early` has started."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    end_early()
    start_early()
    early_processes = {psutil.Process(worker.process.pid) for worker in process_pool._early_processes}
    (process,) = set(psutil.Process().children()) & early_processes
    yield process
    end_early()


def run_tasks(count: int) -> list[int]:
    """Run four tasks in a pool of `count` processes; return the process id of each task."""
    import test_process_pool

    with contextlib.closing(WorkerPool(count, timeout_s=30.0, memory=2**30)) as pool:
        pool.set_work(pickle.dumps(test_process_pool.get_pid))
        for value in range(4):
            pool.submit(value)
        return [result.result for result in wait_for_all(pool, 4)]


def get_pid(task: int) -> int:
    """Return the id of the process that runs the task; worker processes can import this like `work`."""
    return os.getpid()


@pytest.mark.slow
def test_a_process_that_was_started_early_is_the_first_of_the_pool(early: psutil.Process) -> None:
    start_early()  # must not start a second process
    assert early.pid in run_tasks(2)
    assert not process_pool._early_processes
    assert not early.is_running()


@pytest.mark.slow
def test_an_early_process_that_died_is_replaced(early: psutil.Process) -> None:
    early.kill()
    assert len(run_tasks(1)) == 4


def test_an_early_process_that_is_not_needed_ends(early: psutil.Process) -> None:
    unused: Any = SimpleNamespace(preprocess=PreprocessConfig())
    decoding = Decoding(unused, 1, LimitsConfig())
    with InlineEngine(0, decoding):
        assert not early.is_running()
    start_early()
    with RayEngine(RunConfig(), decoding):
        pass  # no scan is due, so that the driver does not process the first scans either
    assert not process_pool._early_processes


def test_an_early_process_ends_with_its_driver() -> None:
    code = (
        "from featray.engines.decoding import process_pool; process_pool.start_early()\n"
        "print(process_pool._early_processes[0].process.pid, flush=True)"
    )
    driver = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not psutil.pid_exists(int(driver.stdout))
    assert not driver.stderr


def signal_all(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        process.send_signal(number)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["both", "driver", "worker"])
def test_a_task_does_not_time_out_because_processes_were_suspended(who: str, tmp_path: Path) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_SUSPENDED_DRIVER)
    environment = make_environment()
    with subprocess.Popen([sys.executable, str(script)], env=environment, stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        worker = psutil.Process(int(driver.stdout.readline()))
        groups = {"both": [driver.pid, worker.pid], "driver": [driver.pid], "worker": [worker.pid]}
        suspended = [psutil.Process(pid) for pid in groups[who]]
        signal_all(suspended, signal.SIGSTOP)
        time.sleep(TIMEOUT_S + GRACE_S + 3)  # the alarm of a worker passes too
        signal_all([process for process in suspended if process.is_running()], signal.SIGCONT)
        results = driver.stdout.read().split()
    assert driver.returncode == 0
    assert set(results) <= {b"ok", b"suspended"}
    assert results[-1] == b"ok"


TIMEOUT_S = 4.0
_SUSPENDED_DRIVER = f"""
import pickle, test_process_pool
from featray.engines.decoding.process_pool import WorkerPool
pool = WorkerPool(1, timeout_s={TIMEOUT_S})
pool.set_work(pickle.dumps(test_process_pool.work))
pool.submit(("plain", 1))
pool.wait()
pool.submit(("short", 2))
print(pool._processes[0].process.pid, flush=True)
for _ in range(3):
    (result,) = pool.wait()
    print(result.failure or "ok", flush=True)
    if result.failure != "suspended":
        break
    pool.submit(("plain", 2))
pool.close()
"""


@pytest.mark.slow
def test_a_worker_that_stays_suspended_is_replaced_and_its_task_is_not_blamed(pool: WorkerPool) -> None:
    pool.submit(("plain", 0))
    pool.submit(("plain", 1))
    wait_for_all(pool, 2)
    suspended = psutil.Process(pool._processes[0].process.pid)
    suspended.suspend()
    pool.submit(("plain", 2))
    (result,) = wait_for_all(pool, 1)
    assert (result.task, result.failure) == (("plain", 2), "suspended")
    assert not suspended.is_running()
    pool.submit(("plain", 3))
    assert [result.result for result in wait_for_all(pool, 1)] == [3]


def test_the_work_clock_counts_a_long_gap_as_one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 100.5, 4000.0, 4000.25])
    monkeypatch.setattr(work_clock, "_TICK_S", 3600.0)  # only the calls below read the clock
    monkeypatch.setattr(work_clock.time, "monotonic", lambda: next(times))
    with contextlib.closing(work_clock.WorkClock()) as clock:
        assert clock.now() == 0.5
        assert clock.now() == 1.5
        assert clock.lost_s() == 3898.5
