"""The Delta log of one table: read the files of a version, and append commits.

No other module imports deltalake. Commits of an output are numbered. Commit n is one log entry in each of the
two tables. Both entries have the application transaction (`featray`, n). The log guarantees for each commit:

- Atomic: Delta creates the file of a log entry only if no file of that name exists. Readers of the log see
  all of an entry or nothing of it.
- Once: Delta rejects an entry with transaction number n if an entry with this number was added after the
  writer opened the table. So an append can be repeated when the store's answer was lost. If two drivers try
  to append commit n, one of them gets `OutputBusyError`.
- Complete: the two entries of a commit are written one after the other. The entry that is written first
  records under `owes` the files that the second entry will add and remove (`PendingCommit`). If the driver is
  killed between the two entries, readers take the missing half from this record, and the next run appends it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.transaction import AddAction, RemoveAction, Transaction

from featray.errors import DeletedOutputError, OutputBusyError, StorageError
from featray.output.file_change import FileChange, PendingCommit
from featray.schema import DataFile
from featray.storage.store import Store

APP = "featray"
"""Application id of every transaction; the transaction's version is the commit number."""
MIN_LOG_ENTRIES = 200
"""Number of newest log entries that `trim` never deletes. A driver that was suspended can thus still detect,
after it resumes, that another driver has committed."""
LOG = "_delta_log"
"""Folder of the log, relative to the table's folder."""

T = TypeVar("T")

_RETENTION_PROPERTY = "delta.deletedFileRetentionDuration"
_CONFIGURATION = {
    "delta.dataSkippingStatsColumns": "scan_id",
    "delta.enableExpiredLogCleanup": "false",  # `trim` cleans up, by number of entries as well as by age
    _RETENTION_PROPERTY: "interval 0 seconds",
}
_ENTRY_NAME = re.compile(rf"{LOG}/(\d{{20}})(\.json|\.checkpoint\.parquet)$")
_TEMPORARY_NAME = re.compile(r"/_commit_[^/]*\.tmp$|#\d+$")
_MAX_ENTRIES_SEARCHED = 10
"""Number of newest entries that are searched for a commit. Only the few entries that change columns or table
properties are between two commits."""
_DAY_S = 24 * 3600
_UNIT_S = {"day": _DAY_S, "hour": 3600, "minute": 60, "second": 1}
_STORE_ERROR = "Error interacting with object store"
"""Text of errors of deltalake that a store caused."""
_SYSTEM_ERROR = re.compile(r"\(os error (\d{1,3})\)")
_BUSY = (
    "another run has changed this output since this run planned its work; nothing of this batch was "
    "committed. Run the command again when the other run has ended."
)


