"""The ledger as arrays: the files of `scans` in, one row number per scan out, and what is wrong with them.

A million scans take about 100 MB here. Row numbers follow the sorted ids, so nothing needs a dictionary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featray.commands.verify.data_file import BrokenFileError, check_schema, open_file, stats_faults
from featray.commands.verify.findings import Fault, Kind
from featray.errors import Reason, WarningCode
from featray.output.dataset import SCANS
from featray.schema import SCAN_COLUMNS, DataFile
from featray.storage.store import Store

STATUSES = ("ok", "failed", "excluded")
_ALWAYS = (
    *("scan_id", "uri", "format", "status", "attempts", "content", "recipe", "run_id", "patches"),
    *("warnings", "bytes_read", "read_s", "decode_s", "preprocess_s", "infer_s"),
)
"""Columns that have a value in every row."""
_NEEDED = ("scan_id", "status", "recipe", "run_id", "patches")
_REASONS = pa.array([str(reason) for reason in Reason])
_WARNINGS = pa.array([str(code) for code in (*Reason, *WarningCode)])


@dataclass(frozen=True)
class LedgerPart:
    """What one file of `scans` adds to the ledger, and its faults."""

    rows: pa.Table | None
    faults: list[Fault]


@dataclass(frozen=True)
class Codes:
    """A column of strings as whole numbers.

    Attributes:
        of_row: int32 (scans,), a row's place in `values`.
        values: The strings that occur; null counts as the empty string.
    """

    of_row: NDArray[np.int32]
    values: list[str]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> Codes:
        """Return a column of strings as codes."""
        encoded = pc.fill_null(column.combine_chunks(), "").dictionary_encode()
        return cls(encoded.indices.to_numpy().astype(np.int32), encoded.dictionary.to_pylist())

    def find(self, texts: pa.Array) -> NDArray[np.int32]:
        """Return the code of each text; -1 where no row has it."""
        encoded = texts.dictionary_encode()
        known = {value: code for code, value in enumerate(self.values)}
        codes = np.array([known.get(text, -1) for text in encoded.dictionary.to_pylist()], np.int32)
        return codes[encoded.indices.to_numpy()] if len(texts) else codes


@dataclass(frozen=True)
class Ledger:
    """All scans, sorted by id.

    Attributes:
        ids: large_string, no id twice.
        counts: Rows by status, as they are in the table.
        is_ok: bool (scans,).
        patches: int64 (scans,), rows per layer that `features` must hold; 0 unless ok.
        recipe: Of each scan.
        run: That wrote each scan.
        partitions: Column of `partition_by` beyond `layer` → its values.
    """

    ids: pa.Array
    counts: dict[str, int]
    is_ok: NDArray[np.bool_]
    patches: NDArray[np.int64]
    recipe: Codes
    run: Codes
    partitions: dict[str, Codes]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, ids: pa.Array) -> NDArray[np.int64]:
        """Return the row number of each id, -1 for those that the ledger does not know."""
        wanted = ids.cast(pa.large_string())
        at = _places(self.ids, wanted)
        rows: NDArray[np.int64] = np.where(_holds_at(self.ids, at, wanted), at, -1)
        return rows

    def names(self, rows: NDArray[np.int64]) -> pa.Array:
        """Return the ids of rows, which may repeat; those below 0 are left out."""
        return self.ids.take(pa.array(np.unique(rows[rows >= 0])))


def read_part(store: Store, schema: pa.Schema, further: Sequence[str], file: DataFile) -> LedgerPart:
    """Read one file of `scans` back.

    Args:
        store: The output.
        schema: Of the table.
        further: Partition columns of `features` beyond `layer`.
        file: Which file.
    """
    try:
        parquet = open_file(store, SCANS, file)
        check_schema(parquet.schema_arrow, SCAN_COLUMNS, schema, file)
        rows = _read(parquet, file)
    except BrokenFileError as broken:
        return LedgerPart(None, [broken.fault])
    faults = stats_faults(file, rows["scan_id"].combine_chunks())
    faults += [*_nulls(rows, file), *_codes(rows), *_states(rows)]
    for name in further:
        if name not in rows.column_names:  # a column that came later
            rows = rows.append_column(name, pa.nulls(len(rows), pa.string()))
    return LedgerPart(
        rows.select(list(dict.fromkeys((*_NEEDED, *further)))).filter(rows["scan_id"].is_valid()), faults
    )


def join(parts: Sequence[pa.Table], further: Sequence[str]) -> tuple[Ledger, list[Fault]]:
    """Return the ledger of all parts that could be read, and what is wrong with it as a whole."""
    empty = pa.table({name: pa.array([], _type(name)) for name in dict.fromkeys((*_NEEDED, *further))})
    rows = pa.concat_tables([empty, *parts])
    statuses = {item["values"]: item["counts"] for item in rows["status"].value_counts().to_pylist()}
    counts = {status: statuses.get(status, 0) for status in STATUSES}
    faults = _unbalanced(rows, counts)
    ids = rows["scan_id"].cast(pa.large_string())
    order = pc.sort_indices(ids)
    ids = ids.take(order).combine_chunks()
    is_first = np.ones(len(ids), bool)
    is_first[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    if not is_first.all():
        faults.append(Fault(Kind.DOUBLED_ROW, ids.filter(pa.array(~is_first))))
    chosen = order.filter(pa.array(is_first))
    rows, ids = rows.drop_columns("scan_id").take(chosen), ids.filter(pa.array(is_first))
    is_ok = pc.fill_null(pc.equal(rows["status"], "ok"), False).to_numpy(zero_copy_only=False)
    promised = pc.fill_null(rows["patches"], 0).to_numpy().astype(np.int64)
    return Ledger(
        ids=ids,
        counts=counts,
        is_ok=is_ok,
        patches=np.where(is_ok, np.maximum(promised, 0), 0),
        recipe=Codes.of(rows["recipe"]),
        run=Codes.of(rows["run_id"]),
        partitions={name: Codes.of(rows[name]) for name in further},
    ), faults


def covered(ids: pa.Array, files: Sequence[DataFile]) -> NDArray[np.bool_]:
    """Return whether each id may be in one of the files, going by the first and last ids that the log names.

    Args:
        ids: large_string, sorted.
        files: Any number; their ranges may overlap, and one without statistics may hold every id.
    """
    if any(file.min_id is None or file.max_id is None for file in files):
        return np.ones(len(ids), bool)
    first = pa.array([file.min_id for file in files], pa.large_string())
    last = pa.array([file.max_id for file in files], pa.large_string())
    start, end = _places(ids, first), _places(ids, last)
    end = np.maximum(start, end + _holds_at(ids, end, last))
    steps = np.zeros(len(ids) + 1, np.int64)
    np.add.at(steps, start, 1)
    np.add.at(steps, end, -1)
    inside: NDArray[np.bool_] = np.cumsum(steps)[:-1] > 0
    return inside


def _places(ids: pa.Array, wanted: pa.Array) -> NDArray[np.int64]:
    """Return for each wanted id how many of the sorted ids are below it.

    All take each step of a binary search together: that needs no index of a million ids per file.
    """
    low, high = np.zeros(len(wanted), np.int64), np.full(len(wanted), len(ids), np.int64)
    while (is_open := low < high).any():
        middle = np.minimum((low + high) // 2, len(ids) - 1)
        is_below = pc.less(ids.take(pa.array(middle)), wanted).to_numpy(zero_copy_only=False)
        low = np.where(is_open & is_below, middle + 1, low)
        high = np.where(is_open & ~is_below, middle, high)
    return low


def _holds_at(ids: pa.Array, at: NDArray[np.int64], wanted: pa.Array) -> NDArray[np.bool_]:
    """Return whether the ids at those places are the wanted ones; a place may be behind the last id."""
    holds = np.zeros(len(at), bool)
    inside = np.flatnonzero(at < len(ids))
    is_same = pc.equal(ids.take(pa.array(at[inside])), wanted.take(pa.array(inside)))
    holds[inside] = is_same.to_numpy(zero_copy_only=False)
    return holds


def _type(name: str) -> pa.DataType:
    return SCAN_COLUMNS.field(name).type if name in SCAN_COLUMNS.names else pa.string()


def _read(parquet: pq.ParquetFile, file: DataFile) -> pa.Table:
    try:
        return parquet.read(use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise BrokenFileError(Kind.UNREADABLE_FILE, f"{file.path}: {type(error).__name__}") from None


def _nulls(rows: pa.Table, file: DataFile) -> list[Fault]:
    faults = []
    for name in _ALWAYS:
        if not rows[name].null_count:
            continue
        if name == "scan_id":  # nothing can name such a row, so its file must go
            detail = f"{file.path}: scan_id"
            faults.append(Fault(Kind.NULL_VALUE, rows["scan_id"].combine_chunks(), detail, broken=True))
        else:
            faults += _fault(Kind.NULL_VALUE, rows, rows[name].is_null(), f"column {name}")
    return faults


def _codes(rows: pa.Table) -> list[Fault]:
    faults = []
    for name, known in (("status", pa.array(STATUSES)), ("reason", _REASONS)):
        unknown = pc.and_(rows[name].is_valid(), pc.invert(pc.is_in(rows[name], known)))
        faults += _fault(Kind.UNKNOWN_CODE, rows, unknown, f"column {name}")
    warnings = rows["warnings"].combine_chunks()
    is_unknown = pc.invert(pc.is_in(warnings.flatten(), _WARNINGS)).to_numpy(zero_copy_only=False)
    if is_unknown.any():
        lengths = pc.fill_null(pc.list_value_length(warnings), 0).to_numpy()
        concerned = np.zeros(len(rows), bool)
        concerned[np.repeat(np.arange(len(rows)), lengths)[is_unknown]] = True
        faults += _fault(Kind.UNKNOWN_CODE, rows, pa.array(concerned), "column warnings")
    return faults


def _states(rows: pa.Table) -> list[Fault]:
    """Look whether a row is what its status says: ok with patches, or not ok with a reason and none."""
    status, patches = rows["status"], rows["patches"]
    is_ok = pc.fill_null(pc.equal(status, "ok"), False)
    is_settled = pc.is_in(status, pa.array(["failed", "excluded"]))
    told = [rows[name].is_valid() for name in ("reason", "stage", "message")]
    told_some, told_all = pc.or_(pc.or_(*told[:2]), told[2]), pc.and_(pc.and_(*told[:2]), told[2])
    checks = (
        (is_ok, pc.less(patches, 1), "an ok row without patches"),
        (is_ok, told_some, "an ok row with a reason, a stage or a message"),
        (is_settled, pc.not_equal(patches, 0), "a row with patches that is not ok"),
        (is_settled, pc.invert(told_all), "a row that is not ok without reason, stage and message"),
    )
    found = ((pc.and_(state, pc.fill_null(wrong, False)), text) for state, wrong, text in checks)
    return list(
        itertools.chain.from_iterable(_fault(Kind.WRONG_STATE, rows, mask, text) for mask, text in found)
    )


def _unbalanced(rows: pa.Table, counts: dict[str, int]) -> list[Fault]:
    if sum(counts.values()) == len(rows):
        return []
    of_none = pc.invert(pc.is_in(rows["status"], pa.array(STATUSES)))
    terms = " + ".join(f"{count} {status}" for status, count in counts.items())
    return _fault(Kind.BOOKS, rows, of_none, f"{terms}, but {len(rows)} rows")


def _fault(kind: Kind, rows: pa.Table, mask: pa.Array, example: str) -> list[Fault]:
    ids = rows["scan_id"].filter(mask).combine_chunks()
    return [Fault(kind, ids, f"{ids[0].as_py()}: {example}")] if len(ids) else []
