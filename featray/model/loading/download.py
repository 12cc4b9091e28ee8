"""Get a model file, a SavedModel folder, a weights file or a Python file as a local path, with its sha256.

In: a local path or an fsspec URL. Out: a path on this machine and the sha256 of the content. Remote files are
downloaded once per machine and version into a cache, under a lock. Local files are used where they are. A
process that runs on another machine than the driver gets the driver's local files from it (`sent_files.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs

from featray.errors import ModelError
from featray.storage.urls import mask_url
from featray.storage.user_cache import get_user_cache

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


MAX_CACHE_BYTES = 20_000_000_000
"""Size of the cache beyond which entries that were not used for long are deleted."""
_RECENT_S = 3600.0
"""Seconds after its last use for which an entry stays."""
_replacements: dict[str, Callable[[], LocalFile]] = {}
"""URI → function that gives the result of `get_local_file` in this process."""


def get_local_file(uri: str, storage_options: Mapping[str, Any] | None = None) -> LocalFile:
    """Return `uri` as a local file; download a remote file at most once per machine and version.

    The cache is the folder `models` of `featray.storage.user_cache`. A cache entry belongs to one version of
    the remote file (its size, etag and modification time). Each use compares the entry with the sha256 that
    was computed after the download.

    Raises:
        ModelError: The file does not exist, is a folder but not a SavedModel, or cannot be read.
    """
    name = redact_uri(uri)
    try:
        if uri in _replacements:
            return _replacements[uri]()
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


def replace_files(replacements: Mapping[str, Callable[[], LocalFile]]) -> None:
    """Let `get_local_file` in this process return other files for some URIs."""
    _replacements.clear()
    _replacements.update(replacements)


def is_remote(uri: str) -> bool:
    """Return whether other machines can read `uri` too; a local path or the memory of a process is not."""
    protocol, separator, _ = uri.partition("://")
    return bool(separator) and protocol not in ("file", "local", "memory")


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
    has_host = "://" in uri and not uri.startswith("file://")
    return mask_url(uri) if has_host else PurePosixPath(uri).name


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
    return get_cache_entry(
        hashlib.sha256("\n".join(version).encode()).hexdigest(),
        PurePosixPath(path).name,
        lambda partial: _download(filesystem, remote_files, partial),
    )


def get_cache_entry(key: str, name: str, write: Callable[[Path], None]) -> LocalFile:
    """Return a file or folder of the cache; make it if it is missing or damaged.

    Several processes may ask for the same entry at the same time; one of them makes it.

    Args:
        key: Identifies the entry.
        name: Name of its file or folder.
        write: Writes the entry to a path. The entry is renamed when it is complete, so that a process that
            is killed never leaves an incomplete model.
    """
    cache = _make_cache_folder()
    folder = cache / key[:32]
    folder.mkdir(exist_ok=True)
    target, partial, digest_file = folder / name, folder / "partial", folder / "sha256"
    with FileLock(folder / "lock"):
        if digest_file.exists() and target.exists():
            if compute_sha256(target) == digest_file.read_text():
                os.utime(digest_file)  # the time of the last use
                return LocalFile(target, digest_file.read_text())
            log.warning("%s has changed in the cache; it is fetched again", target.name)
        for path in (partial, target):
            _remove(path)
        write(partial)
        partial.rename(target)
        sha256 = compute_sha256(target)
        digest_file.write_text(sha256)
    with contextlib.suppress(OSError):  # another process may delete entries at the same time
        _limit_cache(cache)
    return LocalFile(target, sha256)


def _limit_cache(cache: Path) -> None:
    """Delete the entries that were not used for the longest time until the cache is small enough.

    Entries that were used recently stay, because another process may be loading them.
    """
    entries = sorted((file.stat().st_mtime, file.parent) for file in cache.glob("*/sha256"))
    sizes = {folder: sum(file.stat().st_size for file in folder.rglob("*")) for _, folder in entries}
    total = sum(sizes.values())
    for used, folder in entries:
        if total <= MAX_CACHE_BYTES or used > time.time() - _RECENT_S:
            return
        with contextlib.suppress(Timeout), FileLock(folder / "lock", timeout=0):
            for path in folder.iterdir():
                if path.name != "lock":
                    _remove(path)
            total -= sizes[folder]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _download(filesystem: fsspec.AbstractFileSystem, remote_files: dict[str, str], target: Path) -> None:
    """Download a file or folder.

    Args:
        filesystem: The remote filesystem.
        remote_files: {path relative to `target`: remote path}; the relative path of a single file is `''`.
        target: The local file or folder.

    Raises:
        OSError: The size of a downloaded file is not the size that the remote filesystem reports.
    """
    for name, remote_file in remote_files.items():
        local = target / name if name else target
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(remote_file, str(local))
        expected_size, size = filesystem.info(remote_file).get("size"), local.stat().st_size
        if expected_size is not None and expected_size != size:
            raise OSError(f"expected {expected_size} bytes, received {size}")


def _make_cache_folder() -> Path:
    """Return the folder of the cache; a temporary one if the user's cannot be written.

    Raises:
        PermissionError: The temporary folder belongs to another user, who could put code into it.
    """
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: no home folder exists
        folder = get_user_cache("models")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir()) / f"featray-models-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder
