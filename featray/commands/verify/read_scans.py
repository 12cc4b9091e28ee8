"""Read the files of the scans table into arrays with one entry per scan, and check their rows.

The arrays of a million scans take about 100 MB. Row numbers follow the sorted ids and need no dictionary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.commands.verify.data_file import (
    BrokenFileError,
    check_ids,
    check_schema,
    open_data_file,
    read_table,
)
from featray.commands.verify.findings import Fault, FindingKind
from featray.errors import Reason, WarningCode
from featray.output.cells import CellColumn
from featray.output.dataset import SCANS
from featray.output.ledger import find_earlier_rows
from featray.schema import SCAN_COLUMNS, DataFile
from featray.storage.store import Store

STATUSES = ("ok", "failed", "excluded")
_NOT_NULL = (
    *("uri", "format", "status", "attempts", "content", "recipe", "run_id", "patches"),
    *("warnings", "bytes_read", "read_s", "decode_s", "preprocess_s", "infer_s"),
)
"""Columns that have a value in every row, in addition to scan_id."""
_USED_COLUMNS = ("scan_id", "status", "recipe", "run_id", "patches")
_CELL_COLUMNS = ("layers", "failed_layers")
_REQUIRED_COLUMNS = pa.schema([column for column in SCAN_COLUMNS if column.name not in _CELL_COLUMNS])
"""Columns of every file; files of featray 0.1.0 do not have the columns of cells."""
_REASONS = pa.array([str(reason) for reason in Reason])
_WARNINGS = pa.array([str(code) for code in (*Reason, *WarningCode)])


@dataclass(frozen=True)
class ScansFile:
    """The rows of one file of the scans table, and the faults of the file.

    Attributes:
        rows: The used columns of rows that have a scan_id; None if the file cannot be read.
        cells: The column `layers` of these rows; None if the file cannot be read.
        faults: Faults of the file and of its rows.
    """

    rows: pa.Table | None
    cells: CellColumn | None
    faults: list[Fault]

    @property
    def is_broken(self) -> bool:
        """Whether the rows cannot be read."""
        return self.rows is None


@dataclass(frozen=True)
class EncodedColumn:
    """A column of strings, encoded as integers.

    Attributes:
        codes: int32 (rows,), index into `values` for each row.
        values: The distinct strings; null is encoded as the empty string.
    """

    codes: NDArray[np.int32]
    values: list[str]

    @classmethod
    def encode(cls, column: pa.ChunkedArray) -> EncodedColumn:
        """Return a column of strings in encoded form."""
        encoded = pc.fill_null(column.combine_chunks(), "").dictionary_encode()
        return cls(encoded.indices.to_numpy().astype(np.int32), encoded.dictionary.to_pylist())

    def find_codes(self, texts: pa.Array) -> NDArray[np.int32]:
        """Return the code of each text; -1 for a text that is not among the values."""
        return find_codes(texts, self.values)


@dataclass(frozen=True)
class ScansTable:
    """All scans of an output, sorted by id.

    Attributes:
        ids: large_string (scans,), without duplicates.
        counts: Number of rows in the table by status, including duplicates.
        is_ok: bool (scans,).
        cells: The column `layers`: the cells that `features` must hold; null in rows of featray 0.1.0.
        patches: int64 (scans,), number of rows of each cell; 0 for a scan without cells.
        recipe: Recipe id of reading and preprocessing of each scan; in rows of 0.1.0, of all its layers.
        run: Id of the run that wrote each scan.
        partitions: Columns of `partition_by` except `layer` → their values.
    """

    ids: pa.Array
    counts: dict[str, int]
    is_ok: NDArray[np.bool_]
    cells: CellColumn
    patches: NDArray[np.int64]
    recipe: EncodedColumn
    run: EncodedColumn
    partitions: dict[str, EncodedColumn]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def has_no_map(self) -> NDArray[np.bool_]:
        """Whether the column `layers` is null: bool (scans,)."""
        return find_earlier_rows(self.cells)

    def find_rows(self, ids: pa.Array) -> NDArray[np.int64]:
        """Return the row number of each id; -1 for an id that is not in the table."""
        ids = ids.cast(pa.large_string())
        positions = _count_smaller_ids(self.ids, ids)
        rows: NDArray[np.int64] = np.where(_is_id_at(self.ids, positions, ids), positions, -1)
        return rows

    def get_ids(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the ids of some rows, without duplicates; row numbers below 0 are ignored."""
        return self.ids.take(pa.array(np.unique(rows[rows >= 0])))


