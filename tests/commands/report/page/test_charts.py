"""Axes, numbers, colors and pictures of the page."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest

from featray.commands.report.page.charts import (
    MAP_SIDE,
    DotChart,
    DotRow,
    choose_matrix_color,
    draw_dot_chart,
    draw_dot_key,
    merge_letters,
    place_on_map,
)
from featray.commands.report.page.colors import color_column
from featray.commands.report.page.images import encode_slice, shrink_slices
from featray.commands.report.page.markup import element, encode_script_data, mark_code
from featray.commands.report.page.model import Column, Matrix, Slice
from featray.commands.report.page.numbers import Axis, format_bytes, format_cell, format_gb, format_number


def decode(image: Slice) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(image.png, np.uint8), cv2.IMREAD_UNCHANGED))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.856, "0.86"),
        (-0.5, "−0.50"),
        (-0.001, "0.00"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
    ],
)
def test_numbers_have_two_decimals_and_a_minus_sign(value: float | None, text: str) -> None:
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345, "12,345"),
        (0.0, "0"),
        (0.08081, "0.0808"),
        (31.42, "31.4"),
        (1234.5, "1234"),
        (2e-9, "2.00e−09"),
    ],
)
def test_cells_have_three_digits(value: float, text: str) -> None:
    assert format_cell(value) == text


@pytest.mark.parametrize(
    ("count", "size", "gigabytes"),
    [
        (999, "999 B", "under 0.001 GB"),
        (4096, "4.1 kB", "under 0.001 GB"),
        (65_536_000, "66 MB", "0.066 GB"),
        (1_500_000_000_000, "1.5 TB", "1,500 GB"),
    ],
)
def test_sizes_have_a_unit(count: int, size: str, gigabytes: str) -> None:
    assert format_bytes(count) == size
    assert format_gb(count) == gigabytes


def test_an_axis_shows_all_values_and_has_round_ticks() -> None:
    axis = Axis.around([0.5, 0.9, float("nan")])
    assert axis.to_percent(0.7) == "50.00%"
    assert axis.to_percent(5.0) == "100.00%"
    assert np.allclose(axis.make_ticks(), [0.5, 0.6, 0.7, 0.8, 0.9])
    assert Axis.around([]).make_ticks()[0] == 0


def test_a_dot_an_interval_and_ticks_are_where_the_axis_says() -> None:
    row = DotRow("layer", 0.75, 0.5, 1.0, (("kernel", 0.6, "AUC 0.60"),), ("0.75",))
    chart = DotChart("AUC", "read", ("Layer", "AUC"), 0.5, (row,))
    text = draw_dot_chart(chart)
    axis = chart.make_axis()
    assert f'cx="{axis.to_percent(0.75)}"' in text
    assert f'x1="{axis.to_percent(0.5)}" x2="{axis.to_percent(1.0)}"' in text
    assert "<title>kernel AUC 0.60</title>" in text
    assert 'aria-label="layer: 0.75; leakage: kernel AUC 0.60"' in text


def test_ticks_have_letters_if_there_are_several_kinds() -> None:
    ticks = (("kernel", 0.6, "AUC 0.60"), ("spacing", 0.9, "AUC 0.90"))
    row = DotRow("layer", 0.75, 0.5, 1.0, ticks, ("0.75",))
    chart = DotChart("AUC", "read", ("Layer", "AUC"), 0.5, (row,), ("spacing", "kernel"))
    axis = chart.make_axis()
    text = draw_dot_chart(chart)
    assert f'x="{axis.to_percent(0.6)}" y="30" class="leak">b</text>' in text
    assert f'x="{axis.to_percent(0.9)}" y="30" class="leak">a</text>' in text
    assert "leakage: <bdi>a spacing, b kernel</bdi>" in draw_dot_key(chart, "AUC")
    single = dataclasses.replace(chart, tick_names=("kernel",))
    assert "leakage: <bdi>kernel</bdi>" in draw_dot_key(single, "AUC")
    assert "<text" not in draw_dot_chart(single).split("<tbody")[1]


def test_the_key_of_a_dot_chart_has_only_the_marks_that_are_in_it() -> None:
    row = DotRow("layer", None, None, None, (), ())
    key = draw_dot_key(DotChart("Leakage", "read", ("Layer",), 0.0, (row,)), "AUC")
    assert "AUC" not in key
    assert "baseline" not in key
    assert "chance" in key


def test_letters_of_ticks_that_are_close_stand_together() -> None:
    places = [(50.0, "b"), (10.0, "c"), (48.0, "a"), (90.0, "")]
    assert merge_letters(places) == [(10.0, "c"), (49.0, "ab")]


def test_colors_of_a_matrix_follow_its_range() -> None:
    matrix = Matrix("", "", ("a",), ("b",), np.zeros((1, 1)), low=-1, high=1, is_diverging=True)
    values = (-1.0, 0.0, 1.0, 7.0, float("nan"))
    assert [choose_matrix_color(matrix, value) for value in values] == ["d0", "d4", "d8", "d8", "na"]


def test_a_map_has_one_scale_for_both_directions_and_y_upwards() -> None:
    places = place_on_map([0.0, 10.0, float("nan")], [0.0, 1.0, 0.0])
    assert places[2] is None
    assert places[0] is not None
    assert places[1] is not None
    (x0, y0), (x1, y1) = places[0], places[1]
    assert 0 < x0 < x1 < MAP_SIDE
    assert y0 - y1 == pytest.approx((x1 - x0) / 10, abs=0.2)


def test_missing_values_have_no_color_and_the_most_frequent_category_has_the_first() -> None:
    colors = color_column(Column("kernel", ("b", "a", "b", None)))
    assert colors.codes == "010-"
    assert colors.legend == (("b (2)", 0, "c0"), ("a (1)", 1, "c1"))
    assert colors.get_mark(3) == (7, "na")


def test_numbers_of_numpy_are_numbers() -> None:
    assert Column("age", (np.int64(3), np.float32(4.5))).is_numeric  # type: ignore[arg-type]


def test_numbers_are_colored_in_seven_steps_of_their_range() -> None:
    colors = color_column(Column("age", (*range(70), None)))
    assert colors.codes[0] == "0"
    assert colors.codes[69] == "6"
    assert len(colors.legend) == 7


def test_a_slice_has_the_proportions_of_the_voxels_and_the_gray_values_of_the_window() -> None:
    values = np.array([[-1000, 400], [-2000, np.nan]], np.float32)
    image = encode_slice(values, (-1000, 400), proportions=(2.0, 1.0), side=40)
    assert (image.height, image.width) == (40, 20)
    pixels = decode(image)
    assert pixels.shape == (40, 20)
    assert [pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]] == [0, 255, 0, 0]


def test_slices_are_only_made_smaller() -> None:
    image = encode_slice(np.eye(50, dtype=np.float32), (0, 1), side=96)
    smaller = shrink_slices({4: image}, 48)
    assert decode(smaller[4]).shape == (48, 48)
    assert shrink_slices(smaller, 80) == smaller


def test_attributes_and_script_data_are_escaped() -> None:
    assert element("p", "<b>", title='"&') == '<p title="&quot;&amp;">&lt;b&gt;</p>'
    assert encode_script_data(["</script>", "\u2028"]) == '["\\u003c/script\\u003e","\\u2028"]'


def test_parts_of_a_sentence_between_backticks_are_code() -> None:
    assert mark_code("run `a<b` again") == "run <code>a&lt;b</code> again"
    assert mark_code("a ` alone") == "a ` alone"
