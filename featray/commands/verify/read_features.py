"""Read one file of `features`, check its rows, and reduce each row to the numbers that are reconciled."""

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

from featray.commands.verify.data_file import (
    BrokenFileError,
    check_ids,
    check_schema,
    open_data_file,
    read_batches,
)
from featray.commands.verify.expected_cells import ExpectedCells
from featray.commands.verify.findings import Fault, FindingKind
from featray.commands.verify.read_scans import ScansTable
from featray.output.dataset import FEATURES
from featray.schema import FEATURE_COLUMNS, DataFile
from featray.storage.store import Store

Shape = tuple[int, ...]
Rows = NDArray[np.int64]
_LIST_COLUMNS = ("origin", "feature", "shape")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class FeaturesFile:
    """The rows of one file of `features`, and the faults of the file.

    A row that contains a null is among the faults only.

    Attributes:
        scan: int64 (rows,), row number in `ScansTable`; -1 for a scan that is not in the scans table.
        patch: int32 (rows,).
        recipe: int32 (rows,), code of the recipe in `ExpectedCells`; -1 for a recipe that no cell must have.
        unknown_ids: Ids of scans that are not in the scans table.
        shapes: Code of the recipe and shape of a feature → row numbers in `ScansTable`; empty unless
            requested.
        faults: Faults of the file and of its rows.
        is_broken: Whether the rows cannot be read.
    """

    scan: Rows
    patch: NDArray[np.int32]
    recipe: NDArray[np.int32]
    unknown_ids: pa.Array
    shapes: dict[tuple[int, Shape], Rows]
    faults: list[Fault]
    is_broken: bool = False


@dataclass
class _Batches:
    """The same data as in `FeaturesFile`, as lists with one entry per batch of the file."""

    ids: list[pa.Array] = field(default_factory=list)
    scan: list[Rows] = field(default_factory=list)
    patch: list[NDArray[np.int32]] = field(default_factory=list)
    recipe: list[NDArray[np.int32]] = field(default_factory=list)
    unknown_ids: list[pa.Array] = field(default_factory=list)
    shapes: dict[tuple[int, Shape], list[Rows]] = field(default_factory=lambda: defaultdict(list))
    faults: list[Fault] = field(default_factory=list)


def read_features_file(
    store: Store, table_schema: pa.Schema, cells: ExpectedCells, file: DataFile, *, with_shapes: bool
) -> FeaturesFile:
    """Read one file of `features` and check its rows.

    Args:
        store: Store of the output.
        table_schema: Schema of the table `features`.
        cells: The cells that all scans must have.
        file: The file as the log describes it.
        with_shapes: Whether to return the shapes of the features.
    """
    batches = _Batches()
    try:
        parquet = open_data_file(store, FEATURES, file)
        # Partition columns are part of the folder's name; the file does not contain them.
        columns = pa.schema([column for column in table_schema if column.name not in file.partition_values])
        check_schema(parquet.schema_arrow, FEATURE_COLUMNS, columns, file)
        for batch in read_batches(parquet, file):
            rows_by_shape = _add_batch(batches, batch, cells, file)
            if with_shapes:
                _add_shapes(batches, rows_by_shape)
    except BrokenFileError as broken:
        return _join_batches(_Batches(faults=[broken.fault]), is_broken=True)
    ids = pa.chunked_array(batches.ids, pa.string()).combine_chunks()
    batches.faults += check_ids(file, ids)
    batches.faults += _check_partition(file, ids, cells.scans)
    return _join_batches(batches)


def _add_batch(
    batches: _Batches, batch: pa.RecordBatch, cells: ExpectedCells, file: DataFile
) -> dict[Shape, Rows]:
    """Check one batch and add its rows; return the numbers of these rows by shape of the feature."""
    batches.ids.append(batch["scan_id"])
    is_null = _find_null_rows(batch)
    if is_null.any():
        ids = batch["scan_id"].filter(pa.array(is_null))
        detail = f"{file.path}: {', '.join(_find_null_columns(batch))}"
        batches.faults.append(Fault(FindingKind.NULL_VALUE, ids, detail))
        batch = batch.filter(pa.array(~is_null))
    encoded = batch["scan_id"].dictionary_encode()
    scan_of_id = cells.scans.find_rows(encoded.dictionary)
    scan = scan_of_id[encoded.indices.to_numpy()]
    batches.scan.append(scan)
    batches.unknown_ids.append(encoded.dictionary.filter(pa.array(scan_of_id < 0)))
    batches.patch.append(batch["patch"].to_numpy().astype(np.int32))
    batches.recipe.append(cells.find_recipe_codes(batch["recipe"]))
    rows_by_shape = _group_by_shape(batch["shape"])
    batches.faults += [*_check_widths(batch, rows_by_shape), *_check_values(batch)]
    return rows_by_shape


def _add_shapes(batches: _Batches, rows_by_shape: dict[Shape, Rows]) -> None:
    """Add the shapes of the last batch."""
    all_scans, all_recipes = batches.scan[-1], batches.recipe[-1]
    for shape, rows in rows_by_shape.items():
        scan, recipe = all_scans[rows], all_recipes[rows]
        for code in np.unique(recipe).tolist():
            batches.shapes[code, shape].append(np.unique(scan[(recipe == code) & (scan >= 0)]))


