"""The output as readers see it: the tables `features` and `scans` as of one commit.

A `Snapshot` is one commit of both tables. A `Dataset` opens snapshots, and writes data files that no reader
sees until `featray.stages.commit` commits them. Only that module changes the tables. Parquet files are read
with pyarrow through fsspec, never with deltalake's own readers. These can abort the process at exit, and then
a scheduler takes a finished job for a failed one.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.errors import ConfigError, FeatrayError
from featray.output.delta_log import LOG, TableLog
from featray.output.file_change import PendingCommit
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS, DataFile
from featray.storage.store import Store

if TYPE_CHECKING:
    import pyarrow.dataset as pads
    import pyarrow.fs as pafs

    from featray.config import OutputConfig

FEATURES = "features"
SCANS = "scans"
RUNS = "runs"
TABLES_APART = (
    "`features` and `scans` are more than one commit apart. Perhaps one of the folders was copied, restored "
    "or changed by another program. Restore both folders to the same point in time."
)

_MAX_OPEN_ATTEMPTS = 20
"""Maximum number of attempts to open both tables at the same commit while a run commits."""
_BATCH_ROWS = 2**14
"""Rows of `scans` that `Snapshot.convert_scans` reads at a time from one file."""
_THREADS = 4
"""Files of `scans` that `Snapshot.convert_scans` reads at the same time."""
_DATA_FILE_NAME = re.compile(
    r"(?:^|/)part-(?P<run_id>[^/]+)-[0-9a-f]{16}\.parquet(?P<temporary>\.[0-9a-f]{32}\.tmp)?$"
)

T = TypeVar("T")


class Snapshot:
    """Both tables as of one commit, so that each scan in `scans` has its features in `features`.

    If a run was killed between the two halves of a commit, the snapshot includes the whole commit, because
    the first half records the second. The next run appends the second half to the log.

    Args:
        store: The output folder.
        features: Log of `features`.
        scans: Log of `scans`, at the same commit except for `pending`.
        pending: The half of the commit that one of the logs lacks; None if both logs are complete.
    """

    def __init__(
        self, store: Store, features: TableLog, scans: TableLog, pending: PendingCommit | None
    ) -> None:
        self.store, self._logs, self.pending = store, {FEATURES: features, SCANS: scans}, pending

    @property
    def version(self) -> int:
        """Version of `features`, which is also the version of the output (`--version`)."""
        return self._logs[FEATURES].version

    @property
    def commit_number(self) -> int:
        """Number of the newest commit; 0 for an empty output."""
        return max(log.commit_number for log in self._logs.values())

    @property
    def versions(self) -> dict[str, int]:
        """Table → its version."""
        return {name: log.version for name, log in self._logs.items()}

    @property
    def partition_by(self) -> list[str]:
        """Partition columns of `features`, `layer` first."""
        return self._logs[FEATURES].partition_by

    @property
    def retention_days(self) -> float:
        """Days for which the output keeps superseded files (`output.keep_versions_days`)."""
        return self._logs[FEATURES].retention_days

    def schema(self, table: str) -> pa.Schema:
        """Return the Arrow schema of a whole table, including the partition columns.

        Columns that the version of featray that made the table did not have are part of it; they are null.
        """
        stored, fixed = self._logs[table].schema, FEATURE_COLUMNS if table == FEATURES else SCAN_COLUMNS
        return pa.schema([*stored, *(column for column in fixed if column.name not in stored.names)])

    def files(self, table: str) -> list[DataFile]:
        """Return the files that hold the table's rows."""
        files = self._logs[table].files()
        if self.pending is None or self.pending.table != table:
            return files
        change = self.pending.change
        removed = {file.path for file in change.remove}
        return [*(file for file in files if file.path not in removed), *change.add]

    def list_superseded(self, table: str) -> set[str]:
        """Return the paths of files that older, still retained versions of a table need."""
        return self._logs[table].list_superseded() if self.retention_days else set()

    def make_fragments(
        self, table: str, files: Sequence[DataFile] | None = None
    ) -> list[pads.ParquetFileFragment]:
        """Return files of a table (default: all) as pyarrow fragments that know their partition values."""
        schema, filesystem = self.schema(table), self.make_filesystem()
        selected = self.files(table) if files is None else files
        return [self._make_fragment(table, file, schema, filesystem) for file in selected]

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        where: pads.Expression | None = None,
        files: Sequence[DataFile] | None = None,
    ) -> pa.Table:
        """Return rows of a table.

        Args:
            table: Name of the table.
            columns: Names of the columns to read, which may be partition columns; None for all.
            where: Filter; None for all rows.
            files: Files to read; None for all files of the table.

        Raises:
            FileNotFoundError: A file was deleted after the snapshot was opened, because a later commit
                superseded it.
            StorageError: The store does not answer.
        """
        import pyarrow.dataset as pads  # this imports pandas, so it is done late

        fragments = self.make_fragments(table, files)
        rows = pads.FileSystemDataset(
            fragments, self.schema(table), pads.ParquetFileFormat(), self.make_filesystem()
        )
        names = list(columns) if columns else None
        return self.store.run_operation(lambda: rows.to_table(columns=names, filter=where))

    def read_scans(self, columns: Sequence[str]) -> pa.Table:
        """Return columns of all rows of `scans`; raises as `read`."""
        return self.read(SCANS, columns)

    def convert_scans(self, columns: Sequence[str], convert: Callable[[pa.Table], T]) -> list[T]:
        """Return the results of a function for all rows of `scans`, a few thousand rows at a time.

        The rows never lie in memory together: the cells of a million scans take 0.4 GB.

        Args:
            columns: Names of the columns to read.
            convert: Is called with a table of these columns.

        Raises:
            FileNotFoundError: As `read`; the same holds for StorageError.
        """
        schema, filesystem = self.schema(SCANS), self.make_filesystem()
        selected = pa.schema([schema.field(name) for name in columns])

        def convert_file(file: DataFile) -> list[T]:
            path = self.store.path(f"{SCANS}/{file.path}")
            with filesystem.open_input_file(path) as stream:
                parquet = pq.ParquetFile(stream, pre_buffer=True)
                names = [name for name in columns if name in parquet.schema_arrow.names]
                batches = parquet.iter_batches(_BATCH_ROWS, columns=names)
                return [convert(_fill_columns(batch, selected)) for batch in batches]

        with ThreadPoolExecutor(_THREADS) as pool:
            results = pool.map(
                lambda file: self.store.run_operation(lambda: convert_file(file)), self.files(SCANS)
            )
            return [result for of_file in results for result in of_file]

    def make_filesystem(self) -> pafs.FileSystem:
        """Return the store as a pyarrow file system."""
        import pyarrow.fs as pafs

        if self.store.is_local:
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.store.fs))

    def _make_fragment(
        self, table: str, file: DataFile, schema: pa.Schema, filesystem: pafs.FileSystem
    ) -> pads.ParquetFileFragment:
        import pyarrow.dataset as pads

        partition = None
        for name, value in file.partition_values.items():
            equal = pads.field(name) == pads.scalar(pa.scalar(value, schema.field(name).type))
            partition = equal if partition is None else partition & equal
        return pads.ParquetFileFormat().make_fragment(
            self.store.path(f"{table}/{file.path}"), filesystem, partition_expression=partition
        )


