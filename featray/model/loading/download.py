"""Brings one file (model, weights, custom code), or the folder of a SavedModel, to this node.

In: a local path or fsspec URL. Out: a path on this node and the sha256 of its bytes. What is remote
lands once per node in a cache, under a lock; what is local is used in place.
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
    """A file or SavedModel folder of this node.

    Attributes:
        path: Where it lies.
        sha256: Hex digest of its bytes; of a folder, over all files in it and their names.
    """

    path: Path
    sha256: str


def local_file(uri: str, storage_options: Mapping[str, Any] | None = None) -> LocalFile:
    """Return `uri` as a file of this node, downloading it at most once per node and version.

    The cache is the folder FEATRAY_CACHE, else `featray` in XDG_CACHE_HOME or ~/.cache. An entry
    belongs to one version of the remote file (its size, etag, time) and is checked against the
    sha256 taken at download each time it is used.

    Raises:
        ModelError: The file is missing, is a folder that is no SavedModel, or cannot be read.
    """
    name = shown(uri)
    try:
        filesystem, path = url_to_fs(uri, **dict(storage_options or {}))
        _refuse_other_folders(filesystem, path, name)
        if "file" in _protocols(filesystem):
            return LocalFile(Path(path), sha256_of(Path(path)))
        return _cached(filesystem, path, uri)
    except FileNotFoundError:
        raise ModelError(f"{name}: no such file; relative paths start at the working directory") from None
    except ModelError:
        raise
    except Exception as error:  # each store raises its own kinds
        # Their text may carry a URL with credentials: name the kind only.
        raise ModelError(
            f"{name}: cannot be read ({type(error).__name__}); check the address and access"
        ) from error


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's bytes, or of the names and digests of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(uri: str) -> str:
    """Return how messages name `uri`: without credentials, and without folders when it is local."""
    is_remote = "://" in uri and not uri.startswith("file://")
    return mask_url(uri) if is_remote else PurePosixPath(uri).name


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _refuse_other_folders(filesystem: fsspec.AbstractFileSystem, path: str, name: str) -> None:
    if filesystem.isdir(path) and not filesystem.exists(f"{path.rstrip('/')}/saved_model.pb"):
        raise ModelError(
            f"{name}: a folder, not a model; give the .keras or .h5 file in it "
            "(the folder of a SavedModel has saved_model.pb)"
        )


def _cached(filesystem: fsspec.AbstractFileSystem, path: str, uri: str) -> LocalFile:
    remote = {file[len(path) :].lstrip("/"): file for file in sorted(filesystem.find(path))}
    version = [mask_url(uri), *(f"{name} {filesystem.ukey(file)}" for name, file in remote.items())]
    folder = _cache_folder() / hashlib.sha256("\n".join(version).encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / PurePosixPath(path).name
    digest = folder / "sha256"
    with FileLock(folder / "lock"):
        if digest.exists() and target.exists():
            if sha256_of(target) == digest.read_text():
                return LocalFile(target, digest.read_text())
            log.warning("%s changed inside the cache; fetching it again", target.name)
        _download(filesystem, remote, target)
        digest.write_text(sha256_of(target))
        return LocalFile(target, digest.read_text())


def _download(filesystem: fsspec.AbstractFileSystem, remote: dict[str, str], target: Path) -> None:
    """Download beside `target`, then rename: a killed download leaves no half model behind.

    `remote` is {path below `target`: remote path}; a single file is below itself as `''`.
    """
    partial = target.with_name("partial")
    for path in (partial, target):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for name, file in remote.items():
        local = partial / name if name else partial
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(file, str(local))
        expected, got = filesystem.info(file).get("size"), local.stat().st_size
        if expected is not None and expected != got:
            raise OSError(f"{expected} bytes expected, {got} came")
    partial.rename(target)


def _cache_folder() -> Path:
    chosen = os.environ.get("FEATRAY_CACHE")
    if chosen:
        return Path(chosen) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featray" / "models"