def read_scans_file(
    store: Store, table_schema: pa.Schema, partition_columns: Sequence[str], file: DataFile
) -> ScansFile:
    """Read one file of the scans table and check its rows.

    Args:
        store: Store of the output.
        table_schema: Schema of the scans table.
        partition_columns: Partition columns of `features` except `layer`.
        file: The file as the log describes it.
    """
    try:
        parquet = open_data_file(store, SCANS, file)
        check_schema(parquet.schema_arrow, _REQUIRED_COLUMNS, table_schema, file)
        rows = read_table(parquet, file)
    except BrokenFileError as broken:
        return ScansFile(None, None, [broken.fault])
    for name in (*_CELL_COLUMNS, *partition_columns):
        if name not in rows.column_names:  # the column was added to the table after this file
            rows = rows.append_column(name, pa.nulls(len(rows), _get_type(name)))
    cells, failed = [CellColumn.encode(rows[name]) for name in _CELL_COLUMNS]
    faults = check_ids(file, rows["scan_id"].combine_chunks())
    faults += [*_check_nulls(rows), *_check_codes(rows), *_check_states(rows, cells)]
    faults += [*_check_cells(rows, cells, failed), *_check_null_cells(rows, cells, failed)]
    used = rows.select(list(dict.fromkeys((*_USED_COLUMNS, *partition_columns))))
    has_id = rows["scan_id"].is_valid()
    return ScansFile(used.filter(has_id), cells.take(np.asarray(has_id, bool)), faults)


def join_files(
    parts: Sequence[ScansFile], partition_columns: Sequence[str]
) -> tuple[ScansTable, list[Fault]]:
    """Return the scans of all readable files as one table, and the faults of the table as a whole.

    Args:
        parts: The files; those that cannot be read are left out.
        partition_columns: Partition columns of `features` except `layer`.
    """
    names = dict.fromkeys((*_USED_COLUMNS, *partition_columns))
    empty = pa.table({name: pa.array([], _get_type(name)) for name in names})
    rows = pa.concat_tables([empty, *(part.rows for part in parts if part.rows is not None)])
    cells = CellColumn.concatenate([part.cells for part in parts if part.cells is not None])
    statuses = {item["values"]: item["counts"] for item in rows["status"].value_counts().to_pylist()}
    counts = {status: statuses.get(status, 0) for status in STATUSES}
    faults = _check_counts(rows, counts)
    ids = rows["scan_id"].cast(pa.large_string())
    order = pc.sort_indices(ids)
    ids = ids.take(order).combine_chunks()
    is_first = np.ones(len(ids), bool)
    is_first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    if not is_first.all():
        faults.append(Fault(FindingKind.DOUBLED_ROW, ids.filter(pa.array(~is_first))))
    order = order.filter(pa.array(is_first))
    rows, cells = rows.drop_columns("scan_id").take(order), cells.take(order.to_numpy().astype(np.int64))
    is_ok = pc.fill_null(pc.equal(rows["status"], "ok"), fill_value=False).to_numpy(zero_copy_only=False)
    patches = pc.fill_null(rows["patches"], 0).to_numpy().astype(np.int64)
    return ScansTable(
        ids=ids.filter(pa.array(is_first)),
        counts=counts,
        is_ok=is_ok,
        cells=cells,
        patches=np.where(cells.find_rows(bool) | is_ok & find_earlier_rows(cells), np.maximum(patches, 0), 0),
        recipe=EncodedColumn.encode(rows["recipe"]),
        run=EncodedColumn.encode(rows["run_id"]),
        partitions={name: EncodedColumn.encode(rows[name]) for name in partition_columns},
    ), faults


def find_codes(texts: pa.Array, values: Sequence[str]) -> NDArray[np.int32]:
    """Return the position of each text among the values; -1 for a text that is not among them."""
    encoded = texts.dictionary_encode()
    code_of = {value: code for code, value in enumerate(values)}
    codes = np.array([code_of.get(text, -1) for text in encoded.dictionary.to_pylist()], np.int32)
    return codes[encoded.indices.to_numpy()] if len(texts) else codes


