"""Carry out rounds of `kill.rounds`, with the collections, outputs and Ray clusters that they need."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz.kinds import SCANS

from featray.output.dataset import Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection
from kill.harness import (
    FeatureValues,
    RayCluster,
    assert_same_output,
    get_output_folder,
    read_values,
    run_and_kill,
    run_to_end,
)
from kill.rounds import COMMANDS, Round

INPUT_ZYX = (8, 32, 32)
"""Input shape of the model in the fixture `vae_file`."""


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


@dataclass(frozen=True)
class RoundResult:
    """Whether a kill came while the run had work left, and how many scans the second run had to process."""

    met_in_the_middle: bool
    left: int


GetCluster = Callable[[Round], RayCluster | None]


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
def get_cluster(get_shared_cluster: Callable[[], RayCluster], request: pytest.FixtureRequest) -> GetCluster:
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


@pytest.fixture(scope="module")
def kill_scenarios(vae_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """Return command → scenario, over phantoms in NIfTI and DICOM."""
    return {command: make_scenario(command, vae_file, tmp_path_factory) for command in COMMANDS}


@pytest.fixture(scope="module")
def soak_scenarios(vae_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scenario]:
    """Return command → scenario, over scans of every format that a listing finds by itself."""
    kinds = [kind for kind in SCANS.values() if kind.source_format == "auto"]

    def write_all_formats(folder: Path) -> None:
        for number, kind in enumerate(kinds):
            (folder / f"kind_{number}").mkdir(parents=True)
            kind.write(folder / f"kind_{number}")

    return {
        command: make_scenario(command, vae_file, tmp_path_factory, write_all_formats) for command in COMMANDS
    }


def make_scenario(
    command: str,
    vae_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_more: Callable[[Path], None] | None = None,
) -> Scenario:
    """Return the scenario of a command; the collection of `refresh` has changed since it was extracted.

    Args:
        command: `extract` or `refresh`.
        vae_file: Model.
        tmp_path_factory: Makes the folder of the scenario.
        write_more: Writes further scans into the folder of the collection.
    """
    folder = tmp_path_factory.mktemp(command)
    make_collection(folder / "ct", 30, shape_zyx=(16, 40, 48), seed=11, dicom_count=1)
    if write_more:
        write_more(folder / "ct")
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
    return Scenario(config, before, read_values(open_dataset(undisturbed)))


def open_dataset(config: Path) -> Dataset:
    """Return the output of a config file."""
    return Dataset(Store(str(get_output_folder(config))))


def write_config(config: dict[str, Any], output: Path, folder: Path) -> Path:
    """Write the config with an output into a folder; return its path."""
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


def run_round(round_: Round, scenario: Scenario, cluster: RayCluster | None, folder: Path) -> RoundResult:
    """Kill a run of the scenario as the round says, run it again, and assert that the output is right.

    Args:
        round_: The round.
        scenario: Scenario of the command of the round.
        cluster: The cluster that the run joins, or None.
        folder: Empty folder for the config and the output.
    """
    if scenario.output_before is not None:
        shutil.copytree(scenario.output_before, folder / "out")
    config = write_config(scenario.config, folder / "out", folder)
    killed = run_and_kill(config, round_, cluster)
    if not round_.ends_the_run:
        assert killed.returncode == 0, killed.stderr
        assert_same_output(config, scenario.expected)
    elif round_.victim != "raylet":
        assert not killed.was_running or killed.returncode == -signal.SIGKILL, killed.stderr
    if open_dataset(config).find_snapshot() is not None:
        read_values(open_dataset(config))  # between the two runs, a reader sees whole commits only
    summary = run_to_end(config, round_.command)
    assert_same_output(config, scenario.expected)
    left = summary.done + summary.removed
    # A run that kills itself at a point is in the middle. At any time, it may have had no work left.
    in_the_middle = bool(left) or round_.when != "any time" or not round_.ends_the_run
    return RoundResult(killed.was_running and in_the_middle, left)
