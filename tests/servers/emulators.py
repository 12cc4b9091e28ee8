"""Emulators of Azure Blob Storage and Google Cloud Storage, if an environment variable names their program.

They are no Python packages that a test environment would want: install Azurite with `npm install azurite` and
fake-gcs-server from its releases, and name `azurite-blob` in FEATRAY_TEST_AZURITE, the other in
FEATRAY_TEST_FAKE_GCS.
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
# The one key of every Azurite; it is in Microsoft's documentation.
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
START_S = 30.0


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[dict[str, Any]]:
    """Run Azurite with its data in `folder`; give the storage options that reach it."""
    program, port = _program("FEATRAY_TEST_AZURITE"), _free_port()
    where = ["--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with _running([program, *where, "--silent", "--skipApiVersionCheck", "--disableTelemetry"], port):
        endpoint = f"BlobEndpoint=http://127.0.0.1:{port}/{_ACCOUNT}"
        account = f"AccountName={_ACCOUNT};AccountKey={_KEY}"
        yield {"connection_string": f"DefaultEndpointsProtocol=http;{account};{endpoint};"}


@contextlib.contextmanager
def fake_gcs(folder: Path) -> Iterator[dict[str, Any]]:
    """Run fake-gcs-server with its data in `folder`; give the storage options that reach it."""
    program, port = _program("FEATRAY_TEST_FAKE_GCS"), _free_port()
    url = f"http://127.0.0.1:{port}"
    where = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-filesystem-root", str(folder)]
    with _running([program, *where, "-external-url", url, "-public-host", f"127.0.0.1:{port}"], port):
        yield {"token": "anon", "endpoint_url": url}


def _program(variable: str) -> str:
    program = os.environ.get(variable)
    if not program:
        pytest.skip(f"{variable} names no emulator (see tests/servers/emulators.py)")
    return program


@contextlib.contextmanager
def _running(argv: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + START_S
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > give_up or process.poll() is not None:
                raise RuntimeError(f"{argv[0]} did not start within {START_S:g} s")
            time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait(10)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