class TableLog:
    """The log of one table, at the version at which it was opened or that it appended last.

    Args:
        store: The output folder.
        table: Name of the table, which is also the name of its folder.
        handle: The open Delta table.
    """

    def __init__(self, store: Store, table: str, handle: DeltaTable) -> None:
        self._store, self.table, self._handle = store, table, handle

    @classmethod
    def open(cls, store: Store, table: str, version: int | None = None) -> TableLog | None:
        """Return the log at a version (default: the newest); None if the table or the version does not exist.

        Raises:
            StorageError: The store does not answer.
        """
        uri, options = store.delta_uri(table), store.delta_options(with_retries=True)
        try:
            handle = _run_operation(store, lambda: DeltaTable(uri, version=version, storage_options=options))
            return cls(store, table, handle)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            if version is not None:
                return None  # the version was trimmed or has never existed
            raise StorageError(f"the log of {table} cannot be read ({type(error).__name__})") from None

    @classmethod
    def create(cls, store: Store, table: str, schema: pa.Schema, partition_by: Sequence[str]) -> TableLog:
        """Create an empty table, or open it if it already exists.

        It may exist because another run created it, or because an earlier attempt succeeded and only the
        store's answer was lost.

        Raises:
            StorageError: The store does not answer.
        """

        def create_table() -> DeltaTable:
            return DeltaTable.create(
                store.delta_uri(table),
                Schema.from_arrow(schema),
                partition_by=list(partition_by),
                mode="error",
                storage_options=store.delta_options(with_retries=True),
                configuration=_CONFIGURATION,
            )

        try:
            return cls(store, table, _run_operation(store, create_table))
        except DeltaError as error:
            existing = cls.open(store, table)
            if existing is None:
                raise StorageError(f"{table} cannot be created ({type(error).__name__})") from None
            return existing

    @property
    def version(self) -> int:
        """Version of the table."""
        return int(self._handle.version())

    @property
    def commit_number(self) -> int:
        """Number of the last commit; 0 before the first."""
        return self._handle.transaction_version(APP) or 0

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the whole table, including the partition columns."""
        return pa.schema(self._handle.schema().to_arrow())

    @property
    def partition_by(self) -> list[str]:
        """Names of the partition columns."""
        return list(self._handle.metadata().partition_columns)

    @property
    def retention_days(self) -> float:
        """Days for which superseded files are kept (`output.keep_versions_days`)."""
        text = self._handle.metadata().configuration.get(_RETENTION_PROPERTY, "interval 0 seconds")
        _, count, unit = text.split()
        return int(count) * _UNIT_S[unit.rstrip("s")] / _DAY_S

    def files(self) -> list[DataFile]:
        """Return the files that hold the table's rows."""
        actions = pa.table(self._handle.get_add_actions(flatten=True)).to_pylist()
        return [_make_data_file(row) for row in actions]

    def read_pending_commit(self) -> PendingCommit | None:
        """Return the other table's half of the last commit; None if this table's half was written second."""
        owes = (self._read_entry(self.commit_number) or {}).get("owes")
        return PendingCommit.from_json(owes) if owes else None

    def append(
        self, change: FileChange, number: int, run_id: str, *, pending: PendingCommit | None = None
    ) -> None:
        """Append this table's half of commit `number`, directly after the version of this log.

        If the store's answer is lost, the log is read to find out whether the entry was written. If it was
        not, it is written again. Only `featray.stages.commit` calls this.

        Args:
            change: Files to add and to remove.
            number: Number of the commit.
            run_id: The run that commits.
            pending: The other table's half if that is still to be written; None if this is the second half.

        Raises:
            OutputBusyError: Another driver has appended an entry in the meantime; nothing was appended here.
            DeletedOutputError: The log was deleted in the meantime.
            StorageError: The store does not answer. Whether the entry was written may be unknown.
        """
        before = self.version
        if not self._has_entry():
            # Delta would still append, after an entry that was trimmed, or to a log that was deleted.
            if self.is_deleted():
                raise DeletedOutputError(
                    f"the log of {self.table} was deleted; nothing of this batch was committed"
                )
            raise OutputBusyError(_BUSY)
        entry = {"number": number, "run_id": run_id} | ({"owes": pending.to_json()} if pending else {})
        actions = _make_actions(change)
        try:
            # This may be repeated: the log accepts an entry with this number only once.
            _run_operation(self._store, lambda: self._write_entry(actions, entry))
        except (DeltaError, OSError) as error:
            raise StorageError(f"the commit to {self.table} failed ({_describe_error(error)})") from None
        self._reload()
        if self.version != before + 1 or self.commit_number != number:
            raise OutputBusyError(_BUSY)

    def is_deleted(self) -> bool:
        """Return whether the newest entry of this log is gone although no newer one has followed it."""
        return not self._has_entry() and max(self._list_entry_versions(), default=-1) < self.version

    def add_columns(self, columns: pa.Schema) -> None:
        """Add the columns that the table lacks.

        Raises:
            StorageError: The store does not answer.
        """

        def list_missing() -> list[Field]:
            known = set(self.schema.names)
            missing = [column for column in columns if column.name not in known]
            return list(Schema.from_arrow(pa.schema(missing)).fields)

        self._alter_table(lambda: not list_missing(), lambda: self._handle.alter.add_columns(list_missing()))

    def set_retention_days(self, days: float) -> None:
        """Store in the table how long superseded files are kept, unless it already says so.

        Raises:
            StorageError: The store does not answer.
        """
        seconds = round(days * _DAY_S)
        properties = {_RETENTION_PROPERTY: f"interval {seconds} seconds"}
        self._alter_table(
            lambda: seconds == round(self.retention_days * _DAY_S),
            lambda: self._handle.alter.set_table_properties(properties),
        )

    def list_superseded(self) -> set[str]:
        """Return the paths of files that older, still retained versions need.

        These are the files that entries younger than `retention_days` removed.
        """
        cutoff_ms = self._retention_cutoff_ms()
        return {
            unquote(action["remove"]["path"])
            for version in self._list_entry_versions()
            for action in self._read_actions(version)
            if "remove" in action and action["remove"]["deletionTimestamp"] >= cutoff_ms
        }

    def trim(self) -> list[str]:
        """Delete log entries that no retained version needs; return their names.

        Entries are deleted if they are older than a checkpoint that is itself older than `retention_days` and
        is followed by at least `MIN_LOG_ENTRIES` entries.
        """
        names = self._store.list_files(f"{self.table}/{LOG}")
        entries = [(match[1], match[2], name) for name in names if (match := _ENTRY_NAME.search(name))]
        cutoff_ms = self._retention_cutoff_ms()
        checkpoints = sorted(int(version) for version, suffix, _ in entries if suffix != ".json")
        expired = [
            version
            for version in checkpoints
            if version <= self.version - MIN_LOG_ENTRIES and self._read_timestamp_ms(version) <= cutoff_ms
        ]
        deleted = [name for version, _, name in entries if expired and int(version) < expired[-1]]
        self._store.delete(deleted)
        return deleted

    def _has_entry(self) -> bool:
        """Return whether the store has the entry of this log's version."""
        return self._store.get_size(_entry_name(self.table, self.version)) is not None

    def _retention_cutoff_ms(self) -> float:
        """Return the time before which entries are no longer retained, in milliseconds since the epoch."""
        return (time.time() - self.retention_days * _DAY_S) * 1000

    def _reload(self) -> None:
        """Read the entries that were appended since; retried, because it only reads."""
        _run_operation(self._store, self._handle.update_incremental)

    def _write_entry(self, actions: list[AddAction | RemoveAction], entry: dict[str, Any]) -> None:
        """Write one log entry. Return normally even if it was written but the store's answer was lost."""
        try:
            self._handle.create_write_transaction(
                actions,
                mode="append",
                schema=self._handle.schema(),
                partition_by=self.partition_by,
                commit_properties=CommitProperties(
                    custom_metadata={APP: entry}, app_transactions=[Transaction(APP, entry["number"])]
                ),
            )
            return
        except (CommitFailedError, DeltaError, OSError) as error:
            failure = error
        if not self._is_entry_written(entry["number"], entry["run_id"], failure):
            raise failure

    def _alter_table(self, is_done: Callable[[], bool], change: Callable[[], None]) -> None:
        """Change columns or properties of the table, unless `is_done` returns true.

        If the change fails, the log is read, because the change may have been made and only the answer lost.
        """
        if is_done():
            return

        def change_once() -> None:
            try:
                change()
            except (DeltaError, OSError):
                self._handle.update_incremental()
                if not is_done():
                    raise

        try:
            _run_operation(self._store, change_once)
        except (DeltaError, OSError) as error:
            raise StorageError(f"{self.table} cannot be changed ({type(error).__name__})") from None
        self._reload()

    def _is_entry_written(self, number: int, run_id: str, error: Exception) -> bool:
        """Return whether commit `number` of this run is in the log although writing it raised `error`.

        Raises:
            OutputBusyError: Another run's entry is there instead.
        """
        newest = TableLog.open(self._store, self.table)
        entry = newest._read_entry(number) if newest else None
        if entry is not None and entry.get("run_id") == run_id:
            return True
        if isinstance(error, CommitFailedError) or (newest is not None and newest.commit_number >= number):
            raise OutputBusyError(_BUSY)
        return False

    def _read_entry(self, number: int) -> dict[str, Any] | None:
        """Return the record under `featray` in the log entry of a commit; None if the commit is too old."""
        for version in range(self.version, max(-1, self.version - _MAX_ENTRIES_SEARCHED), -1):
            for action in self._read_actions(version):
                entry: dict[str, Any] = action.get("commitInfo", {}).get(APP) or {}
                if entry.get("number") == number:
                    return entry
        return None

    def _list_entry_versions(self) -> list[int]:
        names = self._store.list_files(f"{self.table}/{LOG}")
        matches = (_ENTRY_NAME.search(name) for name in names)
        return sorted(int(match[1]) for match in matches if match and match[2] == ".json")

    def _read_actions(self, version: int) -> list[dict[str, Any]]:
        lines = self._store.read(_entry_name(self.table, version)).splitlines()
        return [json.loads(line) for line in lines if line]

    def _read_timestamp_ms(self, version: int) -> float:
        """Return when an entry was written; infinity if it does not say, so that it never counts as old."""
        infos = (action.get("commitInfo") for action in self._read_actions(version))
        return next((float(info["timestamp"]) for info in infos if info), float("inf"))


