"""Write numbers for people and divide axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from featray.commands.report.page.model import Cell

DASH = "–"
_MINUS = "−"
_PADDING = 0.04
"""Empty part of an axis at each side, as a share of its length."""


def format_number(value: float | None, decimals: int = 2) -> str:
    """Return a number with this many decimals, a minus sign and a dash for a number that does not exist."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", _MINUS)


def format_cell(value: Cell) -> str:
    """Return the content of a table cell: integers in groups of three, other numbers with three digits."""
    if value is None or isinstance(value, str):
        return DASH if value is None else value
    if isinstance(value, int):
        return f"{value:,}".replace("-", _MINUS)
    if not math.isfinite(value):
        return DASH
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}".replace("-", _MINUS)
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return format_number(value, min(digits, 4))


def format_bytes(count: int) -> str:
    """Return a size in B, kB, MB, GB or TB with at least two digits."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 9.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.0f} TB" if size >= 9.95 else f"{size:.1f} TB"


def format_gb(count: int) -> str:
    """Return a size in GB, for comparison of sizes."""
    size = count / 1e9
    if size < 0.001:
        return "under 0.001 GB"
    return f"{size:,.{3 if size < 0.1 else 1 if size < 100 else 0}f} GB"


def drop_nonfinite(value: float | None) -> float | None:
    """Return None for numbers that are not finite, which have no position on an axis."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Axis:
    """Linear map from values to percent of the width."""

    first: float
    last: float

    @classmethod
    def around(cls, values: list[float]) -> Axis:
        """Return an axis that shows all finite values and some space at both sides."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(finite), max(finite)
        space = _PADDING * ((high - low) or 1.0)
        return cls(low - space, high + space)

    def locate(self, value: float) -> float:
        """Return the position of a value in percent; values outside of the axis are put on its end."""
        share = (value - self.first) / (self.last - self.first)
        return 100 * min(1.0, max(0.0, share))

    def to_percent(self, value: float) -> str:
        """Return the position of a value as SVG has it."""
        return f"{self.locate(value):.2f}%"

    def make_ticks(self, count: int = 6) -> list[float]:
        """Return round numbers on the axis, about `count` of them."""
        rough = (self.last - self.first) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(base * power for base in (1, 2, 5, 10) if base * power >= rough)
        numbers = range(math.ceil(self.first / step), math.floor(self.last / step) + 1)
        return [number * step for number in numbers]
