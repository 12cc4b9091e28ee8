"""Get a model file, a SavedModel folder, a weights file or a Python file as a local path, with its sha256.

In: a local path or an fsspec URL. Out: a path on this machine and the sha256 of the content. Remote files are
downloaded once per machine and version into a cache, under a lock. Local files are used where they are.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock
from fsspec.core import url_to_fs

from featray.errors import ModelError
from featray.storage.urls import mask_url

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalFile:
    """A file or a SavedModel folder on this machine.

    Attributes:
        path: The local path.
        sha256: Hexadecimal sha256 of the bytes of a file; for a folder, of the names and digests of all
            files in it.
    """

    path: Path
    sha256: str


def get_local_file(uri: str, storage_options: Mapping[str, Any] | None = None) -> LocalFile:
    """Return `uri` as a local file; download a remote file at most once per machine and version.

    The cache is the folder FEATRAY_CACHE if this environment variable is set, otherwise `featray` in
    XDG_CACHE_HOME or in ~/.cache. A cache entry belongs to one version of the remote file (its size, etag and
    modification time). Each use compares the entry with the sha256 that was computed after the download.

    Raises:
        ModelError: The file does not exist, is a folder but not a SavedModel, or cannot be read.
    """
    name = redact_uri(uri)
    try:
        filesystem, path = url_to_fs(uri, **dict(storage_options or {}))
        _reject_other_folders(filesystem, path, name)
        if "file" in _list_protocols(filesystem):
            return LocalFile(Path(path), compute_sha256(Path(path)))
        return _get_cached_file(filesystem, path, uri)
    except FileNotFoundError:
        raise ModelError(f"{name}: no such file; a relative path starts at the working directory") from None
    except ModelError:
        raise
    except Exception as error:  # each filesystem raises its own types
        # The text of the error may contain a URL with credentials, so the message gives only its type.
        raise ModelError(
            f"{name}: cannot be read ({type(error).__name__}); check the address and your access rights"
        ) from error


def compute_sha256(path: Path) -> str:
    """Return the hexadecimal sha256 of a file; for a folder, of the names and digests of all its files."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {compute_sha256(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def redact_uri(uri: str) -> str:
    """Return `uri` for messages: a remote URL without credentials, a local path without its folders."""
    is_remote = "://" in uri and not uri.startswith("file://")
    return mask_url(uri) if is_remote else PurePosixPath(uri).name


def _list_protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _reject_other_folders(filesystem: fsspec.AbstractFileSystem, path: str, name: str) -> None:
    """Raise ModelError if `path` is a folder but not a SavedModel."""
    if filesystem.isdir(path) and not filesystem.exists(f"{path.rstrip('/')}/saved_model.pb"):
        raise ModelError(
            f"{name}: is a folder, not a model; give the .keras or .h5 file in it "
            "(the folder of a SavedModel contains saved_model.pb)"
        )


def _get_cached_file(filesystem: fsspec.AbstractFileSystem, path: str, uri: str) -> LocalFile:
    """Return the cache entry of a remote file or folder; download it first if it is missing or damaged."""
    remote_files = {file[len(path) :].lstrip("/"): file for file in sorted(filesystem.find(path))}
    version = [mask_url(uri), *(f"{name} {filesystem.ukey(file)}" for name, file in remote_files.items())]
    folder = _find_cache_folder() / hashlib.sha256("\n".join(version).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / PurePosixPath(path).name
    digest_file = folder / "sha256"
    with FileLock(folder / "lock"):
        if digest_file.exists() and target.exists():
            if compute_sha256(target) == digest_file.read_text():
                return LocalFile(target, digest_file.read_text())
            log.warning("%s has changed in the cache; it is downloaded again", target.name)
        _download(filesystem, remote_files, target)
        digest_file.write_text(compute_sha256(target))
        return LocalFile(target, digest_file.read_text())


def _download(filesystem: fsspec.AbstractFileSystem, remote_files: dict[str, str], target: Path) -> None:
    """Download next to `target`, then rename, so that a killed download never leaves an incomplete model.

    Args:
        filesystem: The remote filesystem.
        remote_files: {path relative to `target`: remote path}; the relative path of a single file is `''`.
        target: The local file or folder.

    Raises:
        OSError: The size of a downloaded file is not the size that the remote filesystem reports.
    """
    partial = target.with_name("partial")
    for path in (partial, target):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name, remote_file in remote_files.items():
        local = partial / name if name else partial
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(remote_file, str(local))
        expected_size, size = filesystem.info(remote_file).get("size"), local.stat().st_size
        if expected_size is not None and expected_size != size:
            raise OSError(f"expected {expected_size} bytes, received {size}")
    partial.rename(target)


def _find_cache_folder() -> Path:
    cache = os.environ.get("FEATRAY_CACHE")
    if cache:
        return Path(cache) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featray" / "models"
