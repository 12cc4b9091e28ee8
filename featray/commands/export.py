"""Export: one version of an output in, a plain folder of hive-partitioned Parquet out, with no log beside it.

`DIR/features/layer=NAME/*.parquet` and `DIR/scans/*.parquet` are the output's own files, byte for byte, but
for files of `scans` that lack a column of a later one: plain readers want all alike.
`DIR/export.json` is written last: where it is, the export is whole. Until then `DIR/export.started.json` says
what belongs here, so that the same call goes on after a kill.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as version_of
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featray.errors import ConfigError, StorageError
from featray.output.dataset import FEATURES, SCANS, Snapshot
from featray.output.layer_totals import LayerTotals, sum_by_layer
from featray.output.query import (
    Output,
    find_layer,
    format_recipes,
    open_output,
    read_one_version,
    translate_arrow_errors,
)
from featray.schema import DataFile
from featray.storage.store import Store
from featray.storage.urls import mask_url

log = logging.getLogger(__name__)

MARKER = "export.json"
"""Says what the folder holds; there only when all of it is."""
STARTED = "export.started.json"
"""Names the files of an export that is not done yet."""
_COPIES = 4
"""Files under way at once; between two stores, each is in memory meanwhile."""
_SCRATCH = re.compile(r"\.[0-9a-f]{32}\.tmp$")
_SHOWN = 3


@dataclass(frozen=True)
class ExportResult:
    """What an export holds; but for `copied` and `seconds` also the content of its marker.

    Attributes:
        directory: Where it is, without credentials.
        output: Where it comes from, without credentials.
        version: Version of the output, as `--version` names it.
        versions: Version of each table.
        recipes: Recipe id → `ok` scans; more than one while a refresh is half done.
        scans: Status → scans.
        layers: The layers.
        files: {path below the folder: bytes}.
        copied: Files that this call copied; the others it found.
        seconds: Time it took.
    """

    directory: str
    output: str
    version: int
    versions: dict[str, int]
    recipes: dict[str, int]
    scans: dict[str, int]
    layers: tuple[LayerTotals, ...]
    files: dict[str, int]
    copied: int
    seconds: float

    def text(self) -> str:
        """Return the answer for a person."""
        rows, size = sum(layer.rows for layer in self.layers), sum(self.files.values())
        lines = [
            f"version {self.version} is in {self.directory}: {len(self.layers)} layers, {rows} rows, "
            f"{sum(self.scans.values())} scans; {len(self.files)} files, {size / 1e6:.2f} MB "
            f"({self.copied} copied now, {self.seconds:.1f} s)"
        ]
        if len(self.recipes) > 1:
            lines.append(
                f"it has values of {len(self.recipes)} recipes, which must not be compared: "
                f"{format_recipes(self.recipes)}. Filter by the column recipe, or export after the refresh"
            )
        return "\n".join(lines)


def export(
    output: Output,
    directory: str | os.PathLike[str],
    version: int | None = None,
    *,
    layers: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    directory_options: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Copy one version to a plain folder that any reader of Parquet can take as it is.

    A call that was killed is continued by the same call. A version that is superseded and deleted while it
    is copied is given up for the newest; a version that is asked for by number never is.

    Args:
        output: Folder or URL of an output, the config (.yaml) that names it, or a `Dataset`.
        directory: Local path or fsspec URL of a folder that does not exist yet or is empty.
        version: Version of the output; None for the newest.
        layers: Only these, named with `/` or `.`; all by default.
        storage_options: fsspec options of `output`; None for those of the config, if it is one.
        directory_options: fsspec options of `directory`; None for those of `output` where both are in one
            kind of store.

    Raises:
        ConfigError: There is no such output or version; or the folder holds something else, a whole export,
            or is inside the output.
        UsageError: No such layer.
        StorageError: A store does not answer, or refreshes kept outrunning this call.
    """
    start = time.monotonic()
    dataset = open_output(output, storage_options)
    target = _target(dataset.store, os.fspath(directory), directory_options)

    def once(snapshot: Snapshot) -> ExportResult:
        return _export(snapshot, target, layers, start)

    return read_one_version(dataset, version, once)


def _target(source: Store, place: str, options: Mapping[str, Any] | None) -> Store:
    """Return the folder to fill.

    Raises:
        ConfigError: It is a file, or inside the output.
    """
    protocol = place.partition("://")[0] if "://" in place else ""
    if options is None and protocol and source.uri.startswith(f"{protocol}://"):
        options = source.options
    target = Store(place, dict(options or {}))
    if target.is_local and os.path.lexists(target.root) and not os.path.isdir(target.root):
        raise ConfigError(f"{target.root} is a file; name a folder to export to")
    inside = f"{_real(target)}/".startswith(f"{_real(source)}/")
    if inside and type(target.fs) is type(source.fs):
        raise ConfigError(f"{mask_url(place)} is inside the output; export to a folder of its own")
    return target


def _real(store: Store) -> str:
    return os.path.realpath(store.root) if store.is_local else store.root


def _export(snapshot: Snapshot, target: Store, layers: Sequence[str], start: float) -> ExportResult:
    files = _files(snapshot, layers)
    sizes = {name: file.size for name, file in files.items() if name.startswith(f"{FEATURES}/")}
    there = _begin(target, snapshot, files, sizes)
    todo = {name: file for name, file in files.items() if name not in there}
    size = sum(file.size for file in todo.values())
    log.info("copying %d files, %.1f MB, of version %d", len(todo), size / 1e6, snapshot.version)
    sizes |= _copied(snapshot, target, todo)
    made = _described(snapshot, target, files, sizes, len(todo), time.monotonic() - start)
    _finish(target, made)
    return made


