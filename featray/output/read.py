"""Read features: an output, a layer and a user's request in, `Features` of exactly one version out.

Only files of the layer that may contain a requested scan are opened, and of these only the requested columns
are read. Several files are read in parallel, and their values are copied to their positions in one array. So
apart from this array, only the files that are being read are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featray.errors import FeatrayError
from featray.output.dataset import FEATURES
from featray.output.features import (
    FEATURE,
    KEYS,
    Features,
    Flags,
    Floats,
    Indices,
    Shapes,
    allocate_values,
    find_sort_order,
    make_list_column,
    scatter_values,
    view_values,
)
from featray.output.query import (
    Output,
    ReadRequest,
    Selection,
    join_scans,
    open_output,
    read_one_version,
    resolve_recipe,
    select,
    sort_scan_ids,
)
from featray.schema import DataFile

_READERS = 8
"""Number of files that are read in parallel; on an object store, most of the time is spent waiting."""
_MAX_PARALLEL_BYTES = 128 * 2**20
"""Limit for the total size of files that are read in parallel. A larger file is read alone."""
_BATCH_VALUES = 2**20
"""Number of values to decode at once, because decoding needs several times the memory of its result."""


def read(  # noqa: PLR0913  # public as featray.read
    output: Output,
    layer: str,
    version: int | None = None,
    *,
    scan_ids: Iterable[str] | None = None,
    columns: Sequence[str] | None = None,
    scans: Sequence[str] = (),
    recipe: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Features:
    """Return the features of one layer as of one commit, sorted by scan_id and patch.

    If a refresh supersedes and deletes the newest version while it is read (`keep_versions_days: 0`), reading
    starts again with the version that is newest then. A version given by number is never replaced.

    Args:
        output: Folder or URL of an output, a configuration file (.yaml) that names it, or a `Dataset`.
        layer: Name of the layer, with `/` or `.`.
        version: Version of the output; None for the newest.
        scan_ids: Ids of the scans to read, in any order; None for all scans. `.missing` lists the ids without
            rows.
        columns: Columns of `features` in `.table`; None for all. scan_id and patch are always included.
            Without `feature`, no values are read, and `.array` raises an error.
        scans: Columns of the table `scans` to add to each row. A column that `features` has too gets the
            prefix `scan_`, such as `scan_shape`.
        recipe: Recipe id of the rows to read. Required if the scans have rows of several recipes, as during a
            refresh.
        storage_options: fsspec options of `output`; None for those of the configuration file, if it is one.

    Raises:
        ConfigError: The output or the version does not exist.
        UsageError: The layer, a column or the recipe does not exist, or the scans have rows of several
            recipes.
        StorageError: The store does not answer, or each version was superseded before it was read.
    """
    dataset = open_output(output, storage_options)
    ids = None if scan_ids is None else sort_scan_ids(scan_ids)
    request = ReadRequest(layer, ids, columns, scans, recipe)
    return read_one_version(dataset, version, lambda snapshot: _load_features(select(snapshot, request)))


def _load_features(selection: Selection) -> Features:
    parts = _read_rows_of_files(selection)
    rows = pa.concat_tables(parts)
    mask, recipe = _select_rows(selection, rows)
    rows = rows if mask is None else rows.filter(pa.array(mask))
    order = find_sort_order(rows)
    if order is not None:
        rows = rows.select([name for name in rows.column_names if name != FEATURE]).take(pa.array(order))
    values, shapes = None, None
    if FEATURE in selection.columns:
        shapes = Shapes(rows["shape"], () if len(rows) else _read_sample_shape(selection))
        values, column = _load_values(selection, parts, mask, order, shapes)
        other_columns = [name for name in rows.column_names if name != FEATURE]
        rows = rows.select(other_columns).append_column(FEATURE, column)
    missing = _list_missing(selection.scan_ids, rows["scan_id"])
    table = rows.select(selection.columns)
    if selection.scan_columns:
        table = join_scans(table, selection.read_scan_columns())
    version = selection.snapshot.version
    return Features(selection.layer, version, recipe, table, missing, values=values, shapes=shapes)


def _read_rows_of_files(selection: Selection) -> list[pa.Table]:
    """Return all rows of each file.

    The values are included only if all rows of a single file are requested, because then they can be used
    without a copy.
    """
    columns = dict.fromkeys((*KEYS, "shape", "recipe", *selection.columns))
    needs_all_rows = selection.scan_ids is None and selection.recipe is None
    if len(selection.files) != 1 or not needs_all_rows:
        columns.pop(FEATURE, None)
    if not selection.files:
        schema = selection.snapshot.schema(FEATURES)
        return [pa.schema([schema.field(name) for name in columns]).empty_table()]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda file: selection.read_rows(file, list(columns)), selection.files))


def _select_rows(selection: Selection, rows: pa.Table) -> tuple[Flags | None, str | None]:
    """Return a mask of the requested rows (None for all rows), and their recipe (None without rows).

    The ids are looked up once in the rows of all files. A filter per file would hash all requested ids
    (perhaps half a million) once per file.
    """
    requested, mask = rows.select(["scan_id", "recipe"]), None
    if selection.scan_ids is not None:
        mask = pc.is_in(rows["scan_id"], value_set=selection.scan_ids).to_numpy()
        requested = requested.filter(pa.array(mask))
    recipe = resolve_recipe(_count_recipes(requested), selection.recipe, selection.layer)
    if selection.recipe is not None:
        has_recipe = pc.equal(rows["recipe"], selection.recipe).to_numpy()
        mask = has_recipe if mask is None else has_recipe & mask
    return mask, recipe


def _count_recipes(rows: pa.Table) -> dict[str, int]:
    """Return recipe id → number of scans."""
    counted = rows.group_by("recipe").aggregate([("scan_id", "count_distinct")])
    return dict(
        zip(counted["recipe"].to_pylist(), counted["scan_id_count_distinct"].to_pylist(), strict=True)
    )


def _load_values(
    selection: Selection,
    parts: Sequence[pa.Table],
    mask: Flags | None,
    order: Indices | None,
    shapes: Shapes,
) -> tuple[Floats, pa.ChunkedArray]:
    """Return the numbers of all requested rows as a flat array, and as a list column over the same memory."""
    if order is None and FEATURE in parts[0].column_names:
        column = parts[0][FEATURE]
        if (values := view_values(column, shapes)) is not None:
            return values, column
    values = _read_values(selection, _compute_positions(parts, mask, order), shapes)
    return values, make_list_column(values, shapes)


def _compute_positions(parts: Sequence[pa.Table], mask: Flags | None, order: Indices | None) -> list[Indices]:
    """Return for each file the row numbers in the result of its rows; -1 for rows that are not requested."""
    count = sum(map(len, parts))
    rows = np.arange(count) if mask is None else np.flatnonzero(mask)
    positions = np.full(count, -1)
    positions[rows if order is None else rows[order]] = np.arange(len(rows))
    return np.split(positions, np.cumsum([len(part) for part in parts[:-1]]))


def _read_values(selection: Selection, positions: Sequence[Indices], shapes: Shapes) -> Floats:
    """Return the numbers of all requested rows in a new flat array.

    Args:
        selection: What to read.
        positions: For each file, the row numbers in the result of its rows; -1 for rows to leave out.
        shapes: Shapes of the rows of the result.

    Raises:
        FileNotFoundError: A file was deleted after the snapshot was opened.
        FeatrayError: A file is damaged.
        StorageError: The store does not answer.
    """
    values, store = allocate_values(shapes), selection.snapshot.store

    def read_file(file: DataFile, positions: Indices) -> None:
        is_requested = positions >= 0
        if is_requested.any():
            longest = int(shapes.lengths[positions[is_requested]].max())
            rows_per_batch = max(1, _BATCH_VALUES // max(1, longest))
            # This can be repeated after a transient error: it writes the same numbers to the same positions.
            store.run_operation(
                lambda: _scatter_batches(
                    values, shapes, positions, selection.iter_batches(file, [FEATURE], rows_per_batch)
                )
            )

    largest = max((file.size for file in selection.files), default=1)
    with ThreadPoolExecutor(min(_READERS, max(1, _MAX_PARALLEL_BYTES // largest))) as pool:
        list(pool.map(read_file, selection.files, positions))
    values.flags.writeable = False
    return values


def _scatter_batches(
    values: Floats, shapes: Shapes, positions: Indices, batches: Iterable[pa.RecordBatch]
) -> None:
    """Copy the numbers of one file to their positions in a flat array.

    Args:
        values: Flat array for the numbers of the result; it is changed.
        shapes: Shapes of the rows of the result.
        positions: Row number in the result of each row of the file; -1 for rows to leave out.
        batches: The column `feature` of all rows of the file.

    Raises:
        FeatrayError: The number of rows in the file has changed, or a row does not match its shape.
    """
    first = 0
    for batch in batches:
        batch_positions = positions[first : first + len(batch)]
        first += len(batch)
        is_requested = batch_positions >= 0
        if not is_requested.all():
            batch, batch_positions = batch.filter(pa.array(is_requested)), batch_positions[is_requested]
        scatter_values(values, shapes, batch_positions, batch.column(FEATURE))
    if first != len(positions):
        raise FeatrayError(
            "a file has lost rows while it was read; check whether another program writes to this output"
        )


def _read_sample_shape(selection: Selection) -> tuple[int, ...]:
    """Return the shape of the layer's first value, for a result without rows."""
    files = selection.snapshot.files(FEATURES)
    file = next(file for file in files if file.partition_values["layer"] == selection.layer)
    return tuple(selection.read_rows(file, ["shape"])["shape"][0].as_py())


def _list_missing(scan_ids: pa.Array | None, found_ids: pa.ChunkedArray) -> list[str]:
    """Return the requested ids that have no row; empty if all scans are requested."""
    if scan_ids is None:
        return []
    is_found = pc.is_in(scan_ids, value_set=pc.unique(found_ids))
    missing: list[str] = scan_ids.filter(pc.invert(is_found)).to_pylist()
    return missing
