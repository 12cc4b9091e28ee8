"""A run on several hosts: one is cut off, one joins, and a process is killed; nothing is lost or doubled."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import scenario
from hosts.network import Network, find_obstacle

TESTS = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.ray, pytest.mark.hosts]


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Return a folder with a short path, because Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="fh"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def result(short_folder: Path) -> dict[str, Any]:
    """Carry out the scenario on hosts of its own, and return what happened."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("needs a job server: pip install 'ray[default]'")
    if obstacle := find_obstacle():
        pytest.skip(obstacle)
    with Network(scenario.HOSTS, f"featray-{os.getpid()}") as network:
        command = [sys.executable, "-m", "hosts.scenario", short_folder, network.prefix]
        path = f"{TESTS}{os.pathsep}{TESTS.parent}"
        done = subprocess.run(
            network.make_command("outside", command),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-5000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_a_run_on_several_hosts_is_complete_and_exact_although_one_is_cut_off(result: dict[str, Any]) -> None:
    assert result["exit_code"] == 0, result["log"]
    assert result["late_host_worked"], "a worker that joins during the run is used"
    assert result["killed"], "the scenario killed a process that runs the model"
    assert result["same_rows"]
    assert result["rows"] == scenario.SCAN_COUNT * len(scenario.LAYERS)
    assert result["largest_difference"] < 1e-5
    assert result["verified"].endswith("everything is in order")
