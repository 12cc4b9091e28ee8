"""Run featray, kill one of its processes, and compare the output with that of an undisturbed run.

`run_and_kill` starts the command of a round as a process of its own. Either that process kills itself at a
point of its code (`kill.paced` inserts these points), or this module waits for the first commit, finds the
victim among the running processes, and sends it SIGKILL. `run_to_end` then starts the command again, and
`assert_same_output` compares all features with the expected ones. Every wait has a time limit, and every
process that is started here is ended here, by its id.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import yaml

import featray
from featray.commands.verify import verify
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.lease import LEASE_FOLDER
from featray.stages.report import Summary
from featray.storage.store import Store
from kill.rounds import SCENARIOS, Round

TIMEOUT_S = 300.0
"""Time limit of each wait. A run takes a few seconds; the rest is for machines that are busy."""
POLL_S = 0.03
"""Interval between two looks at the processes or files of a run; looking takes CPU time from the run."""
KILL_WINDOW_S = 0.8
"""A kill at `any time` comes within this time after the first commit; the paced run lasts about as long."""
_TESTS = Path(__file__).resolve().parent.parent
_TOKEN = secrets.token_hex(32)
"""Ray listens on this machine's address, not only on 127.0.0.1; the token keeps others out."""
_START_ATTEMPTS = 3
"""Number of times that a cluster is started; on a busy machine, Ray gives up a start after half a minute."""
_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 2, "object_store_memory": 150_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": sys.argv[1]})
for _ in range(int(sys.argv[2])):
    added = cluster.add_node(**node)
    print(added.all_processes["raylet"][0].process.pid, end=" ")
print(cluster.address, flush=True)
sys.stdin.read()  # returns when the test ends, also if the test is killed
cluster.shutdown()
"""

FeatureValues = dict[tuple[str, str, int], list[float]]
"""(scan_id, layer, patch) → feature."""


def make_environment() -> dict[str, str]:
    """Return the environment of runs and of Ray, in which they find this package and each other."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **inherited,
        "PYTHONPATH": f"{_TESTS}{os.pathsep}{_TESTS.parent}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _TOKEN,
    }


class RayCluster:
    """A Ray cluster on this machine that runs can join; it ends with `close`.

    Args:
        extra_nodes: Number of nodes in addition to the head node; each node has two CPUs.

    Attributes:
        address: Address for `run.address`.
        raylets: Process ids of the raylets of the extra nodes.
    """

    def __init__(self, extra_nodes: int = 0) -> None:
        self._folder = tempfile.mkdtemp(prefix="fr")  # short, because it contains sockets
        command = [sys.executable, "-c", _CLUSTER, self._folder, str(extra_nodes)]
        for _ in range(_START_ATTEMPTS):
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=make_environment()
            )
            assert self._process.stdout is not None
            if words := self._process.stdout.readline().split():
                break
            self._process.communicate()
        else:
            raise RuntimeError("Ray has not started; the machine may be too busy")
        *raylets, self.address = words
        self.raylets = [int(pid) for pid in raylets]

    def find_processes(self) -> list[psutil.Process]:
        """Return all processes of the cluster."""
        return find_descendants(self._process.pid)

    def close(self) -> None:
        """End the cluster and all its processes."""
        processes = self.find_processes()
        assert self._process.stdin is not None
        self._process.stdin.close()
        psutil.wait_procs(processes, timeout=10)
        if self._process.poll() is None:
            processes.append(psutil.Process(self._process.pid))
        kill_processes(processes)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class KilledRun:
    """A run that has ended.

    Attributes:
        returncode: Exit code of the driver; negative if a signal ended it.
        stderr: Output of the driver on stdout and stderr.
        was_running: Whether the run had not ended before the kill.
    """

    returncode: int
    stderr: str
    was_running: bool


