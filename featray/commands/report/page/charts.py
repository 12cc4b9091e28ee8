"""Draw charts as HTML and inline SVG: dots with intervals, heat maps and maps of scans.

Colors are classes of style.css, so that they follow the theme of the reader. Positions along a chart's width
are percentages, so that texts and marks keep their size on every screen.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featray.commands.report.page.markup import Child, Markup, element, isolate, join
from featray.commands.report.page.model import Floats, Matrix
from featray.commands.report.page.numbers import Axis, format_number

SEQUENTIAL_STEPS = 7
DIVERGING_STEPS = 9
MAP_SIDE = 400
"""Side of the square in which maps are drawn, in units of its view box."""
_MAP_PADDING = 14
_ROW_MIDDLE, _ROW_HEIGHT, _HEAD_HEIGHT = 11, 32, 28
_LETTER_WIDTH = 3.0
"""Width of a letter under a tick on a narrow screen, in percent of the chart's width."""
_LONG_NAME = 26
"""Longer names are wrapped."""
_MANY_COLUMNS = 8
"""Column titles of wider heat maps are vertical."""


@dataclass(frozen=True)
class DotRow:
    """A row of a dot chart.

    Attributes:
        name: Name of the row.
        value: Position of the dot; None for no dot.
        low: Start of the interval; None for no interval.
        high: End of the interval.
        ticks: Names, positions and texts of the ticks.
        texts: Texts at the right of the row.
        is_baseline: Whether the row is drawn as a baseline, with a line through all rows.
        is_chosen: Whether the row is emphasized.
    """

    name: str
    value: float | None
    low: float | None
    high: float | None
    ticks: tuple[tuple[str, float, str], ...]
    texts: tuple[str, ...]
    is_baseline: bool = False
    is_chosen: bool = False


@dataclass(frozen=True)
class DotChart:
    """Dots with intervals on a common axis.

    Attributes:
        name: Accessible name.
        described_by: Id of the element that explains the chart.
        headers: Titles of the names and of the texts at the right.
        chance: Position of the line for chance.
        rows: The rows, from the top.
        tick_names: Names of all ticks, in the order of their letters.
    """

    name: str
    described_by: str
    headers: tuple[str, ...]
    chance: float
    rows: tuple[DotRow, ...]
    tick_names: tuple[str, ...] = ()

    def make_axis(self) -> Axis:
        """Return an axis that shows all marks and chance."""
        values = [self.chance, self.chance + 0.1]
        for row in self.rows:
            values += [value for value in (row.value, row.low, row.high) if value is not None]
            values += [position for _, position, _ in row.ticks]
        return Axis.around(values)


def draw_dot_chart(chart: DotChart) -> Markup:
    """Draw a dot chart as a table with one picture per row; the arrow keys move between the rows."""
    axis = chart.make_axis()
    is_long = any(len(row.name) > _LONG_NAME for row in chart.rows)
    guides = _draw_guides(chart, axis)
    head = element(
        "tr",
        element("th", chart.headers[0], scope="col"),
        element("th", _draw_axis_texts(chart, axis), class_="plot", scope="col"),
        [element("th", header, scope="col", class_="text") for header in chart.headers[1:]],
    )
    letters = _assign_letters(chart.tick_names)
    rows = [
        _draw_dot_row(row, join(guides, _draw_row_marks(row, axis, letters)), is_first=number == 0)
        for number, row in enumerate(chart.rows)
    ]
    return element(
        "table",
        element("thead", head),
        element("tbody", rows, data_keys="marks"),
        class_="dots long" if is_long else "dots",
        aria_label=chart.name,
        aria_describedby=chart.described_by,
    )


def _draw_axis_texts(chart: DotChart, axis: Axis) -> Markup:
    decimals = 1 if axis.last - axis.first > 0.45 else 2
    ticks = [
        element("text", format_number(tick, decimals), x=axis.to_percent(tick), y=12)
        for tick in axis.make_ticks()
    ]
    chance = element("text", "chance", x=axis.to_percent(chart.chance), y=27, class_="chance")
    label = "Scale from " + " to ".join(format_number(end) for end in (axis.first, axis.last))
    return element("svg", ticks, chance, class_="axis", height=_HEAD_HEIGHT, role="img", aria_label=label)


def _draw_guides(chart: DotChart, axis: Axis) -> Markup:
    """Return the lines that every row has: round numbers, chance and baselines."""
    lines = [(tick, "grid") for tick in axis.make_ticks()]
    lines += [(row.value, "base") for row in chart.rows if row.is_baseline and row.value is not None]
    lines.append((chart.chance, "chance"))
    return join([_draw_vertical(axis, position, 0, _ROW_HEIGHT, name) for position, name in lines])


