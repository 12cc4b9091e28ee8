"""Commit: receipts of written files in, the next version of both tables out. Runs in the driver only.

The tables `features` and `scans` change together. Commit n consists of one entry in the log of each table.
These are its steps, in this order:

1. New rows of `scans`, and the remaining rows of files that lose some of their rows, are written to new
   files. No version of a table refers to these files yet.
2. Entry n is appended to the log of the first table. It adds and removes files of all layers in one step. It
   also records which files entry n of the second table will add and remove.
3. Entry n is appended to the log of the second table.
4. The superseded files are deleted, unless the output retains older versions (`output.keep_versions_days`).

Which table is first: `features` if the commit adds features, `scans` if it only removes features. So `scans`
never names a cell whose features were not written yet, or were removed because the scan failed. This holds
even for programs that read the log of each table by itself. Such programs may see the earlier recipe or name
of a cell in `scans` for a moment when cells are replaced or renamed.

Promises to readers of the logs:

- Atomic: readers through `Dataset` see a commit in both tables or in neither.
- Killed before step 2 has succeeded: the commit has not happened. Its files are orphans, because no version
  refers to them.
- Killed between step 2 and step 3: the commit counts as done. `Dataset.open_snapshot` takes the second half
  from the entry of the first table. The next `Committer` appends the missing entry before it does anything
  else.
- Killed in step 4: the commit is done. Superseded files that were not deleted are orphans.
- Orphans are deleted by `Committer.delete_orphans`, which every run calls at its start.
- Two drivers: if another driver has committed since this driver opened the tables or last committed, the next
  commit of this driver fails with `OutputBusyError`, and nothing of it is visible.

Programs that read all Parquet files of the folder without the log also see files that are not committed yet,
superseded files that are not deleted yet, and orphans.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from featray.errors import ConfigError, DeletedOutputError, FeatrayError, MissingFileError, StorageError
from featray.output.carry_over import carry_over_features, carry_over_scans, find_earlier_scans
from featray.output.cells import CellMap, leave_out_layers
from featray.output.dataset import (
    FEATURES,
    SCANS,
    TABLES_APART,
    Dataset,
    Snapshot,
    make_table_schema,
    pair_logs,
    parse_run_id,
    refuse_missing_table,
)
from featray.output.delta_log import LOG, TableLog
from featray.output.file_change import FileChange, PendingCommit
from featray.output.orphans import find_orphans, list_output_files
from featray.output.rewrite import TARGET_FILE_BYTES, FileRewriter, map_in_threads
from featray.output.scan_rows import ScanRows
from featray.recipe import RecipeIds
from featray.schema import DataFile, Receipt, ScanRecord
from featray.storage.store import Store

log = logging.getLogger(__name__)

MIN_FILES_TO_COMPACT = 32
"""Number of small files in one partition from which `compact` merges them."""
_MAX_SCANS_PER_DELETION = 20_000
_TRIM_INTERVAL = 100
"""Commits between two calls of `trim`."""
_OTHER_TABLE = {FEATURES: SCANS, SCANS: FEATURES}


class Committer:
    """Commits to one output. Opening it first finishes a commit in which an earlier run was killed.

    Args:
        dataset: The output; its tables are created if they do not exist.
        partition_by: Partition columns of `features`, `layer` first.
        extra_columns: Columns of `scans` in addition to the fixed ones (manifest columns, DICOM tags).
        run_id: The run that commits.
        keep_versions_days: Days for which superseded files are kept; None leaves the output's setting
            unchanged.
        check_lease: Called before each change; raises OutputBusyError if this run has lost the output's
            lease.

    Attributes:
        recovered: Whether opening it finished a commit in which an earlier run was killed.

    Raises:
        ConfigError: The output has other partition columns, or one of its tables or logs was deleted.
        FeatrayError: The tables are more than one commit apart.
        StorageError: The store does not answer.
    """

    def __init__(  # noqa: PLR0913  # all that a commit depends on
        self,
        dataset: Dataset,
        partition_by: Sequence[str],
        extra_columns: Sequence[str] = (),
        *,
        run_id: str,
        keep_versions_days: float | None = None,
        check_lease: Callable[[], None] = lambda: None,
    ) -> None:
        self.dataset, self._run_id, self._check_lease = dataset, run_id, check_lease
        features, scans = [TableLog.open(dataset.store, table) for table in (FEATURES, SCANS)]
        _check_partitions(features, partition_by)
        refuse_missing_table(dataset.store, features, scans)
        for name in [name for name, table in ((FEATURES, features), (SCANS, scans)) if table is None]:
            _refuse_files_without_log(dataset.store, name, run_id)
        self._logs = {
            FEATURES: features or _create_table(dataset, FEATURES, (), partition_by),
            SCANS: scans or _create_table(dataset, SCANS, extra_columns, ()),
        }
        self.recovered = self._finish_interrupted_commit()
        self._files = FileRewriter(dataset, run_id)
        self._scan_rows = ScanRows(dataset, self._files, run_id, self.snapshot)
        self._logs[SCANS].add_columns(make_table_schema(SCANS, extra_columns, ()))
        if keep_versions_days is not None:
            for table_log in self._logs.values():
                table_log.set_retention_days(keep_versions_days)

    def snapshot(self) -> Snapshot:
        """Return both tables as of the last commit; the next commit follows it."""
        return Snapshot(self.dataset.store, self._logs[FEATURES], self._logs[SCANS], None)

    def commit(self, receipts: Sequence[Receipt]) -> None:
        """Commit the features and scan rows of receipts.

        They replace older rows of the same scans. The due layers of a scan replace its cells of these layers;
        its other cells stay. If the scan failed, the due cells are removed.

        Raises:
            OutputBusyError: Another driver has committed since this one opened the tables.
            MissingFileError: A file in a receipt is missing or has another size; nothing was committed.
            StorageError: The store does not answer, or the output was deleted.
        """
        with self._explain_deletion():
            self._commit(receipts)

    def _commit(self, receipts: Sequence[Receipt]) -> None:
        files = [file for receipt in receipts for file in receipt.files]
        records = [record for receipt in receipts for record in receipt.records]
        self._check_files_exist(files)
        # Records that only remove features have a commit of their own, in which `scans` comes first.
        failed = [
            record for record in records if record.status != "ok" and self._scan_rows.find_replaced(record)
        ]
        if failed:
            self._commit_records(failed, (), first=SCANS)
        failed_ids = {record.scan_id for record in failed}
        others = [record for record in records if record.scan_id not in failed_ids]
        if others:
            self._commit_records(others, files, first=FEATURES)

    def _commit_records(
        self, records: Sequence[ScanRecord], files: Sequence[DataFile], *, first: str
    ) -> None:
        """Commit records with the files that hold their features."""
        removal = self._remove_cells(records)
        features = FileChange((*files, *removal.add), removal.remove)
        scans = self._scan_rows.replace(records)
        self._write_commit({FEATURES: features, SCANS: scans}, first=first)
        self._scan_rows.set_committed(records)

    def rename_layers(self, names: Mapping[str, str]) -> None:
        """Give layers other names; their files are copied into the folders of the new names.

        Args:
            names: Old name → new name. No other layer may have one of the new names.
        """
        if not names:
            return
        with self._explain_deletion():
            files = self._find_layer_files(names)

            def rename(cells: CellMap) -> CellMap:
                return {names.get(layer, layer): recipe for layer, recipe in cells.items()}

            changes = {
                FEATURES: self._files.move_files(files, names),
                SCANS: self._scan_rows.change_cells(rename),
            }
            self._write_commit(changes, first=FEATURES)
            self._scan_rows.forget()

    def drop_layers(self, layers: Collection[str]) -> None:
        """Remove all cells of layers."""
        if not layers:
            return
        with self._explain_deletion():
            drop = functools.partial(leave_out_layers, layers=layers)
            removed = tuple(self._find_layer_files(layers))
            changes = {FEATURES: FileChange((), removed), SCANS: self._scan_rows.change_cells(drop)}
            self._write_commit(changes, first=SCANS)
            self._scan_rows.forget()

    def clear_failures(self, scan_ids: Collection[str]) -> None:
        """Set failed scans to ok: their cells are all that the config names. The failed cells are forgotten.

        Args:
            scan_ids: Ids of failed scans that have kept cells.
        """
        if not scan_ids:
            return
        with self._explain_deletion():
            changes = {
                FEATURES: FileChange(data_change=False),
                SCANS: self._scan_rows.clear_failures(scan_ids),
            }
            self._write_commit(changes, first=FEATURES)

    def carry_over(self, translation: Mapping[str, RecipeIds]) -> None:
        """Change all rows of featray 0.1.0 to rows of this version, in one commit.

        Args:
            translation: Recipe id of featray 0.1.0 → the ids that its layers have now.
        """
        if not translation:
            return
        with self._explain_deletion():
            change_features = functools.partial(
                carry_over_features,
                translation=translation,
                earlier_scans=find_earlier_scans(self.snapshot()),
            )
            change_scans = functools.partial(carry_over_scans, translation=translation)
            features = self._files.change_rows(FEATURES, self._logs[FEATURES].files(), change_features)
            scans = self._files.change_rows(SCANS, self._logs[SCANS].files(), change_scans)
            self._write_commit({FEATURES: features, SCANS: scans}, first=FEATURES)
            self._scan_rows.forget()
        log.info("changed %d files of featray 0.1.0 to one recipe per layer", len(features.add))

    def delete_scans(
        self, scan_ids: Collection[str], broken: Mapping[str, Collection[str]] | None = None
    ) -> None:
        """Remove all rows of scans from both tables.

        Args:
            scan_ids: Ids; ids that the output does not hold are ignored.
            broken: Table → paths of files that cannot be read; they are removed from the table as a whole.
        """
        with self._explain_deletion():
            self._delete_scans(sorted(scan_ids), dict(broken or {}))

    def delete_cells(self, layer: str, scan_ids: Collection[str]) -> None:
        """Remove a layer of some scans; a scan without any other layer loses its row, so it is new again.

        Args:
            layer: Name of the layer.
            scan_ids: Ids; ids that the output does not hold are ignored. Their rows must list their layers.
        """
        with self._explain_deletion():
            sorted_ids = sorted(scan_ids)
            for first in range(0, len(sorted_ids), _MAX_SCANS_PER_DELETION):
                ids = sorted_ids[first : first + _MAX_SCANS_PER_DELETION]
                changes = {
                    FEATURES: self._files.remove_rows(FEATURES, self._find_layer_files([layer]), ids),
                    SCANS: self._scan_rows.remove_cells(layer, ids),
                }
                if any(change.remove for change in changes.values()):
                    self._write_commit(changes, first=SCANS)
            self._scan_rows.forget()

    def _delete_scans(self, sorted_ids: Sequence[str], unreadable: dict[str, Collection[str]]) -> None:
        for first in range(0, max(1, len(sorted_ids)), _MAX_SCANS_PER_DELETION):
            ids = set(sorted_ids[first : first + _MAX_SCANS_PER_DELETION])
            changes = {
                table: self._files.remove_rows(table, table_log.files(), ids, unreadable.get(table, ()))
                for table, table_log in self._logs.items()
            }
            if any(change.remove for change in changes.values()):
                self._write_commit(changes, first=SCANS)
            unreadable = {}
        self._scan_rows.forget()

    def delete_orphans(self) -> list[str]:
        """Delete files that runs have written and that no retained version refers to; return their names.

        Call this only while holding the output's lease and while no worker of this run writes: a file that is
        not committed yet looks the same as an orphan. Files that no run has written are left alone.
        """
        with self._explain_deletion():
            store = self.dataset.store
            by_folder = find_orphans(list_output_files(store), self.snapshot())
            orphans = [name for names in by_folder.values() for name in names]
            self._check_lease()  # after listing: without the lease, new files of another run are listed
            store.delete(orphans)
        return orphans

    def exclude_earlier_driver(self) -> None:
        """Append a commit without changes, so that a driver that lost the lease cannot finish a commit.

        A driver may be suspended between its last check of the lease and its log entry. Its entry has the
        same number as this one, and a log accepts each number once. Call this before orphans are deleted,
        because the files of that entry look like orphans.
        """
        nothing = FileChange(data_change=False)
        self._write_commit({FEATURES: nothing, SCANS: nothing}, first=FEATURES)

    def compact(self, at_least: int = MIN_FILES_TO_COMPACT) -> int:
        """Merge small files of `features`; return the decrease in the number of files.

        Args:
            at_least: Number of small files in a partition from which they are merged.
        """
        with self._explain_deletion():
            return self._compact(at_least)

    def _compact(self, at_least: int) -> int:
        small_files: dict[tuple[tuple[str, str | None], ...], list[DataFile]] = defaultdict(list)
        for file in self._logs[FEATURES].files():
            if file.size < TARGET_FILE_BYTES // 2:
                small_files[tuple(file.partition_values.items())].append(file)
        saved = 0
        for partition, files in small_files.items():
            if len(files) < at_least:
                continue
            by_id = sorted(files, key=lambda file: file.min_id)
            merged = tuple(self._files.merge_files(dict(partition), by_id))
            if len(merged) < len(files):
                features = FileChange(merged, tuple(files), data_change=False)
                self._write_commit({FEATURES: features, SCANS: FileChange(data_change=False)}, first=FEATURES)
                saved += len(files) - len(merged)
        return saved

    def trim(self) -> int:
        """Delete log entries that no retained version needs; return their number."""
        return sum(len(table_log.trim()) for table_log in self._logs.values())

    def _find_layer_files(self, layers: Collection[str]) -> list[DataFile]:
        """Return the files of `features` that hold some layers."""
        return [file for file in self._logs[FEATURES].files() if file.partition_values["layer"] in layers]

    def _remove_cells(self, records: Sequence[ScanRecord]) -> FileChange:
        """Write the files of `features` without the cells that records replace."""
        ids_by_layer: dict[str, list[str]] = defaultdict(list)
        for record in records:
            for layer in self._scan_rows.find_replaced(record):
                ids_by_layer[layer].append(record.scan_id)
        change = FileChange()
        files = self._logs[FEATURES].files() if ids_by_layer else []
        for name, scan_ids in ids_by_layer.items():
            of_layer = [file for file in files if file.partition_values["layer"] == name]
            part = self._files.remove_rows(FEATURES, of_layer, scan_ids)
            change = FileChange((*change.add, *part.add), (*change.remove, *part.remove))
        return change

    def _finish_interrupted_commit(self) -> bool:
        """Append the second half of a commit in which a run was killed; return whether there was one."""
        snapshot = pair_logs(self.dataset.store, self._logs[FEATURES], self._logs[SCANS])
        if snapshot is None:
            raise FeatrayError(f"{self.dataset.store!r}: {TABLES_APART}")
        pending = snapshot.pending
        if pending is None:
            return False
        number = self._logs[_OTHER_TABLE[pending.table]].commit_number
        self._logs[pending.table].append(pending.change, number, self._run_id)
        log.info("finished a commit in which an earlier run was killed")
        return True

    def _check_files_exist(self, files: Iterable[DataFile]) -> None:
        """Check files before the commit: the log would accept a missing file, and then every reader fails."""

        def get_size(file: DataFile) -> tuple[DataFile, int | None]:
            return file, self.dataset.store.get_size(f"{FEATURES}/{file.path}")

        for file, size in map_in_threads(get_size, files):
            if size != file.size:
                actual = "the file does not exist" if size is None else f"it has {size} bytes"
                raise MissingFileError(
                    f"{file.path}: expected {file.size} bytes, but {actual}; nothing was committed. "
                    "Check that all workers see the same output folder."
                )

    def _write_commit(self, changes: Mapping[str, FileChange], *, first: str) -> None:
        """Append the next entry to both logs, `first` before the other, then delete superseded files."""
        self._check_lease()
        changes = {table: change.drop_same_files() for table, change in changes.items()}
        second, number = _OTHER_TABLE[first], self._logs[first].commit_number + 1
        pending = PendingCommit(second, changes[second])
        self._logs[first].append(changes[first], number, self._run_id, pending=pending)
        self._logs[second].append(changes[second], number, self._run_id)
        if not self._logs[FEATURES].retention_days:
            self._delete_superseded(changes)
        if number % _TRIM_INTERVAL == 0:
            self.trim()

    @contextlib.contextmanager
    def _explain_deletion(self) -> Iterator[None]:
        """Replace an error in the `with` block by one that says that the output was deleted."""
        try:
            yield
        except Exception as error:  # a deleted file raises errors of many kinds
            if not isinstance(error, StorageError) or isinstance(
                error, DeletedOutputError | MissingFileError
            ):
                self._refuse_deleted_output()
            raise

    def _refuse_deleted_output(self) -> None:
        deleted = [table for table, table_log in self._logs.items() if table_log.is_deleted()]
        if not deleted:
            return
        tables = " and ".join(deleted)
        rest = next((table for table in self._logs if table not in deleted), "")
        remedy = f"Restore {tables} to the state of {rest}, or d" if rest else "D"
        raise DeletedOutputError(
            f"{self.dataset.store!r}: somebody deleted the log of {tables} while this run was working. No "
            f"more was committed. {remedy}elete what is left of the output, and run the same command again."
        )

    def _delete_superseded(self, changes: Mapping[str, FileChange]) -> None:
        """Delete the files that a commit removed. If the driver is killed here, the rest are orphans."""
        self.dataset.store.delete(
            [f"{table}/{file.path}" for table, change in changes.items() for file in change.remove]
        )


def _create_table(
    dataset: Dataset, table: str, extra_columns: Sequence[str], partition_by: Sequence[str]
) -> TableLog:
    schema = make_table_schema(table, extra_columns, partition_by)
    return TableLog.create(dataset.store, table, schema, partition_by)


def _refuse_files_without_log(store: Store, table: str, run_id: str) -> None:
    """Raise if a table without a log has files of other runs; they would be deleted as orphans."""
    written = [name for name in store.list_files(table) if parse_run_id(name) not in (None, run_id)]
    if written:
        raise ConfigError(
            f"{store!r}: the folder {table} holds {len(written)} files of earlier runs, but no log that says "
            f"which of them are valid. Restore {table}/{LOG}, or delete what is left of the output"
        )


def _check_partitions(features: TableLog | None, partition_by: Sequence[str]) -> None:
    existing = features.partition_by if features else list(partition_by)
    if existing != list(partition_by):
        raise ConfigError(
            f"output.partition_by: the output is partitioned by {existing}, not by {list(partition_by)}; "
            "choose another output.uri or the same columns"
        )
