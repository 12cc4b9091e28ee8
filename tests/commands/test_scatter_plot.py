"""The scatter plot: positions and colors of points, ticks, and input without any spread."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from featray.commands import scatter_plot
from featray.commands.scatter_plot import ScatterPlot, draw_scatter_plot

PLOT = ScatterPlot(
    x=np.array([0.0, 10.0]),
    y=np.array([0.0, 5.0]),
    values=np.array([1.0, 3.0]),
    is_square=np.array([False, True]),
    title="title",
    axis_labels=("x", "y"),
    color_label="value",
    marker_labels=("circle", "square"),
)


def find_pixel(x: float, y: float) -> tuple[int, int]:
    """Return (row, column) of a position in `PLOT`; the first point is at the lower left."""
    right, lower = 900 - scatter_plot._RIGHT, 640 - scatter_plot._BOTTOM
    width, height = right - scatter_plot._LEFT, lower - scatter_plot._TOP
    space = scatter_plot._PADDING / (1 + 2 * scatter_plot._PADDING)
    column = scatter_plot._LEFT + width * (space + (1 - 2 * space) * x / 10)
    return round(lower - height * (space + (1 - 2 * space) * y / 5)), round(column)


def test_points_are_at_their_positions_in_the_colors_of_their_values() -> None:
    image = draw_scatter_plot(PLOT)
    ends = np.array([[0], [255]], np.uint8)
    lowest, highest = np.asarray(cv2.applyColorMap(ends, cv2.COLORMAP_VIRIDIS))[:, 0]
    np.testing.assert_array_equal(image[find_pixel(0, 0)], lowest)
    np.testing.assert_array_equal(image[find_pixel(10, 5)], highest)
    np.testing.assert_array_equal(image[find_pixel(7, 1)], [255, 255, 255])


def test_squares_fill_their_corners_and_circles_do_not() -> None:
    image = draw_scatter_plot(PLOT)
    offset = scatter_plot._RADIUS - 1
    for position, is_filled in (((0, 0), False), ((10, 5), True)):
        row, column = find_pixel(*position)
        assert bool(image[row - offset, column - offset].min() < 200) == is_filled


@pytest.mark.parametrize(
    ("first", "last", "ticks"),
    [(-1.2, 1.2, [-1.0, -0.5, 0.0, 0.5, 1.0]), (203, 249, [210, 220, 230, 240]), (0.0, 0.0011, 3)],
)
def test_ticks_are_round_numbers_within_the_axis(first: float, last: float, ticks: list[float] | int) -> None:
    found = scatter_plot._Axis(first, last, 0.0, 100.0).make_ticks()
    if isinstance(ticks, int):
        assert len(found) >= ticks
    else:
        assert found == pytest.approx(ticks)
    assert all(first <= tick <= last for tick in found)


def test_equal_values_and_positions_are_drawn() -> None:
    same = np.array([2.0, 2.0])
    image = draw_scatter_plot(replace(PLOT, x=same, y=same, values=same))
    assert image.shape == (640, 900, 3)
    assert image.dtype == np.uint8