def run_and_kill(config: Path, round_: Round, cluster: RayCluster | None) -> KilledRun:
    """Start the round's command, kill its victim at its moment, and return when the run has ended.

    Args:
        config: Config file of the run; further files are written next to it.
        round_: Names the scenario, the victim and the moment of the kill.
        cluster: Cluster that the run joins; None for engine inline, or for a local Ray of the driver's own.
    """
    output = config.parent / "stderr"
    with output.open("w") as stream:
        process = subprocess.Popen(
            _make_command(config, round_, cluster),
            stdout=stream,
            stderr=stream,
            env=make_environment(),
            start_new_session=True,  # so that killing its process group does not kill the test
        )
    watch, folder = DescendantWatch(process.pid), get_output_folder(config)
    commits_before = count_commits(folder)
    try:
        was_running = _kill_victim(process, round_, cluster, lambda: count_commits(folder) > commits_before)
        wait_until(lambda: process.poll() is not None, "the run to end")
        assert watch.have_ended(), "worker processes must end with their driver"
        return KilledRun(process.returncode, output.read_text(), was_running)
    finally:
        process.kill()
        process.wait()
        watch.kill()


def _make_command(config: Path, round_: Round, cluster: RayCluster | None) -> list[str]:
    point = "-"
    if round_.when != "any time":
        point = "writer" if round_.victim == "writer" else round_.when
    group = "1" if round_.victim == "group" else "0"
    paced = [sys.executable, "-m", "kill.paced", point, str(round_.nth), str(config.parent / "marker"), group]
    address = "local" if cluster is None else cluster.address  # local: starts Ray also for a few scans
    uses_ray = ["--set", f"run.address={address}"] if round_.engine == "ray" else []
    return [
        *paced,
        *SCENARIOS[round_.scenario],
        str(config),
        "--set",
        f"run.engine={round_.engine}",
        *uses_ray,
    ]


def _kill_victim(
    process: subprocess.Popen[bytes],
    round_: Round,
    cluster: RayCluster | None,
    has_committed: Callable[[], bool],
) -> bool:
    """Kill the victim of a round at `any time`; return whether the run had not ended before.

    For a kill at a point this returns at once, because the process kills itself there.
    """
    if round_.when != "any time":
        return True
    rng = random.Random(round_.id)
    victims: list[psutil.Process] = []

    def has_victims_or_ended() -> bool:
        victims[:] = _find_victims(process.pid, round_, cluster)
        return bool(victims) or process.poll() is not None

    # On Ray, all decoding may be finished, and its processes gone, when the first commit comes.
    is_ray_decoder = (round_.engine, round_.victim) == ("ray", "decoder")
    can_begin = has_victims_or_ended if is_ray_decoder else has_committed
    wait_until(lambda: can_begin() or process.poll() is not None, "the run to process its first scans")
    time.sleep(rng.random() * KILL_WINDOW_S)
    if round_.victim in ("driver", "group"):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL) if round_.victim == "group" else process.kill()
        return process.wait(TIMEOUT_S) == -signal.SIGKILL  # it may have ended just before
    wait_until(has_victims_or_ended, f"a {round_.victim}")
    was_running = process.poll() is None
    if was_running:
        victim = rng.choice(victims)
        kill_processes([victim, *find_descendants(victim.pid)] if round_.victim == "node" else [victim])
    return was_running


def _find_victims(driver: int, round_: Round, cluster: RayCluster | None) -> list[psutil.Process]:
    """Return the running processes of which the round kills one.

    For a node these are the raylets of the extra nodes; all processes of a raylet are killed with it, as if
    the machine had failed.
    """
    if round_.victim == "node":
        assert cluster is not None
        return [psutil.Process(pid) for pid in cluster.raylets]
    processes = find_descendants(driver) + (cluster.find_processes() if cluster else [])
    return [process for process in processes if _is_victim(process, round_)]


def _is_victim(process: psutil.Process, round_: Round) -> bool:
    """Return whether the command line or the name of a process shows that it is a possible victim."""
    try:
        command, parent, name = " ".join(process.cmdline()), process.parent(), process.name()
        parent_command = " ".join(parent.cmdline()) if parent else ""
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    is_of_engine = round_.engine == "inline" or parent_command.startswith("ray::")
    is_victim = {
        "decoder": "worker_process" in command and is_of_engine,
        "actor": "MapWorker" in command and "ExtractBatch" in command,
        "raylet": name == "raylet",
    }
    return is_victim[round_.victim]


def count_commits(output: Path) -> int:
    """Return the number of entries in the log of the scans table, except the one that creates the table."""
    return len(list((output / SCANS / "_delta_log").glob("*[1-9]*.json")))


def get_output_folder(config: Path) -> Path:
    """Return the output folder of a config file."""
    return Path(yaml.safe_load(config.read_text())["output"]["uri"])


