"""Collect the data of the page that script.js reads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from featray.commands.report.page.charts import place_on_map
from featray.commands.report.page.colors import ColumnColors, color_alike, color_column
from featray.commands.report.page.model import Cell, NeighborLists, PageModel, ScanMap
from featray.commands.report.page.numbers import format_cell

MAX_QUERIES = 300
"""Scans whose neighbors the page can show."""
MAX_NEIGHBORS = 6


def color_scans(model: PageModel) -> tuple[ColumnColors, ...]:
    """Return the colors of the scans by each column, or one color without columns."""
    colors = tuple(color_column(column) for column in model.scans.columns)
    return colors or (color_alike(len(model.scans.ids)),)


def place_scans(scan_map: ScanMap) -> list[tuple[float, float] | None]:
    """Return the positions of the scans on a map as drawn."""
    return place_on_map(scan_map.x.tolist(), scan_map.y.tolist())


def choose_queries(model: PageModel) -> list[int]:
    """Return the scans whose neighbors the page shows: scans with a slice come first."""
    order = sorted(range(len(model.scans.ids)), key=lambda scan: (scan not in model.slices, scan))
    return order[:MAX_QUERIES]


def list_neighbors(lists: NeighborLists, scan: int) -> list[tuple[int, str]]:
    """Return the nearest neighbors of a scan with their distances as texts."""
    pairs = zip(lists.neighbors[scan].tolist(), lists.distances[scan].tolist(), strict=True)
    present = [(int(neighbor), format_cell(float(distance))) for neighbor, distance in pairs if neighbor >= 0]
    return present[:MAX_NEIGHBORS]


def make_payload(model: PageModel) -> dict[str, Any]:
    """Return the data for script.js as values that JSON can hold."""
    values = {column.name: [_shorten(value) for value in column.values] for column in model.scans.columns}
    queries = choose_queries(model) if model.neighbors else []
    return {
        "ids": model.scans.ids,
        "columns": [
            {
                "name": colors.name,
                "codes": colors.codes,
                "legend": colors.legend,
                "values": values.get(colors.name, []),
            }
            for colors in color_scans(model)
        ],
        "maps": [
            [coordinate for place in place_scans(scan_map) for coordinate in place or (None, None)]
            for scan_map in model.maps
        ],
        "tables": [
            [
                _shorten(value)
                for pair in zip(scan_map.x.tolist(), scan_map.y.tolist(), strict=True)
                for value in pair
            ]
            for scan_map in model.maps
        ],
        "queries": queries,
        "neighbors": [
            {
                "measure": lists.measure,
                "lists": [list_neighbors(lists, scan) for scan in queries],
            }
            for lists in model.neighbors
        ],
    }


def _shorten(value: Cell) -> Cell:
    """Round numbers to five digits; return None for numbers that are not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
