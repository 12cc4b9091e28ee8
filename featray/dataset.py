"""The output as readers see it: two Delta tables over Parquet, `features` and `scans`.

Opens them, says which files are live, reads the ledger, and puts data files beside them that nobody
sees until `stages.commit`, alone, makes them part of a table.
Parquet is read with pyarrow over fsspec, never through deltalake's own readers: those can abort the
process at exit, and a scheduler looks at the exit code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import TableNotFoundError

from featray.errors import ConfigError
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS, DataFile
from featray.storage import Store

FEATURES = "features"
SCANS = "scans"
RUNS = "runs"
APP = "featray"
"""Application id of every transaction; its version counts the commits."""


@dataclass(frozen=True)
class LiveFile:
    """One Parquet file that the current version of a table holds. `path` is below the table's folder."""

    path: str
    size: int
    rows: int
    min_id: str
    max_id: str
    partition_values: dict[str, str | None]


class Dataset:
    """The two tables below one output folder.

    Args:
        store: The output folder; it need not exist yet.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    def open(self, table: str, version: int | None = None) -> DeltaTable | None:
        """Return a table at a version (the newest by default), None when it was never written."""
        try:
            return DeltaTable(
                self.store.delta_uri(table), version=version, storage_options=self.store.delta_options()
            )
        except TableNotFoundError:
            return None

    def create(self, table: str, carried: Sequence[str] = (), partition_by: Sequence[str] = ()) -> DeltaTable:
        """Make an empty table; `carried` names further string columns of `scans` or partitions."""
        return DeltaTable.create(
            self.store.delta_uri(table),
            Schema.from_arrow(table_schema(table, carried, partition_by)),
            partition_by=list(partition_by),
            mode="error",
            storage_options=self.store.delta_options(),
            configuration={"delta.dataSkippingStatsColumns": "scan_id"},
        )

    def live(self, table: str, handle: DeltaTable | None = None) -> list[LiveFile]:
        """Return the files of a table's version; none when it was never written."""
        handle = handle or self.open(table)
        return [] if handle is None else [_live_file(row) for row in _add_actions(handle)]

    def read(
        self, table: str, columns: Sequence[str] | None = None, where: pads.Expression | None = None
    ) -> pa.Table:
        """Return rows of a table's newest version.

        Raises:
            ConfigError: There is no such table here.
        """
        handle = self.open(table)
        if handle is None:
            raise ConfigError(f"{self.store!r} holds no {table} table; is this a featray output?")
        schema = pa.schema(handle.schema().to_arrow())
        fragments = [self._fragment(table, file, schema) for file in self.live(table, handle)]
        found = pads.FileSystemDataset(fragments, schema, pads.ParquetFileFormat(), self._filesystem())
        return found.to_table(columns=list(columns) if columns else None, filter=where)

    def ledger(
        self, columns: Sequence[str] = ("scan_id", "status", "reason", "content", "recipe")
    ) -> pa.Table:
        """Return chosen columns of `scans`; no rows when nothing was ever committed."""
        if self.open(SCANS) is None:
            return SCAN_COLUMNS.empty_table().select(list(columns))
        return self.read(SCANS, columns)

    def read_file(self, table: str, file: LiveFile) -> pa.Table:
        """Return one live file whole."""
        path = self.store.path(f"{table}/{file.path}")
        with self.store.fs.open(path, "rb") as stream:
            return pq.read_table(stream, partitioning=None)

    def put(self, table: str, partition: Mapping[str, str | None], rows: pa.Table, run_id: str) -> DataFile:
        """Write rows as one Parquet file below the table's folder; nobody sees it until committed.

        The name holds the run and a hash of the content, so a retried worker writes the same file
        again instead of leaving a second one.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink, compression="zstd", use_dictionary=["recipe", "run_id"])
        data = sink.getvalue().to_pybytes()
        folder = "".join(f"{key}={_hive(value)}/" for key, value in partition.items())
        path = f"{folder}part-{run_id}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
        self.store.write(f"{table}/{path}", data)
        ids = rows["scan_id"]
        return DataFile(path, len(data), dict(partition), len(rows), pc.min(ids).as_py(), pc.max(ids).as_py())

    def _fragment(self, table: str, file: LiveFile, schema: pa.Schema) -> pads.ParquetFileFragment:
        partition = None
        for name, value in file.partition_values.items():
            equal = pads.field(name) == pads.scalar(pa.scalar(value, schema.field(name).type))
            partition = equal if partition is None else partition & equal
        return pads.ParquetFileFormat().make_fragment(
            self.store.path(f"{table}/{file.path}"), self._filesystem(), partition_expression=partition
        )

    def _filesystem(self) -> pafs.FileSystem:
        if self.store.is_local:
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.store.fs))


def table_schema(table: str, carried: Sequence[str], partition_by: Sequence[str]) -> pa.Schema:
    """Return the Arrow schema of a whole table, partition columns included."""
    fixed = FEATURE_COLUMNS if table == FEATURES else SCAN_COLUMNS
    further = [name for name in (*partition_by, *carried) if name not in fixed.names]
    return pa.schema([*fixed, *((name, pa.string()) for name in dict.fromkeys(further))])


def _hive(value: str | None) -> str:
    """Return a partition value as its folder's name, as Hive and every reader of it spell it."""
    return "__HIVE_DEFAULT_PARTITION__" if value is None else quote(value, safe="")


def _add_actions(handle: DeltaTable) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pa.table(handle.get_add_actions(flatten=True)).to_pylist()
    return rows


def _live_file(row: dict[str, Any]) -> LiveFile:
    prefix = "partition."
    return LiveFile(
        path=unquote(row["path"]),  # the log holds the path URL-encoded once more
        size=row["size_bytes"],
        rows=row["num_records"],
        min_id=row["min.scan_id"],
        max_id=row["max.scan_id"],
        partition_values={key[len(prefix) :]: value for key, value in row.items() if key.startswith(prefix)},
    )