def _fill_columns(batch: pa.RecordBatch, schema: pa.Schema) -> pa.Table:
    """Return rows with the columns of a schema; columns that earlier versions did not write are null."""
    names = batch.schema.names
    columns = [
        batch[field.name].cast(field.type) if field.name in names else pa.nulls(len(batch), field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


class Dataset:
    """The two tables in one output folder.

    Args:
        store: The output folder; it need not exist yet.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @classmethod
    def open(cls, config: OutputConfig) -> Dataset:
        """Return the output that the section `output` of a configuration names; it need not exist yet.

        Raises:
            ConfigError: The protocol of the URL is unknown or its package is not installed.
        """
        return cls(Store(config.uri, config.storage_options))

    def find_snapshot(self, version: int | None = None) -> Snapshot | None:
        """Return the snapshot at a version of `features` (default: the newest); None if it does not exist.

        Raises:
            ConfigError: One of the tables was deleted.
            StorageError: The store does not answer.
            FeatrayError: The tables are more than one commit apart, which no run causes.
        """
        self.store.fs.invalidate_cache()  # a cached listing would hide files that other processes wrote
        for _ in range(_MAX_OPEN_ATTEMPTS):
            features = TableLog.open(self.store, FEATURES, version)
            scans = TableLog.open(self.store, SCANS)
            if version is None:
                refuse_missing_table(self.store, features, scans)
            if features is None or scans is None:
                return None
            if version is not None and scans.commit_number > features.commit_number:
                scans = self._open_scans_at(scans, features.commit_number)
            snapshot = scans and pair_logs(self.store, features, scans)
            if snapshot:
                return snapshot
        if version is not None:
            return None
        raise FeatrayError(f"{self.store!r}: {TABLES_APART}")

    def open_snapshot(self, version: int | None = None) -> Snapshot:
        """Return the snapshot at a version of `features` (default: the newest).

        Raises:
            ConfigError: The output or the version does not exist, or the version is no longer retained.
            StorageError: The store does not answer.
            FeatrayError: The tables are more than one commit apart.
        """
        snapshot = self.find_snapshot(version)
        if snapshot is not None:
            return snapshot
        if version is not None and (newest := self.find_snapshot()) is not None:
            raise ConfigError(
                f"{self.store!r} has no version {version}, or keeps it no longer; the newest version is "
                f"{newest.version}. "
                f"Superseded versions are kept for {newest.retention_days:g} days "
                "(output.keep_versions_days)."
            )
        raise ConfigError(f"{self.store!r} has no features and scans tables; is this a featray output?")

    def read(
        self, table: str, columns: Sequence[str] | None = None, where: pads.Expression | None = None
    ) -> pa.Table:
        """Return rows of a table's newest version. The arguments are those of `Snapshot.read`.

        Raises:
            ConfigError: The output does not exist.
            FileNotFoundError: A file was deleted after the newest version was opened.
            FeatrayError: The tables are more than one commit apart.
            StorageError: The store does not answer.
        """
        return self.open_snapshot().read(table, columns, where)

    def read_scans(self, columns: Sequence[str]) -> pa.Table:
        """Return columns of all rows of `scans`; a table without rows if nothing was ever committed."""
        snapshot = self.find_snapshot()
        if snapshot is None:
            return SCAN_COLUMNS.empty_table().select(list(columns))
        return snapshot.read_scans(columns)

    def write_file(
        self, table: str, partition: Mapping[str, str | None], rows: pa.Table, run_id: str
    ) -> DataFile:
        """Write rows to one Parquet file in the table's folder. Readers do not see it until it is committed.

        The name consists of the run and a hash of the content. So a worker that is retried writes the same
        file again instead of a second one.

        Args:
            table: Name of the table.
            partition: Partition column → value of all rows.
            rows: At least one row, without the partition columns.
            run_id: The run that writes.

        Raises:
            StorageError: The store does not answer, or no space is left.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", use_dictionary=["recipe", "run_id"])
        path, size = self._write_data(table, partition, sink.getvalue().to_pybytes(), run_id)
        ids = rows["scan_id"]
        return DataFile(path, size, dict(partition), len(rows), pc.min(ids).as_py(), pc.max(ids).as_py())

    def copy_file(
        self, table: str, file: DataFile, partition: Mapping[str, str | None], run_id: str
    ) -> DataFile:
        """Copy a data file into another partition, as `write_file` would write its rows.

        Raises:
            FileNotFoundError: The file is missing.
            StorageError: The store does not answer, or no space is left.
        """
        data = self.store.read(f"{table}/{file.path}")
        path, size = self._write_data(table, partition, data, run_id)
        return replace(file, path=path, size=size, partition_values=dict(partition))

    def _write_data(
        self, table: str, partition: Mapping[str, str | None], data: bytes, run_id: str
    ) -> tuple[str, int]:
        """Write the bytes of a data file; return its path in the table's folder, and its size."""
        folder = "".join(f"{make_partition_name(key, value)}/" for key, value in partition.items())
        path = f"{folder}part-{run_id}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        self.store.write(f"{table}/{path}", data)
        return path, len(data)

    def _open_scans_at(self, scans: TableLog, number: int) -> TableLog | None:
        """Return the log of `scans` at commit `number`.

        A version is not exactly a commit, because changes of columns and properties are versions too. So step
        back by the difference of the commit numbers until the number is reached or passed.
        """
        log: TableLog | None = scans
        while log is not None and log.commit_number > number:
            log = TableLog.open(self.store, SCANS, max(0, log.version - (log.commit_number - number)))
        return log


def pair_logs(store: Store, features: TableLog, scans: TableLog) -> Snapshot | None:
    """Return both tables as of one commit.

    Returns:
        None if the logs are at different commits and the newer one does not record the other's missing half.
        This happens when a run commits while the logs are opened.
    """
    if features.commit_number == scans.commit_number:
        return Snapshot(store, features, scans, None)
    ahead, behind = (features, scans) if features.commit_number > scans.commit_number else (scans, features)
    is_next = ahead.commit_number == behind.commit_number + 1
    pending = ahead.read_pending_commit() if is_next else None
    return None if pending is None else Snapshot(store, features, scans, pending)


def refuse_missing_table(store: Store, features: TableLog | None, scans: TableLog | None) -> None:
    """Raise if one of the tables has commits and the other does not exist.

    Raises:
        ConfigError: The message names the missing table.
    """
    present = features or scans
    if present is None or present.commit_number == 0 or (features and scans):
        return
    missing = FEATURES if features is None else SCANS
    raise ConfigError(
        f"{store!r} has no table {missing} (no {missing}/{LOG}), but the table {present.table} with "
        f"{present.commit_number} commits. Restore the folder {missing}, or delete the whole output and run "
        "again"
    )


def count_values(column: pa.ChunkedArray) -> Counter[str]:
    """Return how often each value of a column of texts occurs."""
    return Counter({item["values"]: item["counts"] for item in column.value_counts().to_pylist()})


def parse_run_id(name: str) -> str | None:
    """Return the id of the run that wrote a data file; None if runs do not give files such a name."""
    match = _DATA_FILE_NAME.search(name)
    return match["run_id"] if match else None


def can_contain_any(file: DataFile, sorted_ids: Sequence[str]) -> bool:
    """Return whether one of the ids lies between the smallest and the largest scan_id of a file."""
    position = bisect.bisect_left(sorted_ids, file.min_id)
    return position < len(sorted_ids) and sorted_ids[position] <= file.max_id


def make_table_schema(table: str, extra_columns: Sequence[str], partition_by: Sequence[str]) -> pa.Schema:
    """Return the schema of a whole table: the fixed columns, then partition and extra columns as strings."""
    fixed = FEATURE_COLUMNS if table == FEATURES else SCAN_COLUMNS
    further = [name for name in (*partition_by, *extra_columns) if name not in fixed.names]
    return pa.schema([*fixed, *((name, pa.string()) for name in dict.fromkeys(further))])


def make_partition_name(column: str, value: str | None) -> str:
    """Return the name of the folder for one value of a partition column, as Hive writes it."""
    escaped = "__HIVE_DEFAULT_PARTITION__" if value is None else quote(value, safe="")
    return f"{column}={escaped}"
