"""Starts featray, kills the processes of a round, and compares what is there with an undisturbed run.

Everything waits for a bounded time, and every process that was started here is ended here, by its id.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

import featray
from featray.commands.verify import verify
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.lease import LEASE_FOLDER
from featray.storage.store import Store
from kill.rounds import Round

PATIENCE_S = 150.0
"""A run over small phantoms takes a few seconds; this is for machines that do other things as well."""
WITHIN_S = 0.8
"""A kill comes within so many seconds of the first commit: about as long as the paced run then lasts."""
_TESTS = Path(__file__).resolve().parent.parent
_TOKEN = secrets.token_hex(32)
"""Ray listens on this machine's address, not only on 127.0.0.1; nobody else shall use it."""
_CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 2, "object_store_memory": 150_000_000, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={**node, "temp_dir": sys.argv[1]})
for _ in range(int(sys.argv[2])):
    added = cluster.add_node(**node)
    print(added.all_processes["raylet"][0].process.pid, end=" ")
print(cluster.address, flush=True)
sys.stdin.read()  # until the test has ended, however it ends
cluster.shutdown()
"""

Values = dict[tuple[str, str, int], list[float]]


def environment() -> dict[str, str]:
    """Return what runs and Ray get, so that they find this package and each other."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {
        **kept,
        "PYTHONPATH": f"{_TESTS}{os.pathsep}{_TESTS.parent}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": _TOKEN,
    }


class Head:
    """A Ray of the test's own, which ends with the test.

    Args:
        workers: Nodes beside the head node, each with two CPUs like that one.
    """

    def __init__(self, workers: int = 0) -> None:
        self._folder = tempfile.mkdtemp(prefix="fr")  # short: sockets lie in it
        command = [sys.executable, "-c", _CLUSTER, self._folder, str(workers)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert self._process.stdout is not None
        *raylets, self.address = self._process.stdout.readline().split()
        self.raylets = [int(pid) for pid in raylets]

    def processes(self) -> list[psutil.Process]:
        """Return all that belong to it."""
        return descendants(self._process.pid)

    def close(self) -> None:
        """End it and all its processes."""
        found = self.processes()
        assert self._process.stdin is not None
        self._process.stdin.close()
        psutil.wait_procs(found, timeout=10)
        end([psutil.Process(self._process.pid), *found] if self._process.poll() is None else found)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True)
class Ended:
    """What became of a killed run: its exit code, what it said, whether the kill met it while it ran."""

    returncode: int
    stderr: str
    met: bool


def run_and_kill(config: Path, round_: Round, head: Head | None) -> Ended:
    """Start the round's command and kill its victim at its moment; return when the run has ended."""
    errors = config.parent / "stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            _command(config, round_, head),
            stdout=stream,
            stderr=stream,
            env=environment(),
            start_new_session=True,  # so that its group is not ours
        )
    family, before = Family(process.pid), commits(config)
    try:
        met = _kill(process, round_, head, lambda: commits(config) > before)
        wait_until(lambda: process.poll() is not None, "the run to end")
        assert family.is_gone(), "helpers must end with their driver"
        return Ended(process.returncode, errors.read_text(), met)
    finally:
        process.kill()
        process.wait()
        family.end()


def _command(config: Path, round_: Round, head: Head | None) -> list[str]:
    at_point = round_.when != "any time"
    name = ("writer" if round_.victim == "writer" else round_.when) if at_point else "-"
    group = "1" if round_.victim == "group" else "0"
    paced = [sys.executable, "-m", "kill.paced", name, str(round_.nth), str(config.parent / "marker"), group]
    address = [] if head is None else ["--set", f"run.address={head.address}"]
    return [*paced, round_.command, str(config), "--set", f"run.engine={round_.engine}", *address]


def _kill(
    process: subprocess.Popen[bytes], round_: Round, head: Head | None, has_begun: Callable[[], bool]
) -> bool:
    """Kill at the round's moment, unless the process does so itself; return whether it was still running."""
    if round_.when != "any time":
        return True
    rng = random.Random(round_.id)
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = _victims(process.pid, round_, head)
        return bool(found) or process.poll() is not None

    # Ray's decoders may be done, and gone, when the first commit comes.
    first = look if (round_.engine, round_.victim) == ("ray", "decoder") else has_begun
    wait_until(lambda: first() or process.poll() is not None, "the run to be at work")
    time.sleep(rng.random() * WITHIN_S)
    if round_.victim in ("driver", "group"):
        met = process.poll() is None
        if met:
            os.killpg(process.pid, 9) if round_.victim == "group" else process.kill()
        return met
    wait_until(look, f"a {round_.victim}")
    met = process.poll() is None
    if met:
        victim = rng.choice(found)
        end([victim, *descendants(victim.pid)] if round_.victim == "node" else [victim])
    return met


