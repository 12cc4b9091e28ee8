"""Carry out rounds of `kill.rounds`, with the collections, outputs and Ray clusters that they need."""

from __future__ import annotations

import functools
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz.kinds import SCANS
from small_model import save_small_model

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
from kill.rounds import SCENARIOS, Round

INPUT_ZYX = (8, 32, 32)
"""Input shape of the model."""
SCAN_COUNT = 20
"""With three scans per file and commit, a run makes more commits than a kill waits for."""
LAYERS = ["z_mean", "conv_2", {"layer": "conv_2", "pool": "grid", "grid": [2, 2, 2], "as": "conv_2_grid"}]
OTHER_LAYER = "conv_1"
"""A layer that only outputs before the command have."""


@dataclass(frozen=True)
class Scenario:
    """The input of a command, and the features that the output must hold after it.

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
    """Whether a kill came while the run had work left, and how many scans and layers the next run changed."""

    met_in_the_middle: bool
    left: int


GetCluster = Callable[[Round], RayCluster | None]
GetScenario = Callable[[str], Scenario]


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
def get_kill_scenario(tmp_path_factory: pytest.TempPathFactory) -> GetScenario:
    """Return a function that returns a scenario by its name, over phantoms in NIfTI and DICOM."""
    return functools.cache(lambda name: make_scenario(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(scope="module")
def get_soak_scenario(tmp_path_factory: pytest.TempPathFactory) -> GetScenario:
    """Return a function that returns a scenario by its name, over scans of every format that can be found."""
    kinds = [kind for kind in SCANS.values() if kind.source_format == "auto"]

    def write_all_formats(folder: Path) -> None:
        for number, kind in enumerate(kinds):
            (folder / f"kind_{number}").mkdir(parents=True)
            kind.write(folder / f"kind_{number}")

    return functools.cache(lambda name: make_scenario(name, tmp_path_factory.mktemp(name), write_all_formats))


def make_scenario(name: str, folder: Path, write_more: Callable[[Path], None] | None = None) -> Scenario:
    """Return a scenario: write its output, then change its collection, its layers or its model.

    Args:
        name: One of `SCENARIOS`.
        folder: Empty folder of the scenario.
        write_more: Writes further scans into the folder of the collection.
    """
    make_collection(folder / "ct", SCAN_COUNT, shape_zyx=(16, 40, 48), seed=11, dicom_count=1)
    if write_more:
        write_more(folder / "ct")
    config: dict[str, Any] = {
        "source": {"uri": str(folder / "ct")},
        "preprocess": {"size": list(INPUT_ZYX)},
        "model": {
            "uri": str(save_small_model(folder / "model.keras", seed=1)),
            "layers": list(LAYERS),
            "batch_size": 2,
        },
        "run": {"decode": {"workers": 2}},
    }
    before = _BEFORE[name](config, folder)
    undisturbed = write_config(config, folder / "undisturbed", folder)
    run_to_end(undisturbed, ("extract",))
    expected = read_values(open_dataset(undisturbed))
    if before is not None and "--drop-layers" not in SCENARIOS[name]:
        stored = read_values(open_dataset(write_config(config, before, folder)))
        expected |= {key: value for key, value in stored.items() if key[1] == OTHER_LAYER}  # they stay
    return Scenario(config, before, expected)


def _begin_with_nothing(config: dict[str, Any], folder: Path) -> None:
    """Make no output: all scans are new."""


def _change_collection_of_output(config: dict[str, Any], folder: Path) -> Path:
    """Write the output, then change, remove and add scans."""
    before = _extract_layers(config, folder, LAYERS)
    change_collection(folder / "ct" / "nifti")
    return before


def _leave_out_layers(config: dict[str, Any], folder: Path) -> Path:
    """Write the output with one layer, then add scans."""
    before = _extract_layers(config, folder, ["z_mean"])
    for number, scan in enumerate(sorted((folder / "ct" / "nifti").iterdir())[:4]):
        shutil.copy(scan, scan.with_name(f"new_{number}.nii.gz"))
    return before


def _write_other_layers(config: dict[str, Any], folder: Path) -> Path:
    """Write the output with a layer under another name and with a layer more, then change scans."""
    before = _extract_layers(config, folder, [{"layer": "z_mean", "as": "latent"}, "conv_2", OTHER_LAYER])
    change_collection(folder / "ct" / "nifti")
    return before


def _write_output_of_other_weights(config: dict[str, Any], folder: Path) -> Path:
    """Write the output with other weights, such that changed scans lack two of its three layers."""
    other = {**config["model"], "uri": str(save_small_model(folder / "other.keras", seed=2))}
    earlier = {**config, "model": other}
    before = _extract_layers(earlier, folder, ["z_mean", "conv_2", OTHER_LAYER])
    change_collection(folder / "ct" / "nifti")
    run_to_end(write_config(_set_layers(earlier, ["z_mean"]), before, folder), ("refresh",))
    return before


_BEFORE: dict[str, Callable[[dict[str, Any], Path], Path | None]] = {
    "extract": _begin_with_nothing,
    "refresh": _change_collection_of_output,
    "add_layers": _leave_out_layers,
    "drop_layers": _write_other_layers,
    "other_weights": _write_output_of_other_weights,
}
"""Scenario → the function that writes the output before the command, and then changes the collection."""


def _extract_layers(config: dict[str, Any], folder: Path, layers: Sequence[Any]) -> Path:
    """Extract layers of all scans into a new output, and return its folder."""
    run_to_end(write_config(_set_layers(config, layers), folder / "before", folder), ("extract",))
    return folder / "before"


def _set_layers(config: dict[str, Any], layers: Sequence[Any]) -> dict[str, Any]:
    return {**config, "model": {**config["model"], "layers": list(layers)}}


def open_dataset(config: Path) -> Dataset:
    """Return the output of a config file."""
    return Dataset(Store(str(get_output_folder(config))))


def write_config(config: dict[str, Any], output: Path, folder: Path) -> Path:
    """Write the config with an output into a folder; return its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**config, "output": {"uri": str(output)}}))
    return path


