"""The one place that touches storage: a folder on any fsspec file system, read and written whole.

What a store cannot do for a moment is tried again until a deadline (`featray.storage.retry`), and
then is one clear error.
"""

from __future__ import annotations

import errno
import os
import posixpath
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn, TypeVar

from fsspec.implementations.local import LocalFileSystem

from featray.errors import ConfigError, StorageError
from featray.storage import options as storage_options
from featray.storage import retry
from featray.storage.urls import is_s3, mask_url, open_url

_THREADS = 16
"""Requests that one action on many files may have under way; object stores answer in parallel."""
_PROBE = "runs/.write-check"
_MARK = "featray-created-by"
_RESUME = "What is committed is kept: run the same command again, and it resumes."

T = TypeVar("T")


class Store:
    """A folder in a file system. Paths given to its methods are relative to that folder.

    Args:
        uri: Local path or fsspec URL of the folder; it need not exist yet.
        options: fsspec storage options.

    Raises:
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """

    def __init__(self, uri: str, options: dict[str, Any] | None = None) -> None:
        self.uri = uri
        self.options = dict(options or {})
        self.fs, self.root = open_url(uri, self.options)

    def __repr__(self) -> str:
        """Name the place only: options and URLs may hold credentials."""
        return f"Store({mask_url(self.uri)!r})"

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine's file system."""
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """Return the path of `name` as the file system knows it."""
        return f"{self.root}/{name}" if name else self.root

    def run_operation(self, act: Callable[[], T]) -> T:
        """Return what `act` returns; it asks this store, and is asked again while errors pass by themselves.

        Args:
            act: Safe to repeat.

        Raises:
            StorageError: The store did not answer within `retry.OUTPUT_DEADLINE_S`, or refuses.
            FileNotFoundError: There is no such file.
        """
        try:
            return retry.run_with_retries(act, retry.OUTPUT_DEADLINE_S)
        except Exception as error:  # every store has errors of its own
            self._raise_as_ours(error)

    def read(self, name: str) -> bytes:
        """Return a whole file; raises as `run_operation`."""
        data: bytes = self.run_operation(lambda: self.fs.cat_file(self.path(name)))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in one step: readers see all of it or nothing, also after a kill.

        Raises:
            StorageError: As `run_operation`; or there is no such bucket, or no space left.
        """
        put = _put_local if self.is_local else self.fs.pipe_file
        self._put(lambda: put(self.path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        """Put a file only if there is none of that name; return whether this call did.

        An attempt whose answer was lost may have done it. On S3 a mark on the object tells whose it is; in
        other stores a later attempt that finds exactly these bytes did, so give bytes that nobody else gives.

        Raises:
            StorageError: As `write`.
        """
        if self.is_local:
            return self._put(lambda: _create_local(self.path(name), data))
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
                return attempts > 1 and self._holds(name, data)
            return True

        return self._put(attempt)

    def check_writable(self) -> None:
        """Check that files can be put here: locally by looking, elsewhere by putting one and deleting it.

        Raises:
            ConfigError: It cannot be: a local folder that is a file or may not be written, wrong credentials,
                a missing bucket, a right that is lacking, a server that does not answer.
        """
        if self.is_local:
            self._refuse_unwritable_local()
            return
        try:
            retry.run_with_retries(self._probe, retry.START_DEADLINE_S)
        except Exception as error:  # every store has errors of its own
            if not retry.is_store_error(error):
                raise
            problem = _why_unwritable(error)
            raise ConfigError(
                f"output.uri: {mask_url(self.uri)} {problem} ({retry.describe_error(error)})"
            ) from None

    def get_size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None when there is no such file; raises as `run_operation`."""
        try:
            found: int = self.run_operation(lambda: self._fresh_info(name))["size"]
        except FileNotFoundError:
            return None
        return found

    def list_file_sizes(self, prefix: str = "") -> dict[str, int]:
        """Return {name relative to this folder: bytes} of every file below `prefix`, from one fresh listing.

        Empty when `prefix` does not exist. Raises as `run_operation`.
        """
        try:
            found = self.run_operation(lambda: self._fresh_listing(prefix))
        except FileNotFoundError:
            return {}
        # An empty folder may be listed as itself for a while after its last file has gone.
        files = {path: info["size"] for path, info in found.items() if info["type"] != "directory"}
        return {path[len(self.root) + 1 :]: size for path, size in files.items()}

    def list_files(self, prefix: str = "") -> list[str]:
        """Return every file below `prefix`, relative to this folder; none when it does not exist."""
        return list(self.list_file_sizes(prefix))

    def delete(self, names: list[str]) -> None:
        """Delete files; a file that does not exist is no error.

        Raises:
            StorageError: A file could not be deleted.
        """
        if self.is_local or len(names) < 2:
            for name in names:
                self._delete_one(name)
            return
        # Not in bulk: s3fs does not tell which files of a bulk request were refused.
        with ThreadPoolExecutor(min(_THREADS, len(names))) as pool:
            for done in [pool.submit(self._delete_one, name) for name in names]:
                done.result()

    def delta_uri(self, table: str) -> str:
        """Return where deltalake finds the table."""
        if self.is_local:
            return self.path(table)
        return f"{storage_options.delta_uri(self.uri)}/{table}"

    def delta_options(self, *, with_retries: bool = False) -> dict[str, str]:
        """Return this store's options in deltalake's words, which polars understands too.

        Args:
            with_retries: For deltalake alone: each request is tried as long as `run_operation` would, not for
                two seconds.
        """
        if self.is_local:
            return {}
        return storage_options.make_delta_options(self.uri, self.options, with_retries=with_retries)

    def _put(self, act: Callable[[], T]) -> T:
        try:
            return self.run_operation(act)
        except FileNotFoundError:
            if self.is_local:
                raise
            problem = "the bucket or container does not exist"
            raise StorageError(f"output.uri: {mask_url(self.uri)}: {problem}. {_RESUME}") from None

    def _delete_one(self, name: str) -> None:
        try:
            self.run_operation(lambda: self.fs.rm_file(self.path(name)))
        except FileNotFoundError:
            return

    def _fresh_info(self, name: str) -> dict[str, Any]:
        path = self.path(name)
        self.fs.invalidate_cache(posixpath.dirname(path))
        info: dict[str, Any] = self.fs.info(path)
        return info

    def _fresh_listing(self, prefix: str) -> dict[str, dict[str, Any]]:
        self.fs.invalidate_cache()
        found: dict[str, dict[str, Any]] = self.fs.find(self.path(prefix), detail=True)
        return found

    def _create(self, name: str, data: bytes, mark: str) -> None:
        more = {"Metadata": {_MARK: mark}} if is_s3(self.fs) else {}
        self.fs.pipe_file(self.path(name), data, mode="create", **more)

    def _is_marked(self, name: str, mark: str) -> bool:
        # aiohttp and botocore ask again by themselves, so even a first attempt may find its own object.
        try:
            return bool(self.fs.metadata(self.path(name)).get(_MARK) == mark)
        except FileNotFoundError:  # whose it was has deleted it since
            return False

    def _holds(self, name: str, data: bytes) -> bool:
        return bool(self.fs.cat_file(self.path(name)) == data)

    def _probe(self) -> None:
        self.fs.pipe_file(self.path(_PROBE), b"")
        self.fs.rm_file(self.path(_PROBE))

    def _refuse_unwritable_local(self) -> None:
        place = self.root
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise ConfigError(f"output.uri: {place} is a file, not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"output.uri: no permission to write into {place}")

    def _raise_as_ours(self, error: Exception) -> NoReturn:
        if retry.is_missing(error):
            if self.is_local:
                raise error
            raise FileNotFoundError(f"no such file in {mask_url(self.uri)}") from None
        if retry.is_out_of_space(error):
            problem = "no space is left; make room"
        elif retry.is_transient(error):
            problem = f"did not answer for {retry.OUTPUT_DEADLINE_S:g} s"
        elif retry.is_denied(error):
            remote = "refuses these credentials or lacks a permission; have they expired?"
            problem = "no permission" if self.is_local else remote
        elif not self.is_local and retry.is_store_error(error):
            problem = "cannot do what was asked"
        else:
            raise error
        place = mask_url(self.uri)
        raise StorageError(
            f"output.uri: {place}: {problem} ({retry.describe_error(error)}). {_RESUME}"
        ) from None


def _put_local(path: str, data: bytes) -> None:
    os.replace(_written_beside(path, data), path)


def _create_local(path: str, data: bytes) -> bool:
    """Put a file if there is none, whole from the start; fsspec would look first, which is a race."""
    temporary = _written_beside(path, data)
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
    """Put a file if there is none, where a file cannot have two names; for a moment it is there half."""
    try:
        with open(path, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def _written_beside(path: str, data: bytes) -> str:
    """Write a file of another name into the same folder, down to the disk, and return its path."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _why_unwritable(error: Exception) -> str:
    if retry.is_missing(error):
        return "does not exist: make the bucket or container, or correct the name"
    if retry.is_denied(error):
        return "refuses to be written: check key, secret and permissions in output.storage_options"
    if retry.is_transient(error):
        return "does not answer: check the endpoint in output.storage_options, or wait until it is up"
    return "cannot be reached: check output.uri and output.storage_options"
