"""Send the local files of a model from the driver to processes on other machines.

In: the `model` section of a config. Out: its local files by the URI that names them, each with its sha256; on
another machine, the same files from there if they are equal, or else from a cache of that machine. Must not
know how the bytes travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model.loading import download
from featray.model.loading.custom_objects import split_layer
from featray.model.loading.download import LocalFile

Members = Mapping[str, Any]
"""Path of each file relative to a folder → its bytes, as any buffer; a single file has the path `''`."""


@dataclass(frozen=True)
class SentFile:
    """A file or SavedModel folder of the driver; travels to other processes.

    Attributes:
        name: Its name, whose suffix says how it is loaded.
        sha256: Its digest, as `download.compute_sha256` returns it.
        fetch: Gets its bytes from the driver.
    """

    name: str
    sha256: str
    fetch: Callable[[], Members]


def list_code_references(spec: ModelConfig) -> list[str]:
    """Return the code that `spec` names, each as `file.py:NAME` or `package.module:NAME`."""
    builders = [spec.builder] if spec.builder else []
    return builders + [split_layer(entry)[1] for entry in spec.custom_objects]


def find_local_files(spec: ModelConfig) -> dict[str, LocalFile]:
    """Return the files that the model is made from and that only this machine may have, by their URI."""
    code = [reference.rpartition(":")[0] for reference in list_code_references(spec)]
    uris = [spec.uri, spec.architecture, *(uri for uri in code if uri.endswith(".py"))]
    return {
        uri: download.get_local_file(uri, spec.storage_options)
        for uri in uris
        if uri and not download.is_remote(uri)
    }


def read_members(path: Path) -> dict[str, bytes]:
    """Return the bytes of a file, or of all files of a folder."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


def use_sent_files(files: Mapping[str, SentFile]) -> None:
    """Let this process load the model from the driver's files, under the URIs of the driver."""
    download.replace_files({uri: partial(_get_file, uri, file) for uri, file in files.items()})


def _get_file(uri: str, file: SentFile) -> LocalFile:
    """Return the file of this machine if it is equal, which needs no copy; otherwise a copy in the cache."""
    here = Path(uri.removeprefix("file://"))
    if here.exists() and download.compute_sha256(here) == file.sha256:
        return LocalFile(here, file.sha256)
    copy = download.get_cache_entry(file.sha256, file.name, lambda target: _write(file.fetch(), target))
    if copy.sha256 != file.sha256:
        raise ModelError(
            f"{file.name}: what arrived from the driver is not the file that it has sent; run again"
        )
    return copy


def _write(members: Members, target: Path) -> None:
    for name, content in members.items():
        path = target / name if name else target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
