"""Write the panels under the first screen."""

from __future__ import annotations

import numpy as np

from featray.commands.report.page.charts import draw_canvas_map, draw_map, draw_matrix
from featray.commands.report.page.colors import ColumnColors
from featray.commands.report.page.images import draw_slice, draw_tile
from featray.commands.report.page.markup import Markup, element, isolate, join
from featray.commands.report.page.model import DataTable, Matrix, NeighborLists, PageModel, ScanMap
from featray.commands.report.page.numbers import format_number
from featray.commands.report.page.parts import (
    Section,
    write_advice,
    write_details,
    write_figure,
    write_matrix,
    write_numbers,
    write_section,
    write_select,
    write_table,
)
from featray.commands.report.page.payload import choose_queries, color_scans, list_neighbors, place_scans

MAX_SVG_POINTS = 2000
"""Maps with more points are drawn on a canvas by the script."""
MAX_SHEET = 400
"""Slices on the contact sheet."""
_TABLE_ROWS = 20
"""Rows of the table of a map that are in the file; the script adds the others."""


def write_panels(model: PageModel) -> list[Section]:
    """Return all panels for which the model has content."""
    panels = [
        _write_label_matrix(model),
        _write_measures("health", "Health of the layers", model.health),
        _write_measures("stability", "Stability of the layers", model.stability),
        _write_maps(model) if model.maps else None,
        _write_neighbors(model) if model.neighbors and model.scans.ids else None,
        _write_matrices("units", "Units and labels", model.units),
        _write_matrices("agreement", "Agreement of layers", model.agreement),
        _write_outliers(model) if model.outliers else None,
        _write_sheet(model) if model.slices else None,
    ]
    return [panel for panel in panels if panel]


def _write_label_matrix(model: PageModel) -> Section | None:
    """Return layers × labels with the scores as texts, colored on the way from chance to perfect."""
    results = [result for result in model.labels if result.scores]
    if not results:
        return None
    scores = [{score.candidate: score for score in result.scores} for result in results]
    values = np.full((len(model.candidates), len(results)), np.nan)
    for row, candidate in enumerate(model.candidates):
        for column, of_label in enumerate(scores):
            score = of_label.get(candidate.name)
            values[row, column] = np.nan if score is None else score.value
    marks = tuple(
        tuple("*" if (score := of_label.get(name)) and score.is_chosen else "" for of_label in scores)
        for name in (candidate.name for candidate in model.candidates)
    )
    chance = np.array([result.chance for result in results])
    reach = np.array([result.perfect for result in results]) - chance
    matrix = Matrix(
        "Layers and labels",
        "Each number is the score of a layer for a label, in the metric of the label; the color is the way "
        "from chance (0) to the best possible score (1). An asterisk marks the layer of the verdict. Columns "
        "with different metrics can be compared by color only.",
        tuple(candidate.name for candidate in model.candidates),
        tuple(f"{result.label}, {result.metric}" for result in results),
        values,
        row_title="Layer (view)",
        marks=marks,
    )
    chart = draw_matrix(matrix, matrix.title, "label-matrix-read", (values - chance) / reach)
    return write_section(
        "matrix", matrix.title, write_figure("label-matrix", "Scores", matrix.reading, chart)
    )


def _write_measures(key: str, title: str, table: DataTable | None) -> Section | None:
    """Return a table of measures with explanations of its columns; None without a table."""
    if table is None:
        return None
    terms = [
        (element("dt", title), element("dd", table.explanations[title]))
        for title in table.columns
        if title in table.explanations
    ]
    return write_section(
        key,
        title,
        element("p", table.reading, class_="read") if table.reading else None,
        write_table(table.columns, table.rows, f"Measures of {key}", table.explanations),
        write_details("What the columns mean", element("dl", terms)) if terms else None,
    )


def _write_maps(model: PageModel) -> Section:
    colors = color_scans(model)
    options = [(number, column.name) for number, column in enumerate(colors)]
    select = write_select("color", "Color by", options) if model.scans.columns else None
    maps = [
        _write_map(f"map-{number}", scan_map, model, colors[0]) for number, scan_map in enumerate(model.maps)
    ]
    return write_section(
        "maps",
        "Maps of the scans",
        element(
            "p",
            "Each point is a scan; points that are close have similar values. Shapes repeat the colors of "
            "categories.",
            write_advice(
                "Click a point, or move with the arrow keys and press Enter, to highlight the scan on the "
                "whole page."
            ),
            class_="read",
        ),
        select,
        _write_legend(colors[0]),
        element("div", maps, class_="maps"),
    )


def _write_legend(colors: ColumnColors) -> Markup:
    entries = [
        element("li", _draw_swatch(shape, color), isolate(text)) for text, shape, color in colors.legend
    ]
    return element("ul", entries, id="legend", class_="legend")


def _draw_swatch(shape: int, color: str) -> Markup:
    mark = element("use", href=f"#m{shape}", x=8, y=8, class_=color)
    return element("svg", mark, width=16, height=16, class_="swatch", aria_hidden="true")


