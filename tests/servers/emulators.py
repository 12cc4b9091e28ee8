"""Emulators of Azure Blob Storage and Google Cloud Storage, if environment variables name their programs.

They are not Python packages. Install Azurite with `npm install azurite` and set FEATRAY_TEST_AZURITE to the
path of `azurite-blob`. Install fake-gcs-server from its releases and set FEATRAY_TEST_FAKE_GCS to its path.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

_ACCOUNT = "devstoreaccount1"
# Every Azurite has this key; Microsoft's documentation publishes it.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_S = 30.0


@contextlib.contextmanager
def run_azurite(folder: Path) -> Iterator[dict[str, Any]]:
    """Run Azurite with its data in `folder`; yield the storage options that connect to it."""
    program, port = _find_program("FEATRAY_TEST_AZURITE"), _find_free_port()
    options = ["--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with _run_server([program, *options, "--silent", "--skipApiVersionCheck", "--disableTelemetry"], port):
        endpoint = f"BlobEndpoint=http://127.0.0.1:{port}/{_ACCOUNT}"
        account = f"AccountName={_ACCOUNT};AccountKey={_KEY}"
        yield {"connection_string": f"DefaultEndpointsProtocol=http;{account};{endpoint};"}


@contextlib.contextmanager
def run_fake_gcs(folder: Path) -> Iterator[dict[str, Any]]:
    """Run fake-gcs-server with its data in `folder`; yield the storage options that connect to it."""
    program, port = _find_program("FEATRAY_TEST_FAKE_GCS"), _find_free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-filesystem-root", str(folder)]
    with _run_server([program, *options, "-external-url", url, "-public-host", f"127.0.0.1:{port}"], port):
        yield {"token": "anon", "endpoint_url": url}


def _find_program(variable: str) -> str:
    """Return the program that an environment variable names; skip the test if it names none."""
    program = os.environ.get(variable)
    if not program:
        pytest.skip(f"{variable} is not set to an emulator's program (see tests/servers/emulators.py)")
    return program


@contextlib.contextmanager
def _run_server(argv: list[str], port: int) -> Iterator[None]:
    """Run a server while the `with` block lasts, from when it accepts connections on `port`."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{argv[0]} did not start within {START_S:g} s")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait(10)


def _find_free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
