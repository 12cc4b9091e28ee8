"""Open URLs and paths, mask their credentials, and hash the versions that a store reports for files."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import fsspec
from fsspec.core import url_to_fs

from featray.errors import ConfigError
from featray.storage import options as storage_options

_IDENTIFYING = ("AWS_ENDPOINT_URL", "azure_endpoint", "account_name", "endpoint_url")
"""Options, under the names of deltalake or fsspec, that say which of several stores is meant."""


def open_url(uri: str, options: dict[str, Any] | None = None) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a URL and the path in it, without a trailing slash.

    Requests to S3 have a timeout and are retried a few times, because not all callers retry. Timeouts and
    retries in `options` take precedence.

    Args:
        uri: fsspec URL or local path.
        options: fsspec storage options.

    Raises:
        ConfigError: The URL's protocol is unknown or its package is not installed.
    """
    try:
        fs, path = url_to_fs(uri, **storage_options.make_fsspec_options(uri, options or {}))
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot open {mask_url(uri)}: {error}") from None
    if is_s3(fs):
        fs.retries = 2  # s3fs would make 5 attempts; each one is already 3 attempts of botocore
    return fs, path.rstrip("/") or path


def make_absolute(uri: str) -> str:
    """Return the absolute form of a local path, for processes in other folders; URLs are unchanged."""
    return uri if "://" in uri or not uri else os.path.abspath(uri)


def identify_store(uri: str, options: dict[str, Any]) -> dict[str, str]:
    """Return what distinguishes the store of a URL from others with equal URLs: endpoint and account.

    Contains no credentials. Empty for local paths, and for stores at their usual endpoint.

    Args:
        uri: URL or path in the store.
        options: fsspec storage options.
    """
    known = {**storage_options.make_delta_options(uri, options), "endpoint_url": options.get("endpoint_url")}
    if uri.startswith(("s3://", "s3a://")):
        known.setdefault("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL"))
    return {name: mask_url(str(known[name])) for name in _IDENTIFYING if known.get(name)}


def file_version(info: dict[str, Any]) -> str:
    """Return the version of a file from its listing entry: an ETag, checksum or generation, else its time."""
    version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("generation")
    return str(version or info.get("mtime") or info.get("LastModified") or info.get("last_modified") or "")


def file_checksum(info: dict[str, Any]) -> str:
    """Return the checksum of a file's bytes from its listing entry; empty if the store reports none.

    Only S3's ETag is computed from the bytes. Web servers, whose entries have a URL, often compute it from
    size and time, which two files can have in common. Google and Azure give each upload another one.
    """
    etag = "" if "url" in info else info.get("ETag")
    return str(info.get("md5Hash") or etag or "")


def fingerprint_files(files: Iterable[tuple[str, int, str]]) -> str:
    """Return a hash of the names, sizes and versions of all files.

    Args:
        files: (path, size, version) of each file, in any order; only the last part of a path is used.
    """
    return hash_texts(f"{posixpath.basename(path)}\t{size}\t{version}" for path, size, version in files)


def hash_texts(texts: Iterable[str]) -> str:
    """Return a hash of texts, as 32 hexadecimal digits; the order of the texts does not matter."""
    return hashlib.sha256("\n".join(sorted(texts)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def escape_invalid_utf8(text: str) -> str:
    """Return a path as valid UTF-8 for tables and terminals: other bytes become hexadecimal escapes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Return whether a file system is an S3 store."""
    return "s3" in fs.protocol


def mask_url(uri: str) -> str:
    """Return a URL without user, password, query and fragment, which may contain credentials."""
    if "://" not in uri:
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError:  # square brackets that do not enclose an IPv6 address
        return f"{uri.partition('://')[0]}://"
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))