def can_be_in_files(ids: pa.Array, files: Sequence[DataFile]) -> NDArray[np.bool_]:
    """Return whether each id can be in one of the files, judged by the first and last ids in the log.

    Args:
        ids: large_string, sorted.
        files: Any number of files. Their ranges may overlap. A file without statistics can contain any id.
    """
    if any(file.min_id is None or file.max_id is None for file in files):
        return np.ones(len(ids), bool)
    first = pa.array([file.min_id for file in files], pa.large_string())
    last = pa.array([file.max_id for file in files], pa.large_string())
    start, end = _count_smaller_ids(ids, first), _count_smaller_ids(ids, last)
    end = np.maximum(start, end + _is_id_at(ids, end, last))
    steps = np.zeros(len(ids) + 1, np.int64)
    np.add.at(steps, start, 1)
    np.add.at(steps, end, -1)
    is_inside: NDArray[np.bool_] = np.cumsum(steps)[:-1] > 0
    return is_inside


def _count_smaller_ids(sorted_ids: pa.Array, ids: pa.Array) -> NDArray[np.int64]:
    """Return for each id how many of the sorted ids are smaller, as `numpy.searchsorted` does.

    All ids take each step of the binary search together. So no index of a million ids is built per file.
    """
    low, high = np.zeros(len(ids), np.int64), np.full(len(ids), len(sorted_ids), np.int64)
    while (is_open := low < high).any():
        middle = np.minimum((low + high) // 2, len(sorted_ids) - 1)
        is_smaller = pc.less(sorted_ids.take(pa.array(middle)), ids).to_numpy(zero_copy_only=False)
        low = np.where(is_open & is_smaller, middle + 1, low)
        high = np.where(is_open & ~is_smaller, middle, high)
    return low


def _is_id_at(sorted_ids: pa.Array, positions: NDArray[np.int64], ids: pa.Array) -> NDArray[np.bool_]:
    """Return whether each id is at its position; a position may be one past the last id."""
    is_at = np.zeros(len(positions), bool)
    inside = np.flatnonzero(positions < len(sorted_ids))
    is_equal = pc.equal(sorted_ids.take(pa.array(positions[inside])), ids.take(pa.array(inside)))
    is_at[inside] = is_equal.to_numpy(zero_copy_only=False)
    return is_at


def _get_type(name: str) -> pa.DataType:
    return SCAN_COLUMNS.field(name).type if name in SCAN_COLUMNS.names else pa.string()


def _check_nulls(rows: pa.Table) -> list[Fault]:
    faults = []
    for name in _NOT_NULL:
        if rows[name].null_count:
            faults += _make_faults(FindingKind.NULL_VALUE, rows, rows[name].is_null(), f"column {name}")
    return faults


def _check_codes(rows: pa.Table) -> list[Fault]:
    """Check that statuses, reasons and warnings are known codes."""
    faults = []
    for name, known in (("status", pa.array(STATUSES)), ("reason", _REASONS)):
        is_unknown = pc.and_(rows[name].is_valid(), pc.invert(pc.is_in(rows[name], known)))
        faults += _make_faults(FindingKind.UNKNOWN_CODE, rows, is_unknown, f"column {name}")
    warnings = rows["warnings"].combine_chunks()
    is_unknown_item = pc.invert(pc.is_in(warnings.flatten(), _WARNINGS)).to_numpy(zero_copy_only=False)
    if is_unknown_item.any():
        lengths = pc.fill_null(pc.list_value_length(warnings), 0).to_numpy()
        is_affected = np.zeros(len(rows), bool)
        is_affected[np.repeat(np.arange(len(rows)), lengths)[is_unknown_item]] = True
        faults += _make_faults(FindingKind.UNKNOWN_CODE, rows, pa.array(is_affected), "column warnings")
    return faults


def _check_states(rows: pa.Table, cells: CellColumn) -> list[Fault]:
    """Check that ok rows have no reason, that other rows have one, and that rows with cells have patches.

    A scan that fails when a layer is added keeps its other cells. A scan whose last layer was dropped has
    neither cells nor patches, whatever its status, until a run computes another layer.
    """
    status, patches = rows["status"], rows["patches"]
    is_ok = pc.fill_null(pc.equal(status, "ok"), fill_value=False)
    is_not_ok = pc.is_in(status, pa.array(["failed", "excluded"]))
    has_value = [rows[name].is_valid() for name in ("reason", "stage", "message")]
    has_any = pc.or_(pc.or_(*has_value[:2]), has_value[2])
    has_all = pc.and_(pc.and_(*has_value[:2]), has_value[2])
    has_cells = pa.array(cells.find_rows(bool) | find_earlier_rows(cells) & np.asarray(is_ok, bool))
    checks = (
        (has_cells, pc.less(patches, 1), "a row with layers but without patches"),
        (pc.invert(has_cells), pc.not_equal(patches, 0), "a row with patches but without layers"),
        (is_ok, has_any, "an ok row with a reason, a stage or a message"),
        (is_not_ok, pc.invert(has_all), "a row that is not ok but lacks a reason, a stage or a message"),
    )
    wrong = (
        (pc.and_(has_status, pc.fill_null(is_wrong, fill_value=False)), text)
        for has_status, is_wrong, text in checks
    )
    return list(
        itertools.chain.from_iterable(
            _make_faults(FindingKind.WRONG_STATE, rows, mask, text) for mask, text in wrong
        )
    )


def _check_cells(rows: pa.Table, cells: CellColumn, failed: CellColumn) -> list[Fault]:
    """Check that the columns of cells agree with the status and with each other."""
    is_ok, is_excluded = [
        np.asarray(pc.fill_null(pc.equal(rows["status"], status), fill_value=False), bool)
        for status in ("ok", "excluded")
    ]
    has_cells, has_failed = cells.find_rows(bool), failed.find_rows(bool)
    checks = (
        (is_ok & has_failed, "an ok row that lists failed layers"),
        (is_excluded & (has_cells | has_failed), "an excluded row that lists layers"),
        (_find_shared_layers(cells, failed), "a layer that is both in `layers` and in `failed_layers`"),
        (_find_doubled_layers(rows["layers"], cells), "a layer that is in `layers` twice"),
        (_find_doubled_layers(rows["failed_layers"], failed), "a layer that is in `failed_layers` twice"),
    )
    faults = [_make_faults(FindingKind.WRONG_STATE, rows, pa.array(mask), text) for mask, text in checks]
    return list(itertools.chain.from_iterable(faults))


def _check_null_cells(rows: pa.Table, cells: CellColumn, failed: CellColumn) -> list[Fault]:
    """Check that no recipe is null, and that either both columns of cells are null or neither."""
    faults = []
    for name, column, other in (("layers", cells, failed), ("failed_layers", failed, cells)):
        is_null = find_earlier_rows(column) & ~find_earlier_rows(other)
        is_null |= column.find_rows(lambda recipes: None in (recipes or {}).values())
        faults += _make_faults(FindingKind.NULL_VALUE, rows, pa.array(is_null), f"column {name}")
    return faults


def _find_shared_layers(first: CellColumn, second: CellColumn) -> NDArray[np.bool_]:
    """Return for each row whether both of its maps name the same layer."""
    numbers = first.codes.astype(np.int64) * (len(second.maps) + 1) + second.codes
    _, rows, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    pairs = [(first.maps[first.codes[row]], second.maps[second.codes[row]]) for row in rows]
    is_shared = np.array([bool({*(one or ())} & {*(other or ())}) for one, other in pairs], bool)
    return is_shared[inverse]


def _find_doubled_layers(maps: pa.ChunkedArray, column: CellColumn) -> NDArray[np.bool_]:
    """Return for each row whether its map names a layer more than once; `column` is the encoded column."""
    items = np.diff(maps.combine_chunks().offsets.to_numpy())
    layers = np.array([*(len(cells or ()) for cells in column.maps), 0])
    is_doubled: NDArray[np.bool_] = items > layers[column.codes]
    return is_doubled


def _check_counts(rows: pa.Table, counts: dict[str, int]) -> list[Fault]:
    if sum(counts.values()) == len(rows):
        return []
    has_no_status = pc.invert(pc.is_in(rows["status"], pa.array(STATUSES)))
    terms = " + ".join(f"{count} {status}" for status, count in counts.items())
    return _make_faults(FindingKind.COUNTS_DIFFER, rows, has_no_status, f"{terms}, but {len(rows)} rows")


def _make_faults(kind: FindingKind, rows: pa.Table, mask: pa.Array, example: str) -> list[Fault]:
    """Return one fault about the rows that the mask selects; none if it selects no row."""
    ids = rows["scan_id"].filter(mask).combine_chunks()
    return [Fault(kind, ids, f"{ids[0].as_py()}: {example}")] if len(ids) else []
