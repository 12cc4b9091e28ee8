"""Turn the model of the page into one JSON document and Arrow tables for other programs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from featray.commands.report.page.model import Column, PageModel

FORMAT = 1
"""Version of the JSON document; it grows when a key changes its meaning or disappears."""
_IN_TABLES = ("scans", "maps", "neighbors", "slices")
"""Attributes of the model that are not in the document: they are in the tables or are images."""


def make_document(model: PageModel) -> dict[str, Any]:
    """Return all numbers and texts of the page except those per scan, as values that JSON can hold.

    The keys are the attributes of `PageModel` and of its parts. Numbers that are not finite become None.
    """
    parts = {
        attribute.name: _to_json(getattr(model, attribute.name))
        for attribute in dataclasses.fields(model)
        if attribute.name not in _IN_TABLES
    }
    names = [_to_json(candidate.name) for candidate in model.candidates]
    for candidate, name in zip(parts["candidates"], names, strict=True):
        candidate["name"] = name
    outliers = [{**part, "scan_id": _get_id(model, part["scan"])} for part in parts["outliers"]]
    for extreme in [] if model.extremes is None else parts["extremes"]["low"] + parts["extremes"]["high"]:
        extreme["scan_id"] = _get_id(model, extreme["scan"])
    return {"format": FORMAT, "scans_shown": len(model.scans.ids), **parts, "outliers": outliers}


def encode_document(model: PageModel) -> bytes:
    """Return the document as UTF-8."""
    text = json.dumps(make_document(model), ensure_ascii=False, indent=1, allow_nan=False)
    return (text + "\n").encode()


def make_points_table(model: PageModel) -> pa.Table:
    """Return one row per scan, as viewers of embeddings read it.

    Columns: `scan_id`; `x` and `y` on the first map, null for scans that are not on it; `neighbors` in the
    first candidate with neighbors, a struct of `ids` (row numbers) and `distances`; then the columns of the
    scans. A column whose name is taken gets the prefix `column_`.
    """
    count = len(model.scans.ids)
    table: dict[str, pa.Array] = {"scan_id": _to_array(model.scans.ids)}
    if model.maps:
        table |= {"x": _to_floats(model.maps[0].x), "y": _to_floats(model.maps[0].y)}
    if model.neighbors:
        table["neighbors"] = _make_neighbor_structs(model, count)
    for column in model.scans.columns:
        table[_choose_name(column.name, table)] = _encode_column(column)
    return pa.table(table)


def make_maps_table(model: PageModel) -> pa.Table:
    """Return one row per map and scan: `candidate`, `method`, `scan_id`, `x`, `y`."""
    rows = [
        (scan_map.candidate, scan_map.method, scan_id, x, y)
        for scan_map in model.maps
        for scan_id, x, y in zip(model.scans.ids, scan_map.x.tolist(), scan_map.y.tolist(), strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    names = ("candidate", "method", "scan_id")
    texts = {name: _to_array([row[place] for row in rows]) for place, name in enumerate(names)}
    return pa.table(
        texts | {name: _to_floats([row[place] for row in rows]) for place, name in ((3, "x"), (4, "y"))}
    )


def make_neighbors_table(model: PageModel) -> pa.Table:
    """Return one row per neighbor: candidate, scan_id, rank (from 1), neighbor, distance and measure."""
    ids = np.array([_encode_text(scan_id) for scan_id in model.scans.ids], dtype=object)
    parts = []
    for lists in model.neighbors:
        scans, ranks = np.nonzero(lists.neighbors >= 0)
        candidate, measure = (
            pa.repeat(_encode_text(text), len(scans)) for text in (lists.candidate, lists.measure)
        )
        columns = [
            candidate,
            _to_array(ids[scans].tolist()),
            pa.array(ranks + 1, pa.int32()),
            _to_array(ids[lists.neighbors[scans, ranks]].tolist()),
            _to_floats(lists.distances[scans, ranks]),
            measure,
        ]
        parts.append(pa.table(columns, names=_NEIGHBOR_SCHEMA.names).cast(_NEIGHBOR_SCHEMA))
    return pa.concat_tables(parts) if parts else _NEIGHBOR_SCHEMA.empty_table()


_NEIGHBOR_SCHEMA = pa.schema(
    [
        ("candidate", pa.string()),
        ("scan_id", pa.string()),
        ("rank", pa.int32()),
        ("neighbor", pa.string()),
        ("distance", pa.float64()),
        ("measure", pa.string()),
    ]
)


def _make_neighbor_structs(model: PageModel, count: int) -> pa.Array:
    lists = model.neighbors[0]
    is_present = lists.neighbors >= 0
    structs = [
        {
            "ids": lists.neighbors[scan][is_present[scan]].tolist(),
            "distances": lists.distances[scan][is_present[scan]].tolist(),
        }
        for scan in range(count)
    ]
    kind = pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float64()))])
    return pa.array(structs, kind)


def _encode_column(column: Column) -> pa.Array:
    if column.is_numeric:
        return _to_floats([np.nan if value is None else float(value) for value in column.values])
    return _to_array([None if value is None else str(value) for value in column.values])


def _choose_name(name: str, taken: Mapping[str, Any]) -> str:
    name = _encode_text(name)
    while name in taken:
        name = f"column_{name}"
    return name


def _to_array(texts: Any) -> pa.Array:
    return pa.array([None if text is None else _encode_text(text) for text in texts], pa.string())


def _to_floats(values: Any) -> pa.Array:
    """Return numbers with null for those that are not finite."""
    array = np.asarray(values, np.float64)
    return pa.array(array, pa.float64(), mask=~np.isfinite(array))


def _encode_text(text: str) -> str:
    """Return a text as it is, except lone surrogates, which UTF-8 cannot hold: they become question marks."""
    return text.encode("utf-8", "replace").decode()


def _get_id(model: PageModel, scan: int) -> str:
    return _encode_text(model.scans.ids[scan])


def _to_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {part.name: _to_json(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_encode_text(str(key)): _to_json(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return _to_json(value.tolist())
    if isinstance(value, np.generic):
        return _to_json(value.item())
    if isinstance(value, list | tuple):
        return [_to_json(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _encode_text(value) if isinstance(value, str) else value
