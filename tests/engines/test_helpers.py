"""Helper processes: every task gets exactly one outcome, whatever becomes of its process."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

import numpy as np
import psutil
import pytest

from featray.engines.helpers import Helpers, Outcome


def work(task: tuple[str, int]) -> int:
    """Do what the task says; importable by a helper through this file's folder on its path."""
    kind, value = task
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        time.sleep(3600)
    if kind == "nap":
        time.sleep(0.05)
    return value


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
    pool.use(test_helpers.work)
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


def test_a_task_that_hangs_ends_as_timeout_and_costs_no_other_task(helpers: Helpers) -> None:
    helpers.submit(("hang", 99))
    for value in range(6):
        helpers.submit(("plain", value))
    outcomes = _all(helpers, 7)
    assert [outcome.task for outcome in outcomes if outcome.error == "timeout"] == [("hang", 99)]
    assert sorted(outcome.result for outcome in outcomes if not outcome.error) == list(range(6))


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
    helpers.submit(("hang", 0))
    pids = [helper.process.pid for helper in helpers._helpers]
    helpers.close()
    assert not any(psutil.pid_exists(pid) for pid in pids if pid)
