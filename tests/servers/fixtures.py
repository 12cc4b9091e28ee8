"""Fixtures that start servers; `conftest.py` registers this module for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from servers.faulty import FaultyProxy
from servers.seaweedfs import SeaweedFS

BUCKET = "featray-test"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """Start one S3 server with the bucket BUCKET for all tests. Each test has its own `s3_folder`."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    fsspec.filesystem("s3", **server.options()).mkdir(BUCKET)
    yield server
    server.kill()


@pytest.fixture
def s3_folder(s3_server: SeaweedFS, request: pytest.FixtureRequest) -> str:
    """Return the URL of a folder on the S3 server that no other test uses. Open it with `s3_options`."""
    return f"s3://{BUCKET}/{request.node.name[:80]}"


@pytest.fixture
def s3_options(s3_server: SeaweedFS) -> dict[str, Any]:
    """Return the storage options that connect to the S3 server."""
    return s3_server.options()


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[FaultyProxy]:
    """Start a proxy for the S3 server. It injects no faults until a test sets `faults`."""
    with FaultyProxy(s3_server.port) as running_proxy:
        yield running_proxy
