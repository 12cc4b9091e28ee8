"""The rows of one file of `features`: each looked at, and reduced to a few numbers for the books."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.commands.verify.data_file import BrokenFileError, batches, check_schema, open_file, stats_faults
from featray.commands.verify.findings import Fault, Kind
from featray.commands.verify.read_scans import Ledger
from featray.output.dataset import FEATURES
from featray.schema import FEATURE_COLUMNS, DataFile
from featray.storage.store import Store

Shape = tuple[int, ...]
Rows = NDArray[np.int64]
_LISTS = ("origin", "feature", "shape")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class FileRows:
    """What one file of `features` holds, and its faults. Rows with a null are among the faults only.

    Attributes:
        scan: int64 (rows,), the ledger's row number; -1 where it knows no such scan.
        patch: int32 (rows,).
        recipe: int32 (rows,), code in `Ledger.recipe`; -1 where the ledger has no such recipe.
        run: int32 (rows,), code in `Ledger.run`; -1 likewise.
        unknown: Ids that the ledger does not know.
        shapes: Shape of a feature → the ledger's row numbers; only where asked for.
        faults: What is wrong with the file or its rows alone.
        is_broken: Whether nothing could be read.
    """

    scan: Rows
    patch: NDArray[np.int32]
    recipe: NDArray[np.int32]
    run: NDArray[np.int32]
    unknown: pa.Array
    shapes: dict[Shape, Rows]
    faults: list[Fault]
    is_broken: bool = False


@dataclass
class _Batches:
    """What the batches of a file add up to."""

    ids: list[pa.Array] = field(default_factory=list)
    scan: list[Rows] = field(default_factory=list)
    patch: list[NDArray[np.int32]] = field(default_factory=list)
    recipe: list[NDArray[np.int32]] = field(default_factory=list)
    run: list[NDArray[np.int32]] = field(default_factory=list)
    unknown: list[pa.Array] = field(default_factory=list)
    shapes: dict[Shape, list[Rows]] = field(default_factory=lambda: defaultdict(list))
    faults: list[Fault] = field(default_factory=list)


def read_rows(store: Store, schema: pa.Schema, ledger: Ledger, file: DataFile, *, shapes: bool) -> FileRows:
    """Read one file of `features` back.

    Args:
        store: The output.
        schema: Of the table.
        ledger: All scans.
        file: Which file.
        shapes: Whether the shapes of features are wanted.
    """
    found = _Batches()
    try:
        parquet = open_file(store, FEATURES, file)
        # The partition columns are in the folder's name, never in the file.
        inside = pa.schema([name for name in schema if name.name not in file.partition_values])
        check_schema(parquet.schema_arrow, FEATURE_COLUMNS, inside, file)
        for batch in batches(parquet, file):
            _add(found, batch, ledger, file, shapes)
    except BrokenFileError as broken:
        return _file_rows(_Batches(faults=[broken.fault]), is_broken=True)
    ids = pa.chunked_array(found.ids, pa.string()).combine_chunks()
    found.faults += stats_faults(file, ids)
    if ids.null_count:  # nothing can name such a row, so its file must go
        found.faults.append(Fault(Kind.NULL_VALUE, ids, f"{file.path}: scan_id", broken=True))
    found.faults += _misplaced(np.unique(ledger.find(pc.unique(ids.drop_null()))), ledger, file, ids)
    return _file_rows(found)


def _add(found: _Batches, batch: pa.RecordBatch, ledger: Ledger, file: DataFile, shapes: bool) -> None:
    found.ids.append(batch["scan_id"])
    is_null = _null_rows(batch)
    if is_null.any():
        ids = batch["scan_id"].filter(pa.array(is_null))
        found.faults.append(Fault(Kind.NULL_VALUE, ids, f"{file.path}: {_null_columns(batch)}"))
        batch = batch.filter(pa.array(~is_null))
    encoded = batch["scan_id"].dictionary_encode()
    of_id = ledger.find(encoded.dictionary)
    scan = of_id[encoded.indices.to_numpy()]
    found.scan.append(scan)
    found.unknown.append(encoded.dictionary.filter(pa.array(of_id < 0)))
    found.patch.append(batch["patch"].to_numpy().astype(np.int32))
    found.recipe.append(ledger.recipe.find(batch["recipe"]))
    found.run.append(ledger.run.find(batch["run_id"]))
    shape_of = _shapes(batch["shape"])
    found.faults += [*_width_faults(batch, shape_of), *_value_faults(batch)]
    for shape, rows in shape_of.items() if shapes else ():
        concerned = scan[rows]
        found.shapes[shape].append(np.unique(concerned[concerned >= 0]))


def _file_rows(found: _Batches, *, is_broken: bool = False) -> FileRows:
    return FileRows(
        scan=np.concatenate([np.zeros(0, np.int64), *found.scan]),
        patch=np.concatenate([np.zeros(0, np.int32), *found.patch]),
        recipe=np.concatenate([np.zeros(0, np.int32), *found.recipe]),
        run=np.concatenate([np.zeros(0, np.int32), *found.run]),
        unknown=pa.chunked_array(found.unknown, pa.string()).combine_chunks(),
        shapes={shape: np.concatenate(rows) for shape, rows in found.shapes.items()},
        faults=found.faults,
        is_broken=is_broken,
    )


def _null_rows(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Return which rows hold a null, in a column or inside a list."""
    is_null = np.zeros(len(batch), bool)
    for name in FEATURE_COLUMNS.names:
        column = batch[name]
        if column.null_count:
            is_null |= column.is_null().to_numpy(zero_copy_only=False)
        if name in _LISTS and (items := column.flatten()).null_count:
            is_null[_rows_of(column, items.is_null().to_numpy(zero_copy_only=False))] = True
    return is_null