def _draw_vertical(axis: Axis, position: float, top: int, bottom: int, name: str) -> Markup:
    x = axis.to_percent(position)
    return element("line", x1=x, x2=x, y1=top, y2=bottom, class_=name)


def _assign_letters(names: Sequence[str]) -> dict[str, str]:
    """Return the letter of each tick; a single kind of tick needs none."""
    if len(names) < 2:
        return dict.fromkeys(names, "")
    return {name: string.ascii_lowercase[number % 26] for number, name in enumerate(names)}


def _draw_row_marks(row: DotRow, axis: Axis, letters: dict[str, str]) -> Markup:
    marks: list[Markup] = []
    if row.low is not None and row.high is not None:
        ends = axis.to_percent(row.low), axis.to_percent(row.high)
        marks.append(element("line", x1=ends[0], x2=ends[1], y1=_ROW_MIDDLE, y2=_ROW_MIDDLE, class_="range"))
    for name, position, text in row.ticks:
        tick = _draw_vertical(axis, position, _ROW_MIDDLE + 5, _ROW_MIDDLE + 11, "leak")
        marks.append(element("g", element("title", f"{name} {text}"), tick))
    places = [(axis.locate(position), letters.get(name, "")) for name, position, _ in row.ticks]
    for place, text in merge_letters(places):
        marks.append(element("text", text, x=f"{place:.2f}%", y=_ROW_HEIGHT - 2, class_="leak"))
    if row.value is not None:
        radius = 6 if row.is_chosen else 5
        marks.append(element("circle", cx=axis.to_percent(row.value), cy=_ROW_MIDDLE, r=radius, class_="dot"))
    return join(marks)


def merge_letters(places: Iterable[tuple[float, str]]) -> list[tuple[float, str]]:
    """Join letters that would cover each other into one text at their middle.

    Args:
        places: Position of each letter in percent, and the letter.
    """
    groups: list[list[tuple[float, str]]] = []
    for place, letter in sorted(pair for pair in places if pair[1]):
        is_close = groups and place - groups[-1][-1][0] < _LETTER_WIDTH
        if is_close:
            groups[-1].append((place, letter))
        else:
            groups.append([(place, letter)])
    return [((group[0][0] + group[-1][0]) / 2, "".join(letter for _, letter in group)) for group in groups]


def _draw_dot_row(row: DotRow, marks: Markup, *, is_first: bool) -> Markup:
    leaks = ", ".join(f"{name} {text}" for name, _, text in row.ticks)
    name = f"{row.name}: {', '.join(text for text in row.texts if text)}"
    picture = element(
        "svg",
        marks,
        class_="row",
        height=_ROW_HEIGHT,
        role="img",
        aria_label=f"{name}; leakage: {leaks}" if leaks else name,
        tabindex=0 if is_first else -1,
    )
    kind = " ".join(("baseline" if row.is_baseline else "candidate", "chosen" if row.is_chosen else ""))
    return element(
        "tr",
        element("th", isolate(row.name), scope="row"),
        element("td", picture, class_="plot"),
        [element("td", text, class_="text") for text in row.texts],
        class_=kind.strip(),
    )


def draw_dot_key(chart: DotChart, value: str) -> Markup:
    """Return a list of the marks in a dot chart with their meaning; a dot means `value`."""
    dot = join(
        element("line", x1=1, x2=25, y1=8, y2=8, class_="range"),
        element("circle", cx=13, cy=8, r=5, class_="dot"),
    )
    shown = [row for row in chart.rows if row.value is not None]
    entries: list[tuple[int, Markup, Child]] = [(26, dot, value)] if shown else []
    if any(row.is_baseline for row in shown):
        entries.append((6, _draw_swatch_line("base", 0, 16), "baseline"))
    entries.append((6, _draw_swatch_line("chance", 0, 16), "chance"))
    if chart.tick_names:
        letters = _assign_letters(chart.tick_names)
        names = ", ".join(f"{letter} {name}".strip() for name, letter in letters.items())
        entries.append((6, _draw_swatch_line("leak", 5, 11), join("leakage: ", isolate(names))))
    items = [
        element("li", element("svg", mark, width=width, height=16, aria_hidden="true"), element("span", text))
        for width, mark, text in entries
    ]
    return element("ul", items, class_="marks")


def _draw_swatch_line(name: str, top: int, bottom: int) -> Markup:
    return element("line", x1=3, x2=3, y1=top, y2=bottom, class_=name)


def choose_step(value: float, low: float, high: float, steps: int) -> int:
    """Return the step of a color scale for a value between `low` and `high`."""
    share = (value - low) / ((high - low) or 1.0)
    return min(steps - 1, max(0, math.floor(share * steps)))


def choose_matrix_color(matrix: Matrix, value: float) -> str:
    """Return the color class of a value of a heat map."""
    if not math.isfinite(value):
        return "na"
    steps = DIVERGING_STEPS if matrix.is_diverging else SEQUENTIAL_STEPS
    return f"{'d' if matrix.is_diverging else 'q'}{choose_step(value, matrix.low, matrix.high, steps)}"


