"""The folder of an export: it is new or empty, is filled step by step, and is marked when it is complete.

`DIR/export.json` is written last and marks a complete export. Until then, `DIR/export.started.json` lists the
files of the export, so that the same call can continue after a kill.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from typing import Any

from featray.errors import ConfigError, StorageError
from featray.output.query import format_recipes
from featray.storage.ray_job import refuse_package
from featray.storage.store import Store
from featray.storage.urls import mask_url

MARKER = "export.json"
"""File that describes a complete export."""
STARTED = "export.started.json"
"""File that lists the files of an export that is not complete."""
_SCRATCH = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_MAX_SHOWN = 3


@dataclass(frozen=True)
class ExportFolder:
    """The folder that an export fills.

    Attributes:
        store: The folder.
    """

    store: Store

    @classmethod
    def open(cls, source: Store, directory: str, options: Mapping[str, Any] | None) -> ExportFolder:
        """Return the folder at a path or URL.

        Args:
            source: The output that is exported.
            directory: Local path or fsspec URL.
            options: fsspec options; None for those of the output if both URLs have the same protocol.

        Raises:
            ConfigError: The folder is a file, inside the output, or would be lost with a Ray job.
        """
        if options is None:
            options = source.find_options(directory)
        refuse_package(directory, "DIR")
        target = Store(directory, dict(options or {}))
        if target.is_local and os.path.lexists(target.root) and not os.path.isdir(target.root):
            raise ConfigError(f"{target.root} is a file; name a folder to export to")
        is_inside = f"{_resolve_root(target)}/".startswith(f"{_resolve_root(source)}/")
        if is_inside and type(target.fs) is type(source.fs):
            raise ConfigError(f"{mask_url(directory)} is inside the output; name a folder outside of it")
        return cls(target)

    def list_files(self) -> dict[str, int]:
        """Return path → bytes of the files that an incomplete export has left; empty for a new folder.

        Raises:
            ConfigError: The folder holds a complete export, or files that belong to no export.
        """
        found = self.store.list_file_sizes()
        if MARKER in found:
            raise ConfigError(
                f"{self.store!r} holds a complete export (see its {MARKER}); name another folder"
            )
        started = set(json.loads(self.store.read(STARTED))["files"]) if STARTED in found else set()
        foreign = [path for path in found if _SCRATCH.sub("", path) not in started | {STARTED, MARKER}]
        if foreign:
            problem = "an incomplete export and files that are not part of it" if started else "other files"
            raise ConfigError(
                f"{self.store!r} holds {problem} ({_shorten(foreign)}); name a folder that is new or empty"
            )
        found.pop(STARTED, None)
        return found

    def start(self, version: int, files: Sequence[str], incomplete: Sequence[str]) -> None:
        """Delete files of an earlier call that are of no use, and write the list of files.

        Args:
            version: Version of the output.
            files: Paths of all files of the export.
            incomplete: Paths of the files to delete.
        """
        self.store.delete(list(incomplete))
        self.store.write(STARTED, _to_json({"version": version, "files": list(files)}))

    def finish(self, files: Mapping[str, int], marker: bytes) -> None:
        """Compare the folder with the files of the export and mark the export as complete.

        Args:
            files: Path → bytes.
            marker: Content of the marker.

        Raises:
            StorageError: A file is missing, has another size, or does not belong to the export.
        """
        found = self.store.list_file_sizes()
        found.pop(STARTED, None)
        different = sorted(path for path in found.keys() | files.keys() if found.get(path) != files.get(path))
        if different:
            raise StorageError(
                f"{self.store!r} differs from what was written to it ({len(different)} files: "
                f"{_shorten(different)}). Stop other programs that write there, check the output with "
                "`featray verify`, and run the same command again"
            )
        self.store.write(MARKER, marker)
        self.store.delete([STARTED])


def make_marker(facts: Mapping[str, Any]) -> bytes:
    """Return the content of the marker: facts about the export, the version of featray and the time."""
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    return _to_json({"featray": version_of("featray"), "finished": finished, **facts})


def describe_mixed_recipes(recipes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return one line for each layer with values of several recipes.

    Args:
        recipes: Layer → recipe id → number of scans.
    """
    return [
        f"layer {layer} has values of {len(counts)} recipes, which must not be compared: "
        f"{format_recipes(counts)}. Filter by the column recipe, or export after the refresh"
        for layer, counts in recipes.items()
        if len(counts) > 1
    ]


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _resolve_root(store: Store) -> str:
    return os.path.realpath(store.root) if store.is_local else store.root


def _shorten(paths: Sequence[str]) -> str:
    """Return the first paths, separated by commas, and `…` if there are others."""
    return ", ".join(paths[:_MAX_SHOWN]) + (", …" if len(paths) > _MAX_SHOWN else "")
