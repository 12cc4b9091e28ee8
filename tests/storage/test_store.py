"""Storage without a server: retries and deadlines, messages of errors, and translation of options.

test_object_store.py tests the same against a real server.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
    SSLError,
)
from deltalake.exceptions import CommitFailedError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from featray.config import SourceConfig
from featray.errors import ConfigError, ScanError, StorageError
from featray.schema import Scan
from featray.stages.list import list_scans
from featray.stages.read import Reader
from featray.storage import options as storage_options
from featray.storage import retry
from featray.storage.store import Store
from featray.storage.urls import open_url

URL = "http://user:PLANTED-SECRET@127.0.0.1:1/bucket"


def make_s3_error(status: int, code: str = "", *, cause: bool = True) -> Exception:
    """Return the exception that s3fs raises for an HTTP error of S3; for some requests it drops the cause."""
    error = {"Code": code or str(status), "Message": f"PLANTED-SECRET {URL}"}
    original = ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
    if cause:
        return translate_boto_error(original)
    try:
        try:
            raise original
        except ClientError as raised:
            raise translate_boto_error(raised, set_cause=False)  # noqa: B904 - as s3fs does
    except Exception as error:
        return error


TRANSIENT = [
    make_s3_error(503, "SlowDown"),
    make_s3_error(503, cause=False),
    make_s3_error(500, "InternalError"),
    make_s3_error(429, "TooManyRequests"),
    make_s3_error(400, "RequestTimeout"),
    make_s3_error(400, "IncompleteBody"),
    make_s3_error(409, "ConditionalRequestConflict"),
    EndpointConnectionError(endpoint_url=URL),
    ReadTimeoutError(endpoint_url=URL),
    IncompleteReadError(actual_bytes=1, expected_bytes=2),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ServerDisconnectedError(),
    ConnectionResetError(),
    FSTimeoutError(),
    OSError("Generic S3 error: Error performing PUT ... - HTTP error: error sending request"),
    OSError("Generic S3 error: ... 503 Service Unavailable: <Error>"),
]
PERMANENT = [
    make_s3_error(404, "NoSuchKey"),
    make_s3_error(403, "SignatureDoesNotMatch"),
    make_s3_error(403, cause=False),
    make_s3_error(412, "PreconditionFailed"),
    make_s3_error(400, "InvalidBucketName"),
    make_s3_error(501, "NotImplemented"),
    NoCredentialsError(),
    SSLError(endpoint_url=URL, error="PLANTED-SECRET"),
    FileExistsError(),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("Kernel error -> ... 403 Forbidden"),
    CommitFailedError("503 Service Unavailable"),
    KeyError("a bug in the program"),
]


class Failing:
    """An operation that raises its errors in order, then returns `then`; without `then`, it keeps failing."""

    def __init__(self, *errors: Exception, then: Any = NotImplemented) -> None:
        self._errors, self._then, self.calls = list(errors), then, 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.calls += 1
        if self.calls <= len(self._errors):
            raise self._errors[self.calls - 1]
        if self._then is NotImplemented:
            raise self._errors[-1]
        return self._then


@pytest.fixture(autouse=True)
def _shorten_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "OUTPUT_DEADLINE_S", 0.2)
    monkeypatch.setattr(retry, "SOURCE_DEADLINE_S", 0.2)
    monkeypatch.setattr(retry, "START_DEADLINE_S", 0.2)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store in memory, which counts as remote."""
    return Store(f"memory://{tmp_path.name}/out")


@pytest.mark.parametrize("error", TRANSIENT, ids=lambda error: retry.describe_error(error))
def test_a_transient_error_is_retried_until_the_operation_succeeds(error: Exception) -> None:
    operation = Failing(error, error, then="answer")
    assert retry.run_with_retries(operation, deadline_s=5) == "answer"
    assert operation.calls == 3


@pytest.mark.parametrize("error", PERMANENT, ids=lambda error: retry.describe_error(error))
def test_a_permanent_error_is_not_retried(error: Exception) -> None:
    operation = Failing(error, then="answer")
    with pytest.raises(type(error)):
        retry.run_with_retries(operation, deadline_s=5)
    assert operation.calls == 1


def test_waits_between_retries_grow_and_end_at_the_deadline() -> None:
    operation, start = Failing(ConnectionResetError()), time.monotonic()
    with pytest.raises(ConnectionResetError):
        retry.run_with_retries(operation, deadline_s=0.5)
    assert (
        4 <= operation.calls <= 12
    )  # waits of up to 10, 20, 40, 80, 160, 320 ms, each at least half of that
    assert time.monotonic() - start < 0.6


@pytest.mark.parametrize("error", [*TRANSIENT, *PERMANENT], ids=lambda error: retry.describe_error(error))
def test_the_description_of_an_error_contains_nothing_of_its_text(error: Exception) -> None:
    description = retry.describe_error(error)
    assert description
    assert "PLANTED" not in description
    assert "bucket" not in description


