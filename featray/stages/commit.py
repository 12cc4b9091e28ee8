"""The one committer: receipts in, one visible step of both tables out. Runs on the driver only.

Commit n, in this order, so that a kill at any point loses and doubles nothing:

1. new rows of `scans`, and files that lose or move rows, are written to files that nobody references yet;
2. one table gets entry n of its log, which adds and removes files of all layers at once and names what the
   other table's entry n will hold;
3. the other table gets its entry n;
4. what was superseded is deleted, unless versions are kept.

Where rows are added, `features` goes first; where some only go, `scans` does: so at no moment does
`scans` promise rows that are not there. A kill between 2 and 3 is mended at the next start (`recover`);
until then `Dataset.snapshot` shows the commit whole.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.errors import ConfigError, FeatrayError
from featray.output.dataset import (
    FEATURES,
    SCANS,
    Dataset,
    Snapshot,
    can_contain_any,
    paired,
    table_schema,
)
from featray.output.delta_log import Owed, TableLog
from featray.output.orphans import find_orphans, list_output_files
from featray.schema import DataFile, Receipt, ScanRecord

log = logging.getLogger(__name__)

_In = TypeVar("_In")
_Out = TypeVar("_Out")

LEDGER_ROWS = 32_768
"""Rows up to which files of `scans` are merged; a changed scan rewrites the file that it is in."""
FILE_BYTES = 64 * 2**20
"""Size that files of `features` are compacted to; those above half of it are left as they are."""
MERGED_BYTES = 256 * 2**20
"""Values that are merged into one file at most, uncompressed: they are in memory meanwhile."""
COMPACT_AT = 32
"""Small files of one partition that make compaction worth its while after a run."""
_FORGET_AT_ONCE = 20_000
_TRIM_EVERY = 100
_THREADS = 4
"""Files that are read at once, and so are in memory."""
_OTHER = {FEATURES: SCANS, SCANS: FEATURES}


@dataclass(frozen=True)
class _Change:
    """Files that one table gains and loses."""

    add: tuple[DataFile, ...] = ()
    remove: tuple[DataFile, ...] = ()


class Committer:
    """Commits to one output, on the table versions it opened, finishing first what a killed run began.

    A second driver that commits in between makes the next commit here fail: every commit carries
    the next number of the same application id, which a log accepts only once.

    Args:
        dataset: The output.
        partition_by: Partition columns of `features`, `layer` first.
        carried: Further columns of `scans` (manifest columns, asked-for DICOM tags).
        run_id: The run that commits.
        keep_versions_days: As configured; None leaves it as it is.
        still_ours: Raises OutputBusyError when the output's lease has been lost.

    Raises:
        ConfigError: The output is partitioned otherwise.
    """

    def __init__(
        self,
        dataset: Dataset,
        partition_by: Sequence[str],
        carried: Sequence[str] = (),
        *,
        run_id: str,
        keep_versions_days: float | None = None,
        still_ours: Callable[[], None] = lambda: None,
    ) -> None:
        self.dataset, self._run_id, self._still_ours = dataset, run_id, still_ours
        store = dataset.store
        features = TableLog.open(store, FEATURES)
        _refuse_other_partitions(features, partition_by)
        self._logs = {
            FEATURES: features or _created(dataset, FEATURES, (), partition_by),
            SCANS: TableLog.open(store, SCANS) or _created(dataset, SCANS, carried, ()),
        }
        self.recovered = self._recover()
        self._logs[SCANS].add_columns(carried)
        if keep_versions_days is not None:
            for table_log in self._logs.values():
                table_log.set_keep_days(keep_versions_days)

    def snapshot(self) -> Snapshot:
        """Return both tables as of the last commit, which is what the next one is planned on."""
        return Snapshot(self.dataset.store, self._logs[FEATURES], self._logs[SCANS], None)

    def commit(self, receipts: Sequence[Receipt]) -> None:
        """Make the receipts' features and scan rows visible, in place of older rows of the same scans.

        Raises:
            OutputBusyError: Another driver committed since this one opened the tables.
            FileNotFoundError: A worker's file is missing or has another size; nothing was committed.
            StorageError: The store does not answer.
        """
        files = [file for receipt in receipts for file in receipt.files]
        records = [record for receipt in receipts for record in receipt.records]
        self._verify(files)
        failed = [record for record in records if record.status != "ok" and self._has_features(record)]
        if failed:  # their features go, and the ledger must say so first
            ids = {record.scan_id for record in failed}
            ledger = self._ledger(failed, ids)
            self._apply({FEATURES: self._without(FEATURES, ids), SCANS: ledger}, first=SCANS)
            self._remember(failed)
        others = [record for record in records if record not in failed] if failed else records
        if others:
            replaced = {record.scan_id for record in others if self._has_features(record)}
            stored = {record.scan_id for record in others if record.scan_id in self._stored}
            features = self._without(FEATURES, replaced)
            change = _Change((*files, *features.add), features.remove)
            self._apply({FEATURES: change, SCANS: self._ledger(others, stored)}, first=FEATURES)
            self._remember(others)

    def forget(self, scan_ids: Collection[str], broken: Mapping[str, Collection[str]] | None = None) -> None:
        """Take scans out of both tables.

        Args:
            scan_ids: Ids, known or not.
            broken: By table, paths of files that cannot be read and leave it whole.
        """
        ordered, bad = sorted(scan_ids), dict(broken or {})
        for first in range(0, max(1, len(ordered)), _FORGET_AT_ONCE):
            ids = set(ordered[first : first + _FORGET_AT_ONCE])
            changes = {table: self._without(table, ids, bad.get(table, ())) for table in self._logs}
            if any(change.remove for change in changes.values()):
                self._apply(changes, first=SCANS)
            bad = {}
        self.__dict__.pop("_stored", None)

    def sweep(self) -> list[str]:
        """Delete data files of ended runs that no version refers to; return their names.

        Only the holder of the output's lease may call this, and not while its own workers write: a file
        of a run in flight looks the same. Files that no run has written are left alone.
        """
        self._still_ours()
        store = self.dataset.store
        by_folder = find_orphans(list_output_files(store), self.snapshot())
        orphans = [name for names in by_folder.values() for name in names]
        store.delete(orphans)
        return orphans

    def compact(self, at_least: int = COMPACT_AT) -> int:
        """Merge small files of `features` where a partition has many; return how many fewer there are."""
        groups: dict[tuple[tuple[str, str | None], ...], list[DataFile]] = defaultdict(list)
        for file in self._logs[FEATURES].files():
            if file.size < FILE_BYTES // 2:
                groups[tuple(file.partition_values.items())].append(file)
        fewer = 0
        for partition, small in groups.items():
            if len(small) < at_least:
                continue
            merged = tuple(self._merged(dict(partition), sorted(small, key=lambda file: file.min_id)))
            if len(merged) < len(small):
                change = _Change(merged, tuple(small))
                self._apply({FEATURES: change, SCANS: _Change()}, first=FEATURES, data_change=False)
                fewer += len(small) - len(merged)
        return fewer

    def trim(self) -> int:
        """Delete log entries that no readable version needs; return how many."""
        return sum(len(table_log.trim()) for table_log in self._logs.values())

    @functools.cached_property
    def _stored(self) -> dict[str, bool]:
        """Ids that the ledger holds, and whether they have features."""
        rows = self.snapshot().ledger(("scan_id", "status"))
        has_features = pc.equal(rows["status"], "ok").to_pylist()
        return dict(zip(rows["scan_id"].to_pylist(), has_features, strict=True))

    def _has_features(self, record: ScanRecord) -> bool:
        return self._stored.get(record.scan_id, False)

    def _remember(self, records: Iterable[ScanRecord]) -> None:
        self._stored.update((record.scan_id, record.status == "ok") for record in records)

    def _recover(self) -> bool:
        """Write the second half of a commit that a kill cut; return whether there was one."""
        found = paired(self.dataset.store, self._logs[FEATURES], self._logs[SCANS])
        if found is None:
            raise FeatrayError(
                "`features` and `scans` are more than one commit apart; was one of the folders copied, "
                "restored or changed by another program? Bring back both from one moment."
            )
        if found.owed is None:
            return False
        owed, number = found.owed, self._logs[_OTHER[found.owed.table]].number
        self._logs[owed.table].append(
            owed.add, owed.remove, number, self._run_id, data_change=owed.data_change
        )
        log.info("finished a commit that an earlier run was killed in")
        return True

    def _verify(self, files: Iterable[DataFile]) -> None:
        # The log would accept a missing file, and every reader would fail from then on.
        def size(file: DataFile) -> tuple[DataFile, int | None]:
            return file, self.dataset.store.size(f"{FEATURES}/{file.path}")

        for file, found in _in_threads(size, files):
            if found != file.size:
                raise FileNotFoundError(
                    f"{file.path}: expected {file.size} bytes, found {found}; nothing was committed. "
                    "Do all workers see the same output folder?"
                )

    def _apply(self, changes: Mapping[str, _Change], *, first: str, data_change: bool = True) -> None:
        """Write entry n of both logs, then delete what it superseded."""
        self._still_ours()
        second, number = _OTHER[first], self._logs[first].number + 1
        owed = Owed(second, changes[second].add, changes[second].remove, data_change)
        for table, owes in ((first, owed), (second, None)):
            self._logs[table].append(
                changes[table].add,
                changes[table].remove,
                number,
                self._run_id,
                owes=owes,
                data_change=data_change,
            )
        if not self._logs[FEATURES].keep_days:
            self._delete(changes)
        if number % _TRIM_EVERY == 0:
            self.trim()

    def _delete(self, changes: Mapping[str, _Change]) -> None:
        """Delete superseded files; what a kill leaves of them is an orphan for the next `sweep`."""
        self.dataset.store.delete(
            [f"{table}/{file.path}" for table, change in changes.items() for file in change.remove]
        )

    def _ledger(self, records: Sequence[ScanRecord], replaced: Collection[str]) -> _Change:
        """Return the change of `scans`: fresh rows, merged with files that are no larger than they are.

        So there are few files after any number of commits, and a row moves about log2(commits) times.
        """
        without = self._without(SCANS, replaced)
        schema = self._logs[SCANS].schema
        tables = [pa.Table.from_pylist([record.to_row() for record in records], schema=schema)]
        gone, merged, rows = {file.path for file in without.remove}, [], len(records)
        left = [file for file in self._logs[SCANS].files() if file.path not in gone]
        for file in sorted(left, key=lambda file: file.rows):
            if file.rows > rows or rows + file.rows > LEDGER_ROWS:
                break
            tables.append(self._read(SCANS, file))
            merged.append(file)
            rows += file.rows
        fresh = pa.concat_tables(tables, promote_options="default").select(schema.names).sort_by("scan_id")
        written = self.dataset.put(SCANS, {}, fresh, self._run_id)
        return _Change((written, *without.add), (*without.remove, *merged))

    def _without(self, table: str, scan_ids: Collection[str], broken: Collection[str] = ()) -> _Change:
        """Return the change that takes scans, and whole broken files, out of a table."""
        if not scan_ids and not broken:
            return _Change()
        wanted, ordered = pa.array(list(scan_ids), pa.string()), sorted(scan_ids)
        files = self._logs[table].files()
        gone = [file for file in files if file.path in broken]
        maybe = [file for file in files if file.path not in broken and can_contain_any(file, ordered)]
        rewritten = [
            pair for pair in _in_threads(lambda file: self._rewritten(table, file, wanted), maybe) if pair
        ]
        add = tuple(new for _, new in rewritten if new)
        return _Change(add, (*gone, *(old for old, _ in rewritten)))

    def _rewritten(
        self, table: str, file: DataFile, scan_ids: pa.Array
    ) -> tuple[DataFile, DataFile | None] | None:
        """Put a file's rows of other scans; return both files, or None where it holds none of these scans."""
        stored = self._opened(table, file)
        kept = pc.invert(pc.is_in(stored.read(["scan_id"])["scan_id"], scan_ids))
        if pc.all(kept).as_py():
            return None
        rows = stored.read().filter(kept)
        return file, self.dataset.put(table, file.partition_values, rows, self._run_id) if len(rows) else None

    def _merged(self, partition: Mapping[str, str | None], files: Sequence[DataFile]) -> Iterator[DataFile]:
        """Put the rows of many files into few; yield those."""
        tables: list[pa.Table] = []
        size = unpacked = 0
        for file, rows in _in_threads(lambda file: (file, self._read(FEATURES, file)), files):
            is_full = size + file.size > FILE_BYTES or unpacked + rows.nbytes > MERGED_BYTES
            if tables and is_full:
                yield self._put_sorted(partition, tables)
                tables, size, unpacked = [], 0, 0
            tables.append(rows)
            size += file.size
            unpacked += rows.nbytes
        yield self._put_sorted(partition, tables)

    def _put_sorted(self, partition: Mapping[str, str | None], tables: list[pa.Table]) -> DataFile:
        rows = pa.concat_tables(tables).sort_by([("scan_id", "ascending"), ("patch", "ascending")])
        return self.dataset.put(FEATURES, partition, rows, self._run_id)

    def _read(self, table: str, file: DataFile) -> pa.Table:
        return self._opened(table, file).read()

    def _opened(self, table: str, file: DataFile) -> pq.ParquetFile:
        """Fetch a file whole: of those that are rewritten all is needed, and they are of bounded size."""
        try:
            return pq.ParquetFile(pa.BufferReader(self.dataset.store.read(f"{table}/{file.path}")))
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise FeatrayError(
                f"{table}/{file.path} is damaged ({type(error).__name__}); nothing was committed. `featray "
                "verify` says what is wrong with the output, and how to mend it."
            ) from None


def _in_threads(work: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Yield what `work` returns, in order, a few at a time: object stores answer in parallel."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting = iter(items)
        while some := list(itertools.islice(waiting, _THREADS)):
            yield from pool.map(work, some)


def _created(dataset: Dataset, table: str, carried: Sequence[str], partition_by: Sequence[str]) -> TableLog:
    return TableLog.create(dataset.store, table, table_schema(table, carried, partition_by), partition_by)


def _refuse_other_partitions(features: TableLog | None, partition_by: Sequence[str]) -> None:
    there = features.partition_by if features else list(partition_by)
    if there != list(partition_by):
        raise ConfigError(
            f"output.partition_by: the output is partitioned by {there}, not by {list(partition_by)}; "
            "choose another output.uri or the same columns"
        )
