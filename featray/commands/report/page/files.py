"""Make the files of a report: the page, and the numbers next to it."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from featray.commands.report.page.data import (
    encode_document,
    make_maps_table,
    make_neighbors_table,
    make_points_table,
)
from featray.commands.report.page.model import PageModel
from featray.commands.report.page.page import Download, render_page

PAGE_NAME = "report.html"
_DOCUMENT = Download("report.json", "all numbers and sentences of this page")
_POINTS = Download(
    "points.parquet", "one row per scan with x, y and neighbors, as viewers of embeddings read it"
)
_MAPS = Download("maps.parquet", "one row per map and scan")
_NEIGHBORS = Download("neighbors.parquet", "one row per layer, scan and neighbor")
_MEASURES = Download("measures.parquet", "one row per layer with all measures that need no labels")


def make_files(
    model: PageModel, measures: pa.Table | None = None, *, include_images: bool = True
) -> dict[str, bytes]:
    """Return the files of a report by their names; the page links to the others.

    Args:
        model: Content.
        measures: Measures that need no labels as numbers, one row per candidate; None without measures.
        include_images: Whether the page may hold slices; they are patient data.
    """
    files = {_DOCUMENT: encode_document(model)}
    if model.scans.ids:
        tables = {_POINTS: make_points_table, _MAPS: make_maps_table, _NEIGHBORS: make_neighbors_table}
        files |= {download: _encode_table(make(model)) for download, make in tables.items()}
    if measures is not None:
        files[_MEASURES] = _encode_table(measures)
    page = render_page(model, tuple(files), include_images=include_images)
    return {PAGE_NAME: page, **{download.name: content for download, content in files.items()}}


def _encode_table(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