@pytest.mark.parametrize(
    "operate",
    [
        lambda store: store.read("a"),
        lambda store: store.write("a", b""),
        lambda store: store.create("a", b""),
        lambda store: store.get_size("a"),
        lambda store: store.list_files(),
        lambda store: store.delete(["a"]),
        lambda store: store.delete(["a", "b"]),
    ],
    ids=["read", "write", "create", "get_size", "list_files", "delete", "delete several"],
)
def test_an_output_that_stays_unreachable_raises_one_clear_error(
    operate: Callable[[Store], Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = Failing(EndpointConnectionError(endpoint_url=URL))
    for name in ("cat_file", "pipe_file", "info", "find", "rm_file"):
        monkeypatch.setattr(store.fs, name, operation)
    with pytest.raises(StorageError) as raised:
        operate(store)
    assert operation.calls > 2
    assert str(raised.value) == (
        f"output.uri: {store.uri}: did not answer for 0.2 s (EndpointConnectionError). "
        "Committed results are kept; run the same command again to resume."
    )
    assert raised.value.exit_code == 1


def test_credentials_that_expire_during_a_run_raise_one_clear_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = Failing(make_s3_error(403, "ExpiredToken"))
    monkeypatch.setattr(store.fs, "pipe_file", operation)
    with pytest.raises(StorageError, match=r"refuses these credentials.*HTTP 403 ExpiredToken.*to resume\."):
        store.write("a", b"")
    assert operation.calls == 1


def test_a_bug_in_the_program_is_not_reported_as_a_storage_error(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.fs, "cat_file", Failing(KeyError("bug")))
    with pytest.raises(KeyError):
        store.read("a")


def test_a_full_disk_is_named_in_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", Failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StorageError, match=r"no space is left; make room.*Committed results are kept"):
        Store(str(tmp_path)).write("a", b"1")


def test_a_folder_that_cannot_be_created_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as in /proc, where also root cannot create a folder
    monkeypatch.setattr(os, "makedirs", Failing(FileNotFoundError(errno.ENOENT, "No such file or directory")))
    problem = rf"^--out: {tmp_path}/out: the folder cannot be created.*\. Correct it and run the same command"
    with pytest.raises(StorageError, match=problem):
        Store(f"{tmp_path}/out", config_key="--out").write("report.html", b"1")


def test_the_message_for_an_unwritable_store_names_the_key_that_gave_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"^cache.uri: no permission to write into /"):
        Store("/featray-cache", config_key="cache.uri").check_writable()


@pytest.mark.parametrize("where", ["{tmp_path}/out", "memory://{tmp_path}/out"])
def test_files_are_written_read_listed_and_deleted(where: str, tmp_path: Path) -> None:
    store = Store(where.format(tmp_path=tmp_path))
    assert (store.list_files(), store.list_file_sizes(), store.get_size("a/b"), store.list_files("a")) == (
        [],
        {},
        None,
        [],
    )
    store.write("a/b", b"12")
    store.write("a/b", b"123")
    store.write("c", b"1")
    assert store.list_file_sizes() == {"a/b": 3, "c": 1}
    assert (store.list_files("a"), store.get_size("a/b"), store.read("a/b")) == (["a/b"], 3, b"123")
    assert [store.create("d", b"1"), store.create("d", b"2")] == [True, False]
    store.delete(["a/b", "c", "d", "gone"])
    assert store.list_files() == []
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


@pytest.mark.parametrize("has_links", [True, False])
def test_of_many_callers_that_create_the_same_local_file_exactly_one_succeeds(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_links:
        monkeypatch.setattr(os, "link", Failing(OSError(errno.EPERM, "Operation not permitted")))
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            stores = [Store(str(tmp_path)) for _ in range(8)]
            won = list(
                pool.map(lambda i: stores[i].create(f"{round_}", b"%d" % i), range(8))  # noqa: B023
            )
            assert sum(won) == 1
            assert Store(str(tmp_path)).read(f"{round_}") == b"%d" % won.index(True)
    assert len(Store(str(tmp_path)).list_files()) == 20


def test_a_create_whose_answer_was_lost_recognizes_its_own_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = store.fs.pipe_file
    lost = iter([True, False, True, False])

    def pipe_file(path: str, data: bytes, mode: str) -> None:
        if next(lost):
            if data == b"mine":
                original(path, data, mode=mode)
            raise ConnectionResetError
        original(path, data, mode=mode)

    monkeypatch.setattr(store.fs, "pipe_file", pipe_file)
    assert store.create("a", b"mine")
    assert not store.create("a", b"of another")


def test_checking_a_remote_output_for_write_access_leaves_no_file(store: Store) -> None:
    store.check_writable()
    assert store.list_files() == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (make_s3_error(403, "SignatureDoesNotMatch"), "check key, secret and permissions"),
        (make_s3_error(404, "NoSuchBucket"), "create the bucket"),
        (EndpointConnectionError(endpoint_url=URL), "check the endpoint"),
        (NoCredentialsError(), "check key, secret and permissions"),
        (make_s3_error(400, "InvalidBucketName"), "cannot be reached"),
    ],
)
def test_an_output_that_cannot_be_written_is_a_config_error(
    error: Exception, message: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.fs, "pipe_file", Failing(error))
    with pytest.raises(ConfigError, match=message) as raised:
        store.check_writable()
    assert "PLANTED" not in str(raised.value)


