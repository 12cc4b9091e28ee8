"""Runs that are killed or interrupted: when the command is started again, each scan is stored exactly once.

By default twelve of the rounds in `kill.rounds` run; `pytest -m kill` runs all of them. `kill.harness` starts
and kills the runs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from kill.harness import (
    TIMEOUT_S,
    FeatureValues,
    RayCluster,
    assert_same_output,
    read_values,
    run_and_kill,
    run_to_end,
)
from kill.rounds import COMMANDS, DEFAULT_ROUNDS, ROUNDS, Round

import featray
from featray.output.dataset import Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection

SCAN_COUNT = 64
"""More than share a file and are in flight, so that a stop leaves some scans out."""
INPUT_ZYX = (8, 32, 32)
"""Input shape of the model in `vae_file`."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a collection of scans so large that a signal reaches a run over them in the middle."""
    folder = tmp_path_factory.mktemp("collection")
    make_collection(folder, SCAN_COUNT, shape_zyx=(64, 160, 160), seed=5, dicom_count=1)
    return folder


@pytest.fixture(scope="module")
def job(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a config without output, with a model so slow that a run makes several commits."""
    from featray.synthetic.vae import build_encoder

    model = tmp_path_factory.mktemp("model") / "encoder.keras"
    build_encoder((32, 128, 128)).save(model)
    return {
        "source": {"uri": str(collection)},
        "preprocess": {"size": [32, 128, 128]},
        "model": {
            "uri": str(model),
            "custom_objects": ["featray.synthetic.vae:Sampling"],
            "layers": ["z_mean", "z_log_var", "pre_latent", "conv_2"],
        },
        "run": {"engine": "inline", "decode": {"workers": 1}},
    }


@pytest.fixture
def config(job: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**job, "output": {"uri": str(tmp_path / "out")}}))
    return path


def start_extract(config: Path, engine: str, *, is_new_session: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "featray", "extract", str(config), "--set", f"run.engine={engine}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=is_new_session, **pipes)


def run_extract(config: Path) -> None:
    process = start_extract(config, "inline")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def open_dataset(config: Path) -> Dataset:
    return Dataset(Store(yaml.safe_load(config.read_text())["output"]["uri"]))


def wait_for_commit(config: Path, process: subprocess.Popen[str]) -> None:
    log = Path(open_dataset(config).store.root) / "scans" / "_delta_log"
    deadline = time.monotonic() + 120
    while not (log / "00000000000000000001.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no commit within two minutes"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> FeatureValues:
    """Return the features that a run without an interruption stores."""
    output = str(tmp_path_factory.mktemp("undisturbed") / "out")
    featray.extract({**job, "output": {"uri": output}})
    return read_values(Dataset(Store(output)))


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_after_one_ctrl_c_finished_scans_are_committed_and_the_message_says_how_to_resume(
    config: Path, undisturbed: FeatureValues, engine: str
) -> None:
    process = start_extract(config, engine)
    wait_for_commit(config, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=30)[1], "child processes are still running"
    assert process.returncode == 130, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    committed = len(open_dataset(config).read_scans(("scan_id",)))
    assert 0 < committed < SCAN_COUNT
    run_extract(config)
    assert_same_output(config, undisturbed)


def test_a_second_ctrl_c_stops_the_run_at_once_and_leaves_no_process(config: Path) -> None:
    process = start_extract(config, "inline")
    wait_for_commit(config, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=5)[1]


def test_an_interrupted_worker_process_shows_the_user_no_traceback(config: Path) -> None:
    process = start_extract(config, "inline", is_new_session=True)
    wait_for_commit(config, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal also sends it to the whole group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def get_shared_cluster() -> Iterator[Callable[[], RayCluster]]:
    """Return a function that returns the cluster that rounds share; its first call starts the cluster."""
    started: list[RayCluster] = []

    def get() -> RayCluster:
        if not started:
            started.append(RayCluster())
        return started[0]

    yield get
    for cluster in started:
        cluster.close()


@pytest.fixture
def get_cluster(
    get_shared_cluster: Callable[[], RayCluster], request: pytest.FixtureRequest
) -> Callable[[Round], RayCluster | None]:
    """Return a function that returns the cluster that the run of a round joins.

    A round that kills a node gets a cluster of its own. A round that kills the raylet gets none, so that the
    run starts its own Ray.
    """

    def get(round_: Round) -> RayCluster | None:
        if round_.engine == "inline" or round_.victim == "raylet":
            return None
        if round_.victim != "node":
            return get_shared_cluster()
        cluster = RayCluster(extra_nodes=1)
        request.addfinalizer(cluster.close)
        return cluster

    return get


@dataclass(frozen=True)
class Scenario:
    """The input of a command, and the features that it must store.

    Attributes:
        config: Config without output.
        output_before: Output before the command; None for no output.
        expected: All features after the command.
    """

    config: dict[str, Any]
    output_before: Path | None
    expected: FeatureValues


@pytest.fixture(scope="module")
def scenarios(vae_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """Return command → scenario; the collection of `refresh` has changed since it was extracted."""
    scenarios = {}
    for command in COMMANDS:
        folder = tmp_path_factory.mktemp(command)
        make_collection(folder / "ct", 30, shape_zyx=(16, 40, 48), seed=11, dicom_count=1)
        config: dict[str, Any] = {
            "source": {"uri": str(folder / "ct")},
            "preprocess": {"size": list(INPUT_ZYX)},
            "model": {
                "uri": str(vae_file),
                "custom_objects": ["featray.synthetic.vae:Sampling"],
                "layers": ["encoder/z_mean", "encoder/conv_2"],
                "batch_size": 2,
            },
            "run": {"decode": {"workers": 2}},
        }
        before = None
        if command == "refresh":
            before = folder / "before"
            run_to_end(write_config(config, before, folder), "extract")
            change_collection(folder / "ct" / "nifti")
        undisturbed = write_config(config, folder / "undisturbed", folder)
        run_to_end(undisturbed, "extract")
        scenarios[command] = Scenario(config, before, read_values(open_dataset(undisturbed)))
    return scenarios


def write_config(config: dict[str, Any], output: Path, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "output": {"uri": str(output)}}))
    return path


def change_collection(folder: Path) -> None:
    """Give twelve scans another content, and rename four, so that four are removed and four are new."""
    scans = sorted(folder.iterdir())
    for changed, other in zip(scans[:24:2], scans[1:24:2], strict=True):
        shutil.copy(other, changed)
    for number, renamed in enumerate(scans[24:28]):
        renamed.rename(folder / f"new_{number}.nii.gz")


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
    kill_round: Round,
    scenarios: dict[str, Scenario],
    get_cluster: Callable[[Round], RayCluster | None],
    tmp_path: Path,
) -> None:
    start, scenario = time.monotonic(), scenarios[kill_round.command]
    if scenario.output_before is not None:
        shutil.copytree(scenario.output_before, tmp_path / "out")
    config = write_config(scenario.config, tmp_path / "out", tmp_path)
    killed = run_and_kill(config, kill_round, get_cluster(kill_round))
    if not kill_round.ends_the_run:
        assert killed.returncode == 0, killed.stderr
        assert_same_output(config, scenario.expected)
    elif kill_round.victim != "raylet":
        assert not killed.was_running or killed.returncode == -signal.SIGKILL, killed.stderr
    if open_dataset(config).find_snapshot() is not None:
        read_values(open_dataset(config))  # between the two runs, a reader sees whole commits only
    summary = run_to_end(config, kill_round.command)
    assert_same_output(config, scenario.expected)
    left = summary.done + summary.removed
    # A run that kills itself at a point is in the middle. At any time, it may have had no work left.
    in_the_middle = bool(left) or kill_round.when != "any time" or not kill_round.ends_the_run
    log_round(kill_round, met=killed.was_running and in_the_middle, left=left, start=start)


def log_round(kill_round: Round, *, met: bool, left: int, start: float) -> None:
    """Add a line to the file that the environment variable FEATRAY_KILL_LOG names, if it is set.

    Args:
        kill_round: The round.
        met: Whether the kill came while the run had work left.
        left: Number of scans that the second run processed or removed.
        start: Time at which the round began, by the monotonic clock.
    """
    if path := os.environ.get("FEATRAY_KILL_LOG"):
        seconds = round(time.monotonic() - start, 1)
        line = {"round": kill_round.id, "met_in_the_middle": met, "left": left, "seconds": seconds}
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
