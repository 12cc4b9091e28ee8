"""jobs/submit.py with a real head node of Ray, which runs featray as a job."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from kill.harness import kill_processes, wait_until
from servers.ray_jobs import takes_jobs

from featray.output.lease import LEASE_FOLDER
from featray.synthetic.phantom import make_collection

REPOSITORY = Path(__file__).resolve().parents[2]
ConfigOf = Callable[..., dict[str, Any]]

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None,
        reason="needs a job server: pip install 'ray[default]'",
    ),
]


class RayHead:
    """The head node of a Ray cluster with a job server; it ends with `close`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fj"))  # short, because it contains sockets
        names = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port")
        names += ("ray-client-server-port", "metrics-export-port", "runtime-env-agent-port")
        ports = dict(zip(names, find_free_ports(len(names)), strict=True))
        self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
        inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.environment = {
            **inherited,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # On a busy machine its agents need more than the 30 s after which the node would end.
            "RAY_agent_register_timeout_ms": "240000",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
        command += ["--object-store-memory=100000000", f"--temp-dir={self.folder}", "--disable-usage-stats"]
        with (self.folder / "head.log").open("w") as log:
            self._process = subprocess.Popen(
                command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until(self._is_ready, "the job server")
        except BaseException:
            self.close()
            raise

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, (self.folder / "head.log").read_text()
        return takes_jobs(self.address, self.environment["RAY_AUTH_TOKEN"])

    def start_submit(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start jobs/submit.py; its own options come before `--`."""
        command = [
            sys.executable,
            str(REPOSITORY / "jobs" / "submit.py"),
            "--address",
            self.address,
            *arguments,
        ]
        return subprocess.Popen(
            command,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        processes = psutil.Process(self._process.pid).children(recursive=True)
        kill_processes([psutil.Process(self._process.pid), *processes])
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def find_free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """Start one head node for all tests of this file."""
    started = RayHead()
    yield started
    started.close()


def test_the_code_of_the_command_returns_and_the_same_id_is_not_run_again(
    head: RayHead, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text("import sys\nprint('a line of the job')\nsys.exit(4)\n")
    options = ["--submission-id", "nightly-1", "--working-dir", str(tmp_path)]
    for _ in range(2):
        process = head.start_submit(*options, "--", "python", "job.py")
        out, err = process.communicate(timeout=200)
        assert process.returncode == 4, err
        assert out.count("a line of the job") == 1
    assert "job nightly-1 was submitted before and has ended" in err


def test_a_job_cannot_write_to_the_folder_to_which_ray_unpacks_its_working_directory(
    head: RayHead, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    command = ["python", "-m", "featray", "vacuum", "out"]
    process = head.start_submit("--working-dir", str(tmp_path), "--", *command)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, err
    assert "OUTPUT: out is in the folder to which Ray has unpacked the working directory" in out
    assert "Traceback" not in out + err


def test_without_a_token_the_submitter_says_which_variable_to_set(head: RayHead) -> None:
    process = head.start_submit("--", "true", RAY_AUTH_TOKEN="wrong")
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "wants its token: set RAY_AUTH_TOKEN" in err
    assert "Traceback" not in err


def test_a_job_that_is_stopped_commits_and_releases_its_output_within_the_three_seconds_of_ray(
    head: RayHead, config_of: ConfigOf, tmp_path: Path
) -> None:
    source, output = tmp_path / "ct", tmp_path / "out"
    make_collection(source, 200, shape_zyx=(24, 96, 96), seed=5)
    values = config_of(run={"engine": "inline", "decode": {"workers": 1}}, model={"batch_size": 1})
    values |= {"source": {"uri": str(source)}, "output": {"uri": str(output)}}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = ["python", str(REPOSITORY / "jobs" / "extract.py"), str(config), "--set", "run.engine=inline"]
    process = head.start_submit("--submission-id", "to-stop", "--grace", "3", "--", *command)
    log = output / "scans" / "_delta_log" / "00000000000000000001.json"
    wait_until(lambda: log.exists() or process.poll() is not None, "the first commit")
    stop_job(head, "to-stop")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 130, out + err
    assert "job to-stop was stopped" in err
    (run,) = output.glob("runs/*/run.json")
    assert json.loads(run.read_text())["submission_id"] == "to-stop"
    found = re.search(r"interrupted; (\d+) scans are committed", out)
    assert found, out
    assert 0 < int(found[1]) < 200
    assert not list((output / LEASE_FOLDER).iterdir())


def stop_job(head: RayHead, name: str) -> None:
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    request = urllib.request.Request(f"{head.address}/api/jobs/{name}/stop", method="POST", headers=token)
    urllib.request.urlopen(request, timeout=30)