def _victims(driver: int, round_: Round, head: Head | None) -> list[psutil.Process]:
    """Return the processes that play the victim's part just now."""
    if round_.victim == "node":  # a machine that is gone takes all its processes with it
        assert head is not None
        return [psutil.Process(pid) for pid in head.raylets]
    family = descendants(driver) + (head.processes() if head else [])
    return [found for found in family if _plays(found, round_)]


def _plays(found: psutil.Process, round_: Round) -> bool:
    try:
        line, parent, name = " ".join(found.cmdline()), found.parent(), found.name()
        above = " ".join(parent.cmdline()) if parent else ""
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    is_helper = "worker_process" in line and (round_.engine == "inline" or above.startswith("ray::"))
    parts = {
        "decoder": is_helper,
        "actor": "MapWorker" in line and "ExtractBatch" in line,
        "raylet": name == "raylet",
    }
    return parts[round_.victim]


def commits(config: Path) -> int:
    """Return how many entries the ledger's log has, beside the one that makes it."""
    return len(list((output_of(config) / SCANS / "_delta_log").glob("*[1-9]*.json")))


def output_of(config: Path) -> Path:
    """Return the folder that a config names."""
    return Path(yaml.safe_load(config.read_text())["output"]["uri"])


def finish(config: Path, command: str) -> Any:
    """Let one undisturbed start go to its end, and return its summary; the engine makes no difference."""
    run = featray.refresh if command == "refresh" else featray.extract
    return run(str(config), ["run.engine=inline", "run.decode.workers=0"])


def values(dataset: Dataset) -> Values:
    """Return all features; no row is there twice, and the ledger promises exactly these."""
    snapshot = dataset.open_snapshot()
    rows = snapshot.read(FEATURES, ("scan_id", "layer", "patch", "feature")).to_pylist()
    found = {(row["scan_id"], row["layer"], row["patch"]): row["feature"] for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    ledger = snapshot.read(SCANS, ("scan_id", "status", "patches")).to_pylist()
    assert len({row["scan_id"] for row in ledger}) == len(ledger), "a scan is in the ledger twice"
    layers = {layer for _, layer, _ in found}
    promised = {
        (row["scan_id"], layer, patch)
        for row in ledger
        if row["status"] == "ok"
        for layer in layers
        for patch in range(row["patches"])
    }
    assert promised == found.keys(), "the ledger and the features differ"
    return found


def assert_same(config: Path, expected: Values) -> None:
    """Compare an output with an undisturbed run's, and its folder with its tables."""
    dataset = Dataset(Store(str(output_of(config))))
    found = values(dataset)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6, err_msg=str(key))
    for table in (FEATURES, SCANS):  # a plain reader of the folder sees the table and nothing else
        on_disk = {name for name in dataset.store.list_files(table) if "/_delta_log/" not in name}
        assert on_disk == {f"{table}/{file.path}" for file in dataset.open_snapshot().files(table)}
    assert list(dataset.store.list_files(LEASE_FOLDER)) == [], "a lease is left"
    assert verify(dataset).text().endswith("everything is in order")


def wait_until(has_come: Callable[[], bool], what: str) -> None:
    """Look every few milliseconds, for a bounded time."""
    deadline = time.monotonic() + PATIENCE_S
    while not has_come():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.005)


def descendants(pid: int) -> list[psutil.Process]:
    """Return a process's children and theirs; none when it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes: Iterable[psutil.Process]) -> None:
    """Kill what is still there."""
    found = list(processes)
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil knows when a pid was given away since
            process.kill()
    psutil.wait_procs(found, timeout=10)


class Family:
    """All processes that a process has started, though it may be dead; looks a few times a second."""

    def __init__(self, pid: int) -> None:
        self._pid, self._found, self._stop = pid, set[psutil.Process](), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def is_gone(self) -> bool:
        """Whether all of them end soon, now that the process has."""
        self._end_looking()
        return not psutil.wait_procs(self._found, timeout=20)[1]

    def end(self) -> None:
        """Kill what is left of them."""
        self._end_looking()
        end(self._found)

    def _look(self) -> None:
        while not self._stop.wait(0.25):
            self._found.update(descendants(self._pid))

    def _end_looking(self) -> None:
        self._stop.set()
        self._thread.join()
