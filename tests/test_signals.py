"""Runs that Ctrl-C or SIGTERM stops: what is finished is committed, and no process is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from kill.harness import FeatureValues, assert_same_output, find_descendants, read_values, wait_until
from kill.scenarios import open_dataset

import featray
from featray.output.dataset import Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection

PROGRAM = ("-m", "featray", "extract")
REPOSITORY = Path(__file__).resolve().parent.parent
SCAN_COUNT = 64
"""More than share a file and are in flight, so that a stop leaves some scans out."""

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
    build_encoder((32, 96, 96)).save(model)
    return {
        "source": {"uri": str(collection)},
        "preprocess": {"size": [32, 96, 96]},
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


def start_extract(
    config: Path, engine: str, *, is_new_session: bool = False, program: Sequence[str] = PROGRAM
) -> subprocess.Popen[str]:
    command = [sys.executable, *program, str(config), "--set", f"run.engine={engine}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, start_new_session=is_new_session, **pipes)


def run_extract(config: Path) -> None:
    process = start_extract(config, "inline")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


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
    _, err = process.communicate(timeout=120)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_the_run_as_one_to_the_driver_does(
    config: Path, number: signal.Signals
) -> None:
    process = start_extract(config, "inline", is_new_session=True)
    wait_for_commit(config, process)
    workers = psutil.Process(process.pid).children()
    os.killpg(process.pid, number)  # as a terminal, `ray job stop` and Slurm do
    assert workers
    assert all(worker.is_running() for worker in workers), "the driver still needs them"
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "interrupted;" in err


@pytest.mark.ray
@pytest.mark.parametrize(("number", "to_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_while_a_local_ray_starts_ends_the_run_as_interrupted(
    config: Path, number: signal.Signals, to_group: bool
) -> None:
    process = start_extract(config, "ray", is_new_session=True)
    wait_until(lambda: bool(find_raylet(process.pid)) or process.poll() is not None, "Ray to start")
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number) if to_group else process.send_signal(number)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    assert not psutil.wait_procs(children, timeout=30)[1], "child processes are still running"


def find_raylet(pid: int) -> list[psutil.Process]:
    return [child for child in find_descendants(pid) if child.name() in ("gcs_server", "raylet")]


@pytest.mark.parametrize(
    ("number", "seconds", "program"),
    [(signal.SIGINT, 2.0, PROGRAM), (signal.SIGTERM, 0.5, [str(REPOSITORY / "jobs" / "extract.py")])],
    ids=["command", "job"],
)
def test_a_signal_during_imports_ends_the_command_as_interrupted(
    config: Path, number: signal.Signals, seconds: float, program: Sequence[str]
) -> None:
    process = start_extract(config, "inline", program=program)
    # The first worker process is started by the handler of the command, after the signals are handled.
    wait_until(lambda: bool(find_descendants(process.pid)), "the first worker process")
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
