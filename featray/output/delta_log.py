"""One table's Delta log: what a version holds, and the one way to append to it. Alone imports deltalake.

An output's two tables move in lockstep: commit n is one entry in each log, under application id `featray`
and number n, which a log accepts only once. The entry that is written first names what it owes the other.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Field, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, RemoveAction, Transaction

from featray.errors import OutputBusyError, StorageError
from featray.schema import DataFile
from featray.storage.store import Store

APP = "featray"
"""Application id of every transaction; its version is the commit's number."""
KEPT_ENTRIES = 200
"""Log entries that always stay, so that a driver that was asleep is refused rather than not noticed."""
LOG = "_delta_log"

_KEEP = "delta.deletedFileRetentionDuration"
_CONFIGURATION = {
    "delta.dataSkippingStatsColumns": "scan_id",
    "delta.enableExpiredLogCleanup": "false",  # `trim` does that, by count as well as by age
    _KEEP: "interval 0 seconds",
}
_ENTRY = re.compile(rf"{LOG}/(\d{{20}})(\.json|\.checkpoint\.parquet)$")
_SEEN = 10
"""Entries to look through for a commit; only changes of columns and properties come between two."""
_DAY_S = 24 * 3600


@dataclass(frozen=True)
class Owed:
    """What a commit still owes the table that it writes second.

    Attributes:
        table: Name of that table.
        add: Files to add.
        remove: Files to take out.
        data_change: Whether rows change, or only move to other files.
    """

    table: str
    add: tuple[DataFile, ...]
    remove: tuple[DataFile, ...]
    data_change: bool = True


