"""Helper processes: every task gets exactly one outcome, whatever becomes of its process."""

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
from typing import Any

import numpy as np
import psutil
import pytest

from featray.config import LimitsConfig, RunConfig
from featray.engines.decoding import process_pool as started
from featray.engines.decoding.process_pool import _GRACE_S, Helpers, Outcome, end_early, start_early
from featray.engines.inline import InlineEngine
from featray.engines.ray.engine import RayEngine
from featray.errors import FeatrayError


def work(task: tuple[str, int]) -> int:
    """Do what the task says; importable by a helper through this file's folder on its path."""
    kind, value = task
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(3600)
    if kind == "hang in C":
        ctypes.PyDLL(None).sleep(3600)  # keeps Python's lock: none of its threads and handlers run
    if kind == "nap":
        time.sleep(0.05)
    return value


def allocate(size: int) -> str:
    """Say whether so many bytes can be had; importable like `work`."""
    try:
        return "fits" if np.ones(size, np.uint8).all() else "never"
    except MemoryError:
        return "MemoryError"


class Unloadable:
    """Work that ends the process it is unpickled in, as a library that is missing or broken does."""

    def __reduce__(self) -> Any:
        return os._exit, (7,)


class Unprepared:
    """Work that lacks a library where it is to be done."""

    def prepare(self) -> None:
        raise ImportError("no library")

    def __call__(self, task: Any) -> Any:
        return task


def _all(helpers: Helpers, count: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    while len(outcomes) < count:
        outcomes += helpers.wait()
    return outcomes


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_helpers

    pool = Helpers(2, timeout_s=3.0)
    pool.use(pickle.dumps(test_helpers.work))
    yield pool
    pool.close()


def test_every_task_has_one_outcome(helpers: Helpers) -> None:
    for value in range(50):
        helpers.submit(("plain", value))
    assert sorted(outcome.result for outcome in _all(helpers, 50)) == list(range(50))


@pytest.mark.parametrize(("kind", "code"), [("die", -9), ("segfault", -11)])
def test_a_task_that_kills_its_process_costs_no_other_task(helpers: Helpers, kind: str, code: int) -> None:
    for value in range(6):
        helpers.submit(("plain", value))
    helpers.submit((kind, 99))
    for value in range(6, 12):
        helpers.submit(("plain", value))
    outcomes = _all(helpers, 13)
    crashed = [(outcome.task, outcome.exit_code) for outcome in outcomes if outcome.error == "crash"]
    assert crashed == [((kind, 99), code)]
    assert sorted(outcome.result for outcome in outcomes if not outcome.error) == list(range(12))


@pytest.mark.parametrize("kind", ["hang", "hang in C"])
def test_a_task_that_hangs_ends_as_timeout_and_costs_no_other_task(helpers: Helpers, kind: str) -> None:
    helpers.submit((kind, 99))
    for value in range(6):
        helpers.submit(("plain", value))
    outcomes = _all(helpers, 7)
    assert [outcome.task for outcome in outcomes if outcome.error == "timeout"] == [(kind, 99)]
    assert sorted(outcome.result for outcome in outcomes if not outcome.error) == list(range(6))


def test_closed_while_a_thread_waits_no_helper_is_started_anew(helpers: Helpers) -> None:
    helpers.submit(("plain", 0))
    helpers.submit(("hang", 1))
    helpers.wait()  # so that they are up
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(helpers.wait)
        time.sleep(0.2)  # for it to begin; if it has not, it finds the pipes closed
        helpers.close()
        with pytest.raises((FeatrayError, OSError)):
            waiting.result(60)
    assert not any("spawn_main" in " ".join(child.cmdline()) for child in psutil.Process().children())


def test_helpers_killed_at_random_lose_no_task(helpers: Helpers) -> None:
    rng = np.random.default_rng(0)
    for value in range(60):
        helpers.submit(("nap", value))
    done: Counter[int] = Counter()
    while done.total() < 60:
        for outcome in helpers.wait():
            if outcome.error:
                helpers.submit(outcome.task)
            else:
                done[outcome.result] += 1
        if rng.random() < 0.2:
            psutil.Process(int(rng.choice([helper.process.pid for helper in helpers._helpers]))).kill()
    assert done == Counter(range(60))


def test_closing_leaves_no_process(helpers: Helpers) -> None:
    helpers.submit(("hang in C", 0))
    pids = [helper.process.pid for helper in helpers._helpers]
    helpers.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)


def test_a_helper_whose_task_hangs_in_c_ends_though_nobody_is_left_to_kill_it(
    tmp_path: Path,
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(_DYING_DRIVER)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    driver = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    helper = int(driver.stdout)
    deadline = time.monotonic() + 1.0 + _GRACE_S + 20
    while psutil.pid_exists(helper) and psutil.Process(helper).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the helper outlives its driver"
        time.sleep(0.1)


_DYING_DRIVER = """
import os, pickle, signal, test_helpers
from featray.engines.helpers import Helpers
helpers = Helpers(1, timeout_s=1.0)
helpers.use(pickle.dumps(test_helpers.work))
helpers.submit(("plain", 1))
helpers.wait()
helpers.submit(("hang in C", 1))
print(helpers._helpers[0].process.pid, flush=True)
test_helpers.time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_task_that_takes_more_memory_than_it_may_fails_and_the_next_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_helpers

    pool = Helpers(1, timeout_s=60.0, memory=200 * 2**20)
    try:
        pool.use(pickle.dumps(test_helpers.allocate))
        for size in (100, 300, 100):
            pool.submit(size * 2**20)
        assert [outcome.result for outcome in _all(pool, 3)] == ["fits", "MemoryError", "fits"]
    finally:
        pool.close()


@pytest.mark.parametrize("name", ["Unloadable", "Unprepared"])
def test_helpers_that_never_come_up_are_no_tasks_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import test_helpers

    monkeypatch.setattr("featray.engines.decoding.process_pool.STARTS", 2)
    pool = Helpers(1, timeout_s=60.0)
    try:
        pool.use(pickle.dumps(getattr(test_helpers, name)()))
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
    (found,) = set(psutil.Process().children()) & {psutil.Process(one.process.pid) for one in started._early}
    yield found
    end_early()


def _done_by(count: int) -> list[int]:
    import test_helpers

    with contextlib.closing(Helpers(count, timeout_s=30.0, memory=2**30)) as pool:
        pool.use(pickle.dumps(test_helpers.pid_of))
        for value in range(4):
            pool.submit(value)
        return [outcome.result for outcome in _all(pool, 4)]


def pid_of(task: int) -> int:
    """Return the process that is at work; importable like `work`."""
    return os.getpid()


def test_a_helper_that_was_started_early_is_the_first(early: psutil.Process) -> None:
    start_early()  # a second one would be of no use
    assert early.pid in _done_by(2)
    assert not started._early
    assert not early.is_running()


def test_one_that_died_meanwhile_is_replaced(early: psutil.Process) -> None:
    early.kill()
    assert len(_done_by(1)) == 4


def test_where_no_helpers_are_needed_it_ends(early: psutil.Process) -> None:
    limits = LimitsConfig()
    with InlineEngine(0, limits):
        assert not early.is_running()
    start_early()
    with RayEngine(RunConfig(), limits):
        pass  # nothing to do: not even the few scans that are seen to while Ray comes up
    assert not started._early


def test_it_ends_with_its_driver() -> None:
    code = (
        "from featray.engines.base import helpers; helpers.start_early()\n"
        "print(helpers._early[0].process.pid, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not psutil.pid_exists(int(done.stdout))
    assert not done.stderr