def change_collection(folder: Path) -> None:
    """Give eight scans another content, and rename three, so that three are removed and three are new."""
    scans = sorted(folder.glob("phantom_*"))
    for changed, other in zip(scans[:16:2], scans[1:16:2], strict=True):
        shutil.copy(other, changed)
    for number, renamed in enumerate(scans[16:19]):
        renamed.rename(folder / f"new_{number}.nii.gz")


def run_round(
    round_: Round, scenario: Scenario, cluster: RayCluster | None, folder: Path, *, may_miss: bool = False
) -> RoundResult:
    """Kill a run of the scenario as the round says, run it again, and assert that the output is right.

    Args:
        round_: The round.
        scenario: The scenario that the round names.
        cluster: The cluster that the run joins, or None.
        folder: Empty folder for the config and the output.
        may_miss: Whether the run may end before it reaches its point for the last time. On a machine that is
            very busy it makes fewer commits, because more is ready for each.
    """
    if scenario.output_before is not None:
        shutil.copytree(scenario.output_before, folder / "out")
    config = write_config(scenario.config, folder / "out", folder)
    killed = run_and_kill(config, round_, cluster)
    if not round_.ends_the_run:
        assert killed.returncode == 0, killed.stderr
        assert_same_output(config, scenario.expected)
    elif round_.victim != "raylet":
        ended_before = killed.returncode == 0 and (may_miss or not killed.was_running)
        assert ended_before or killed.returncode == -signal.SIGKILL, killed.stderr
    if open_dataset(config).find_snapshot() is not None:
        read_values(open_dataset(config))  # between the two runs, a reader sees whole commits only
    summary = run_to_end(config, SCENARIOS[round_.scenario])
    assert_same_output(config, scenario.expected)
    left = summary.done + summary.removed + len(summary.renamed_layers) + len(summary.dropped_layers)
    # A run that kills itself at a point is in the middle. At any time, it may have had no work left.
    in_the_middle = bool(left) or round_.when != "any time" or not round_.ends_the_run
    was_killed = killed.returncode != 0 or not round_.ends_the_run
    return RoundResult(killed.was_running and was_killed and in_the_middle, left)
