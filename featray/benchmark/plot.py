"""Draw an SVG with one bar per variant: the core-seconds per scan, divided by use."""

from __future__ import annotations

from collections.abc import Mapping
from xml.sax.saxutils import escape

COLORS = {
    "decompress": "#1b6ca8",
    "resize": "#5fa8d3",
    "model": "#2e8b57",
    "decode more": "#9ecae1",
    "model more": "#98d8aa",
    "write": "#8c6bb1",
    "engine": "#e07b39",
    "work": "#777777",
    "idle": "#e4e4e4",
}
"""Color of each part of a bar, in the order of the parts: the required stages come first."""
LEGEND = {"decode more": "decoding overhead", "model more": "model overhead", "work": "whole script"}
"""Texts of the legend that differ from the names of the parts."""

_WIDTH, _LEFT, _RIGHT = 960, 130, 100
_TOP, _BAR, _GAP = 56, 26, 14
_FONT = 'font-family="sans-serif" font-size="13"'


def plot(title: str, bars: Mapping[str, Mapping[str, float]], rates: Mapping[str, float]) -> str:
    """Return the SVG as text.

    Args:
        title: Text above the bars.
        bars: Core-seconds per scan by part, of each variant; the parts are keys of `COLORS`.
        rates: Scans per second of each variant, written to the right of its bar.
    """
    longest = max(sum(parts.values()) for parts in bars.values())
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    bottom = _TOP + len(bars) * (_BAR + _GAP)
    lines = [_draw_text(16, 26, title, size=16), *_draw_axis(longest, scale, bottom)]
    for row, (name, parts) in enumerate(bars.items()):
        y = _TOP + row * (_BAR + _GAP)
        lines.append(_draw_text(_LEFT - 10, y + 18, name, anchor="end"))
        lines += _draw_bar(parts, scale, y)
        end = _LEFT + scale * sum(parts.values())
        lines.append(_draw_text(end + 8, y + 18, f"{rates[name]:.2f}/s"))
    shown = [name for name in COLORS if any(parts.get(name) for parts in bars.values())]
    lines += _draw_legend(shown, bottom + 52)
    height = bottom + 52 + 24 * -(-len(shown) // 5) + 8
    body = "\n".join(lines)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _draw_bar(parts: Mapping[str, float], scale: float, y: float) -> list[str]:
    lines, x = [], float(_LEFT)
    for name in COLORS:
        width = scale * parts.get(name, 0.0)
        if width > 0:
            tooltip = f"<title>{escape(LEGEND.get(name, name))} {parts[name]:.3f} s</title>"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{COLORS[name]}">'
                f"{tooltip}</rect>"
            )
        x += width
    return lines


def _draw_axis(longest: float, scale: float, y: float) -> list[str]:
    """Return about five vertical lines at round numbers of core-seconds, and the unit."""
    step = next(
        base * 10.0**power
        for power in range(-9, 9)
        for base in (1, 2, 5)
        if base * 10.0**power >= longest / 6
    )
    lines = []
    for number in range(int(longest / step) + 1):
        x = _LEFT + scale * number * step
        lines.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 6}" y2="{y}" stroke="#cccccc"/>')
        lines.append(_draw_text(x, y + 16, f"{number * step:g}", anchor="middle"))
    return [*lines, _draw_text(_WIDTH - 16, y + 32, "core-seconds per scan", anchor="end")]


def _draw_legend(names: list[str], y: float) -> list[str]:
    lines = []
    for index, name in enumerate(names):
        x, baseline = 16 + 185 * (index % 5), y + 24 * (index // 5)
        lines.append(f'<rect x="{x}" y="{baseline - 12}" width="14" height="14" fill="{COLORS[name]}"/>')
        lines.append(_draw_text(x + 20, baseline, LEGEND.get(name, name)))
    return lines


def _draw_text(x: float, y: float, content: str, *, anchor: str = "start", size: int = 13) -> str:
    font = _FONT.replace("13", str(size))
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {font}>{escape(content)}</text>'