def run_to_end(config: Path, command: Sequence[str]) -> Summary:
    """Run a command undisturbed in this process, and return its summary.

    It always uses engine inline, because both engines give the same values.

    Args:
        config: Config file.
        command: Words of the command line, as in `SCENARIOS`.
    """
    overrides = ["run.engine=inline", "run.decode.workers=0"]
    if command[0] == "extract":
        return featray.extract(str(config), overrides)
    return featray.refresh(str(config), overrides, drop_layers="--drop-layers" in command)


def read_values(dataset: Dataset) -> FeatureValues:
    """Return all features; check that each row occurs once and that the scans table names exactly these.

    Each row must have the recipe that the scans table names for its cell.
    """
    snapshot = dataset.open_snapshot()
    rows = snapshot.read(FEATURES, ("scan_id", "layer", "patch", "feature", "recipe")).to_pylist()
    values = {(row["scan_id"], row["layer"], row["patch"]): row["feature"] for row in rows}
    assert len(values) == len(rows), "a row occurs twice"
    columns = ("scan_id", "status", "patches", "layers", "failed_layers")
    scans = snapshot.read(SCANS, columns).to_pylist(maps_as_pydicts="strict")
    assert len({scan["scan_id"] for scan in scans}) == len(scans), "a scan has two rows in the scans table"
    promised = {
        (scan["scan_id"], layer, patch): recipe
        for scan in scans
        for layer, recipe in scan["layers"].items()
        for patch in range(scan["patches"])
    }
    stored = {(row["scan_id"], row["layer"], row["patch"]): row["recipe"] for row in rows}
    assert stored == promised, "the scans table and the features differ"
    for scan in scans:
        assert not scan["layers"].keys() & scan["failed_layers"].keys(), "a cell is there and has failed"
        assert bool(scan["failed_layers"]) == (scan["status"] == "failed"), "the status of a scan is wrong"
    return values


def assert_same_output(config: Path, expected: FeatureValues) -> None:
    """Assert that an output has the features of an undisturbed run, no further files, and no lease."""
    dataset = Dataset(Store(str(get_output_folder(config))))
    values = read_values(dataset)
    assert values.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(values[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))
    for table in (FEATURES, SCANS):  # a plain reader of the folder sees the data of the table and no other
        on_disk = {name for name in dataset.store.list_files(table) if "/_delta_log/" not in name}
        assert on_disk == {f"{table}/{file.path}" for file in dataset.open_snapshot().files(table)}
    assert list(dataset.store.list_files(LEASE_FOLDER)) == [], "the lease was not removed"
    assert verify(dataset).text().endswith("everything is in order")


def wait_until(is_true: Callable[[], bool], event: str) -> None:
    """Call `is_true` every `POLL_S` until it returns true; fail after `TIMEOUT_S`.

    Args:
        is_true: Condition to wait for.
        event: What is waited for, for the message.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, f"waited {TIMEOUT_S:.0f} s for {event}"
        time.sleep(POLL_S)


def find_descendants(pid: int) -> list[psutil.Process]:
    """Return the children of a process, their children, and so on; none if the process has ended."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_processes(processes: Iterable[psutil.Process]) -> None:
    """Kill those of the processes that are still running."""
    to_kill = list(processes)
    for process in to_kill:
        with contextlib.suppress(psutil.NoSuchProcess):  # also if another process has the same id by now
            process.kill()
    psutil.wait_procs(to_kill, timeout=10)


class DescendantWatch:
    """Collects all processes that a process starts, because they cannot be found after it has died.

    A thread searches for them four times a second, until `have_ended` or `kill` is called.

    Args:
        pid: Id of the process.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._processes, self._stop = pid, set[psutil.Process](), threading.Event()
        self._thread = threading.Thread(target=self._search, daemon=True)
        self._thread.start()

    def have_ended(self) -> bool:
        """Wait up to a minute for all the processes to end; return whether they have."""
        self._stop_searching()
        return not psutil.wait_procs(self._processes, timeout=60)[1]

    def kill(self) -> None:
        """Kill those of the processes that are still running."""
        self._stop_searching()
        kill_processes(self._processes)

    def _search(self) -> None:
        while not self._stop.wait(0.25):
            self._processes.update(find_descendants(self._pid))

    def _stop_searching(self) -> None:
        self._stop.set()
        self._thread.join()
