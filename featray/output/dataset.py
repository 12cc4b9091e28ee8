"""The output as readers see it: two Delta tables over Parquet, `features` and `scans`, as of one commit.

A `Snapshot` is that: both tables' files, in agreement. `Dataset` opens one, and puts data files beside the
tables that nobody sees until `stages.commit`, alone, makes them part of a table.
Parquet is read with pyarrow over fsspec, never through deltalake's own readers: those can abort the
process at exit, and a scheduler looks at the exit code.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.errors import ConfigError, FeatrayError
from featray.output.delta_log import Owed, TableLog
from featray.schema import FEATURE_COLUMNS, SCAN_COLUMNS, DataFile
from featray.storage.store import Store

if TYPE_CHECKING:
    import pyarrow.dataset as pads
    import pyarrow.fs as pafs

    from featray.config import OutputConfig

FEATURES = "features"
SCANS = "scans"
RUNS = "runs"
LEDGER = ("scan_id", "status", "reason", "content", "recipe")
"""Columns of `scans` that planning needs."""

_LOOKS = 20
"""Times to look again when a run commits while the two tables are being opened."""
_DATA_FILE = re.compile(
    r"(?:^|/)part-(?P<run_id>[^/]+)-[0-9a-f]{16}\.parquet(?P<scratch>\.[0-9a-f]{32}\.tmp)?$"
)


class Snapshot:
    """Both tables as of one commit: what `scans` says of a scan is what `features` holds.

    A commit that a kill cut between the two tables counts as done here, for nothing that it needs is missing;
    the next run writes down its second half.

    Args:
        store: The output folder.
        features: Log of `features`.
        scans: Log of `scans` at the same commit, but for `owed`.
        owed: What one of the tables still lacks.
    """

    def __init__(self, store: Store, features: TableLog, scans: TableLog, owed: Owed | None) -> None:
        self.store, self._logs, self.owed = store, {FEATURES: features, SCANS: scans}, owed

    @property
    def version(self) -> int:
        """Version of `features`: what `--version` names."""
        return self._logs[FEATURES].version

    @property
    def number(self) -> int:
        """Number of the newest commit; 0 for an empty output."""
        return max(log.number for log in self._logs.values())

    @property
    def versions(self) -> dict[str, int]:
        """Version of each table."""
        return {name: log.version for name, log in self._logs.items()}

    @property
    def partition_by(self) -> list[str]:
        """Partition columns of `features`, `layer` first."""
        return self._logs[FEATURES].partition_by

    @property
    def keep_days(self) -> float:
        """Days that the output keeps superseded files (`output.keep_versions_days`)."""
        return self._logs[FEATURES].keep_days

    def schema(self, table: str) -> pa.Schema:
        """Return the Arrow schema of a whole table, partition columns included."""
        return self._logs[table].schema

    def files(self, table: str) -> list[DataFile]:
        """Return the files that hold the table's rows."""
        files = self._logs[table].files()
        if self.owed is None or self.owed.table != table:
            return files
        gone = {file.path for file in self.owed.remove}
        return [file for file in files if file.path not in gone] + list(self.owed.add)

    def superseded(self, table: str) -> set[str]:
        """Return paths of files that older versions within `keep_days` are read from."""
        return self._logs[table].superseded() if self.keep_days else set()

    def fragments(
        self, table: str, files: Sequence[DataFile] | None = None
    ) -> list[pads.ParquetFileFragment]:
        """Return files (all by default) as pyarrow fragments that know their partition values."""
        schema, filesystem = self.schema(table), self.filesystem()
        chosen = self.files(table) if files is None else files
        return [self._fragment(table, file, schema, filesystem) for file in chosen]

    def read(
        self,
        table: str,
        columns: Sequence[str] | None = None,
        where: pads.Expression | None = None,
        files: Sequence[DataFile] | None = None,
    ) -> pa.Table:
        """Return rows of a table, or of some of its files; partition columns are among the columns.

        Raises:
            FileNotFoundError: A file has been deleted since, as superseded files are.
            StorageError: The store does not answer.
        """
        import pyarrow.dataset as pads  # with it comes pandas: not before it is needed

        fragments = self.fragments(table, files)
        found = pads.FileSystemDataset(
            fragments, self.schema(table), pads.ParquetFileFormat(), self.filesystem()
        )
        return self.store.ask(
            lambda: found.to_table(columns=list(columns) if columns else None, filter=where)
        )

    def ledger(self, columns: Sequence[str] = LEDGER) -> pa.Table:
        """Return chosen columns of `scans`."""
        return self.read(SCANS, columns)

    def filesystem(self) -> pafs.FileSystem:
        """Return the store as pyarrow sees it."""
        import pyarrow.fs as pafs

        if self.store.is_local:
            return pafs.LocalFileSystem()
        return pafs.PyFileSystem(pafs.FSSpecHandler(self.store.fs))

    def _fragment(
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


class Dataset:
    """The two tables below one output folder.

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

    def find(self, version: int | None = None) -> Snapshot | None:
        """Return the newest commit, or the one that made `version` of `features`; None if there is none.

        Raises:
            StorageError: The store does not answer.
            FeatrayError: The tables are more than one commit apart, which no run leaves behind.
        """
        self.store.fs.invalidate_cache()  # a listing from before would hide what other processes have written
        for _ in range(_LOOKS):
            features = TableLog.open(self.store, FEATURES, version)
            scans = TableLog.open(self.store, SCANS)
            if features is None or scans is None:
                return None
            if version is not None and scans.number > features.number:
                scans = self._earlier(scans, features.number)
            found = scans and paired(self.store, features, scans)
            if found:
                return found
        if version is not None:
            return None
        raise FeatrayError(
            f"{self.store!r}: `features` and `scans` are more than one commit apart; was one of the folders "
            "copied, restored or changed by another program? Bring back both from one moment."
        )

    def snapshot(self, version: int | None = None) -> Snapshot:
        """Return what `find` finds.

        Raises:
            ConfigError: There is no output here, or no such version any more.
            StorageError: The store does not answer.
        """
        found = self.find(version)
        if found is not None:
            return found
        if version is not None and (newest := self.find()) is not None:
            raise ConfigError(
                f"{self.store!r} has no version {version} (any more); the newest is {newest.version}, and "
                f"superseded versions are kept for {newest.keep_days:g} days (output.keep_versions_days)"
            )
        raise ConfigError(f"{self.store!r} holds no features and scans tables; is this a featray output?")

    def read(
        self, table: str, columns: Sequence[str] | None = None, where: pads.Expression | None = None
    ) -> pa.Table:
        """Return rows of a table's newest version; raises as `snapshot`."""
        return self.snapshot().read(table, columns, where)

    def ledger(self, columns: Sequence[str] = LEDGER) -> pa.Table:
        """Return chosen columns of `scans`; no rows when nothing was ever committed."""
        found = self.find()
        return SCAN_COLUMNS.empty_table().select(list(columns)) if found is None else found.ledger(columns)

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

    def _earlier(self, scans: TableLog, number: int) -> TableLog | None:
        """Return the log of `scans` at commit `number`: a few entries are no commits, so guess and go on."""
        at: TableLog | None = scans
        while at is not None and at.number > number:
            at = TableLog.open(self.store, SCANS, max(0, at.version - (at.number - number)))
        return at


def paired(store: Store, features: TableLog, scans: TableLog) -> Snapshot | None:
    """Return both tables as of one commit, or None when a run was committing while they were opened."""
    if features.number == scans.number:
        return Snapshot(store, features, scans, None)
    first, second = (features, scans) if features.number > scans.number else (scans, features)
    owed = first.owes() if first.number == second.number + 1 else None
    return None if owed is None else Snapshot(store, features, scans, owed)


def written_by(name: str) -> str | None:
    """Return the id of the run that wrote a data file of this name; None for a file that no run writes."""
    found = _DATA_FILE.search(name)
    return found["run_id"] if found else None


def can_contain_any(file: DataFile, sorted_ids: Sequence[str]) -> bool:
    """Return whether one of the ids lies between the smallest and the largest scan_id of the file."""
    position = bisect.bisect_left(sorted_ids, file.min_id)
    return position < len(sorted_ids) and sorted_ids[position] <= file.max_id


def table_schema(table: str, carried: Sequence[str], partition_by: Sequence[str]) -> pa.Schema:
    """Return the Arrow schema of a whole table, partition columns included."""
    fixed = FEATURE_COLUMNS if table == FEATURES else SCAN_COLUMNS
    further = [name for name in (*partition_by, *carried) if name not in fixed.names]
    return pa.schema([*fixed, *((name, pa.string()) for name in dict.fromkeys(further))])


def _hive(value: str | None) -> str:
    """Return a partition value as its folder's name, as Hive and every reader of it spell it."""
    return "__HIVE_DEFAULT_PARTITION__" if value is None else quote(value, safe="")
