"""Define `Store`, a folder on any fsspec file system, whose files are read and written as a whole.

Operations are retried while a store has transient errors (`featray.storage.retry`). After a deadline they
fail with a `StorageError` that names the remedy.
"""

from __future__ import annotations

import errno
import os
import posixpath
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple, NoReturn, TypeVar

from fsspec.implementations.local import LocalFileSystem

from featray.errors import ConfigError, StorageError
from featray.storage import options as storage_options
from featray.storage import retry
from featray.storage.names import find_name_problem
from featray.storage.ray_job import refuse_package
from featray.storage.urls import is_s3, mask_url, open_url

_THREADS = 16
"""Parallel requests of one operation on many files; object stores answer in parallel."""
_PROBE_NAME = "runs/.write-check"
_CREATOR_KEY = "featray-created-by"
"""Metadata key of S3 objects that `Store.create` has written."""
_TIME_KEYS = ("mtime", "LastModified", "last_modified", "updated", "created")
"""Names under which the file systems of fsspec give the time of a file: local, S3, Azure, Google, memory."""
_OUTPUT_KEY = "output.uri"

T = TypeVar("T")


class FileInfo(NamedTuple):
    """Name of a file in a `Store`, its size in bytes, and when it was touched or written last.

    The time is in seconds since the epoch; 0 if the store does not say it.
    """

    name: str
    size: int
    written: float


