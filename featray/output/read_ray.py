"""Read features in Ray: an output and a layer in, a Ray Dataset over the files of exactly one version out.

The driver reads the log and the requested columns of `scans`. Ray tasks read the values, one file at a time.
Apart from `engines/ray`, this is the only module that imports Ray.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads

from featray.output.dataset import FEATURES
from featray.output.features import FEATURE, Shapes, flatten_values, make_matrix
from featray.output.ledger import LEDGER_ROW_COLUMNS, find_stored_cells
from featray.output.query import (
    Output,
    ReadRequest,
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

_MAX_BLOCKS = 2000
"""Maximum number of blocks of file names. A task reads the files of one block, one after the other."""
_INTEGER_LISTS = {"origin", "shape"}
"""Columns with lists of integers. The lists of a column have the same length unless inputs differ in rank."""


def read_ray(  # noqa: PLR0913  # public as featray.read_ray
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
    """Return the features of one layer as of one commit, as a lazy `ray.data.Dataset`.

    The order of rows is not defined. `feature` is a tensor column: in a row, it is a float32 array with the
    shape of the value; in a batch, it is (rows, *shape). If values differ in shape, each row keeps its shape.
    Workers open the same files as this driver, so a local output must be on a file system that all nodes
    share.

    The dataset can be read as long as the files of its version exist. If a refresh may run at the same time,
    let the output keep superseded files for longer than you read (`output.keep_versions_days`).

    Args:
        output: Folder or URL of an output, a configuration file (.yaml) that names it, or a `Dataset`.
        layer: Name of the layer, with `/` or `.`.
        version: Version of the output; None for the newest.
        scan_ids: Ids of the scans to read; None for all scans.
        columns: Columns of `features` to return; None for all. scan_id and patch are always included.
        scans: Columns of the table `scans` to add to each row, named as by `featray.read`.
        recipe: Recipe id of the rows to read. Required if the scans have rows of several recipes.
        storage_options: fsspec options of `output`; None for those of the configuration file, if it is one.

    Raises:
        ConfigError: The output or the version does not exist.
        UsageError: The layer, a column or the recipe does not exist, or the scans have rows of several
            recipes.
        StorageError: The store does not answer.
    """
    dataset = open_output(output, storage_options)
    ids = None if scan_ids is None else sort_scan_ids(scan_ids)
    request = ReadRequest(layer, ids, columns, scans, recipe)
    return read_one_version(dataset, version, lambda snapshot: _make_dataset(select(snapshot, request)))


def _make_dataset(selection: Selection) -> RayDataset:
    import ray

    resolve_recipe(_count_recipes(selection), selection.recipe, selection.layer)
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
        where=_make_filter(selection),
        scans=ray.put(selection.read_scan_columns()) if selection.scan_columns else None,
    )
    file_list = ray.data.from_items(files, override_num_blocks=min(len(files), _MAX_BLOCKS))
    return file_list.map_batches(task, batch_size=1, batch_format="pyarrow")


def _make_filter(selection: Selection) -> pads.Expression | None:
    """Return the filter that tasks apply to the rows of each file; None for all rows."""
    ids = None if selection.scan_ids is None else pads.field("scan_id").isin(selection.scan_ids)
    if selection.recipe is None:
        return ids
    recipe = pads.field("recipe") == selection.recipe
    return recipe if ids is None else ids & recipe


def _count_recipes(selection: Selection) -> dict[str, int]:
    """Return recipe id → number of requested scans with features. Reads `scans`, and no file of features."""
    rows = selection.read_scans([name for name in LEDGER_ROW_COLUMNS if name != "scan_id"])
    return find_stored_cells(selection.snapshot, rows).count_recipes().get(selection.layer, {})


def _read_files(
    files: pa.Table,
    *,
    schema: pa.Schema,
    columns: Sequence[str],
    where: pads.Expression | None,
    scans: Any,
) -> Iterator[pa.Table]:
    """Yield the requested rows of each file. Runs in a Ray task.

    Args:
        files: Table with the columns `fragment` (pickled) and `rows`.
        schema: Schema of `features`.
        columns: Columns to return.
        where: Filter of the rows; None for all rows.
        scans: Ray reference to a table with scan_id and the columns of scans to add; None for no columns.
    """
    import ray

    needed = list(dict.fromkeys((*columns, "shape")))
    for file in files.to_pylist():
        fragment = pickle.loads(file["fragment"])
        read_rows = partial(read_file_rows, fragment, schema, needed, where, file["rows"])
        rows = retry.run_with_retries(read_rows, retry.OUTPUT_DEADLINE_S)
        result = _convert_to_tensors(rows).select(columns)
        if len(result):
            yield result if scans is None else join_scans(result, ray.get(scans))


def _convert_to_tensors(rows: pa.Table) -> pa.Table:
    """Return rows with lists of numbers as tensors, which Ray gives to users as NumPy arrays."""
    from ray.data.extensions import ArrowTensorArray, ArrowVariableShapedTensorArray

    columns = {name: rows[name] for name in rows.column_names}
    if FEATURE in columns:
        shapes = Shapes(rows["shape"])
        values = flatten_values(rows[FEATURE], shapes)
        if shapes.common is None:
            columns[FEATURE] = ArrowVariableShapedTensorArray.from_numpy(shapes.split(values))
        elif shapes.common:
            columns[FEATURE] = ArrowTensorArray.from_numpy(values.reshape(len(rows), *shapes.common))
        else:
            columns[FEATURE] = pa.array(values)
    for name in _INTEGER_LISTS & columns.keys():
        matrix = make_matrix(columns[name])
        if matrix is not None and matrix.shape[1]:
            columns[name] = ArrowTensorArray.from_numpy(matrix)
    return pa.table(columns)
