"""`featray export`: copy one version of an output as plain Parquet files in hive partitions.

`DIR/features/layer=NAME/*.parquet` and `DIR/scans/*.parquet` are byte-for-byte copies of the output's files.
Only files of `scans` without a column that was added later are rewritten with that column, because plain
readers expect the same columns in all files.
`DIR/export.json` is written last and marks a complete export. Until then, `DIR/export.started.json` lists the
files of the export, so that the same call can continue after a kill.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featray.commands.export_folder import ExportFolder, describe_mixed_recipes, make_marker
from featray.errors import StorageError
from featray.output.dataset import FEATURES, SCANS, Snapshot, count_values
from featray.output.layer_totals import LayerTotals, sum_by_layer
from featray.output.ledger import LEDGER_ROW_COLUMNS, find_stored_cells
from featray.output.query import (
    Output,
    find_layer,
    open_output,
    read_one_version,
    translate_arrow_errors,
)
from featray.schema import DataFile
from featray.storage.urls import mask_url

log = logging.getLogger(__name__)

_PARALLEL_COPIES = 4
"""Files copied at once. Between two different stores, each of them is in memory."""


@dataclass(frozen=True)
class ExportResult:
    """Description of an export. Without `copied` and `seconds`, it is also the content of `export.json`.

    Attributes:
        directory: Folder of the export, without credentials.
        output: Output that was exported, without credentials.
        version: Version of the output, as `--version` takes it.
        versions: Version of each table.
        recipes: Layer of the export → recipe id → number of scans; a layer has more than one recipe while a
            refresh is incomplete.
        scans: Number of scans by status.
        layers: Rows, files and bytes of each layer.
        files: Path below the folder → bytes.
        copied: Number of files that this call copied; an earlier call copied the others.
        seconds: Time of this call.
    """

    directory: str
    output: str
    version: int
    versions: dict[str, int]
    recipes: dict[str, dict[str, int]]
    scans: dict[str, int]
    layers: tuple[LayerTotals, ...]
    files: dict[str, int]
    copied: int
    seconds: float

    def text(self) -> str:
        """Return the result as text for the terminal."""
        rows, size = sum(layer.rows for layer in self.layers), sum(self.files.values())
        lines = [
            f"exported version {self.version} to {self.directory}: {len(self.layers)} layers, {rows} rows, "
            f"{sum(self.scans.values())} scans; {len(self.files)} files, {size / 1e6:.2f} MB "
            f"({self.copied} files copied now, {self.seconds:.1f} s)"
        ]
        return "\n".join([*lines, *describe_mixed_recipes(self.recipes)])

    def to_marker(self) -> bytes:
        """Return the content of `export.json`."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("copied", "seconds")}
        return make_marker(facts)


def export(  # noqa: PLR0913  # public function with the options of the command
    output: Output,
    directory: str | os.PathLike[str],
    version: int | None = None,
    *,
    layers: Sequence[str] = (),
    storage_options: Mapping[str, Any] | None = None,
    directory_options: Mapping[str, Any] | None = None,
) -> ExportResult:
    """Copy one version of an output to a plain folder that every Parquet reader can read.

    If a call was killed, the same call continues it. If the newest version is superseded and its files are
    deleted during the copy, the then newest version is exported instead. If `version` was given, that is an
    error.

    Args:
        output: Folder or URL of an output, the config (.yaml) that names it, or a `Dataset`.
        directory: Local path or fsspec URL of a folder that does not exist or is empty.
        version: Version of the output; None for the newest.
        layers: Names of the layers to export, with `/` or `.`; empty for all.
        storage_options: fsspec options of `output`; None for the options of the config, if `output` is one.
        directory_options: fsspec options of `directory`; None for the options of `output` if both URLs have
            the same protocol.

    Raises:
        ConfigError: The output or the version does not exist, or the folder holds other files or a complete
            export, or is inside the output.
        UsageError: The output has no such layer.
        StorageError: A store does not answer, or every version was superseded before it was copied.
    """
    start = time.monotonic()
    dataset = open_output(output, storage_options)
    folder = ExportFolder.open(dataset.store, os.fspath(directory), directory_options)

    def export_version(snapshot: Snapshot) -> ExportResult:
        return _Export(snapshot, folder, _select_files(snapshot, layers)).run(start)

    return read_one_version(dataset, version, export_version)


def _select_files(snapshot: Snapshot, layers: Sequence[str]) -> dict[str, DataFile]:
    """Return the files to export by their path, which is the same below the output and below the folder."""
    features = snapshot.files(FEATURES)
    if layers:
        names = {find_layer(layer, features) for layer in layers}
        features = [file for file in features if file.partition_values["layer"] in names]
    files = {f"{FEATURES}/{file.path}": file for file in features}
    return files | {f"{SCANS}/{file.path}": file for file in snapshot.files(SCANS)}