def draw_matrix(matrix: Matrix, name: str, described_by: str, shades: Floats | None = None) -> Markup:
    """Draw a heat map as a table with colored cells and numbers; the arrow keys move between the cells.

    Args:
        matrix: Names and numbers.
        name: Accessible name.
        described_by: Id of the element that explains the heat map.
        shades: Array (rows, columns) of the numbers that give the colors, if they are not the numbers shown.
    """
    shades = matrix.values if shades is None else shades
    is_wide = len(matrix.columns) > _MANY_COLUMNS
    head = element(
        "tr",
        element("th", matrix.row_title, scope="col") if matrix.row_title else element("td"),
        [element("th", isolate(column), scope="col") for column in matrix.columns],
    )
    rows = [
        element("tr", element("th", isolate(title), scope="row"), _draw_cells(matrix, number, shades[number]))
        for number, title in enumerate(matrix.rows)
    ]
    table = element(
        "table",
        element("thead", head),
        element("tbody", rows, data_keys="grid"),
        class_="heat wide" if is_wide else "heat",
        aria_label=name,
        aria_describedby=described_by,
    )
    return join(element("div", table, class_="scroll"), _draw_color_key(matrix))


def _draw_cells(matrix: Matrix, row: int, shades: Floats) -> list[Markup]:
    cells = []
    for column in range(len(matrix.columns)):
        value = float(matrix.values[row, column])
        mark = matrix.marks[row][column] if matrix.marks else ""
        cells.append(
            element(
                "td",
                format_number(value, matrix.decimals) + mark,
                class_=choose_matrix_color(matrix, float(shades[column])),
                tabindex=0 if row == column == 0 else -1,
            )
        )
    return cells


def _draw_color_key(matrix: Matrix) -> Markup:
    steps = DIVERGING_STEPS if matrix.is_diverging else SEQUENTIAL_STEPS
    letter = "d" if matrix.is_diverging else "q"
    swatches = [element("span", class_=f"{letter}{step}") for step in range(steps)]
    ends = [format_number(end, matrix.decimals) for end in (matrix.low, matrix.high)]
    return element("p", ends[0], element("span", swatches, aria_hidden="true"), ends[1], class_="key")


def place_on_map(x: list[float], y: list[float]) -> list[tuple[float, float] | None]:
    """Return the positions of points in the square of a map, y upwards, with one scale for both directions.

    Points without finite coordinates have no position.
    """
    is_shown = [math.isfinite(a) and math.isfinite(b) for a, b in zip(x, y, strict=True)]
    shown = [(a, b) for a, b, shown in zip(x, y, is_shown, strict=True) if shown]
    if not shown:
        return [None] * len(x)
    ends = [(min(values), max(values)) for values in zip(*shown, strict=True)]
    side = max(high - low for low, high in ends) or 1.0
    scale = (MAP_SIDE - 2 * _MAP_PADDING) / side
    middle_x, middle_y = ((low + high) / 2 for low, high in ends)
    half = MAP_SIDE / 2
    return [
        (round(half + (a - middle_x) * scale, 1), round(half - (b - middle_y) * scale, 1)) if shown else None
        for a, b, shown in zip(x, y, is_shown, strict=True)
    ]


def draw_map(
    positions: list[tuple[float, float] | None], marks: list[tuple[int, str]], name: str, described_by: str
) -> Markup:
    """Draw a map of scans; the arrow keys move between them.

    Args:
        positions: Position of each scan; None for a scan that is not on the map.
        marks: Shape number and color class of each scan.
        name: Accessible name.
        described_by: Id of the element that explains the map.
    """
    points = [
        element("use", href=f"#m{shape}", x=f"{place[0]:g}", y=f"{place[1]:g}", class_=color, data_s=number)
        for number, (place, (shape, color)) in enumerate(zip(positions, marks, strict=True))
        if place is not None
    ]
    return element(
        "svg",
        points,
        element("circle", class_="cursor", r=9, cx=-99, cy=-99),
        viewBox=f"0 0 {MAP_SIDE} {MAP_SIDE}",
        class_="map",
        **_describe_map(name, described_by),
    )


def draw_canvas_map(name: str, described_by: str) -> Markup:
    """Return a canvas on which script.js draws a map of many scans."""
    side = 2 * MAP_SIDE
    return element("canvas", class_="map", width=side, height=side, **_describe_map(name, described_by))


def _describe_map(name: str, described_by: str) -> dict[str, str | int]:
    return {
        "role": "application",
        "aria_roledescription": "map of scans",
        "aria_label": name,
        "aria_describedby": described_by,
        "tabindex": 0,
    }
