"""Kills and interruptions that really happen: a run started again ends with each scan exactly once.

Plain `pytest` runs a dozen of the rounds that `kill.rounds` lists; `pytest -m kill` runs all of them.
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
from kill.harness import PATIENCE_S, Head, assert_same, finish, run_and_kill, values
from kill.rounds import COMMANDS, DOZEN, ROUNDS, Round

from featray.output.dataset import Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection

SCANS_IN_ALL = 64
"""More than a file's worth and all that is in flight: a stop leaves some out."""
INPUT_ZYX = (8, 32, 32)
"""What `vae_file` takes."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return scans large enough that a run over them can be met in the middle."""
    from featray.synthetic.phantom import make_collection

    folder = tmp_path_factory.mktemp("collection")
    make_collection(folder, SCANS_IN_ALL, shape_zyx=(64, 160, 160), seed=5, dicom_count=1)
    return folder


@pytest.fixture(scope="module")
def job(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a config without output, of a model slow enough that commits do not come all at once."""
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


@pytest.fixture(scope="module")
def undisturbed(job: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    import featray

    output = str(tmp_path_factory.mktemp("undisturbed") / "out")
    featray.extract({**job, "output": {"uri": output}})
    return values(Dataset(Store(output)))


@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.ray)])
def test_ctrl_c_once_commits_what_is_finished_and_says_how_to_resume(
    config: Path, undisturbed: Any, engine: str
) -> None:
    process = start(config, engine)
    wait_for_a_commit(config, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=30)[1], "processes are left"
    assert process.returncode == 130, err
    assert "run the same command again to resume" in err
    assert "Traceback" not in err
    done = len(dataset_of(config).read_scans(("scan_id",)))
    assert 0 < done < SCANS_IN_ALL
    run_to_the_end(config)
    assert_same(config, undisturbed)


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


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[Callable[[], Head]]:
    """Return a function that gives the Ray that rounds share, started when first asked for."""
    started: list[Head] = []

    def get() -> Head:
        if not started:
            started.append(Head())
        return started[0]

    yield get
    for found in started:
        found.close()


@pytest.fixture
def ray_of(shared_ray: Callable[[], Head], request: pytest.FixtureRequest) -> Callable[[Round], Head | None]:
    """Return a function that gives the Ray that a round joins, one of its own if it loses a node."""

    def get(round_: Round) -> Head | None:
        if round_.engine == "inline" or round_.victim == "raylet":  # that of the driver's own Ray
            return None
        if round_.victim != "node":
            return shared_ray()
        own = Head(workers=1)
        request.addfinalizer(own.close)
        return own

    return get


@dataclass(frozen=True)
class Stage:
    """What a command starts from and comes to: a config without output, the output before, all features."""

    config: dict[str, Any]
    before: Path | None
    expected: dict[tuple[str, str, int], list[float]]


@pytest.fixture(scope="module")
def stages(vae_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    """Return, by command, a small collection's stage; one for `refresh` has changed since its extraction."""
    found = {}
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
            finish(_written(config, before, folder), "extract")
            _change(folder / "ct" / "nifti")
        undisturbed = _written(config, folder / "undisturbed", folder)
        finish(undisturbed, "extract")
        found[command] = Stage(config, before, values(dataset_of(undisturbed)))
    return found


def _written(config: dict[str, Any], output: Path, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "output": {"uri": str(output)}}))
    return path


def _change(folder: Path) -> None:
    """Give twelve scans another content, take four away, and put four new ones."""
    scans = sorted(folder.iterdir())
    for changed, other in zip(scans[:24:2], scans[1:24:2], strict=True):
        shutil.copy(other, changed)
    for number, gone in enumerate(scans[24:28]):
        gone.rename(folder / f"new_{number}.nii.gz")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Take every round when the kill tests are asked for (`-m kill`), else a dozen."""
    if "kill_round" in metafunc.fixturenames:
        rounds = ROUNDS if metafunc.config.option.markexpr == "kill" else DOZEN
        marks = {"ray": [pytest.mark.ray], "inline": []}
        metafunc.parametrize(
            "kill_round", [pytest.param(found, id=found.id, marks=marks[found.engine]) for found in rounds]
        )


@pytest.mark.kill
@pytest.mark.timeout(2 * PATIENCE_S)
def test_whoever_is_killed_and_whenever_the_next_start_ends_as_if_nothing_had_happened(
    kill_round: Round, stages: dict[str, Stage], ray_of: Callable[[Round], Head | None], tmp_path: Path
) -> None:
    start, stage = time.monotonic(), stages[kill_round.command]
    if stage.before is not None:
        shutil.copytree(stage.before, tmp_path / "out")
    config = _written(stage.config, tmp_path / "out", tmp_path)
    ended = run_and_kill(config, kill_round, ray_of(kill_round))
    if not kill_round.ends_the_run:
        assert ended.returncode == 0, ended.stderr
        assert_same(config, stage.expected)
    elif kill_round.victim != "raylet":
        assert not ended.met or ended.returncode == -signal.SIGKILL, ended.stderr
    if dataset_of(config).find_snapshot() is not None:
        values(dataset_of(config))  # what a reader sees meanwhile is whole commits
    summary = finish(config, kill_round.command)
    assert_same(config, stage.expected)
    left = summary.done + summary.removed
    # At a point it has killed itself; at any time the last of its work may have been done.
    in_the_middle = bool(left) or kill_round.when != "any time" or not kill_round.ends_the_run
    _note(kill_round, met=ended.met and in_the_middle, left=left, start=start)


def _note(kill_round: Round, *, met: bool, left: int, start: float) -> None:
    """Add a line to the file that FEATRAY_KILL_LOG names, if it does."""
    if path := os.environ.get("FEATRAY_KILL_LOG"):
        seconds = round(time.monotonic() - start, 1)
        line = {"round": kill_round.id, "met_in_the_middle": met, "left": left, "seconds": seconds}
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