def _write_map(key: str, scan_map: ScanMap, model: PageModel, colors: ColumnColors) -> Markup:
    places = place_scans(scan_map)
    count = sum(place is not None for place in places)
    name = f"{scan_map.candidate}, {scan_map.method}"
    if count > MAX_SVG_POINTS:
        chart = draw_canvas_map(f"Map of {count:,} scans: {name}", f"{key}-read")
    else:
        marks = [colors.get_mark(scan) for scan in range(len(places))]
        chart = draw_map(places, marks, f"Map of {count:,} scans: {name}", f"{key}-read")
    xy = zip(model.scans.ids, scan_map.x.tolist(), scan_map.y.tolist(), strict=True)
    rows = [(scan_id, x, y) for (scan_id, x, y), place in zip(xy, places, strict=True) if place is not None][
        :_TABLE_ROWS
    ]
    table = write_table(("Scan", "x", "y"), rows, f"Positions: {name}")
    note = (
        f"The first {len(rows)} of {count:,} scans; all are in the files below."
        if count > len(rows)
        else None
    )
    return write_figure(
        key,
        join(isolate(scan_map.candidate), f", {scan_map.method}"),
        f"{count:,} scans. {scan_map.caption}".strip(),
        chart,
        element("output", class_="readout"),
        write_numbers("Positions as a table", element("p", note, class_="note") if note else None, table),
    )


def _write_neighbors(model: PageModel) -> Section:
    """Return the neighbors of a scan in two layers; the script fills in other scans and layers."""
    queries = choose_queries(model)
    names = list(enumerate(lists.candidate for lists in model.neighbors))
    second = min(1, len(names) - 1)
    choices = [(place, model.scans.ids[scan]) for place, scan in enumerate(queries)]
    sides = [(0, "left"), (second, "right")] if second else [(0, "left")]
    layers = [
        element(
            "div",
            write_select(f"layer-{side}", "Layer", names, number),
            _write_neighbor_list(f"near-{side}", model.neighbors[number], queries[0], model),
        )
        for number, side in sides
    ]
    limited = len(queries) < len(model.scans.ids)
    extent = (
        f" The page holds the neighbors of {len(queries)} scans; all are in the files below."
        if limited
        else ""
    )
    return write_section(
        "neighbors",
        "Neighbors of a scan",
        element(
            "p",
            "The scans that are nearest to the chosen scan in each of two layers, nearest first, with their "
            f"distances. Distances of different layers cannot be compared.{extent}",
            class_="read",
        ),
        write_select("query", "Scan", choices),
        element("div", _write_query(queries[0], model), layers, class_="pair"),
    )


def _write_query(scan: int, model: PageModel) -> Markup:
    tile = draw_tile(scan, model.scans.ids[scan], "the chosen scan", model.slices)
    return element("div", element("ol", tile, class_="tiles", id="near-query"), class_="query")


def _write_neighbor_list(key: str, lists: NeighborLists, scan: int, model: PageModel) -> Markup:
    tiles = [
        draw_tile(neighbor, model.scans.ids[neighbor], distance, model.slices)
        for neighbor, distance in list_neighbors(lists, scan)
    ]
    title = join("Nearest in ", isolate(lists.candidate), f", {lists.measure}")
    return join(
        element("p", title, class_="label", id=f"{key}-name"),
        element("ol", tiles, class_="tiles", id=key, aria_labelledby=f"{key}-name"),
    )


def _write_matrices(key: str, title: str, matrices: tuple[Matrix, ...]) -> Section | None:
    figures = [write_matrix(f"{key}-{number}", matrix) for number, matrix in enumerate(matrices)]
    return write_section(key, title, element("div", figures, class_="matrices")) if figures else None


def _write_outliers(model: PageModel) -> Section:
    rows = [
        element(
            "li",
            draw_slice(outlier.scan, model.scans.ids[outlier.scan], model.slices),
            element(
                "p",
                element("strong", isolate(model.scans.ids[outlier.scan])),
                f" in {outlier.candidate}, score {format_number(outlier.score)}. {outlier.reason}",
            ),
            data_s=outlier.scan,
        )
        for outlier in model.outliers
    ]
    reading = "Scans far from all others, the most extreme first. Look at them before you trust a score."
    return write_section(
        "outliers",
        "Outlier scans",
        element("p", reading, class_="read"),
        element("ol", rows, class_="outliers"),
    )


def _write_sheet(model: PageModel) -> Section:
    scans = sorted(model.slices)[:MAX_SHEET]
    tiles = [draw_tile(scan, model.scans.ids[scan], "", model.slices) for scan in scans]
    reading = f"The middle slice of {len(scans):,} scans, in the order of the output."
    advice = write_advice("Click a slice, here or above, to highlight its scan on the whole page.")
    return write_section(
        "sheet",
        "Contact sheet",
        element("p", reading, advice, class_="read"),
        element("ol", tiles, class_="tiles sheet"),
    )
