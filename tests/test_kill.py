"""Kills and interruptions that really happen: a run started again ends with each scan exactly once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from featray.dataset import FEATURES, SCANS, Dataset
from featray.storage import Store

SCANS_IN_ALL = 32


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return scans large enough that a run over them can be met in the middle."""
    from featray.ct.phantom import make_collection

    folder = tmp_path_factory.mktemp("collection")
    make_collection(folder, SCANS_IN_ALL, shape_zyx=(64, 160, 160), seed=5, dicom=1)
    return folder


@pytest.fixture(scope="module")
def job(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a config without output, of a model slow enough that commits do not come all at once."""
    from featray.vae import build_encoder

    model = tmp_path_factory.mktemp("model") / "encoder.keras"
    build_encoder((32, 128, 128)).save(model)
    return {
        "source": {"uri": str(collection)},
        "preprocess": {"size": [32, 128, 128]},
        "model": {
            "uri": str(model),
            "custom_objects": ["featray.vae:Sampling"],
            "layers": ["z_mean", "z_log_var", "pre_latent", "conv_2"],
        },
        "run": {"engine": "inline", "decode": {"workers": 1}},
    }


@pytest.fixture
def config(job: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**job, "output": {"uri": str(tmp_path / "out")}}))
    return path


def start(config: Path, engine: str, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "featray",
        "extract",
        str(config),
        "--set",
        f"run.engine={engine}",
        *more,
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_to_the_end(config: Path) -> None:
    process = start(config, "inline")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def dataset_of(config: Path) -> Dataset:
    return Dataset(Store(yaml.safe_load(config.read_text())["output"]["uri"]))


def wait_for_a_commit(config: Path, process: subprocess.Popen[str]) -> None:
    log = Path(dataset_of(config).store.root) / "scans" / "_delta_log"
    deadline = time.monotonic() + 120
    while not (log / "00000000000000000001.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no commit within two minutes"
        time.sleep(0.005)


def kill_with_children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """SIGKILL the driver; return those of its children that had to be killed after it."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()  # only processes that this test's own run started
    psutil.wait_procs(alive, timeout=10)
    return alive


def values(dataset: Dataset) -> dict[tuple[str, str], list[float]]:
    rows = dataset.read(FEATURES, ("scan_id", "layer", "feature")).to_pylist()
    found = {(row["scan_id"], row["layer"]): row["feature"] for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


@pytest.fixture(scope="module")
def undisturbed(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    import featray

    output = str(tmp_path_factory.mktemp("undisturbed") / "out")
    featray.extract({**job, "output": {"uri": output}})
    return values(Dataset(Store(output)))


def assert_exactly_once(config: Path, undisturbed: dict[tuple[str, str], list[float]]) -> None:
    dataset = dataset_of(config)
    found = values(dataset)
    assert found.keys() == undisturbed.keys()
    for key, value in undisturbed.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)
    assert len(dataset.ledger()) == SCANS_IN_ALL
    for table in (FEATURES, SCANS):  # a plain reader of the folder sees the table and nothing else
        on_disk = {name for name in dataset.store.names(table) if "/_delta_log/" not in name}
        assert on_disk == {f"{table}/{file.path}" for file in dataset.live(table)}


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_run_killed_in_the_middle_and_started_again_has_each_scan_once(
    config: Path, undisturbed: Any, engine: str
) -> None:
    process = start(config, engine)
    wait_for_a_commit(config, process)
    left_over = kill_with_children(process)
    assert not left_over or engine == "ray", "helpers must end with their driver"
    done = len(dataset_of(config).ledger())
    assert 0 < done < SCANS_IN_ALL, "the kill did not meet the run in the middle"

    again = start(config, engine, "--json")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["ok"] == SCANS_IN_ALL
    # A commit cut between the two tables is finished at the next start, without doing it again.
    assert 0 < summary["done"] <= SCANS_IN_ALL - done
    assert_exactly_once(config, undisturbed)


def test_a_run_killed_at_random_moments_again_and_again_has_each_scan_once(
    config: Path, undisturbed: Any
) -> None:
    rng = np.random.default_rng(7)
    for _ in range(3):
        process = start(config, "inline")
        wait_for_a_commit(config, process)
        time.sleep(rng.random() * 0.3)
        kill_with_children(process)
    run_to_the_end(config)
    assert_exactly_once(config, undisturbed)


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_ctrl_c_once_commits_what_is_finished_and_says_how_to_resume(
    config: Path, undisturbed: Any, engine: str
) -> None:
    process = start(config, engine)
    wait_for_a_commit(config, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=10)[1], "processes are left"
    assert process.returncode == 130, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    done = len(dataset_of(config).ledger())
    assert 0 < done < SCANS_IN_ALL
    run_to_the_end(config)
    assert_exactly_once(config, undisturbed)


def test_ctrl_c_twice_stops_at_once_and_leaves_no_process(config: Path) -> None:
    process = start(config, "inline")
    wait_for_a_commit(config, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_an_interrupted_helper_is_not_the_users_traceback(config: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "featray", "extract", str(config)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for_a_commit(config, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


@pytest.mark.parametrize("point", ["put", "features", "scans"])
def test_a_commit_survives_a_kill_at_each_of_its_points(config: Path, undisturbed: Any, point: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", _DIE_AT, str(config), point], stderr=subprocess.PIPE)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    run_to_the_end(config)
    assert_exactly_once(config, undisturbed)


_DIE_AT = """
import os, signal, sys
import featray
from featray.stages.commit import Committer
original, point, commits = Committer._write, sys.argv[2], []

def dying(self, table, *args):
    commits.append(table)
    second = commits.count(table) == 2
    if second and point == "put":
        os.kill(os.getpid(), signal.SIGKILL)     # the workers' files are there, no table knows them
    original(self, table, *args)
    if second and point == table:
        os.kill(os.getpid(), signal.SIGKILL)     # between the tables, or right after both

Committer._write = dying
featray.extract(sys.argv[1], ["run.engine=inline", "run.decode.workers=0"])
"""
