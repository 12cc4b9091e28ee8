"""The one committer: receipts in, one visible step of both tables out. Runs on the driver only.

Commit n, in this order, so that a kill at any point loses and doubles nothing:

1. the new rows of `scans` are written to a file that nobody references yet;
2. `features` commits its new files, with n and step 1's file named in the same log entry;
3. `scans` commits that file under the same n.

A kill between 2 and 3 is mended at the next start: `features` is one commit ahead, and its log entry
says what `scans` still owes (`recover`). So the ledger never promises rows that are not there.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Field
from deltalake.exceptions import CommitFailedError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, RemoveAction, Transaction

from featray.dataset import APP, FEATURES, SCANS, Dataset
from featray.errors import ConfigError, OutputBusyError
from featray.schema import DataFile, Receipt, ScanRecord


class Committer:
    """Commits receipts to one output, on the table versions it opened.

    A second driver that commits in between makes the next commit here fail: every commit carries
    the next number of the same application id, which the log accepts only once.

    Args:
        dataset: The output.
        partition_by: Partition columns of `features`, `layer` first.
        carried: Further columns of `scans` (manifest columns, asked-for DICOM tags).

    Raises:
        ConfigError: The output is partitioned otherwise.
    """

    def __init__(self, dataset: Dataset, partition_by: Sequence[str], carried: Sequence[str] = ()) -> None:
        self.dataset = dataset
        features = dataset.open(FEATURES)
        _refuse_other_partitions(features, partition_by)
        self.features = features or dataset.create(FEATURES, partition_by=partition_by)
        self.scans = dataset.open(SCANS) or dataset.create(SCANS, carried)
        self._add_columns(carried)

    def recover(self) -> bool:
        """Finish a commit that a kill cut between the two tables; return whether there was one."""
        owed = _number(self.features) > _number(self.scans)
        if owed:
            entry = self.features.history(1)[0][APP]
            self._write(SCANS, [DataFile(**entry["add"])], entry["remove"], _number(self.features), {})
        return owed

    def commit(self, receipts: Sequence[Receipt], run_id: str) -> None:
        """Make the receipts' features and scan rows visible, replacing older rows of the same scans.

        Raises:
            OutputBusyError: Another driver committed since this one opened the tables.
            FileNotFoundError: A worker's file is missing or has another size; nothing was committed.
        """
        files = [file for receipt in receipts for file in receipt.files]
        records = [record for receipt in receipts for record in receipt.records]
        self._verify(files)
        number = max(_number(self.features), _number(self.scans)) + 1
        replaced, kept = self._superseded([record.scan_id for record in records])
        ledger_file = self._write_ledger_file(records, kept, run_id)
        if files:
            owed = {APP: {"add": asdict(ledger_file), "remove": replaced}}
            self._write(FEATURES, files, [], number, owed)
        self._write(SCANS, [ledger_file], replaced, number, {})
        self._stored.update(record.scan_id for record in records)
        self.dataset.store.delete([f"{SCANS}/{path}" for path in replaced])

    def remove_orphans(self) -> int:
        """Delete files that no live version references; return how many.

        Only the holder of the output's lease may call this: a file of a run in flight looks the same.
        """
        store = self.dataset.store
        orphans = []
        for table, handle in ((FEATURES, self.features), (SCANS, self.scans)):
            live = {f"{table}/{file.path}" for file in self.dataset.live(table, handle)}
            orphans += [name for name in store.names(table) if _is_data(name) and name not in live]
        store.delete(orphans)
        return len(orphans)

    @functools.cached_property
    def _stored(self) -> set[str]:
        """Ids that the ledger holds; first asked for after `recover`."""
        return set(self.dataset.ledger(("scan_id",))["scan_id"].to_pylist())

    def _verify(self, files: Iterable[DataFile]) -> None:
        # The log would accept a missing file, and every reader would fail from then on.
        for file in files:
            found = self.dataset.store.size(f"{FEATURES}/{file.path}")
            if found != file.size:
                raise FileNotFoundError(
                    f"{file.path}: expected {file.size} bytes, found {found}; nothing was committed. "
                    "Do all workers see the same output folder?"
                )

    def _superseded(self, scan_ids: list[str]) -> tuple[list[str], list[pa.Table]]:
        """Return the ledger files that hold one of the scans, and their rows of other scans."""
        scan_ids = [scan_id for scan_id in scan_ids if scan_id in self._stored]
        if not scan_ids:  # new scans, which is nearly all of them, need no look at earlier files
            return [], []
        wanted = pa.array(scan_ids, pa.string())
        replaced, kept = [], []
        for file in self.dataset.live(SCANS, self.scans):
            if not any(file.min_id <= scan_id <= file.max_id for scan_id in scan_ids):
                continue
            rows = self.dataset.read_file(SCANS, file)
            others = rows.filter(pc.invert(pc.is_in(rows["scan_id"], wanted)))
            if len(others) < len(rows):
                replaced.append(file.path)
                kept.append(others)
        return replaced, kept

    def _write_ledger_file(self, records: list[ScanRecord], kept: list[pa.Table], run_id: str) -> DataFile:
        schema = pa.schema(self.scans.schema().to_arrow())
        fresh = pa.Table.from_pylist([record.to_row() for record in records], schema=schema)
        rows = pa.concat_tables([fresh, *kept], promote_options="default").sort_by("scan_id")
        return self.dataset.put(SCANS, {}, rows, run_id)

    def _write(
        self, table: str, adds: list[DataFile], removes: list[str], number: int, metadata: dict[str, Any]
    ) -> None:
        handle: DeltaTable = getattr(self, table)
        now = int(time.time() * 1000)
        actions: list[AddAction | RemoveAction] = [_add_action(file, now) for file in adds]
        actions += [RemoveAction(path, True, now, partition_values={}) for path in removes]
        before = handle.version()
        try:
            handle.create_write_transaction(
                actions,
                mode="append",
                schema=handle.schema(),
                partition_by=handle.metadata().partition_columns,
                commit_properties=CommitProperties(
                    custom_metadata=metadata, app_transactions=[Transaction(APP, number)]
                ),
            )
        except CommitFailedError:
            raise OutputBusyError(_BUSY) from None
        handle.update_incremental()
        if handle.version() != before + 1:
            raise OutputBusyError(_BUSY)

    def _add_columns(self, carried: Sequence[str]) -> None:
        known = {name.name for name in self.scans.schema().fields}
        missing = [name for name in carried if name not in known]
        if missing:
            self.scans.alter.add_columns([Field(name, PrimitiveType("string")) for name in missing])
            self.scans.update_incremental()


def _refuse_other_partitions(features: DeltaTable | None, partition_by: Sequence[str]) -> None:
    there = features.metadata().partition_columns if features else list(partition_by)
    if there != list(partition_by):
        raise ConfigError(
            f"output.partition_by: the output is partitioned by {there}, not by {list(partition_by)}; "
            "choose another output.uri or the same columns"
        )


def _number(handle: DeltaTable) -> int:
    return handle.transaction_version(APP) or 0


def _is_data(name: str) -> bool:
    return "/_delta_log/" not in name


def _add_action(file: DataFile, now: int) -> AddAction:
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
        data_change=True,
        stats=json.dumps(stats),
    )


_BUSY = (
    "another run has changed this output since this run planned its work; nothing of this batch was "
    "committed. Start again when the other run has ended."
)
