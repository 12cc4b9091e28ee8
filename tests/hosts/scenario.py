"""A run on several hosts, of which one is cut off, while another one joins and a process is killed.

    ip netns exec OUTSIDE python -m hosts.scenario FOLDER PREFIX

This module runs on a host that is no part of the cluster, submits the run from there, and prints one JSON
document with what happened. `tests/engines/ray/test_hosts.py` makes the hosts and checks the document.

    head     head node of Ray, without CPUs for work
    store    a worker and the object store, which holds the scans, the model and the output
    cut      a worker whose cable is pulled after the first commit
    late     a worker that joins at that moment
    outside  where the run is submitted
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import psutil
import yaml
from kill.harness import read_values, wait_until
from kill.scenarios import INPUT_ZYX, LAYERS
from servers.ray_jobs import takes_jobs
from servers.seaweedfs import SeaweedFS
from small_model import save_small_model

import featray
from featray.commands.verify import verify
from featray.output.dataset import Dataset
from featray.storage.store import Store
from featray.synthetic.phantom import make_collection
from hosts.network import Network

HOSTS = ("head", "store", "cut", "late", "outside")
SCAN_COUNT = 40
BUCKET = "hosts"
OUTPUT = f"s3://{BUCKET}/out"
PORT, DASHBOARD_PORT = 6379, 8265
REPOSITORY = Path(__file__).resolve().parents[2]


def main(folder: Path, network: Network) -> dict[str, Any]:
    """Carry out the scenario in an empty folder, and return what happened."""
    address = network.get_address("store")
    store = SeaweedFS(folder / "store", address, lambda command: network.make_command("store", command))
    store.start()
    local = make_configs(folder, store)
    cluster = Cluster(network, folder)
    cluster.start_head()
    for host in ("store", "cut"):
        cluster.start_worker(host)
    submission = cluster.submit(folder / "job")
    dataset = Dataset(Store(OUTPUT, store.options()))
    wait_until(lambda: submission.poll() is not None or count_commits(dataset) > 0, "the first commit")
    if submission.poll() is not None:
        raise RuntimeError(f"the run has ended too early: {(folder / 'submit.log').read_text()[-3000:]}")
    network.cut("cut")
    cluster.start_worker("late")
    wait_until(lambda: submission.poll() is not None or cluster.find_workers("late"), "work on the late host")
    joined = bool(cluster.find_workers("late"))
    killed = cluster.kill_worker("store", "late")
    code = submission.wait(300)
    featray.extract(local, ["run.engine=inline", "run.decode.workers=0"])
    expected = read_values(Dataset(Store(local["output"]["uri"])))
    values = read_values(dataset)
    return {
        "exit_code": code,
        "late_host_worked": joined,
        "killed": killed,
        "rows": len(values),
        "same_rows": values.keys() == expected.keys(),
        "largest_difference": max(
            abs(a - b)
            for key in expected.keys() & values.keys()
            for a, b in zip(values[key], expected[key], strict=True)
        ),
        "verified": verify(dataset).text().splitlines()[-1],
        "log": (folder / "submit.log").read_text()[-3000:],
    }


class Cluster:
    """A Ray cluster on the hosts of a network, with a token of its own."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network, self._folder = network, folder
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self._environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{REPOSITORY / 'tests'}{os.pathsep}{REPOSITORY}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "FEATRAY_TEST_DECODE_S": "1.0",
            "RAY_agent_register_timeout_ms": "240000",  # for busy machines
            # A host that does not answer is given up after seconds, not after half a minute.
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "3",
        }
        self._jobs = f"http://{network.get_address('head')}:{DASHBOARD_PORT}"

    def start_head(self) -> None:
        """Start the head node, and wait until it takes jobs."""
        address = self._network.get_address("head")
        options = [f"--port={PORT}", f"--dashboard-host={address}", f"--dashboard-port={DASHBOARD_PORT}"]
        self._start_node("head", ["--head", "--num-cpus=0", f"--temp-dir={self._folder / 'ray'}", *options])
        wait_until(self._takes_jobs, "the job server")

    def start_worker(self, host: str) -> None:
        """Start a node with one CPU."""
        self._start_node(host, [f"--address={self._network.get_address('head')}:{PORT}", "--num-cpus=1"])

    def submit(self, working_directory: Path) -> subprocess.Popen[bytes]:
        """Submit the run from this host; return the process that follows it."""
        command = [sys.executable, REPOSITORY / "jobs" / "submit.py", "--address", self._jobs]
        command += ["--working-dir", working_directory, "--"]
        command += ["python", "-m", "kill.paced", "-", "0", "-", "0", "extract", "config.yaml"]
        with (self._folder / "submit.log").open("wb") as log:
            return subprocess.Popen([*map(str, command)], stdout=log, stderr=log, env=self._environment)

    def find_workers(self, host: str) -> list[int]:
        """Return the ids of the processes of a host that run the model."""
        return [pid for pid in self._network.list_processes(host) if "ExtractBatch" in get_command(pid)]

    def kill_worker(self, *hosts: str) -> bool:
        """Kill a process that runs the model on one of the hosts; return whether there was one."""
        for pid in [pid for host in hosts for pid in self.find_workers(host)][:1]:
            os.kill(pid, signal.SIGKILL)
            return True
        return False

    def _start_node(self, host: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--node-ip-address={self._network.get_address(host)}", "--object-store-memory=100000000"]
        self._network.start(host, [*command, *options], self._folder / f"{host}.log", self._environment)

    def _takes_jobs(self) -> bool:
        return takes_jobs(self._jobs, self._environment["RAY_AUTH_TOKEN"])


def make_configs(folder: Path, store: SeaweedFS) -> dict[str, Any]:
    """Make scans, a model and the config of the job, and return the config of the same run on this host."""
    make_collection(folder / "ct", SCAN_COUNT, shape_zyx=(16, 40, 48), seed=7, dicom_count=1)
    model = save_small_model(folder / "model.keras", seed=1)
    files = fsspec.filesystem("s3", **store.options())
    files.mkdir(BUCKET)
    files.put(str(folder / "ct"), f"{BUCKET}/ct", recursive=True)
    files.put(str(model), f"{BUCKET}/model.keras")
    common: dict[str, Any] = {"preprocess": {"size": list(INPUT_ZYX)}}
    options = {"storage_options": store.options()}
    local = {
        **common,
        "source": {"uri": str(folder / "ct")},
        "model": {"uri": str(model), "layers": LAYERS, "batch_size": 2},
        "output": {"uri": str(folder / "local")},
    }
    remote = {
        **common,
        "source": {"uri": f"s3://{BUCKET}/ct", **options},
        "model": {"uri": f"s3://{BUCKET}/model.keras", **options, "layers": LAYERS, "batch_size": 2},
        "output": {"uri": OUTPUT, **options},
        "run": {"engine": "ray", "decode": {"workers": 1}},
    }
    (folder / "job").mkdir()
    (folder / "job" / "config.yaml").write_text(yaml.safe_dump(remote))
    return local


def count_commits(dataset: Dataset) -> int:
    return len([name for name in dataset.store.list_files("scans/_delta_log") if name.endswith("1.json")])


def get_command(pid: int) -> str:
    """Return the command line of a process; empty if it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Network(HOSTS, sys.argv[2]))))
