"""Extract: decoded scans in, one Arrow row per scan with the values of all layers out.

This stage is given the extractor and holds no model itself. If the model cannot take a scan, or gives values
that are not finite, the scan's record fails; the other scans of its batch keep their values. If the device of
the model fails, no scan does: a `DeviceError` ends the call.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.errors import DeviceError, InputMemoryError, InputShapeError, Reason, ScanError
from featray.model.batch_buffers import concatenate_rows, release_buffer
from featray.schema import EXTRACTED, EXTRACTED_ROW, Decoded

LayerValues = Mapping[str, NDArray[np.float32]]
"""Layer name → float32 (rows, *shape)."""
LayerExtractor = Callable[..., LayerValues]
"""float32 (rows, …), one seed text per row, and names of layers → values of these layers. Without names, the
values of all layers."""

MAX_VALUES = 2**31 - 1
"""Maximum number of values of one scan over all layers and patches: the capacity of one Arrow list."""


def extract(extractor: LayerExtractor, decoded: Sequence[Decoded], *, recipe: str) -> pa.Table:
    """Return one row per scan: its record, and its features of all due layers and all patches.

    Args:
        extractor: The model.
        decoded: Scans with model inputs of any shapes; scans that have failed stay in it, without features.
        recipe: Recipe id from which the seeds of random layers are made (`RecipeIds.seed`).

    Returns:
        Rows of `schema.EXTRACTED`, in the order of `decoded`.

    Raises:
        DeviceError: The device of the model has failed, or its memory has become too short for any scan.
    """
    values: dict[str, LayerValues] = {}
    for group in _group_alike(scan for scan in decoded if scan.record.status == "ok"):
        values |= _infer(functools.partial(_call_model, extractor, recipe=recipe), group)
    for scan in decoded:
        scan.record.reduced_batch = getattr(extractor, "reduced_batch", None)
    return _make_table(decoded, values)


def return_scans(decoded: Sequence[Decoded], reason: str, process: str) -> pa.Table:
    """Return one row per scan without features, marked as not processed, because the device has failed.

    Args:
        decoded: The scans.
        reason: Problem of the device in words.
        process: Id of this process.
    """
    for scan in decoded:
        scan.record.returned, scan.record.returned_by = reason, process
    return _make_table(decoded, {})


def _make_table(decoded: Sequence[Decoded], values: Mapping[str, LayerValues]) -> pa.Table:
    tables = [_make_row(scan, values.get(scan.record.scan_id, {})) for scan in decoded]
    return pa.concat_tables(tables) if tables else EXTRACTED.empty_table()


def _group_alike(decoded: Iterable[Decoded]) -> list[list[Decoded]]:
    """Return groups of scans with inputs of one shape and with the same due layers."""
    groups: dict[tuple[object, ...], list[Decoded]] = defaultdict(list)
    for scan in decoded:
        groups[scan.tensor.shape[1:], tuple(scan.record.due_layers)].append(scan)
    return list(groups.values())


def _infer(
    call_model: Callable[[list[Decoded]], LayerValues], group: list[Decoded]
) -> dict[str, LayerValues]:
    """Return {scan_id: values}; if the model fails on a batch, call it with each scan alone."""
    start = time.perf_counter()
    try:
        values = call_model(group)
    except DeviceError:
        raise
    except Exception as error:  # any error of the user's model must cost only the scan that causes it
        if len(group) > 1:
            return {key: value for scan in group for key, value in _infer(call_model, [scan]).items()}
        is_explained = isinstance(error, InputShapeError | InputMemoryError)
        message = str(error) if is_explained else f"the model raised {type(error).__name__}"
        group[0].record.fail("extract", ScanError(Reason.MODEL, message))
        return {}
    seconds = (time.perf_counter() - start) / len(group)
    return dict(_split_by_scan(values, group, seconds))


def _call_model(extractor: LayerExtractor, group: list[Decoded], recipe: str) -> LayerValues:
    """Return the values of the due layers, for the rows of all scans of a group."""
    seeds, due_layers = _make_seeds(group, recipe), group[0].record.due_layers
    layers = (tuple(due_layers),) if due_layers else ()
    if len(group) == 1:
        return extractor(group[0].tensor, seeds, *layers)
    rows, memory = concatenate_rows([scan.tensor for scan in group])
    values = extractor(rows, seeds, *layers)
    release_buffer(memory, values.values())
    return values


def _make_seeds(group: list[Decoded], recipe: str) -> list[str]:
    """Return one seed text per row: recipe, scan and patch alone decide it, so a retry gives equal values."""
    return [
        f"{recipe}\n{scan.record.scan_id}\n{patch}" for scan in group for patch in range(len(scan.tensor))
    ]


def _split_by_scan(
    values: LayerValues, group: list[Decoded], seconds: float
) -> Iterator[tuple[str, LayerValues]]:
    """Yield scan_id and values of each scan; a scan with too many or non-finite values fails instead."""
    first = 0
    for scan in group:
        last = first + len(scan.tensor)
        of_scan = {name: array[first:last] for name, array in values.items()}
        first, scan.record.infer_s = last, seconds
        error = _find_error(of_scan)
        if error is not None:
            scan.record.fail("extract", error)
        else:
            yield scan.record.scan_id, of_scan


def _find_error(values: LayerValues) -> ScanError | None:
    count = sum(array.size for array in values.values())
    if count > MAX_VALUES:
        message = f"{count} values, more than a scan may have ({MAX_VALUES}); pool, or cut fewer patches"
        return ScanError(Reason.TOO_LARGE, message)
    non_finite = [name for name, array in values.items() if not np.isfinite(array).all()]
    if non_finite:
        message = f"NaN or infinity in layer {', '.join(non_finite)}; check the model and the window"
        return ScanError(Reason.NON_FINITE_FEATURES, message)
    return None


def _make_row(scan: Decoded, values: LayerValues) -> pa.Table:
    scan.record.patches = len(scan.origins) if values else 0
    rows = [
        _make_layer_rows(scan, name, np.ascontiguousarray(array, dtype=np.float32))
        for name, array in values.items()
    ]
    features = pa.concat_arrays(rows) if rows else pa.array([], EXTRACTED_ROW)
    nested = pa.ListArray.from_arrays(pa.array([0, len(features)], pa.int32()), features)
    return pa.Table.from_arrays([pa.array([scan.record.to_json()]), nested], schema=EXTRACTED)


def _make_layer_rows(scan: Decoded, name: str, array: NDArray[np.float32]) -> pa.StructArray:
    """Return one struct per patch; Arrow takes the values without a copy."""
    patches = len(array)
    columns = [
        pa.array([scan.record.scan_id] * patches),
        pa.array([name] * patches),
        pa.array(np.arange(patches, dtype=np.int32)),
        _make_lists(scan.origins.astype(np.int32)),
        _make_lists(array.reshape(patches, -1)),
        _make_lists(np.tile(np.array(array.shape[1:], np.int32), (patches, 1))),
    ]
    arrays = [column.cast(field.type) for column, field in zip(columns, EXTRACTED_ROW, strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=list(EXTRACTED_ROW))


def _make_lists(rows: NDArray[np.generic]) -> pa.ListArray:
    """Return one Arrow list per row of a 2-D array."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))