def _join_batches(batches: _Batches, *, is_broken: bool = False) -> FeaturesFile:
    return FeaturesFile(
        scan=np.concatenate([np.zeros(0, np.int64), *batches.scan]),
        patch=np.concatenate([np.zeros(0, np.int32), *batches.patch]),
        recipe=np.concatenate([np.zeros(0, np.int32), *batches.recipe]),
        unknown_ids=pa.chunked_array(batches.unknown_ids, pa.string()).combine_chunks(),
        shapes={key: np.concatenate(rows) for key, rows in batches.shapes.items()},
        faults=batches.faults,
        is_broken=is_broken,
    )


def _find_null_rows(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Return for each row whether a column, or an item of a list, is null."""
    is_null = np.zeros(len(batch), bool)
    for name in FEATURE_COLUMNS.names:
        column = batch[name]
        if column.null_count:
            is_null |= column.is_null().to_numpy(zero_copy_only=False)
        if name in _LIST_COLUMNS and (items := column.flatten()).null_count:
            is_null[_find_rows_of_items(column, items.is_null().to_numpy(zero_copy_only=False))] = True
    return is_null


def _find_null_columns(batch: pa.RecordBatch) -> list[str]:
    """Return the names of the columns that contain a null."""
    return [
        name
        for name in FEATURE_COLUMNS.names
        if batch[name].null_count or (name in _LIST_COLUMNS and batch[name].flatten().null_count)
    ]


def _find_rows_of_items(lists: pa.Array, is_selected: NDArray[np.bool_]) -> Rows:
    """Return the rows whose lists contain a selected item.

    Args:
        lists: (rows,), lists of items.
        is_selected: (items of all lists,).
    """
    ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64))
    return np.unique(np.searchsorted(ends, np.flatnonzero(is_selected), side="right"))


def _group_by_shape(column: pa.Array) -> dict[Shape, Rows]:
    """Return the row numbers of each shape. Nearly all batches have a single shape, which is fast."""
    rows, lengths = np.arange(len(column)), pc.list_value_length(column).to_numpy()
    if not len(column):
        return {}
    if (lengths == lengths[0]).all():
        sizes = column.flatten().to_numpy().reshape(len(column), lengths[0])
        if (sizes == sizes[0]).all():
            return {tuple(sizes[0].tolist()): rows}
    rows_by_shape: dict[Shape, list[int]] = defaultdict(list)
    for row, shape in enumerate(column.to_pylist()):
        rows_by_shape[tuple(shape)].append(row)
    return {shape: np.array(rows) for shape, rows in rows_by_shape.items()}


def _check_widths(batch: pa.RecordBatch, rows_by_shape: dict[Shape, Rows]) -> Iterator[Fault]:
    widths = pc.list_value_length(batch["feature"]).to_numpy()
    for shape, rows in rows_by_shape.items():
        wrong = rows[widths[rows] != math.prod(shape)]
        if len(wrong):
            ids = batch["scan_id"].take(pa.array(wrong))
            detail = f"{ids[0].as_py()}: {widths[wrong[0]]} values of shape {shape}"
            yield Fault(FindingKind.WRONG_WIDTH, ids, detail)


def _check_values(batch: pa.RecordBatch) -> Iterator[Fault]:
    is_finite = np.isfinite(batch["feature"].flatten().to_numpy(zero_copy_only=False))
    if is_finite.all():
        return
    rows = _find_rows_of_items(batch["feature"], ~is_finite)
    ids, patches = [batch[name].take(pa.array(rows)) for name in ("scan_id", "patch")]
    values = batch["feature"][int(rows[0])].values.to_numpy(zero_copy_only=False)
    count = np.count_nonzero(~np.isfinite(values))
    detail = f"{ids[0].as_py()}: {count} of {len(values)} values of patch {patches[0].as_py()}"
    yield Fault(FindingKind.NOT_FINITE, ids, detail)


def _check_partition(file: DataFile, ids: pa.Array, scans: ScansTable) -> Iterator[Fault]:
    """Compare the partition of a file in its path, in the log, and in the scans table.

    Args:
        file: The file as the log describes it.
        ids: The scan_id of every row.
        scans: All scans.
    """
    folders = dict(part.split("=", 1) for part in file.path.split("/")[:-1] if "=" in part)
    in_path = {name: None if text == _NULL_PARTITION else unquote(text) for name, text in folders.items()}
    if in_path != file.partition_values:
        detail = f"{file.path}: the log says {file.partition_values}"
        yield Fault(FindingKind.WRONG_PARTITION, ids, detail, removes_file=True)
    rows = np.unique(scans.find_rows(pc.unique(ids.drop_null())))
    rows = rows[rows >= 0]
    for name, column in scans.partitions.items():
        (code,) = column.find_codes(pa.array([file.partition_values.get(name) or ""]))
        wrong = rows[column.codes[rows] != code]
        if len(wrong):
            wrong_ids, expected = scans.get_ids(wrong), column.values[column.codes[wrong[0]]]
            detail = (
                f"{wrong_ids[0].as_py()}: its {name} is {expected!r}, but {file.path} is in another folder"
            )
            yield Fault(FindingKind.WRONG_PARTITION, wrong_ids, detail)
