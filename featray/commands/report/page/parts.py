"""Parts that several sections of the page share: figures, tables, lists of scans."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from featray.commands.report.page.charts import draw_matrix
from featray.commands.report.page.markup import Child, Markup, element, isolate
from featray.commands.report.page.model import Cell, Matrix
from featray.commands.report.page.numbers import format_cell

_NUMBER = re.compile(r"[-−]?[\d,]+(\.\d+)?( ?[%\w]{1,3})?|–")


@dataclass(frozen=True)
class Section:
    """A section with a heading.

    Attributes:
        key: Id of its element, to which links lead.
        title: Text of its heading.
        content: The element.
    """

    key: str
    title: str
    content: Markup


def write_section(key: str, title: str, *content: Child) -> Section:
    """Return a section with a heading that other parts can link to."""
    heading = element("h2", title, id=f"{key}-title")
    whole = element("section", heading, *content, id=key, aria_labelledby=f"{key}-title")
    return Section(key, title, whole)


def write_contents(sections: Sequence[Section]) -> Markup:
    """Return links to sections."""
    links = [element("li", element("a", part.title, href=f"#{part.key}")) for part in sections]
    return element("nav", element("ul", links), aria_label="Parts of this page", class_="contents")


def write_figure(key: str, title: Child, reading: str, *content: Child, heading: str = "h3") -> Markup:
    """Return a figure with a heading and a sentence on how to read it, whose id is `KEY-read`."""
    caption = element(
        "figcaption",
        element(heading, title, id=f"{key}-name"),
        element("p", reading, class_="read", id=f"{key}-read"),
    )
    return element("figure", caption, *content, id=key, aria_labelledby=f"{key}-name")


def write_matrix(key: str, matrix: Matrix) -> Markup:
    """Return a heat map as a figure."""
    chart = draw_matrix(matrix, matrix.title, f"{key}-read")
    return write_figure(key, matrix.title, matrix.reading, chart)


def write_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    name: str,
    explanations: Mapping[str, str] | None = None,
) -> Markup:
    """Return a table whose first column names the rows; numbers are aligned at the right."""
    notes = explanations or {}
    lines = list(rows)
    is_text = [any(_is_text(line[place]) for line in lines) for place in range(len(columns))]
    titles = [
        element("th", isolate(title), scope="col", title=notes.get(title), class_="text" if text else None)
        for title, text in zip(columns, is_text, strict=True)
    ]
    head = element("tr", titles)
    body = [element("tr", _write_cell(line[0], is_name=True), map(_write_cell, line[1:])) for line in lines]
    table = element("table", element("thead", head), element("tbody", body), class_="data", aria_label=name)
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=name)


def _write_cell(value: Cell, *, is_name: bool = False) -> Markup:
    text = format_cell(value)
    if is_name:
        return element("th", isolate(text), scope="row")
    content = isolate(text) if isinstance(value, str) else text
    return element("td", content, class_="text" if _is_text(value) else None)


def _is_text(value: Cell) -> bool:
    """Return whether a cell holds words, not a number or a number with a unit."""
    return isinstance(value, str) and not _NUMBER.fullmatch(value)


def write_details(summary: str, *content: Child, **attributes: str | int | None) -> Markup:
    """Return content that a click opens."""
    return element("details", element("summary", summary), *content, **attributes)


def write_numbers(summary: str, *content: Child) -> Markup:
    """Return a table that a click opens; unlike other folded content, it is printed only if it is open."""
    return write_details(summary, *content, class_="numbers")


def write_advice(text: str) -> Markup:
    """Return a sentence about clicks and keys, which is shown only if scripts run."""
    return element("span", f" {text}", class_="scripted")


def write_select(key: str, label: str, options: Iterable[tuple[int, str]], chosen: int = 0) -> Markup:
    """Return a labeled select element, which is shown only if scripts run."""
    choices = [
        element("option", text, value=number, selected="" if number == chosen else None)
        for number, text in options
    ]
    return element(
        "p",
        element("label", label, for_=key),
        element("select", choices, id=key, autocomplete="off"),
        class_="control scripted",
    )
