"""Write: extracted scans in, one Parquet file per layer and partition out, and a receipt for them.

The files are not part of any table yet; only `stages.commit` makes them so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from featray.output.dataset import FEATURES, Dataset
from featray.schema import FEATURE_COLUMNS, Receipt, ScanRecord, UnitsSeen

MAX_BYTES = 256 * 2**20
"""Values that are sorted and written at once."""
MAX_UNITS = 2**16
"""Layers with more units are whole feature maps, of which nobody asks for a dead unit."""


def write(
    extracted: pa.Table, dataset: Dataset, partition_by: Sequence[str], recipe: str, run_id: str
) -> Receipt:
    """Put the features of all layers and return the receipt to commit.

    Args:
        extracted: Rows of `schema.EXTRACTED`.
        dataset: The output.
        partition_by: `layer`, then columns of the scans.
        recipe: Recipe id of every value.
        run_id: The run that writes.
    """
    receipt = Receipt((), ())
    for part in _bounded(extracted):
        records = tuple(ScanRecord.from_json(text) for text in part["record"].to_pylist())
        features = pa.Table.from_struct_array(pc.list_flatten(part["features"]).combine_chunks())
        rows = features.append_column("recipe", pa.repeat(recipe, len(features)))
        rows = rows.append_column("run_id", pa.repeat(run_id, len(rows)))
        files = tuple(
            dataset.write_file(
                FEATURES, partition, rows.select(FEATURE_COLUMNS.names).cast(FEATURE_COLUMNS), run_id
            )
            for partition, rows in _partitions(rows, records, partition_by)
        )
        units = tuple(_units_seen(features))
        receipt = Receipt(receipt.files + files, receipt.records + records, receipt.units + units)
    return receipt


def _bounded(extracted: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows in slices of about MAX_BYTES: a table of all patches of all scans may not fit."""
    first = 0
    for last in range(1, len(extracted) + 1):
        if last == len(extracted) or extracted.slice(first, last + 1 - first).nbytes > MAX_BYTES:
            yield extracted.slice(first, last - first)
            first = last


def _units_seen(features: pa.Table) -> Iterator[UnitsSeen]:
    for layer in pc.unique(features["layer"]).to_pylist():
        values = features.filter(pc.equal(features["layer"], layer))["feature"].combine_chunks()
        width = len(values[0])
        if pc.any(pc.not_equal(pc.list_value_length(values), width)).as_py():
            yield UnitsSeen(layer, 0, len(values), "")
        elif width <= MAX_UNITS:
            active = (values.flatten().to_numpy().reshape(-1, width) != 0).any(axis=0)
            yield UnitsSeen(layer, width, len(values), np.packbits(active).tobytes().hex())


def _partitions(
    rows: pa.Table, records: Sequence[ScanRecord], partition_by: Sequence[str]
) -> Iterator[tuple[dict[str, str | None], pa.Table]]:
    groups: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
    for record in records:
        groups[tuple(_partition_value(record.to_row(), name) for name in partition_by[1:])].append(
            record.scan_id
        )
    for layer in pc.unique(rows["layer"]).to_pylist():
        of_layer = rows.filter(pc.equal(rows["layer"], layer))
        for values, scan_ids in groups.items():
            part = of_layer.filter(pc.is_in(of_layer["scan_id"], pa.array(scan_ids, pa.string())))
            if len(part):
                named = dict(zip(partition_by, (layer, *values), strict=True))
                yield named, part.sort_by([("scan_id", "ascending"), ("patch", "ascending")])


def _partition_value(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    return None if value is None or value == "" else str(value)
