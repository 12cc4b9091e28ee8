"""The one place that touches storage: a folder on any fsspec file system, read and written whole.

Also translates fsspec's options into those of the Delta log, so a user gives credentials once.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import uuid
from collections.abc import Iterable
from typing import Any

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from featray.config import mask_url
from featray.errors import ConfigError

_S3_OPTIONS = {
    "key": "AWS_ACCESS_KEY_ID",
    "secret": "AWS_SECRET_ACCESS_KEY",
    "token": "AWS_SESSION_TOKEN",
    "endpoint_url": "AWS_ENDPOINT_URL",
    "region_name": "AWS_REGION",
}
_AZURE_OPTIONS = {
    "account_name": "account_name",
    "account_key": "account_key",
    "sas_token": "sas_token",
    "tenant_id": "tenant_id",
    "client_id": "client_id",
    "client_secret": "client_secret",
}
_GCS_OPTIONS = {"token": "google_service_account"}
_DELTA_OPTIONS = {"s3": _S3_OPTIONS, "s3a": _S3_OPTIONS, "gs": _GCS_OPTIONS, "gcs": _GCS_OPTIONS}
_DELTA_OPTIONS |= dict.fromkeys(("abfs", "abfss", "az", "adl"), _AZURE_OPTIONS)


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

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        data: bytes = self.fs.cat_file(self.path(name))
        return data

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file in one step: readers see all of it or nothing, also after a kill."""
        path = self.path(name)
        if not self.is_local:
            self.fs.pipe_file(path, data)  # an object appears only when its upload is complete
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def create(self, name: str, data: bytes) -> bool:
        """Put a file only if there is none of that name; return whether this call did."""
        path = self.path(name)
        if self.is_local:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    def refuse_unwritable(self) -> None:
        """Check, without writing, that files can be put here. Other stores tell only when they are asked.

        Raises:
            ConfigError: A local folder that is a file, or that may not be written.
        """
        if not self.is_local:
            return
        place = self.root
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise ConfigError(f"output.uri: {place} is a file, not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"output.uri: no permission to write into {place}")

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, or None when there is no such file."""
        try:
            found: int = self.fs.info(self.path(name))["size"]
        except FileNotFoundError:
            return None
        return found

    def names(self, prefix: str = "") -> list[str]:
        """Return every file below `prefix`, relative to this folder; none when it does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self.path(prefix))
        except FileNotFoundError:
            return []
        return [path[len(self.root) + 1 :] for path in found]

    def delete(self, names: list[str]) -> None:
        """Delete files; one that is gone already is no error."""
        for name in names:
            try:
                self.fs.rm_file(self.path(name))
            except FileNotFoundError:
                continue

    def delta_uri(self, table: str) -> str:
        """Return where deltalake finds the table."""
        if self.is_local:
            return self.path(table)
        return f"{self.uri.rstrip('/')}/{table}"

    def delta_options(self) -> dict[str, str]:
        """Return this store's options in deltalake's words."""
        if self.is_local:
            return {}
        protocol = self.uri.partition("://")[0]
        return _delta_options(_DELTA_OPTIONS.get(protocol, {}), self.options)


def open_url(uri: str, options: dict[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it, without a trailing slash.

    Raises:
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """
    try:
        fs, path = url_to_fs(uri, **(options or {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {mask_url(uri)}: {error}") from None
    return fs, path.rstrip("/") or path


def file_version(info: dict[str, Any]) -> str:
    """Return what a listing's entry says of a file's version: an etag or the like, else its time."""
    version = file_checksum(info) or info.get("generation")
    return str(version or info.get("mtime") or info.get("LastModified") or info.get("last_modified") or "")


def file_checksum(info: dict[str, Any]) -> str:
    """Return what in a listing's entry is equal for equal bytes; empty where the store has nothing such."""
    return str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or "")


def fingerprint(files: Iterable[tuple[str, int, str]]) -> str:
    """Return a hash of (path, size, version) of all files; of a path the last part counts."""
    return hash_of(f"{posixpath.basename(path)}\t{size}\t{version}" for path, size, version in files)


def hash_of(texts: Iterable[str]) -> str:
    """Return 32 hexadecimal digits for a set of texts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(texts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def utf8(text: str) -> str:
    """Return a path as tables and terminals can hold it: bytes that are no UTF-8 are spelled out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _delta_options(names: dict[str, str], options: dict[str, Any]) -> dict[str, str]:
    flat = {**options, **(options.get("client_kwargs") or {})}
    found = {names[key]: str(value) for key, value in flat.items() if key in names and value is not None}
    if found.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        found["AWS_ALLOW_HTTP"] = "true"
    return found
