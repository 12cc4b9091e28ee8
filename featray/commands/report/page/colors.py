"""Assign colors and shapes to scans by a column; script.js gets the result as one letter per scan."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from featray.commands.report.page.charts import SEQUENTIAL_STEPS, choose_step
from featray.commands.report.page.model import Cell, Column
from featray.commands.report.page.numbers import format_cell

MAX_CATEGORIES = 6
"""Categories with their own color; the others share one."""
_OTHER, _MISSING = MAX_CATEGORIES, "-"
_SHAPE_OF_MISSING = 7


@dataclass(frozen=True)
class ColumnColors:
    """Colors of the scans by one column.

    Attributes:
        name: Name of the column.
        codes: One letter per scan: a digit is a position in `legend`, `-` a missing value.
        legend: Texts, shape numbers and color classes.
    """

    name: str
    codes: str
    legend: tuple[tuple[str, int, str], ...]

    def get_mark(self, scan: int) -> tuple[int, str]:
        """Return the shape number and the color class of a scan."""
        code = self.codes[scan]
        return (_SHAPE_OF_MISSING, "na") if code == _MISSING else self.legend[int(code)][1:]


def color_column(column: Column) -> ColumnColors:
    """Assign steps of a color scale to numbers, and colors with shapes to categories."""
    values = [
        None if isinstance(value, float) and not math.isfinite(value) else value for value in column.values
    ]
    return _color_numbers(column.name, values) if column.is_numeric else _color_texts(column.name, values)


def color_alike(count: int) -> ColumnColors:
    """Return one color for all scans."""
    return ColumnColors("", "0" * count, (("scan", 0, "c0"),))


def _color_numbers(name: str, values: list[Cell]) -> ColumnColors:
    """Divide the range of the numbers, without the outer 2 %, in equal steps."""
    numbers = sorted(float(value) for value in values if value is not None)
    cut = len(numbers) // 50
    low, high = (numbers[cut], numbers[-1 - cut]) if numbers else (0.0, 1.0)
    codes = [
        _MISSING if value is None else str(choose_step(float(value), low, high, SEQUENTIAL_STEPS))
        for value in values
    ]
    width = (high - low) / SEQUENTIAL_STEPS
    legend = [
        (f"{format_cell(low + step * width)} to {format_cell(low + (step + 1) * width)}", 0, f"q{step}")
        for step in range(SEQUENTIAL_STEPS)
    ]
    return ColumnColors(name, "".join(codes), tuple(legend))


def _color_texts(name: str, values: list[Cell]) -> ColumnColors:
    counts = Counter(str(value) for value in values if value is not None)
    ranked = sorted(counts, key=lambda text: (-counts[text], text))
    numbers = {text: min(rank, _OTHER) for rank, text in enumerate(ranked)}
    legend = [
        (f"{text} ({counts[text]:,})", rank, f"c{rank}") for rank, text in enumerate(ranked[:MAX_CATEGORIES])
    ]
    if len(ranked) > MAX_CATEGORIES:
        others = sum(counts[text] for text in ranked[MAX_CATEGORIES:])
        legend.append((f"{len(ranked) - MAX_CATEGORIES} other values ({others:,})", _OTHER, "c6"))
    codes = [_MISSING if value is None else str(numbers[str(value)]) for value in values]
    return ColumnColors(name, "".join(codes), tuple(legend))