def is_temporary_log_file(name: str) -> bool:
    """Return whether a file is a temporary file that a killed writer left in the folder of a log."""
    return f"/{LOG}/" in name and bool(_TEMPORARY_NAME.search(name))


def _run_operation(store: Store, operation: Callable[[], T]) -> T:
    """Run an operation of deltalake on a store, retrying transient errors, and return its result.

    deltalake raises OSError for most errors of a store, but not if the answer to a listing is cut.
    """

    def run_once() -> T:
        try:
            return operation()
        except DeltaError as error:
            if _STORE_ERROR in str(error):
                raise OSError(str(error)) from None
            raise

    return store.run_operation(run_once)


def _describe_error(error: Exception) -> str:
    """Return the class of an error of deltalake, and the cause if its text names an error of the system."""
    match = _SYSTEM_ERROR.search(str(error))
    return f"{os.strerror(int(match[1]))}" if match else type(error).__name__


def _entry_name(table: str, version: int) -> str:
    return f"{table}/{LOG}/{version:020}.json"


def _make_data_file(row: dict[str, Any]) -> DataFile:
    """Return the data file of one row of deltalake's flattened add actions."""
    prefix = "partition."
    return DataFile(
        path=unquote(row["path"]),  # the log URL-encodes the path once more
        size=row["size_bytes"],
        rows=row["num_records"],
        min_id=row["min.scan_id"],
        max_id=row["max.scan_id"],
        partition_values={key[len(prefix) :]: value for key, value in row.items() if key.startswith(prefix)},
    )


def _make_actions(change: FileChange) -> list[AddAction | RemoveAction]:
    now_ms = int(time.time() * 1000)
    adds = [_make_add_action(file, now_ms, data_change=change.data_change) for file in change.add]
    removes = [
        RemoveAction(file.path, change.data_change, now_ms, file.size, file.partition_values)
        for file in change.remove
    ]
    return [*adds, *removes]


def _make_add_action(file: DataFile, now_ms: int, *, data_change: bool) -> AddAction:
    stats = {
        "numRecords": file.rows,
        "nullCount": {"scan_id": 0},
        "minValues": {"scan_id": file.min_id},
        "maxValues": {"scan_id": file.max_id},
    }
    return AddAction(
        path=file.path,
        size=file.size,
        partition_values=file.partition_values,
        modification_time=now_ms,
        data_change=data_change,
        stats=json.dumps(stats),
    )