def _files(snapshot: Snapshot, layers: Sequence[str]) -> dict[str, DataFile]:
    """Return {path below either folder: file} of what is to be exported."""
    features = snapshot.files(FEATURES)
    if layers:
        wanted = {find_layer(layer, features) for layer in layers}
        features = [file for file in features if file.partition_values["layer"] in wanted]
    named = {f"{FEATURES}/{file.path}": file for file in features}
    return named | {f"{SCANS}/{file.path}": file for file in snapshot.files(SCANS)}


def _begin(target: Store, snapshot: Snapshot, files: Iterable[str], sizes: Mapping[str, int]) -> set[str]:
    """Make the folder ready, and return the files that an earlier call has brought already.

    Raises:
        ConfigError: It holds what is not of an export under way.
    """
    found = target.list_file_sizes()
    if MARKER in found:
        raise ConfigError(f"{target!r} holds a whole export ({MARKER} says of what); name another folder")
    begun = set(json.loads(target.read(STARTED))["files"]) if STARTED in found else set()
    foreign = [name for name in found if _SCRATCH.sub("", name) not in begun | {STARTED, MARKER}]
    if foreign:
        some = ", ".join(foreign[:_SHOWN]) + (", …" if len(foreign) > _SHOWN else "")
        what = "an export that is not done, and files that are not of it" if begun else "files already"
        raise ConfigError(f"{target!r} holds {what} ({some}); name a folder that is new or empty")
    there = {name for name, size in found.items() if sizes.get(name) == size}
    target.delete([name for name in found if name not in there and name != STARTED])
    target.write(STARTED, _json({"version": snapshot.version, "files": sorted(files)}))
    return there


def _copied(snapshot: Snapshot, target: Store, files: Mapping[str, DataFile]) -> dict[str, int]:
    """Copy files, a few at once; return their sizes in the folder.

    Raises:
        FileNotFoundError: One has been deleted since, as superseded files are.
        StorageError: A store does not answer, or a file has not the size that the log says.
    """

    def copy(name: str) -> int:
        if name.startswith(f"{SCANS}/"):
            return _copy_scans(snapshot, target, name, files[name])
        return _copy(snapshot.store, target, name, files[name].size)

    pool = ThreadPoolExecutor(_COPIES)
    try:
        return dict(zip(files, pool.map(copy, files), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def _copy(source: Store, target: Store, name: str, size: int) -> int:
    """Copy one file as it is: within one object store without moving it through this machine."""
    if source.is_local and target.is_local:
        _copy_local(source.path(name), target.path(name))
    elif source.fs is target.fs and not source.is_local:
        source.run_operation(lambda: source.fs.cp_file(source.path(name), target.path(name)))
    else:
        target.write(name, _checked(source.read(name), name, size))
    return size


def _copy_local(path: str, to: str) -> None:
    os.makedirs(os.path.dirname(to), exist_ok=True)
    temporary = f"{to}.{uuid.uuid4().hex}.tmp"
    shutil.copyfile(path, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, to)


def _copy_scans(snapshot: Snapshot, target: Store, name: str, file: DataFile) -> int:
    """Copy one file of `scans`, with all columns that the table has by now."""
    data = _checked(snapshot.store.read(name), name, file.size)
    schema = snapshot.schema(SCANS)
    with translate_arrow_errors(name):
        parquet = pq.ParquetFile(pa.BufferReader(data))
        if parquet.schema_arrow.names != schema.names:
            whole = pa.concat_tables([schema.empty_table(), parquet.read()], promote_options="default")
            sink = pa.BufferOutputStream()
            pq.write_table(whole.select(schema.names), sink, compression="zstd")
            data = sink.getvalue().to_pybytes()
    target.write(name, data)
    return len(data)


def _checked(data: bytes, name: str, size: int) -> bytes:
    if len(data) != size:
        raise StorageError(
            f"{name} has {len(data)} bytes instead of {size}; `featray verify` says how to mend the output"
        )
    return data


def _described(
    snapshot: Snapshot,
    target: Store,
    files: Mapping[str, DataFile],
    sizes: Mapping[str, int],
    copied: int,
    seconds: float,
) -> ExportResult:
    ledger = snapshot.read_scans(("status", "recipe")).to_pylist()
    return ExportResult(
        directory=mask_url(target.uri),
        output=mask_url(snapshot.store.uri),
        version=snapshot.version,
        versions=snapshot.versions,
        recipes=dict(Counter(row["recipe"] for row in ledger if row["status"] == "ok").most_common()),
        scans=dict(Counter(row["status"] for row in ledger).most_common()),
        layers=sum_by_layer(file for name, file in files.items() if name.startswith(f"{FEATURES}/")),
        files=dict(sorted(sizes.items())),
        copied=copied,
        seconds=seconds,
    )


def _finish(target: Store, made: ExportResult) -> None:
    """Look whether all is there and nothing else, then say so.

    Raises:
        StorageError: It is not.
    """
    found = target.list_file_sizes()
    found.pop(STARTED, None)
    if found != made.files:
        wrong = sorted(
            name for name in found.keys() | made.files.keys() if found.get(name) != made.files.get(name)
        )
        some = ", ".join(wrong[:_SHOWN]) + (", …" if len(wrong) > _SHOWN else "")
        raise StorageError(
            f"{target!r} is not what was copied to it ({len(wrong)} files: {some}); does something else "
            "write there, or is the output damaged (`featray verify`)? Then run the same command again"
        )
    content = {name: value for name, value in asdict(made).items() if name not in ("copied", "seconds")}
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    target.write(MARKER, _json({"featray": version_of("featray"), "finished": finished, **content}))
    target.delete([STARTED])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
