"""Read back inside Ray: an output and a layer in, a Ray Dataset over exactly one version's files out.

The driver reads the log and chosen columns of `scans`; values are read by tasks, one file at a time.
The only file that imports Ray beside the engine's.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from featray.output.dataset import FEATURES, Snapshot
from featray.output.features import FEATURE, Shapes, flat_values, matrix_of
from featray.output.query import (
    Output,
    Selection,
    join_scans,
    open_output,
    read_file_rows,
    read_one_version,
    resolve_recipe,
    select,
    sort_scan_ids,
)
from featray.storage import retry

if TYPE_CHECKING:
    from ray.data import Dataset as RayDataset

_MOST_BLOCKS = 2000
"""Blocks of file names; a task takes one block, file by file."""
_INTEGERS = {"origin", "shape"}
"""Columns that are lists of integers, and of one length unless inputs differ in rank."""


def read_ray(
    output: Output,
    layer: str,
    version: int | None = None,
    *,
    scan_ids: Iterable[str] | None = None,
    columns: Sequence[str] | None = None,
    scans: Sequence[str] = (),
    recipe: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> RayDataset:
    """Return one layer's features, as of one commit, as a `ray.data.Dataset`; nothing is read yet.

    Rows come file by file, in no promised order. `feature` is a tensor column: a row's value is a float32
    array in its own shape, a batch's is (rows, *shape); where shapes differ, each row keeps its own.
    Workers open the same files as this driver: a local output must be on a file system that all share.

    The version stays what it is for as long as its files do. Where a refresh may run meanwhile, let the
    output keep superseded files for longer than you read (`output.keep_versions_days`).

    Args:
        output: Folder or URL of an output, the config (.yaml) that names it, or a `featray` dataset.
        layer: Its name, with `/` or `.`.
        version: Version of the output; None for the newest.
        scan_ids: Only these scans.
        columns: Only these columns of `features` (scan_id and patch are always there).
        scans: Columns of the table `scans` to add to each row, named as by `featray.read`.
        recipe: Only rows of this recipe id.
        storage_options: fsspec options of `output`; None for those of the config, if it is one.

    Raises:
        ConfigError: There is no such output or version.
        UsageError: No such layer, column or recipe, or values of several recipes.
        StorageError: The store does not answer.
    """
    dataset = open_output(output, storage_options)
    ids = None if scan_ids is None else sort_scan_ids(scan_ids)

    def once(snapshot: Snapshot) -> RayDataset:
        return _lazily(select(snapshot, layer, ids, columns, scans, recipe))

    return read_one_version(dataset, version, once)


def _lazily(selection: Selection) -> RayDataset:
    import ray

    resolve_recipe(_recipes(selection), selection.recipe, selection.layer)
    schema = selection.snapshot.schema(FEATURES)
    fragments = selection.snapshot.make_fragments(FEATURES, selection.files)
    files = [
        {"fragment": pickle.dumps(fragment), "rows": file.rows}
        for fragment, file in zip(fragments, selection.files, strict=True)
    ]
    if not files:
        return ray.data.from_arrow(
            pa.schema([schema.field(name) for name in selection.columns]).empty_table()
        )
    task = partial(
        _read_files,
        schema=schema,
        columns=selection.columns,
        where=_where(selection),
        scans=ray.put(selection.scans()) if selection.joined else None,
    )
    listed = ray.data.from_items(files, override_num_blocks=min(len(files), _MOST_BLOCKS))
    return listed.map_batches(task, batch_size=1, batch_format="pyarrow")


def _where(selection: Selection) -> pads.Expression | None:
    """Return the filter of rows that a task applies to each file."""
    ids = None if selection.scan_ids is None else pads.field("scan_id").isin(selection.scan_ids)
    if selection.recipe is None:
        return ids
    recipe = pads.field("recipe") == selection.recipe
    return recipe if ids is None else ids & recipe


def _recipes(selection: Selection) -> dict[str, int]:
    """Return recipe id → wanted scans that have features, from the ledger: no file of values is opened."""
    rows = selection.read_scans(["recipe"], pads.field("status") == "ok")
    return dict(Counter(rows["recipe"].to_pylist()).most_common())


def _read_files(
    files: pa.Table,
    *,
    schema: pa.Schema,
    columns: Sequence[str],
    where: pads.Expression | None,
    scans: Any,
) -> Iterator[pa.Table]:
    """Yield the wanted rows of each file; runs in a task.

    Args:
        files: Columns `fragment` (pickled) and `rows`.
        schema: Of `features`.
        columns: Of the answer.
        where: Filter of the rows.
        scans: Reference to a table with scan_id and the columns to add; None for none.
    """
    import ray

    needed = list(dict.fromkeys((*columns, "shape")))
    for file in files.to_pylist():
        fragment = pickle.loads(file["fragment"])
        act = partial(read_file_rows, fragment, schema, needed, where, file["rows"])
        rows = retry.run_with_retries(act, retry.OUTPUT_DEADLINE_S)
        answer = _with_tensors(rows).select(columns)
        if len(answer):
            yield answer if scans is None else join_scans(answer, ray.get(scans))


def _with_tensors(rows: pa.Table) -> pa.Table:
    """Return rows with lists of numbers as tensors, which reach the user as NumPy arrays."""
    from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

    columns = {name: rows[name] for name in rows.column_names}
    if FEATURE in columns:
        shapes = Shapes(rows["shape"])
        values = flat_values(rows[FEATURE], shapes)
        if shapes.common is None:
            columns[FEATURE] = ArrowVariableShapedTensorArray.from_numpy(shapes.split(values))
        elif shapes.common:
            columns[FEATURE] = ArrowTensorArray.from_numpy(values.reshape(len(rows), *shapes.common))
        else:
            columns[FEATURE] = pa.array(values)
    for name in _INTEGERS & columns.keys():
        matrix = matrix_of(columns[name])
        if matrix is not None and matrix.shape[1]:
            columns[name] = ArrowTensorArray.from_numpy(matrix)
    return pa.table(columns)
