"""Extract: decoded scans in, one Arrow row per scan with the values of all layers out.

Holds no model itself: the extractor is given. A scan whose values are not finite, or that the model
cannot take, becomes a failed record and costs its batch neighbours nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.errors import InputShapeError, Reason, ScanError
from featray.model.batch_buffers import concatenate_rows, release_buffer
from featray.schema import EXTRACTED, EXTRACTED_ROW, Decoded

Values = Mapping[str, NDArray[np.float32]]
LayerExtractor = Callable[[NDArray[np.float32], Sequence[str]], Values]

MAX_VALUES = 2**31 - 1
"""Of one scan, over all layers and patches: what one Arrow list holds."""


def extract(extractor: LayerExtractor, decoded: Sequence[Decoded]) -> pa.Table:
    """Return one row per scan: its record, and its features of all layers and patches.

    Args:
        extractor: float32 (n, …) → {layer: (n, *shape)}; further takes one text per row that seeds what a
            layer draws at random.
        decoded: Scans of any input shapes; failed ones pass through without features.
    """
    values: dict[str, Values] = {}
    for group in _same_shape(scan for scan in decoded if scan.record.status == "ok"):
        values |= _infer(extractor, group)
    tables = [_row(scan, values.get(scan.record.scan_id, {})) for scan in decoded]
    return pa.concat_tables(tables) if tables else EXTRACTED.empty_table()


def _same_shape(decoded: Iterable[Decoded]) -> list[list[Decoded]]:
    groups: dict[tuple[int, ...], list[Decoded]] = defaultdict(list)
    for scan in decoded:
        groups[scan.tensor.shape[1:]].append(scan)
    return list(groups.values())


def _infer(extractor: LayerExtractor, group: list[Decoded]) -> dict[str, Values]:
    """Return {scan_id: values}; when a batch fails, each scan is tried alone."""
    start = time.perf_counter()
    try:
        found = _call(extractor, group)
    except Exception as error:  # whatever the user's model raises must cost only its own scan
        if len(group) > 1:
            return {key: value for scan in group for key, value in _infer(extractor, [scan]).items()}
        ours = isinstance(error, InputShapeError)
        message = str(error) if ours else f"the model raised {type(error).__name__}"
        group[0].record.fail("extract", ScanError(Reason.MODEL, message))
        return {}
    seconds = (time.perf_counter() - start) / len(group)
    return dict(_split(found, group, seconds))


def _call(extractor: LayerExtractor, group: list[Decoded]) -> Values:
    """Return what the extractor finds in the rows of all scans."""
    if len(group) == 1:
        return extractor(group[0].tensor, _make_seeds(group))
    rows, memory = concatenate_rows([scan.tensor for scan in group])
    found = extractor(rows, _make_seeds(group))
    release_buffer(memory, found.values())
    return found


def _make_seeds(group: list[Decoded]) -> list[str]:
    """Return what seeds each row's draw: its scan, patch and recipe alone, so that a retry agrees."""
    records = [scan.record for scan in group for _ in scan.tensor]
    patches = [patch for scan in group for patch in range(len(scan.tensor))]
    return [
        f"{record.recipe}\n{record.scan_id}\n{patch}" for record, patch in zip(records, patches, strict=True)
    ]


def _split(found: Values, group: list[Decoded], seconds: float) -> Iterable[tuple[str, Values]]:
    first = 0
    for scan in group:
        last = first + len(scan.tensor)
        values = {name: array[first:last] for name, array in found.items()}
        first, scan.record.infer_s = last, seconds
        count = sum(array.size for array in values.values())
        if count > MAX_VALUES:
            message = f"{count} values, more than a scan may have ({MAX_VALUES}); pool, or cut fewer patches"
            scan.record.fail("extract", ScanError(Reason.TOO_LARGE, message))
            continue
        broken = [name for name, array in values.items() if not np.isfinite(array).all()]
        if broken:
            message = f"NaN or infinity in layer {', '.join(broken)}; check the model and the window"
            scan.record.fail("extract", ScanError(Reason.NON_FINITE_FEATURES, message))
        else:
            yield scan.record.scan_id, values


def _row(scan: Decoded, values: Values) -> pa.Table:
    patches = len(scan.origins) if values else 0
    scan.record.patches = patches
    rows = [
        _layer_rows(scan, name, np.ascontiguousarray(array, dtype=np.float32))
        for name, array in values.items()
    ]
    features = pa.concat_arrays(rows) if rows else pa.array([], EXTRACTED_ROW)
    nested = pa.ListArray.from_arrays(pa.array([0, len(features)], pa.int32()), features)
    return pa.Table.from_arrays([pa.array([scan.record.to_json()]), nested], schema=EXTRACTED)


def _layer_rows(scan: Decoded, name: str, array: NDArray[np.float32]) -> pa.StructArray:
    """Return one struct per patch; the values are handed to Arrow without a copy."""
    patches = len(array)
    columns = [
        pa.array([scan.record.scan_id] * patches),
        pa.array([name] * patches),
        pa.array(np.arange(patches, dtype=np.int32)),
        _lists(scan.origins.astype(np.int32)),
        _lists(array.reshape(patches, -1)),
        _lists(np.tile(np.array(array.shape[1:], np.int32), (patches, 1))),
    ]
    arrays = [column.cast(field.type) for column, field in zip(columns, EXTRACTED_ROW, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(EXTRACTED_ROW))


def _lists(rows: NDArray[np.generic]) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))
