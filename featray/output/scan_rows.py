"""The rows of `scans`: records in, changed files of the table out.

The row of a scan says which cells `features` holds for it. So a commit asks here which cells of a scan stay
and which are replaced. Nothing here changes a table: `stages/commit.py` commits the changed files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featray.output.cells import CellColumn, CellMap, leave_out_layers
from featray.output.dataset import SCANS, Dataset, Snapshot, can_contain_any
from featray.output.file_change import FileChange
from featray.output.rewrite import FileRewriter
from featray.schema import DataFile, ScanRecord

MAX_MERGED_SCAN_ROWS = 32_768
"""Maximum rows of a merged file of `scans`. A changed scan rewrites the whole file that holds its row."""
FAILURE_COLUMNS = ("status", "reason", "stage", "message", "attempts", "run_id", "layers", "failed_layers")
"""Columns of `scans` that change if a scan fails when cells are added to it."""

_WITHOUT_FAILURE: dict[str, Any] = {
    "status": "ok",
    "reason": None,
    "stage": None,
    "message": None,
    "failed_layers": {},
}
"""Columns of `scans` that change if the failure of a scan is cleared, with their values."""


class ScanRows:
    """The rows of `scans` as of the last commit, and the files that the next commit changes.

    Args:
        dataset: The output.
        files: Writes new versions of files.
        run_id: The run that writes.
        open_snapshot: Returns both tables as of the last commit of this run.
    """

    def __init__(
        self, dataset: Dataset, files: FileRewriter, run_id: str, open_snapshot: Callable[[], Snapshot]
    ) -> None:
        self._dataset, self._files, self._run_id = dataset, files, run_id
        self._open_snapshot = open_snapshot
        self._different_cells: dict[tuple[tuple[str, str], ...], CellMap] = {}

    def find_replaced(self, record: ScanRecord) -> set[str]:
        """Return the layers whose stored cells are removed when this record is committed."""
        return self._stored.get(record.scan_id, {}).keys() - self._find_kept(record).keys()

    def replace(self, records: Sequence[ScanRecord]) -> FileChange:
        """Write the rows of records; they replace older rows of the same scans."""
        stored = [record.scan_id for record in records if record.scan_id in self._stored]
        return self._replace_rows(self._make_rows(records), stored)

    def set_committed(self, records: Sequence[ScanRecord]) -> None:
        """Note that records have been committed."""
        for record in records:
            self._stored[record.scan_id] = self._intern({**self._find_kept(record), **record.layers})

    def forget(self) -> None:
        """Note that other rows than those of records have changed; they are read again when needed."""
        self.__dict__.pop("_stored", None)

    def change_cells(self, change: Callable[[CellMap], CellMap]) -> FileChange:
        """Write the files again with changed maps of cells, those that are there and those that failed.

        A row that loses its last cell has no patches any more.
        """

        def change_rows(_: DataFile, rows: pa.Table) -> pa.Table:
            changed = rows
            for name in ("layers", "failed_layers"):
                column = CellColumn.encode(rows[name])
                new = column.map(lambda cells: change(cells or {}))
                if new.maps != column.maps:
                    changed = changed.set_column(rows.column_names.index(name), name, new.decode())
            return rows if changed is rows else _clear_patches(changed)

        return self._files.change_rows(SCANS, self._open_snapshot().files(SCANS), change_rows)

    def remove_cells(self, layer: str, scan_ids: Collection[str]) -> FileChange:
        """Write the files again without a layer of some scans; a row that loses its last cell is removed."""
        ids = pa.array(list(scan_ids), pa.string())

        def remove(_: DataFile, rows: pa.Table) -> pa.Table:
            cells = CellColumn.encode(rows["layers"])
            has_cell = cells.find_rows(lambda cell_map: layer in (cell_map or {}))
            is_changed = has_cell & np.asarray(pc.is_in(rows["scan_id"], ids), bool)
            if not is_changed.any():
                return rows
            kept = cells.map_rows(is_changed, lambda cell_map: leave_out_layers(cell_map or {}, [layer]))
            changed = rows.set_column(rows.column_names.index("layers"), "layers", kept.decode())
            return changed.filter(pa.array(kept.has_cells() | ~is_changed))

        return self._files.change_rows(SCANS, self._find_files(scan_ids), remove)

    def clear_failures(self, scan_ids: Collection[str]) -> FileChange:
        """Write the files again in which scans are failed, with status ok for these scans."""
        ids = pa.array(list(scan_ids), pa.string())

        def clear(_: DataFile, rows: pa.Table) -> pa.Table:
            is_cleared = pc.is_in(rows["scan_id"], ids)
            if not pc.any(is_cleared).as_py():
                return rows
            cleared = rows.filter(is_cleared)
            for name, value in _WITHOUT_FAILURE.items():
                field = rows.schema.field(name)
                values = pa.array([value] * len(cleared), field.type)
                cleared = cleared.set_column(rows.schema.get_field_index(name), field, values)
            return pa.concat_tables([rows.filter(pc.invert(is_cleared)), cleared]).sort_by("scan_id")

        return self._files.change_rows(SCANS, self._find_files(scan_ids), clear)

    @functools.cached_property
    def _stored(self) -> dict[str, CellMap]:
        """Id of each scan in `scans` → its cells in `features`. Scans with equal cells share one dict."""
        stored: dict[str, CellMap] = {}
        for ids, column in self._open_snapshot().convert_scans(("scan_id", "layers"), _encode_cells):
            maps = [self._intern(cells or {}) for cells in column.maps]
            stored.update(zip(ids.to_pylist(), map(maps.__getitem__, column.codes.tolist()), strict=True))
        return stored

    def _intern(self, cells: CellMap) -> CellMap:
        """Return the one dict that all scans with these cells share."""
        return self._different_cells.setdefault(tuple(sorted(cells.items())), cells)

    def _find_kept(self, record: ScanRecord) -> CellMap:
        """Return the stored cells that stay when this record is committed."""
        if not record.due_layers:
            return {}
        return leave_out_layers(self._stored.get(record.scan_id, {}), record.due_layers)

    def _make_rows(self, records: Sequence[ScanRecord]) -> list[dict[str, Any]]:
        """Return rows of `scans`. A failed scan that keeps cells also keeps the columns about them."""
        kept = {record.scan_id: self._find_kept(record) for record in records}
        rows = {record.scan_id: record.to_row() for record in records}
        keeping = [record.scan_id for record in records if record.status != "ok" and kept[record.scan_id]]
        for stored in self._read_rows(keeping):
            row = rows[stored["scan_id"]]
            rows[stored["scan_id"]] = {**stored, **{name: row[name] for name in FAILURE_COLUMNS}}
        for scan_id, row in rows.items():
            row["layers"] = dict(sorted({**kept[scan_id], **row["layers"]}.items()))
            row["failed_layers"] = dict(sorted(row["failed_layers"].items()))
        return list(rows.values())

    def _read_rows(self, scan_ids: Collection[str]) -> list[dict[str, Any]]:
        """Return the stored rows of some scans."""
        ids = pa.array(list(scan_ids), pa.string())
        tables = [self._files.read_file(SCANS, file) for file in self._find_files(scan_ids)]
        rows = [table.filter(pc.is_in(table["scan_id"], ids)) for table in tables]
        return [row for part in rows for row in part.to_pylist(maps_as_pydicts="strict")]

    def _find_files(self, scan_ids: Collection[str]) -> list[DataFile]:
        """Return the files that can contain rows of some scans."""
        sorted_ids = sorted(scan_ids)
        return [file for file in self._open_snapshot().files(SCANS) if can_contain_any(file, sorted_ids)]

    def _replace_rows(self, rows: Sequence[Mapping[str, Any]], replaced: Collection[str]) -> FileChange:
        """Write new rows to one file, and return the change that adds it.

        The new file also takes in existing files, smallest first, as long as the next one has no more rows
        than the new file has so far. So the number of files stays small after any number of commits, and a
        row is rewritten about log2(commits) times.

        Args:
            rows: The new rows.
            replaced: Ids of these scans that already have a row, which is removed.
        """
        snapshot = self._open_snapshot()
        files, schema = snapshot.files(SCANS), snapshot.schema(SCANS)
        removal = self._files.remove_rows(SCANS, files, replaced)
        tables = [pa.Table.from_pylist(list(rows), schema=schema)]
        rewritten, merged, row_count = {file.path for file in removal.remove}, [], len(rows)
        untouched = [file for file in files if file.path not in rewritten]
        for file in sorted(untouched, key=lambda file: file.rows):
            if file.rows > row_count or row_count + file.rows > MAX_MERGED_SCAN_ROWS:
                break
            tables.append(self._files.read_file(SCANS, file))
            merged.append(file)
            row_count += file.rows
        table = pa.concat_tables(tables, promote_options="default").select(schema.names).sort_by("scan_id")
        written = self._dataset.write_file(SCANS, {}, table, self._run_id)
        return FileChange((written, *removal.add), (*removal.remove, *merged))


def _clear_patches(rows: pa.Table) -> pa.Table:
    """Return rows of `scans`, with 0 patches in rows without cells."""
    has_cells = CellColumn.encode(rows["layers"]).find_rows(bool)
    patches = pc.if_else(pa.array(has_cells), rows["patches"], pa.scalar(0, pa.int32()))
    return rows.set_column(rows.column_names.index("patches"), "patches", patches)


def _encode_cells(rows: pa.Table) -> tuple[pa.ChunkedArray, CellColumn]:
    return rows["scan_id"], CellColumn.encode(rows["layers"])
