"""Draw points as a scatter plot: positions, values and texts in, uint8 BGR image out. Must know no files."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

_Image = NDArray[np.uint8]
_Array = NDArray[np.float64]
_Color = tuple[int, int, int]

_SCALE = 2
"""The plot is drawn at this multiple of its size and reduced, so that its lines are smooth."""
_WIDTH, _HEIGHT = 900, 640
_LEFT, _TOP, _RIGHT, _BOTTOM = 90, 70, 170, 110
"""Distances from the edges of the image to the plot area, in pixels."""
_BAR_WIDTH, _BAR_GAP = 18, 30
_RADIUS = 8
_PADDING = 0.08
"""Empty part of the plot area at each side."""
_TICKS = 5
_BLACK: _Color = (30, 30, 30)
_GRID: _Color = (225, 225, 225)


@dataclass(frozen=True)
class ScatterPlot:
    """Content of a plot.

    Attributes:
        x: Positions along the horizontal axis.
        y: Positions along the vertical axis.
        values: Value of each point, shown as its color.
        is_square: Whether each point is drawn as a square instead of a circle.
        title: Text above the plot.
        axis_labels: Names of the horizontal and the vertical axis.
        color_label: Name of `values`, above the color bar.
        marker_labels: Meaning of circles and of squares.
    """

    x: _Array
    y: _Array
    values: _Array
    is_square: NDArray[np.bool_]
    title: str
    axis_labels: tuple[str, str]
    color_label: str
    marker_labels: tuple[str, str]


@dataclass(frozen=True)
class _Axis:
    """Linear map from values to pixels: `first` is at pixel `start`, `last` at pixel `end`."""

    first: float
    last: float
    start: float
    end: float

    @classmethod
    def around(cls, values: _Array, start: float, end: float) -> _Axis:
        """Return an axis that shows all values and some space at both sides."""
        low, high = float(values.min()), float(values.max())
        space = _PADDING * ((high - low) or 1.0)
        return cls(low - space, high + space, start, end)

    def to_pixel(self, value: float) -> float:
        return self.start + (value - self.first) / (self.last - self.first) * (self.end - self.start)

    def make_ticks(self) -> list[float]:
        """Return round numbers between `first` and `last`, about `_TICKS` of them."""
        rough = (self.last - self.first) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(base * power for base in (1, 2, 5, 10) if base * power >= rough)
        numbers = range(math.ceil(self.first / step), math.floor(self.last / step) + 1)
        return [number * step for number in numbers]


def draw_scatter_plot(plot: ScatterPlot) -> _Image:
    """Draw a scatter plot with axes, a color bar and a legend of the markers.

    Returns:
        The image, uint8 (rows, columns, 3), in the channel order of OpenCV (blue, green, red).
    """
    image = np.full((_HEIGHT * _SCALE, _WIDTH * _SCALE, 3), 255, np.uint8)
    x_axis = _Axis.around(plot.x, _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis.around(plot.y, _HEIGHT - _BOTTOM, _TOP)
    _draw_text(image, plot.title, (_LEFT, 40), 0.62)
    _draw_axes(image, x_axis, y_axis, plot.axis_labels)
    colors = _to_colors(plot.values)
    for x, y, color, is_square in zip(plot.x, plot.y, colors, plot.is_square, strict=True):
        _draw_marker(image, (x_axis.to_pixel(x), y_axis.to_pixel(y)), color, is_square=bool(is_square))
    _draw_color_bar(image, plot)
    _draw_legend(image, plot.marker_labels)
    return np.asarray(cv2.resize(image, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)


def _draw_axes(image: _Image, x_axis: _Axis, y_axis: _Axis, labels: tuple[str, str]) -> None:
    for tick in x_axis.make_ticks():
        x = x_axis.to_pixel(tick)
        _draw_line(image, (x, y_axis.start), (x, y_axis.end), _GRID)
        _draw_text(image, f"{tick:g}", (x, y_axis.start + 22), anchor="middle")
    for tick in y_axis.make_ticks():
        y = y_axis.to_pixel(tick)
        _draw_line(image, (x_axis.start, y), (x_axis.end, y), _GRID)
        _draw_text(image, f"{tick:g}", (x_axis.start - 8, y + 5), anchor="end")
    corners = [(x_axis.start, y_axis.end), (x_axis.end, y_axis.start)]
    cv2.rectangle(image, _scale(corners[0]), _scale(corners[1]), _BLACK, _SCALE)
    _draw_text(image, labels[0], ((x_axis.start + x_axis.end) / 2, y_axis.start + 50), 0.5, anchor="middle")
    _draw_vertical_text(image, labels[1], (22, (y_axis.start + y_axis.end) / 2))


def _draw_color_bar(image: _Image, plot: ScatterPlot) -> None:
    left, right = _WIDTH - _RIGHT + _BAR_GAP, _WIDTH - _RIGHT + _BAR_GAP + _BAR_WIDTH
    low, high = float(plot.values.min()), float(plot.values.max())
    axis = _Axis(low, high if high > low else low + 1.0, _HEIGHT - _BOTTOM, _TOP)
    top, bottom = _scale((left, axis.end)), _scale((right, axis.start))
    rows = np.linspace(1.0, 0.0, bottom[1] - top[1])
    image[top[1] : bottom[1], top[0] : bottom[0]] = _map_colors(rows)[:, np.newaxis]
    cv2.rectangle(image, top, bottom, _BLACK, _SCALE)
    for tick in axis.make_ticks():
        y = axis.to_pixel(tick)
        _draw_line(image, (right, y), (right + 5, y), _BLACK)
        _draw_text(image, f"{tick:g}", (right + 10, y + 5))
    _draw_text(image, plot.color_label, (left, _TOP - 12))


def _draw_legend(image: _Image, labels: tuple[str, str]) -> None:
    y = _HEIGHT - 28
    for number, label in enumerate(labels):
        x = _LEFT + 10 + number * 200
        _draw_marker(image, (x, y), (160, 160, 160), is_square=number == 1)
        _draw_text(image, label, (x + 18, y + 5))


def _draw_marker(image: _Image, center: tuple[float, float], color: _Color, *, is_square: bool) -> None:
    x, y = center
    for shade, thickness in ((color, cv2.FILLED), (_BLACK, _SCALE)):
        if is_square:
            first, last = _scale((x - _RADIUS, y - _RADIUS)), _scale((x + _RADIUS, y + _RADIUS))
            cv2.rectangle(image, first, last, shade, thickness, cv2.LINE_AA)
        else:
            cv2.circle(image, _scale(center), _RADIUS * _SCALE, shade, thickness, cv2.LINE_AA)


def _to_colors(values: _Array) -> list[_Color]:
    """Return a color for each value, from the smallest to the largest along the color map."""
    low, high = float(values.min()), float(values.max())
    fractions = (values - low) / ((high - low) or 1.0)
    return [(int(blue), int(green), int(red)) for blue, green, red in _map_colors(fractions)]


def _map_colors(fractions: _Array) -> _Image:
    """Return the colors (n, 3) of fractions between 0 and 1."""
    levels = np.rint(255 * fractions).astype(np.uint8)[:, np.newaxis]
    colors: _Image = np.asarray(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), np.uint8)[:, 0]
    return colors


def _draw_line(
    image: _Image, start: tuple[float, float], end: tuple[float, float], color: tuple[int, int, int]
) -> None:
    cv2.line(image, _scale(start), _scale(end), color, _SCALE, cv2.LINE_AA)


def _draw_text(
    image: _Image, text: str, position: tuple[float, float], size: float = 0.45, *, anchor: str = "start"
) -> None:
    """Draw text; `position` is the start, the middle or the end of its baseline, as `anchor` says."""
    width = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size * _SCALE, _SCALE)[0][0]
    x, y = _scale(position)
    x -= {"start": 0, "middle": width // 2, "end": width}[anchor]
    cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, size * _SCALE, _BLACK, _SCALE, cv2.LINE_AA)


def _draw_vertical_text(image: _Image, text: str, center: tuple[float, float]) -> None:
    """Draw text that reads upwards around a point."""
    rotated = np.ascontiguousarray(np.rot90(image, -1))  # clockwise: upwards becomes left to right
    x, y = center
    _draw_text(rotated, text, (_HEIGHT - y, x), 0.5, anchor="middle")
    image[:] = np.rot90(rotated)


def _scale(position: tuple[float, float]) -> tuple[int, int]:
    return round(position[0] * _SCALE), round(position[1] * _SCALE)