class Store:
    """A folder in a file system. Names of files are paths relative to this folder.

    Args:
        uri: Local path or fsspec URL of the folder; it need not exist yet.
        options: fsspec storage options.
        config_key: Key of the config that names the folder, for messages.

    Raises:
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """

    def __init__(
        self, uri: str, options: dict[str, Any] | None = None, *, config_key: str = _OUTPUT_KEY
    ) -> None:
        self.uri = uri
        self._config_key = config_key
        self.options = dict(options or {})
        self.fs, self.root = open_url(uri, self.options)

    def __repr__(self) -> str:
        """Show only the masked URL, because options and URLs may contain credentials."""
        return f"Store({mask_url(self.uri)!r})"

    @property
    def is_local(self) -> bool:
        """Whether the folder is in this machine's file system."""
        return isinstance(self.fs, LocalFileSystem)

    @property
    def _advice(self) -> str:
        """What to do after an error, for the end of its message."""
        if self._config_key == _OUTPUT_KEY:
            return "Committed results are kept; run the same command again to resume."
        return "Correct it and run the same command again."

    def find_options(self, uri: str) -> dict[str, Any] | None:
        """Return the options of this store for a URL of the same protocol; None for other URLs and paths."""
        protocol, separator, _ = uri.partition("://")
        return self.options if separator and self.uri.startswith(f"{protocol}://") else None

    def path(self, name: str) -> str:
        """Return the path of a file in the file system; for an empty name, the path of the folder."""
        return f"{self.root}/{name}" if name else self.root

    def run_operation(self, operation: Callable[[], T]) -> T:
        """Run an operation on this store, retrying transient errors, and return its result.

        Args:
            operation: Makes requests to this store; it must be safe to repeat.

        Raises:
            StorageError: The store did not answer within `retry.OUTPUT_DEADLINE_S`, denies the operation, has
                no space left, or reports another error.
            FileNotFoundError: The file does not exist.
        """
        try:
            return retry.run_with_retries(operation, retry.OUTPUT_DEADLINE_S)
        except Exception as error:  # each store's library has its own exception classes
            self._raise_translated(error)

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises as `run_operation`."""
        data: bytes = self.run_operation(lambda: self.fs.cat_file(self.path(name)))
        return data

    def write(self, name: str, data: bytes, *, flush: bool = True) -> None:
        """Write a whole file in one step: readers see all of it or nothing, even if this process is killed.

        Args:
            name: Name of the file.
            data: Content.
            flush: Whether a local file is on the disk when this returns. Without it, the file may be damaged
                after a loss of power, and writing does not wait for the disk.

        Raises:
            StorageError: The store does not answer or denies access, the bucket does not exist, or no space
                is left.
        """
        path = self.path(name)
        if self.is_local:
            self._run_write(lambda: os.replace(_write_temporary(path, data, flush=flush), path))
        else:
            self._run_write(lambda: self.fs.pipe_file(path, data))

    def create(self, name: str, data: bytes) -> bool:
        """Write a file only if no file of that name exists; return whether this call created it.

        An earlier attempt of this call may have created the file although the store's answer was lost. On S3,
        a mark in the object's metadata shows that. In other stores, a later attempt that finds exactly `data`
        counts as the creator.

        Args:
            name: Name of the file.
            data: Content; it must be unique to this caller.

        Raises:
            StorageError: As `write`.
        """
        if self.is_local:
            return self._run_write(lambda: _create_local(self.path(name), data))
        mark, attempts = uuid.uuid4().hex, 0

        def attempt() -> bool:
            nonlocal attempts
            attempts += 1
            try:
                self._create(name, data, mark)
            except Exception as error:
                if not retry.is_name_taken(error):
                    raise
                if is_s3(self.fs):
                    return self._is_marked(name, mark)
                return attempts > 1 and self._has_content(name, data)
            return True

        return self._run_write(attempt)

    def check_writable(self) -> None:
        """Check that files can be written here.

        For a local folder, permissions are checked. In other stores, a small file is written and deleted.

        Raises:
            ConfigError: The name cannot be that of an output (`featray.storage.names`).
            ConfigError: Files written here would be lost with a Ray job (`featray.storage.ray_job`).
            ConfigError: No file can be written: the local path is a file or is read-only, credentials are
                wrong, the bucket does not exist, a permission is missing, or the server does not answer.
        """
        problem = find_name_problem(self.uri, self.root, is_local=self.is_local)
        if problem:
            raise ConfigError(f"{self._config_key}: the path {problem}")
        refuse_package(self.uri, self._config_key)
        if self.is_local:
            self._check_local_writable()
            return
        try:
            retry.run_with_retries(self._write_probe, retry.START_DEADLINE_S)
        except Exception as error:  # each store's library has its own exception classes
            if not retry.is_store_error(error):
                raise
            problem = _explain_unwritable(error, self._config_key)
            raise ConfigError(
                f"{self._config_key}: {mask_url(self.uri)} {problem} ({retry.describe_error(error)})"
            ) from None

    def get_size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it does not exist. Raises as `run_operation`."""
        try:
            size: int = self.run_operation(lambda: self._fetch_info(name))["size"]
        except FileNotFoundError:
            return None
        return size

    def list_file_sizes(self, prefix: str = "") -> dict[str, int]:
        """Return name → size in bytes of all files below the folder `prefix`, from a fresh listing.

        Empty if the folder does not exist. Raises as `run_operation`.
        """
        return {name: info["size"] for name, info in self._list_files(prefix).items()}

    def list_file_infos(self) -> list[FileInfo]:
        """Return name, size and time of all files. Empty if the folder does not exist.

        Raises as `run_operation`.
        """
        files = self._list_files("")
        return [FileInfo(name, info["size"], _get_write_time(info)) for name, info in files.items()]

    def touch(self, name: str) -> None:
        """Set the time of a local file to now. Objects in other stores keep the time of their writing."""
        if self.is_local:
            os.utime(self.path(name))

    def list_files(self, prefix: str = "") -> list[str]:
        """Return the names of all files below the folder `prefix`; empty if it does not exist."""
        return list(self.list_file_sizes(prefix))

    def delete(self, names: list[str]) -> None:
        """Delete files; files that do not exist are ignored.

        Raises:
            StorageError: A file could not be deleted.
        """
        if self.is_local or len(names) < 2:
            for name in names:
                self._delete_one(name)
            return
        # One request per file: for a bulk request, s3fs does not report which files were not deleted.
        with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
            for future in [pool.submit(self._delete_one, name) for name in names]:
                future.result()

    def delta_uri(self, table: str) -> str:
        """Return the URL or path of a table for deltalake."""
        if self.is_local:
            return self.path(table)
        return f"{storage_options.make_delta_uri(self.uri)}/{table}"

    def delta_options(self, *, with_retries: bool = False) -> dict[str, str]:
        """Return this store's options under deltalake's names, which polars understands too.

        Args:
            with_retries: Whether deltalake retries each request for as long as `run_operation` does.
                Leave it False for polars, which does not know these options.
        """
        if self.is_local:
            return {}
        return storage_options.make_delta_options(self.uri, self.options, with_retries=with_retries)

    def _run_write(self, operation: Callable[[], T]) -> T:
        """Run an operation that writes; a missing parent means that no bucket or folder can be written to."""
        try:
            return self.run_operation(operation)
        except FileNotFoundError:
            problem = "the bucket or container does not exist"
            if self.is_local:
                problem = "the folder cannot be created, or was deleted at this moment"
            raise StorageError(
                f"{self._config_key}: {mask_url(self.uri)}: {problem}. {self._advice}"
            ) from None

    def _delete_one(self, name: str) -> None:
        try:
            self.run_operation(lambda: self.fs.rm_file(self.path(name)))
        except FileNotFoundError:
            return

    def _fetch_info(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        self.fs.invalidate_cache(posixpath.dirname(path))
        info: dict[str, Any] = self.fs.info(path)
        return info

    def _list_files(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Return name → fsspec's description of all files below a folder; empty if it does not exist."""
        try:
            listing = self.run_operation(lambda: self._fetch_listing(prefix))
        except FileNotFoundError:
            return {}
        # An empty folder may be listed as an entry of itself for a while after its last file was deleted.
        files = {path: info for path, info in listing.items() if info["type"] != "directory"}
        return {path[len(self.root) + 1 :]: info for path, info in files.items()}

    def _fetch_listing(self, prefix: str) -> dict[str, dict[str, Any]]:
        self.fs.invalidate_cache()
        listing: dict[str, dict[str, Any]] = self.fs.find(self.path(prefix), detail=True)
        return listing

    def _create(self, name: str, data: bytes, mark: str) -> None:
        s3_options = {"Metadata": {_CREATOR_KEY: mark}} if is_s3(self.fs) else {}
        self.fs.pipe_file(self.path(name), data, mode="create", **s3_options)

    def _is_marked(self, name: str, mark: str) -> bool:
        # aiohttp and botocore also retry, so even a first attempt may find the object that it created.
        try:
            return bool(self.fs.metadata(self.path(name)).get(_CREATOR_KEY) == mark)
        except FileNotFoundError:  # another caller created it and has deleted it since
            return False

    def _has_content(self, name: str, data: bytes) -> bool:
        return bool(self.fs.cat_file(self.path(name)) == data)

    def _write_probe(self) -> None:
        self.fs.pipe_file(self.path(_PROBE_NAME), b"")
        self.fs.rm_file(self.path(_PROBE_NAME))

    def _check_local_writable(self) -> None:
        """Check the folder, or the nearest folder above it that exists."""
        folder = self.root
        while not os.path.lexists(folder):
            folder = os.path.dirname(folder)
        if not os.path.isdir(folder):
            raise ConfigError(f"{self._config_key}: {folder} is a file, not a folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"{self._config_key}: no permission to write into {folder}")

    def _raise_translated(self, error: Exception) -> NoReturn:
        """Raise a store's error as FileNotFoundError or StorageError; other errors are raised unchanged."""
        if retry.is_missing(error):
            if self.is_local:
                raise error
            raise FileNotFoundError(f"no such file in {mask_url(self.uri)}") from None
        if retry.is_out_of_space(error):
            problem = "no space is left; make room"
        elif isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            problem = "a name is too long for the file system; shorten the values of output.partition_by"
        elif retry.is_transient(error):
            problem = f"did not answer for {retry.OUTPUT_DEADLINE_S:g} s"
        elif retry.is_denied(error):
            remote = "refuses these credentials or lacks a permission; have they expired?"
            problem = "no permission" if self.is_local else remote
        elif not self.is_local and retry.is_store_error(error):
            problem = "the operation failed"
        else:
            raise error
        reason = f"{problem} ({retry.describe_error(error)})"
        raise StorageError(f"{self._config_key}: {mask_url(self.uri)}: {reason}. {self._advice}") from None


def _get_write_time(info: Mapping[str, Any]) -> float:
    """Return the time at which a file was written, in seconds; 0 if the store does not say it."""
    time = next((info[key] for key in _TIME_KEYS if info.get(key)), 0.0)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _create_local(path: str, data: bytes) -> bool:
    """Create a complete file in one step if none exists; return whether this call created it.

    fsspec would first check whether the file exists, and another process could create it after the check.
    """
    temporary = _write_temporary(path, data, flush=True)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return _create_without_links(path, data)
    finally:
        os.unlink(temporary)
    return True


def _create_without_links(path: str, data: bytes) -> bool:
    """Create a file if none exists, as `_create_local` does, on a file system without hard links.

    While the file is being written, readers see it incomplete.
    """
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def _write_temporary(path: str, data: bytes, *, flush: bool) -> str:
    """Write a temporary file into the same folder, flush it to the disk if asked to, and return its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        if flush:
            file.flush()
            os.fsync(file.fileno())
    return temporary


def _explain_unwritable(error: Exception, key: str) -> str:
    """Return why nothing can be written, and the remedy; `key` is the config key or option of the store."""
    options = "--storage-options" if key == "--out" else key.replace("uri", "storage_options")
    if retry.is_missing(error):
        return "does not exist: create the bucket or container, or correct the name"
    if retry.is_denied(error):
        return f"denies write access: check key, secret and permissions in {options}"
    if retry.is_transient(error):
        return f"does not answer: check the endpoint in {options}, or wait until it is up"
    return f"cannot be reached: check {key} and {options}"
