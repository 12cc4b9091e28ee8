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
from featray.engines.decoding import process_pool
from featray.engines.decoding.process_pool import TaskResult, WorkerPool, end_early, start_early
from featray.engines.decoding.worker_process import GRACE_S
from featray.engines.inline import InlineEngine
from featray.engines.ray.engine import RayEngine
from featray.errors import FeatrayError


def work(task: tuple[str, int]) -> int:
    """Do what the task names; a worker process can import it, because this file's folder is on its path."""
    kind, value = task
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(3600)
    if kind == "hang in C":
        ctypes.PyDLL(None).sleep(
            3600
        )  # holds the interpreter lock, so that no thread and no signal handler runs
    if kind == "nap":
        time.sleep(0.05)
    return value


def allocate(size: int) -> str:
    """Report whether `size` bytes can be allocated; importable like `work`."""
    try:
        return "fits" if np.ones(size, np.uint8).all() else "never"
    except MemoryError:
        return "MemoryError"


class Unloadable:
    """Work that ends the process that unpickles it, like a missing or broken library."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


class Unprepared:
    """Work whose library is missing in the worker process."""

    def prepare(self) -> None:
        raise ImportError("no library")

    def __call__(self, task: Any) -> Any:
        return task


def wait_for_all(pool: WorkerPool, count: int) -> list[TaskResult]:
    results: list[TaskResult] = []
    while len(results) < count:
        results += pool.wait()
    return results


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_process_pool

    pool = WorkerPool(2, timeout_s=3.0)
    pool.set_work(pickle.dumps(test_process_pool.work))
    yield pool
    pool.close()


def test_every_task_has_one_result(pool: WorkerPool) -> None:
    for value in range(50):
        pool.submit(("plain", value))
    assert sorted(result.result for result in wait_for_all(pool, 50)) == list(range(50))


@pytest.mark.parametrize(("kind", "code"), [("die", -9), ("segfault", -11)])
def test_a_task_that_kills_its_process_costs_no_other_task(pool: WorkerPool, kind: str, code: int) -> None:
    for value in range(6):
        pool.submit(("plain", value))
    pool.submit((kind, 99))
    for value in range(6, 12):
        pool.submit(("plain", value))
    results = wait_for_all(pool, 13)
    crashed = [(result.task, result.exit_code) for result in results if result.failure == "crash"]
    assert crashed == [((kind, 99), code)]
    assert sorted(result.result for result in results if not result.failure) == list(range(12))


@pytest.mark.parametrize("kind", ["hang", "hang in C"])
def test_a_task_that_hangs_ends_as_timeout_and_costs_no_other_task(pool: WorkerPool, kind: str) -> None:
    pool.submit((kind, 99))
    for value in range(6):
        pool.submit(("plain", value))
    results = wait_for_all(pool, 7)
    assert [result.task for result in results if result.failure == "timeout"] == [(kind, 99)]
    assert sorted(result.result for result in results if not result.failure) == list(range(6))


def test_closing_the_pool_while_a_thread_waits_starts_no_process(pool: WorkerPool) -> None:
    pool.submit(("plain", 0))
    pool.submit(("hang", 1))
    pool.wait()  # until the processes have started
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pool.wait)
        time.sleep(0.2)  # for the wait to begin; if it has not begun, it finds the pipes closed
        pool.close()
        with pytest.raises((FeatrayError, OSError)):
            waiting.result(60)
    assert not any("worker_process" in " ".join(child.cmdline()) for child in psutil.Process().children())


def test_processes_killed_at_random_lose_no_task(pool: WorkerPool) -> None:
    rng = np.random.default_rng(0)
    for value in range(60):
        pool.submit(("nap", value))
    done: Counter[int] = Counter()
    while done.total() < 60:
        for result in pool.wait():
            if result.failure:
                pool.submit(result.task)
            else:
                done[result.result] += 1
        if rng.random() < 0.2:
            psutil.Process(int(rng.choice([process.process.pid for process in pool._processes]))).kill()
    assert done == Counter(range(60))


def test_closing_leaves_no_process(pool: WorkerPool) -> None:
    pool.submit(("hang in C", 0))
    pids = [process.process.pid for process in pool._processes]
    pool.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)


def test_a_process_whose_task_hangs_in_c_ends_after_its_driver_was_killed(
    tmp_path: Path,
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_DYING_DRIVER)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
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


def test_a_task_above_the_memory_limit_fails_and_the_next_one_does_not(
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


@pytest.mark.parametrize("name", ["Unloadable", "Unprepared"])
def test_processes_that_never_start_are_no_fault_of_a_task(
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
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    end_early()
    start_early()
    (process,) = set(psutil.Process().children()) & {
        psutil.Process(one.process.pid) for one in process_pool._early_processes
    }
    yield process
    end_early()


def pids_of_tasks(count: int) -> list[int]:
    import test_process_pool

    with contextlib.closing(WorkerPool(count, timeout_s=30.0, memory=2**30)) as pool:
        pool.set_work(pickle.dumps(test_process_pool.pid_of))
        for value in range(4):
            pool.submit(value)
        return [result.result for result in wait_for_all(pool, 4)]


def pid_of(task: int) -> int:
    """Return the id of the process that runs the task; importable like `work`."""
    return os.getpid()


def test_a_process_that_was_started_early_is_the_first_of_the_pool(early: psutil.Process) -> None:
    start_early()  # starts no second process
    assert early.pid in pids_of_tasks(2)
    assert not process_pool._early_processes
    assert not early.is_running()


def test_an_early_process_that_died_is_replaced(early: psutil.Process) -> None:
    early.kill()
    assert len(pids_of_tasks(1)) == 4


def test_an_early_process_that_is_not_needed_ends(early: psutil.Process) -> None:
    unused: Any = SimpleNamespace(preprocess=PreprocessConfig())
    decoding = Decoding(unused, 1, LimitsConfig())
    with InlineEngine(0, decoding):
        assert not early.is_running()
    start_early()
    with RayEngine(RunConfig(), decoding):
        pass  # nothing is due, so that not even the first scans are processed in the driver
    assert not process_pool._early_processes


def test_an_early_process_ends_with_its_driver() -> None:
    code = (
        "from featray.engines.decoding import process_pool; process_pool.start_early()\n"
        "print(process_pool._early_processes[0].process.pid, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not psutil.pid_exists(int(done.stdout))
    assert not done.stderr
