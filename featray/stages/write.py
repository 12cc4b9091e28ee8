"""Write: extracted scans in; out come one Parquet file per layer and partition, and a receipt.

The files are not part of a table until `stages/commit.py` commits the receipt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featray.output.dataset import FEATURES, Dataset
from featray.schema import FEATURE_COLUMNS, Receipt, ScanRecord, UnitsSeen

MAX_BYTES = 256 * 2**20
"""Maximum size in bytes of the rows that are copied, sorted and written at once, unless one scan has more."""
MAX_UNITS = 2**16
"""Maximum number of units of a layer for which active units are recorded. Larger layers are whole feature
maps, whose dead units are of no interest."""


def write(
    extracted: pa.Table,
    dataset: Dataset,
    partition_by: Sequence[str],
    recipes: Mapping[str, str],
    run_id: str,
) -> Receipt:
    """Write the features of all due layers to files, and return the receipt to commit.

    Args:
        extracted: Table with the schema `schema.EXTRACTED`.
        dataset: The output.
        partition_by: Partition columns: `layer`, then columns of `scans`.
        recipes: Layer → its recipe id.
        run_id: The run that writes.

    Raises:
        StorageError: The store does not answer, or no space is left.
    """
    receipt = Receipt((), ())
    for part in _split_by_size(extracted):
        records = tuple(ScanRecord.from_json(text) for text in part["record"].to_pylist())
        features = pa.Table.from_struct_array(pc.list_flatten(part["features"]).combine_chunks())
        layers = features["layer"].combine_chunks().dictionary_encode()
        ids = pa.array([recipes[layer] for layer in layers.dictionary.to_pylist()], pa.string())
        rows = features.append_column("recipe", ids.take(layers.indices))
        rows = rows.append_column("run_id", pa.repeat(run_id, len(rows)))
        files = tuple(
            dataset.write_file(
                FEATURES, partition, rows.select(FEATURE_COLUMNS.names).cast(FEATURE_COLUMNS), run_id
            )
            for partition, rows in _split_by_partition(rows, records, partition_by)
        )
        units = tuple(_find_active_units(features))
        receipt = Receipt(receipt.files + files, receipt.records + records, receipt.units + units)
    return receipt


def _split_by_size(extracted: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows in slices of at most MAX_BYTES, but of at least one scan.

    So only one slice at a time is copied, because a copy of all rows may not fit into memory.
    """
    first = 0
    for last in range(1, len(extracted) + 1):
        if last == len(extracted) or extracted.slice(first, last + 1 - first).nbytes > MAX_BYTES:
            yield extracted.slice(first, last - first)
            first = last


def _find_active_units(features: pa.Table) -> Iterator[UnitsSeen]:
    """Yield for each layer which of its units have a value other than 0; no units if their number varies."""
    for layer in pc.unique(features["layer"]).to_pylist():
        values = features.filter(pc.equal(features["layer"], layer))["feature"].combine_chunks()
        width = len(values[0])
        if pc.any(pc.not_equal(pc.list_value_length(values), width)).as_py():
            yield UnitsSeen(layer, 0, len(values), "")
        elif width <= MAX_UNITS:
            active = (values.flatten().to_numpy().reshape(-1, width) != 0).any(axis=0)
            yield UnitsSeen(layer, width, len(values), np.packbits(active).tobytes().hex())


def _split_by_partition(
    rows: pa.Table, records: Sequence[ScanRecord], partition_by: Sequence[str]
) -> Iterator[tuple[dict[str, str | None], pa.Table]]:
    """Yield the partition values (column → value) and the sorted rows of each partition."""
    scan_ids_by_values: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
    for record in records:
        values = tuple(_get_partition_value(record.to_row(), name) for name in partition_by[1:])
        scan_ids_by_values[values].append(record.scan_id)
    for layer in pc.unique(rows["layer"]).to_pylist():
        layer_rows = rows.filter(pc.equal(rows["layer"], layer))
        for values, scan_ids in scan_ids_by_values.items():
            is_in_partition = pc.is_in(layer_rows["scan_id"], pa.array(scan_ids, pa.string()))
            partition_rows = layer_rows.filter(is_in_partition)
            if len(partition_rows):
                partition = dict(zip(partition_by, (layer, *values), strict=True))
                yield partition, partition_rows.sort_by([("scan_id", "ascending"), ("patch", "ascending")])


def _get_partition_value(row: dict[str, Any], name: str) -> str | None:
    """Return the value of a partition column as a text; None if the scan has no value."""
    value = row.get(name)
    return None if value is None or value == "" else str(value)