def list_first_scan(folder: str, files: dict[str, bytes]) -> tuple[Reader, Scan]:
    """Write array files to the memory file system; return a reader and the first scan."""
    fs, _ = open_url(folder)
    for name, data in files.items():
        fs.pipe_file(f"{folder}/{name}", data)
    source = SourceConfig(uri=folder, format="npy")
    (scan, *_) = list_scans(source).scans
    return Reader(source, policy=None, max_voxels=10**6), scan


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EndpointConnectionError(endpoint_url=URL), "did not answer for 0.2 s (EndpointConnectionError)"),
        (make_s3_error(403, "AccessDenied"), "no permission to read a.npy (HTTP 403 AccessDenied)"),
        (make_s3_error(404, "NoSuchKey"), "a.npy is missing; it was there when it was listed"),
        (make_s3_error(400, "InvalidRange"), "a.npy could not be fetched (HTTP 400 InvalidRange)"),
    ],
)
def test_a_scan_that_cannot_be_fetched_fails_with_reason_storage(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, scan = list_first_scan(f"memory://{tmp_path.name}/in", {"a.npy": b"bytes"})
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", Failing(error))
    with pytest.raises(ScanError) as raised:
        reader.read(scan)
    assert raised.value.reason == "storage"
    assert message in str(raised.value)


def test_timeouts_in_the_users_options_take_precedence() -> None:
    given = {"key": "k", "config_kwargs": {"read_timeout": 300, "max_pool_connections": 5}}
    options = storage_options.make_fsspec_options("s3://bucket", given)
    assert options["key"] == "k"
    assert options["config_kwargs"]["read_timeout"] == 300
    assert options["config_kwargs"]["max_pool_connections"] == 5
    assert options["config_kwargs"]["connect_timeout"] == 5
    assert storage_options.make_fsspec_options("gs://bucket", {"token": "anon"}) == {"token": "anon"}


@pytest.mark.parametrize(
    ("uri", "given", "expected"),
    [
        ("s3://b", {"key": "k", "secret": "s"}, {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}),
        (
            "s3://b",
            {"endpoint_url": "http://h:1", "client_kwargs": {"region_name": "r", "verify": False}},
            {
                "AWS_ENDPOINT_URL": "http://h:1",
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "r",
                "allow_invalid_certificates": "true",
            },
        ),
        ("s3a://b", {"anon": True}, {"AWS_SKIP_SIGNATURE": "true"}),
        (
            "s3://b",
            {"config_kwargs": {"s3": {"addressing_style": "virtual"}}},
            {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"},
        ),
        ("az://c", {"account_name": "a", "account_key": "k"}, {"account_name": "a", "account_key": "k"}),
        (
            "abfs://c",
            {"connection_string": "AccountName=a;AccountKey=k==;BlobEndpoint=http://h:1/a;"},
            {
                "account_name": "a",
                "account_key": "k==",
                "azure_endpoint": "http://h:1/a",
                "azure_allow_http": "true",
            },
        ),
        ("gs://b", {"token": {"a": 1}}, {"google_service_account_key": json.dumps({"a": 1})}),
        ("gs://b", {"token": "google_default"}, {}),
    ],
)
def test_fsspec_options_are_translated_for_deltalake(
    uri: str, given: dict[str, Any], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert storage_options.make_delta_options(uri, given) == expected
    with_retries = storage_options.make_delta_options(uri, given, with_retries=True)
    assert with_retries == expected | {
        name: with_retries[name] for name in with_retries.keys() - expected.keys()
    }
    assert with_retries["max_retries"] == "1000"


def test_anonymous_access_to_google_storage_requests_no_token() -> None:
    options = storage_options.make_delta_options("gs://b", {"token": "anon", "endpoint_url": "http://h:1"})
    key = json.loads(options["google_service_account_key"])
    assert key["disable_oauth"] is True
    assert (key["gcs_base_url"], options["allow_http"]) == ("http://h:1", "true")


def test_protocols_are_translated_to_those_that_deltalake_knows() -> None:
    assert storage_options.make_delta_uri("gcs://b/out/") == "gs://b/out"
    assert storage_options.make_delta_uri("s3://b/out") == "s3://b/out"


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_is_flushed_to_the_disk_unless_it_can_be_made_again(
    flush: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    store = Store(str(tmp_path))
    store.write("a/b", b"content", flush=flush)
    assert (store.read("a/b"), len(flushed)) == (b"content", int(flush))