@dataclass(frozen=True)
class _Export:
    """The export of one version.

    Attributes:
        snapshot: The version.
        folder: The folder to fill.
        files: Path below the folder → file of the output.
    """

    snapshot: Snapshot
    folder: ExportFolder
    files: Mapping[str, DataFile]

    def run(self, start: float) -> ExportResult:
        """Copy the files that an earlier call has not copied, and mark the export as complete.

        Args:
            start: Time on the monotonic clock when the command began.
        """
        sizes = {path: file.size for path, file in self.files.items() if path.startswith(f"{FEATURES}/")}
        present = self._prepare_folder(sizes)
        missing = [path for path in self.files if path not in present]
        size = sum(self.files[path].size for path in missing)
        log.info("copying %d files, %.1f MB, of version %d", len(missing), size / 1e6, self.snapshot.version)
        sizes |= self._copy_files(missing)
        result = self._describe(sizes, len(missing), time.monotonic() - start)
        self.folder.finish(result.files, result.to_marker())
        return result

    def _prepare_folder(self, sizes: Mapping[str, int]) -> set[str]:
        """Delete incomplete files of an earlier call and write the list of files.

        Args:
            sizes: Path of a features file → bytes.

        Returns:
            Paths of the files that an earlier call copied completely.

        Raises:
            ConfigError: The folder holds a complete export, or files that belong to no export.
        """
        found = self.folder.list_files()
        complete = {path for path, size in found.items() if sizes.get(path) == size}
        incomplete = [path for path in found if path not in complete]
        self.folder.start(self.snapshot.version, sorted(self.files), incomplete)
        return complete

    def _copy_files(self, paths: Sequence[str]) -> dict[str, int]:
        """Copy files, several at once; return their sizes in the folder.

        Raises:
            FileNotFoundError: A file was superseded and deleted.
            StorageError: A store does not answer, or the size of a file differs from that in the log.
        """
        pool = ThreadPoolExecutor(_PARALLEL_COPIES)
        try:
            return dict(zip(paths, pool.map(self._copy_file, paths), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def _copy_file(self, path: str) -> int:
        """Copy one file; return its size in the folder."""
        if path.startswith(f"{SCANS}/"):
            return self._copy_scans_file(path)
        source, target, size = self.snapshot.store, self.folder.store, self.files[path].size
        if source.is_local and target.is_local:
            _copy_local_file(source.path(path), target.path(path))
        elif source.fs is target.fs and not source.is_local:  # the store copies without this machine
            source.run_operation(lambda: source.fs.cp_file(source.path(path), target.path(path)))
        else:
            target.write(path, self._read_file(path))
        return size

    def _copy_scans_file(self, path: str) -> int:
        """Copy a file of `scans`, with all columns of the table; return its size in the folder."""
        data = self._read_file(path)
        schema = self.snapshot.schema(SCANS)
        with translate_arrow_errors(path):
            parquet = pq.ParquetFile(pa.BufferReader(data))
            if parquet.schema_arrow.names != schema.names:
                complete = pa.concat_tables([schema.empty_table(), parquet.read()], promote_options="default")
                sink = pa.BufferOutputStream()
                pq.write_table(complete.select(schema.names), sink, compression="zstd")
                data = sink.getvalue().to_pybytes()
        self.folder.store.write(path, data)
        return len(data)

    def _read_file(self, path: str) -> bytes:
        """Return the content of a file of the output.

        Raises:
            StorageError: Its size differs from that in the log.
        """
        data, size = self.snapshot.store.read(path), self.files[path].size
        if len(data) != size:
            raise StorageError(
                f"{path} has {len(data)} bytes instead of {size}; `featray verify` says how to repair the "
                "output"
            )
        return data

    def _describe(self, sizes: Mapping[str, int], copied: int, seconds: float) -> ExportResult:
        rows = self.snapshot.read_scans(LEDGER_ROW_COLUMNS)
        features = (file for path, file in self.files.items() if path.startswith(f"{FEATURES}/"))
        layers = sum_by_layer(features)
        recipes = find_stored_cells(self.snapshot, rows).count_recipes()
        return ExportResult(
            directory=mask_url(self.folder.store.uri),
            output=mask_url(self.snapshot.store.uri),
            version=self.snapshot.version,
            versions=self.snapshot.versions,
            recipes={layer.layer: recipes.get(layer.layer, {}) for layer in layers},
            scans=dict(count_values(rows["status"]).most_common()),
            layers=layers,
            files=dict(sorted(sizes.items())),
            copied=copied,
            seconds=seconds,
        )


def _copy_local_file(source: str, destination: str) -> None:
    """Copy a file so that the destination never exists incomplete."""
    os.makedirs(os.path.dirname(destination), exist_ok=True)
    temporary = f"{destination}.{uuid.uuid4().hex}.tmp"
    shutil.copyfile(source, temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, destination)
