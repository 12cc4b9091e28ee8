"""Runs that are killed: when the command is started again, each scan is stored exactly once.

By default five of the rounds in `kill.rounds` run; `pytest -m kill` runs all of them. `kill.harness` starts
and kills the runs.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from kill.harness import TIMEOUT_S
from kill.rounds import DEFAULT_ROUNDS, ROUNDS, Round
from kill.scenarios import GetCluster, GetScenario, RoundResult, run_round

pytestmark = pytest.mark.slow


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run all rounds with `-m kill`, and the default rounds without it."""
    if "kill_round" in metafunc.fixturenames:
        rounds = ROUNDS if metafunc.config.option.markexpr == "kill" else DEFAULT_ROUNDS
        marks = {"ray": [pytest.mark.ray], "inline": []}
        metafunc.parametrize(
            "kill_round",
            [pytest.param(round_, id=round_.id, marks=marks[round_.engine]) for round_ in rounds],
        )


@pytest.mark.kill
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_after_a_kill_the_next_run_stores_the_same_output_as_an_undisturbed_run(
    kill_round: Round, get_kill_scenario: GetScenario, get_cluster: GetCluster, tmp_path: Path
) -> None:
    start = time.monotonic()
    scenario = get_kill_scenario(kill_round.scenario)
    result = run_round(kill_round, scenario, get_cluster(kill_round), tmp_path)
    log_round(kill_round, result, seconds=time.monotonic() - start)


def log_round(kill_round: Round, result: RoundResult, *, seconds: float) -> None:
    """Add a line to the file that the environment variable FEATRAY_KILL_LOG names, if it is set."""
    if path := os.environ.get("FEATRAY_KILL_LOG"):
        line = {"round": kill_round.id, **asdict(result), "seconds": round(seconds, 1)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