def _null_columns(batch: pa.RecordBatch) -> str:
    """Return the names of the columns that hold a null."""
    return ", ".join(
        name
        for name in FEATURE_COLUMNS.names
        if batch[name].null_count or (name in _LISTS and batch[name].flatten().null_count)
    )


def _rows_of(lists: pa.Array, is_item: NDArray[np.bool_]) -> Rows:
    """Return the rows that those items of the lists belong to which are marked."""
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64))
    return np.unique(np.searchsorted(ends, np.flatnonzero(is_item), side="right"))


def _shapes(column: pa.Array) -> dict[Shape, Rows]:
    """Return the rows of each shape. Nearly always there is one, so that comes cheap."""
    rows, lengths = np.arange(len(column)), pc.list_value_length(column).to_numpy()
    if not len(column):
        return {}
    if (lengths == lengths[0]).all():
        sizes = column.flatten().to_numpy().reshape(len(column), lengths[0])
        if (sizes == sizes[0]).all():
            return {tuple(sizes[0].tolist()): rows}
    found: dict[Shape, list[int]] = defaultdict(list)
    for row, shape in enumerate(column.to_pylist()):
        found[tuple(shape)].append(row)
    return {shape: np.array(rows) for shape, rows in found.items()}


def _width_faults(batch: pa.RecordBatch, shapes: dict[Shape, Rows]) -> Iterator[Fault]:
    widths = pc.list_value_length(batch["feature"]).to_numpy()
    for shape, rows in shapes.items():
        wrong = rows[widths[rows] != math.prod(shape)]
        if len(wrong):
            ids = batch["scan_id"].take(pa.array(wrong))
            detail = f"{ids[0].as_py()}: {widths[wrong[0]]} values of shape {shape}"
            yield Fault(Kind.WRONG_WIDTH, ids, detail)


def _value_faults(batch: pa.RecordBatch) -> Iterator[Fault]:
    is_finite = np.isfinite(batch["feature"].flatten().to_numpy(zero_copy_only=False))
    if is_finite.all():
        return
    ids = batch["scan_id"].take(pa.array(_rows_of(batch["feature"], ~is_finite)))
    yield Fault(Kind.NOT_FINITE, ids, f"{ids[0].as_py()}: {np.count_nonzero(~is_finite)} values in its file")


def _misplaced(scan: Rows, ledger: Ledger, file: DataFile, ids: pa.Array) -> Iterator[Fault]:
    """Yield where the folder, the log and the ledger say other things of the partition."""
    folders = dict(part.split("=", 1) for part in file.path.split("/")[:-1] if "=" in part)
    read = {key: None if value == _NULL_PARTITION else unquote(value) for key, value in folders.items()}
    if read != file.partition_values:
        detail = f"{file.path}: the log says {file.partition_values}"
        yield Fault(Kind.WRONG_PARTITION, ids, detail, broken=True)
    known = scan[scan >= 0]
    for name, codes in ledger.partitions.items():
        (code,) = codes.find(pa.array([file.partition_values.get(name) or ""]))
        wrong = known[codes.of_row[known] != code]
        if len(wrong):
            names, belongs = ledger.names(wrong), codes.values[codes.of_row[wrong[0]]]
            detail = f"{names[0].as_py()}: its {name} is {belongs!r}, {file.path} is in another folder"
            yield Fault(Kind.WRONG_PARTITION, names, detail)
