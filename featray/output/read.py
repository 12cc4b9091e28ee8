"""Read back: an output, a layer and what is wanted of it in, `Features` of exactly one version out.

Only the layer's files are opened, of these only those that may hold a wanted scan, and of each only the
wanted columns. The values go file by file to their places in one array, so that besides it little more than
the files in hand are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featray.errors import FeatrayError
from featray.output.dataset import FEATURES, Snapshot
from featray.output.features import (
    FEATURE,
    KEYS,
    Features,
    Flags,
    Floats,
    Indices,
    Shapes,
    empty_values,
    list_column,
    put,
    sorted_order,
    values_of,
)
from featray.output.query import (
    Output,
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
"""Files whose small columns are read at once: on an object store, waiting is most of it."""
_IN_HAND_BYTES = 128 * 2**20
"""Size of all files whose values are being read at one moment, unless one alone is larger."""
_CHUNK_VALUES = 2**20
"""Values that are decoded at once: of a whole file they would take several times their own memory."""


def read(
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
    """Return one layer's features, as of one commit, sorted by scan_id and patch.

    A version that is superseded and deleted while it is read, as with `keep_versions_days: 0` during a
    refresh, is given up for the newest; a version that is asked for by number never is.

    Args:
        output: Folder or URL of an output, the config (.yaml) that names it, or a `Dataset`.
        layer: Its name, with `/` or `.`.
        version: Version of the output; None for the newest.
        scan_ids: Only these scans, in whatever order; those without rows are in `.missing`.
        columns: Only these columns of `features` in `.table` (scan_id and patch are always there). Without
            `feature` among them no values are read, and there is no `.array`.
        scans: Columns of the table `scans` to add to each row. One that `features` has too, such as
            `shape`, becomes `scan_shape`.
        recipe: Only rows of this recipe id; needed while a refresh is half done and there are two.
        storage_options: fsspec options of `output`; None for those of the config, if it is one.

    Raises:
        ConfigError: There is no such output or version.
        UsageError: No such layer, column or recipe, or rows of several recipes.
        StorageError: The store does not answer, or refreshes kept outrunning this reader.
    """
    dataset = open_output(output, storage_options)
    ids = None if scan_ids is None else sort_scan_ids(scan_ids)

    def once(snapshot: Snapshot) -> Features:
        return _load(select(snapshot, layer, ids, columns, scans, recipe))

    return read_one_version(dataset, version, once)


def _load(selection: Selection) -> Features:
    parts = _parts(selection)
    rows = pa.concat_tables(parts)
    kept, recipe = _kept(selection, rows)
    rows = rows if kept is None else rows.filter(pa.array(kept))
    order = sorted_order(rows)
    if order is not None:
        rows = rows.select([name for name in rows.column_names if name != FEATURE]).take(pa.array(order))
    values, shapes = None, None
    if FEATURE in selection.columns:
        shapes = Shapes(rows["shape"], () if len(rows) else _sample_shape(selection))
        values, column = _values(selection, parts, kept, order, shapes)
        others = [name for name in rows.column_names if name != FEATURE]
        rows = rows.select(others).append_column(FEATURE, column)
    missing = _missing(selection.scan_ids, rows["scan_id"])
    table = rows.select(selection.columns)
    if selection.joined:
        table = join_scans(table, selection.scans())
    version = selection.snapshot.version
    return Features(selection.layer, version, recipe, table, missing, values=values, shapes=shapes)


def _parts(selection: Selection) -> list[pa.Table]:
    """Return all rows of each file, without the values unless they can stay where they are then."""
    columns = dict.fromkeys((*KEYS, "shape", "recipe", *selection.columns))
    is_all = selection.scan_ids is None and selection.recipe is None
    if len(selection.files) != 1 or not is_all:
        columns.pop(FEATURE, None)
    if not selection.files:
        schema = selection.snapshot.schema(FEATURES)
        return [pa.schema([schema.field(name) for name in columns]).empty_table()]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(lambda file: selection.rows(file, list(columns)), selection.files))


def _kept(selection: Selection, rows: pa.Table) -> tuple[Flags | None, str | None]:
    """Return which rows are wanted, None for all, and their recipe, None when there are none.

    One look at all rows: a filter of each file would hash half a million ids once per file.
    """
    wanted, kept = rows.select(["scan_id", "recipe"]), None
    if selection.scan_ids is not None:
        kept = pc.is_in(rows["scan_id"], value_set=selection.scan_ids).to_numpy()
        wanted = wanted.filter(pa.array(kept))
    recipe = resolve_recipe(_recipes(wanted), selection.recipe, selection.layer)
    if selection.recipe is not None:
        of_recipe = pc.equal(rows["recipe"], selection.recipe).to_numpy()
        kept = of_recipe if kept is None else of_recipe & kept
    return kept, recipe


def _recipes(rows: pa.Table) -> dict[str, int]:
    """Return recipe id → scans."""
    counted = rows.group_by("recipe").aggregate([("scan_id", "count_distinct")])
    return dict(
        zip(counted["recipe"].to_pylist(), counted["scan_id_count_distinct"].to_pylist(), strict=True)
    )


def _values(
    selection: Selection,
    parts: Sequence[pa.Table],
    kept: Flags | None,
    order: Indices | None,
    shapes: Shapes,
) -> tuple[Floats, pa.ChunkedArray]:
    """Return the numbers of all wanted rows, flat and as a list column over the same memory."""
    if order is None and FEATURE in parts[0].column_names:
        column = parts[0][FEATURE]
        if (values := values_of(column, shapes)) is not None:
            return values, column
    values = _filled(selection, _places(parts, kept, order), shapes)
    return values, list_column(values, shapes)


def _places(parts: Sequence[pa.Table], kept: Flags | None, order: Indices | None) -> list[Indices]:
    """Return, for each file, the places that its rows have in the answer; -1 for those not wanted."""
    count = sum(map(len, parts))
    rows = np.arange(count) if kept is None else np.flatnonzero(kept)
    places = np.full(count, -1)
    places[rows if order is None else rows[order]] = np.arange(len(rows))
    return np.split(places, np.cumsum([len(part) for part in parts[:-1]]))


def _filled(selection: Selection, places: Sequence[Indices], shapes: Shapes) -> Floats:
    """Return the numbers of all wanted rows in one new array, read file by file.

    Raises:
        FileNotFoundError: A file has been deleted since.
        FeatrayError: A file is damaged.
        StorageError: The store does not answer.
    """
    values, store = empty_values(shapes), selection.snapshot.store

    def fill(file: DataFile, places: Indices) -> None:
        wanted = places >= 0
        if wanted.any():
            at_once = max(1, _CHUNK_VALUES // max(1, int(shapes.lengths[places[wanted]].max())))
            # Tried again after an error that passes, it puts the same numbers to the same places.
            store.run_operation(lambda: _fill(values, shapes, places, selection.values(file, at_once)))

    largest = max((file.size for file in selection.files), default=1)
    with ThreadPoolExecutor(min(_READERS, max(1, _IN_HAND_BYTES // largest))) as pool:
        list(pool.map(fill, selection.files, places))
    values.flags.writeable = False
    return values


def _fill(values: Floats, shapes: Shapes, places: Indices, chunks: Iterable[pa.ListArray]) -> None:
    first = 0
    for chunk in chunks:
        place = places[first : first + len(chunk)]
        first += len(chunk)
        if (place < 0).any():
            chunk, place = chunk.filter(pa.array(place >= 0)), place[place >= 0]
        put(values, shapes, place, chunk)
    if first != len(places):
        raise FeatrayError("a file has lost rows while it was read; what else writes to this output?")


def _sample_shape(selection: Selection) -> tuple[int, ...]:
    """Return the shape of the layer's first value, for an answer that has none."""
    files = selection.snapshot.files(FEATURES)
    file = next(file for file in files if file.partition_values["layer"] == selection.layer)
    return tuple(selection.rows(file, ["shape"])["shape"][0].as_py())


def _missing(scan_ids: pa.Array | None, found: pa.ChunkedArray) -> list[str]:
    if scan_ids is None:
        return []
    there = pc.is_in(scan_ids, value_set=pc.unique(found))
    missing: list[str] = scan_ids.filter(pc.invert(there)).to_pylist()
    return missing
