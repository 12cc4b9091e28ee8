"""Rewrite data files: files of one table in, new files without some rows or with changed rows out.

Nothing here changes a table: the result of each function is a `FileChange`, which `stages/commit.py` commits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.errors import FeatrayError
from featray.output.dataset import FEATURES, Dataset, can_contain_any
from featray.output.file_change import FileChange
from featray.schema import DataFile

TARGET_FILE_BYTES = 64 * 2**20
"""Size to which files of `features` are merged; files larger than half of it are not merged."""
MAX_MERGE_BYTES = 256 * 2**20
"""Maximum number of uncompressed bytes that are merged into one file; all are in memory at the same time."""
_THREADS = 4
"""Number of files that are read at the same time, and are therefore in memory together."""

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class FileRewriter:
    """Writes new versions of data files of one output, for one run.

    Args:
        dataset: The output.
        run_id: The run that writes.
    """

    def __init__(self, dataset: Dataset, run_id: str) -> None:
        self._dataset, self._run_id = dataset, run_id

    def remove_rows(
        self, table: str, files: Iterable[DataFile], scan_ids: Collection[str], broken: Collection[str] = ()
    ) -> FileChange:
        """Write the remaining rows of each file that holds one of the scans.

        Args:
            table: Name of the table.
            files: Files to search.
            scan_ids: Scans whose rows are removed.
            broken: Paths of unreadable files, which are removed as a whole.
        """
        if not scan_ids and not broken:
            return FileChange()
        id_array, sorted_ids = pa.array(list(scan_ids), pa.string()), sorted(scan_ids)
        files = list(files)
        unreadable = [file for file in files if file.path in broken]
        candidates = [file for file in files if file.path not in broken and can_contain_any(file, sorted_ids)]
        results = map_in_threads(lambda file: self._remove_rows_of_file(table, file, id_array), candidates)
        rewritten = [result for result in results if result]
        add = tuple(new_file for _, new_file in rewritten if new_file)
        return FileChange(add, (*unreadable, *(old_file for old_file, _ in rewritten)))

    def change_rows(
        self, table: str, files: Iterable[DataFile], change: Callable[[DataFile, pa.Table], pa.Table]
    ) -> FileChange:
        """Write each file again with changed rows; a file of which no row remains is removed.

        Args:
            table: Name of the table.
            files: Files to change.
            change: File and its rows → the new rows; the same object if nothing changes.
        """

        def change_file(file: DataFile) -> tuple[DataFile, DataFile | None] | None:
            rows = self.read_file(table, file)
            changed = change(file, rows)
            if changed is rows:
                return None
            if not len(changed):
                return file, None
            return file, self._dataset.write_file(table, file.partition_values, changed, self._run_id)

        changed = [result for result in map_in_threads(change_file, files) if result]
        return FileChange(tuple(new for _, new in changed if new), tuple(old for old, _ in changed))

    def move_files(self, files: Iterable[DataFile], layers: Mapping[str, str]) -> FileChange:
        """Copy files of `features` into the folders of other layers.

        Args:
            files: Files of the layers to rename.
            layers: Old name of a layer → its new name.
        """

        def move_file(file: DataFile) -> tuple[DataFile, DataFile]:
            partition = {**file.partition_values, "layer": layers[str(file.partition_values["layer"])]}
            return file, self._dataset.copy_file(FEATURES, file, partition, self._run_id)

        moved = list(map_in_threads(move_file, files))
        return FileChange(tuple(new for _, new in moved), tuple(old for old, _ in moved))

    def merge_files(
        self, partition: Mapping[str, str | None], files: Sequence[DataFile]
    ) -> Iterator[DataFile]:
        """Write the rows of many files of one partition of `features` to a few larger files; yield these."""
        tables: list[pa.Table] = []
        size = uncompressed_size = 0
        for file, rows in map_in_threads(lambda file: (file, self.read_file(FEATURES, file)), files):
            is_full = (
                size + file.size > TARGET_FILE_BYTES or uncompressed_size + rows.nbytes > MAX_MERGE_BYTES
            )
            if tables and is_full:
                yield self._write_sorted(partition, tables)
                tables, size, uncompressed_size = [], 0, 0
            tables.append(rows)
            size += file.size
            uncompressed_size += rows.nbytes
        yield self._write_sorted(partition, tables)

    def read_file(self, table: str, file: DataFile) -> pa.Table:
        """Return all rows of a file, without its partition columns."""
        return self._open_file(table, file).read()

    def _remove_rows_of_file(
        self, table: str, file: DataFile, scan_ids: pa.Array
    ) -> tuple[DataFile, DataFile | None] | None:
        """Write a file's rows of other scans to a new file.

        Returns:
            The old file and the new one, which is None if no row remains; None if the file holds none of the
            scans.
        """
        parquet = self._open_file(table, file)
        is_other = pc.invert(pc.is_in(parquet.read(["scan_id"])["scan_id"], scan_ids))
        if pc.all(is_other).as_py():
            return None
        rows = parquet.read().filter(is_other)
        if not len(rows):
            return file, None
        return file, self._dataset.write_file(table, file.partition_values, rows, self._run_id)

    def _write_sorted(self, partition: Mapping[str, str | None], tables: list[pa.Table]) -> DataFile:
        rows = pa.concat_tables(tables).sort_by([("scan_id", "ascending"), ("patch", "ascending")])
        return self._dataset.write_file(FEATURES, partition, rows, self._run_id)

    def _open_file(self, table: str, file: DataFile) -> pq.ParquetFile:
        """Read a whole file into memory: a rewrite needs all of it, and the size of files is limited."""
        try:
            return pq.ParquetFile(pa.BufferReader(self._dataset.store.read(f"{table}/{file.path}")))
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise FeatrayError(
                f"{table}/{file.path} is missing or damaged ({type(error).__name__}), so the scans that need "
                "it were not committed; earlier commits are kept. "
                "Run `featray verify` on the output: it reports every problem and how to repair it."
            ) from None


def map_in_threads(function: Callable[[_In], _Out], items: Iterable[_In]) -> Iterator[_Out]:
    """Yield the results of `function` in order. A few calls run at once: object stores answer in parallel."""
    with ThreadPoolExecutor(_THREADS) as pool:
        iterator = iter(items)
        while batch := list(itertools.islice(iterator, _THREADS)):
            yield from pool.map(function, batch)