class TableLog:
    """The log of one table at the version it was opened at, or has appended since.

    Args:
        store: The output folder.
        table: Name of the table, which is its folder.
        handle: As opened.
    """

    def __init__(self, store: Store, table: str, handle: DeltaTable) -> None:
        self._store, self.table, self._handle = store, table, handle

    @classmethod
    def open(cls, store: Store, table: str, version: int | None = None) -> TableLog | None:
        """Return the log at a version (the newest by default), None when there is none.

        Raises:
            StorageError: The store does not answer.
        """
        place, options = store.delta_uri(table), store.delta_options(patient=True)
        try:
            handle = store.ask(lambda: DeltaTable(place, version=version, storage_options=options))
            return cls(store, table, handle)
        except TableNotFoundError:
            return None
        except (DeltaError, OSError) as error:
            if version is not None:
                return None  # trimmed, or never there
            raise StorageError(f"the log of {table} cannot be read ({type(error).__name__})") from None

    @classmethod
    def create(cls, store: Store, table: str, schema: pa.Schema, partition_by: Sequence[str]) -> TableLog:
        """Make an empty table, or open the one that another run, or an attempt whose answer was lost, made.

        Raises:
            StorageError: The store does not answer.
        """

        def make() -> DeltaTable:
            return DeltaTable.create(
                store.delta_uri(table),
                Schema.from_arrow(schema),
                partition_by=list(partition_by),
                mode="error",
                storage_options=store.delta_options(patient=True),
                configuration=_CONFIGURATION,
            )

        try:
            return cls(store, table, store.ask(make))
        except DeltaError as error:
            there = cls.open(store, table)
            if there is None:
                raise StorageError(f"{table} cannot be made ({type(error).__name__})") from None
            return there

    @property
    def version(self) -> int:
        """Version of the table."""
        return int(self._handle.version())

    @property
    def number(self) -> int:
        """Number of the last commit; 0 before the first."""
        return self._handle.transaction_version(APP) or 0

    @property
    def schema(self) -> pa.Schema:
        """Arrow schema of the whole table, partition columns included."""
        return pa.schema(self._handle.schema().to_arrow())

    @property
    def partition_by(self) -> list[str]:
        """Partition columns."""
        return list(self._handle.metadata().partition_columns)

    @property
    def keep_days(self) -> float:
        """Days that superseded files are kept (`output.keep_versions_days`)."""
        text = self._handle.metadata().configuration.get(_KEEP, "interval 0 seconds")
        _, count, unit = text.split()
        return (
            int(count) * {"day": _DAY_S, "hour": 3600, "minute": 60, "second": 1}[unit.rstrip("s")] / _DAY_S
        )

    def files(self) -> list[DataFile]:
        """Return the files that hold the table's rows."""
        actions = pa.table(self._handle.get_add_actions(flatten=True)).to_pylist()
        return [_live_file(row) for row in actions]

    def owes(self) -> Owed | None:
        """Return what the last commit said that it owes the other table; None if it was the second half."""
        entry = self._entry(self.number)
        owed = (entry or {}).get("owes")
        if not owed:
            return None
        add = tuple(DataFile(**file) for file in owed["add"])
        remove = tuple(DataFile(**file) for file in owed["remove"])
        return Owed(owed["table"], add, remove, owed["data_change"])

    def append(
        self,
        add: Sequence[DataFile],
        remove: Sequence[DataFile],
        number: int,
        run_id: str,
        *,
        owes: Owed | None = None,
        data_change: bool = True,
    ) -> None:
        """Append commit `number`, on exactly the version this log was read at. Only the committer calls it.

        Where an answer was lost the log is asked: the entry is in it, or is written again.

        Raises:
            OutputBusyError: Somebody else has appended since; nothing of this was.
            StorageError: The store does not answer; nothing was appended.
        """
        before = self.version
        if (
            self._store.size(_json(self.table, before)) is None
        ):  # trimmed: far behind, and a create would pass
            raise OutputBusyError(BUSY)
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [_add_action(file, now, data_change) for file in add]
        actions += [
            RemoveAction(file.path, data_change, now, file.size, file.partition_values) for file in remove
        ]
        entry = {"number": number, "run_id": run_id} | ({"owes": asdict(owes)} if owes else {})
        properties = CommitProperties(
            custom_metadata={APP: entry}, app_transactions=[Transaction(APP, number)]
        )

        def write() -> None:
            try:
                self._handle.create_write_transaction(
                    actions,
                    mode="append",
                    schema=self._handle.schema(),
                    partition_by=self.partition_by,
                    commit_properties=properties,
                )
                return
            except (CommitFailedError, DeltaError, OSError) as error:
                failed = error
            if not self._is_written(number, run_id, failed):
                raise failed

        try:
            self._store.ask(write)  # again is safe: of one entry and its repetition the log takes one
        except (DeltaError, OSError) as error:
            raise StorageError(f"the commit to {self.table} failed ({type(error).__name__})") from None
        self._reload()
        if self.version != before + 1 or self.number != number:
            raise OutputBusyError(BUSY)

    def add_columns(self, names: Sequence[str]) -> None:
        """Add string columns that the table lacks; raises as `create`."""

        def missing() -> list[Field]:
            known = set(self.schema.names)
            return [Field(name, PrimitiveType("string")) for name in names if name not in known]

        self._alter(lambda: not missing(), lambda: self._handle.alter.add_columns(missing()))

    def set_keep_days(self, days: float) -> None:
        """Write down for how long superseded files are kept, if it is not so yet; raises as `create`."""
        seconds = round(days * _DAY_S)
        properties = {_KEEP: f"interval {seconds} seconds"}
        self._alter(
            lambda: seconds == round(self.keep_days * _DAY_S),
            lambda: self._handle.alter.set_table_properties(properties),
        )

    def superseded(self) -> set[str]:
        """Return paths that entries younger than `keep_days` took out: what older versions are read from."""
        cutoff = (time.time() - self.keep_days * _DAY_S) * 1000
        return {
            unquote(action["remove"]["path"])
            for version in self._json_versions()
            for action in self._actions(version)
            if "remove" in action and action["remove"]["deletionTimestamp"] >= cutoff
        }

    def trim(self) -> list[str]:
        """Delete log entries that no version that can still be read needs; return their names.

        All before the newest checkpoint that is older than `keep_days` and than `KEPT_ENTRIES` entries.
        """
        names = self._store.names(f"{self.table}/{LOG}")
        found = [(match[1], match[2], name) for name in names if (match := _ENTRY.search(name))]
        cutoff = (time.time() - self.keep_days * _DAY_S) * 1000
        checkpoints = sorted(int(version) for version, kind, _ in found if kind != ".json")
        old = [
            version
            for version in checkpoints
            if version <= self.version - KEPT_ENTRIES and self._timestamp(version) <= cutoff
        ]
        gone = [name for version, _, name in found if old and int(version) < old[-1]]
        self._store.delete(gone)
        return gone

    def _reload(self) -> None:
        """Read what was appended since; only reads, so an answer that was cut short is asked for again."""
        self._store.ask(self._handle.update_incremental)

    def _alter(self, is_done: Callable[[], bool], change: Callable[[], None]) -> None:
        """Change what the table says of itself; whether it has, where an answer was lost, the log tells."""
        if is_done():
            return

        def write() -> None:
            try:
                change()
            except (DeltaError, OSError):
                self._handle.update_incremental()
                if not is_done():
                    raise

        try:
            self._store.ask(write)
        except (DeltaError, OSError) as error:
            raise StorageError(f"{self.table} cannot be changed ({type(error).__name__})") from None
        self._reload()

    def _is_written(self, number: int, run_id: str, error: Exception) -> bool:
        """Return whether the entry arrived, and only the answer did not.

        Raises:
            OutputBusyError: Somebody else's did.
        """
        there = TableLog.open(self._store, self.table)
        entry = there._entry(number) if there else None
        if entry is not None and entry.get("run_id") == run_id:
            return True
        if isinstance(error, CommitFailedError) or (there is not None and there.number >= number):
            raise OutputBusyError(BUSY)
        return False

    def _entry(self, number: int) -> dict[str, Any] | None:
        """Return what commit `number` says of itself, if it is among the newest entries."""
        for version in range(self.version, max(-1, self.version - _SEEN), -1):
            for action in self._actions(version):
                own: dict[str, Any] = action.get("commitInfo", {}).get(APP) or {}
                if own.get("number") == number:
                    return own
        return None

    def _json_versions(self) -> list[int]:
        found = (_ENTRY.search(name) for name in self._store.names(f"{self.table}/{LOG}"))
        return sorted(int(match[1]) for match in found if match and match[2] == ".json")

    def _actions(self, version: int) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in self._store.read(_json(self.table, version)).splitlines() if line
        ]

    def _timestamp(self, version: int) -> float:
        """Return when an entry was written, in milliseconds; an entry without that is as new as can be."""
        infos = (action.get("commitInfo") for action in self._actions(version))
        return next((float(info["timestamp"]) for info in infos if info), float("inf"))


def is_scratch(name: str) -> bool:
    """Whether a file in a log's folder is one that a killed writer was still about to rename."""
    return f"/{LOG}/" in name and bool(re.search(r"/_commit_[^/]*\.tmp$|#\d+$", name))


def _json(table: str, version: int) -> str:
    return f"{table}/{LOG}/{version:020}.json"


def _live_file(row: dict[str, Any]) -> DataFile:
    prefix = "partition."
    return DataFile(
        path=unquote(row["path"]),  # the log holds the path URL-encoded once more
        size=row["size_bytes"],
        rows=row["num_records"],
        min_id=row["min.scan_id"],
        max_id=row["max.scan_id"],
        partition_values={key[len(prefix) :]: value for key, value in row.items() if key.startswith(prefix)},
    )


def _add_action(file: DataFile, now: int, data_change: bool) -> AddAction:
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
        modification_time=now,
        data_change=data_change,
        stats=json.dumps(stats),
    )


BUSY = (
    "another run has changed this output since this run planned its work; nothing of this batch was "
    "committed. Start again when the other run has ended."
)
