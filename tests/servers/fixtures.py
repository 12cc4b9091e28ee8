"""Fixtures of the servers; `conftest.py` names this module once for all tests."""

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
    """Start one S3 server for all tests, with the bucket BUCKET; tests keep to folders of their own in it."""
    server = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    server.start()
    fsspec.filesystem("s3", **server.options()).mkdir(BUCKET)
    yield server
    server.kill()


@pytest.fixture
def s3_folder(s3_server: SeaweedFS, request: pytest.FixtureRequest) -> str:
    """Return the URL of a folder on the S3 server that no other test uses; `s3_options` reach it."""
    return f"s3://{BUCKET}/{request.node.name[:80]}"


@pytest.fixture
def s3_options(s3_server: SeaweedFS) -> dict[str, Any]:
    """Return the storage options that reach the S3 server."""
    return s3_server.options()


@pytest.fixture
def proxy(s3_server: SeaweedFS) -> Iterator[FaultyProxy]:
    """Put a proxy before the S3 server that does no harm until its `faults` are set."""
    with FaultyProxy(s3_server.port) as between:
        yield between
