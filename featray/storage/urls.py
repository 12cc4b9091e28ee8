"""URLs and paths: open them, mask their credentials, and fingerprint what a store says of its files."""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.core import url_to_fs

from featray.errors import ConfigError
from featray.storage import options as storage_options


def open_url(uri: str, options: dict[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it, without a trailing slash.

    On S3 a hung server is noticed and errors that pass are tried again a few times, also where nobody else
    does; what `options` say of that is left as it is.

    Raises:
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """
    try:
        fs, path = url_to_fs(uri, **storage_options.make_fsspec_options(uri, options or {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {mask_url(uri)}: {error}") from None
    if is_s3(fs):
        fs.retries = 2  # each of them is three of botocore's; s3fs would make it five
    return fs, path.rstrip("/") or path


def file_version(info: dict[str, Any]) -> str:
    """Return what a listing's entry says of a file's version: an etag or the like, else its time."""
    version = file_checksum(info) or info.get("generation")
    return str(version or info.get("mtime") or info.get("LastModified") or info.get("last_modified") or "")


def file_checksum(info: dict[str, Any]) -> str:
    """Return what in a listing's entry is equal for equal bytes; empty where the store has nothing such."""
    return str(info.get("ETag") or info.get("etag") or info.get("md5Hash") or "")


def fingerprint_files(files: Iterable[tuple[str, int, str]]) -> str:
    """Return a hash of (path, size, version) of all files; of a path the last part counts."""
    return hash_texts(f"{posixpath.basename(path)}\t{size}\t{version}" for path, size, version in files)


def hash_texts(texts: Iterable[str]) -> str:
    """Return 32 hexadecimal digits for a set of texts, whatever their order."""
    return hashlib.sha256("\n".join(sorted(texts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def escape_invalid_utf8(text: str) -> str:
    """Return a path as tables and terminals can hold it: bytes that are no UTF-8 are spelled out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether a file system is an S3 store."""
    return "s3" in fs.protocol


def mask_url(uri: str) -> str:
    """Return `uri` without user, password, query and fragment, which may carry credentials."""
    if "://" not in uri:
        return uri
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
