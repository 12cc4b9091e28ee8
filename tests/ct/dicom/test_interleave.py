"""Volumes that interleave along the normal are told from parts that complete one grid."""

from __future__ import annotations

import numpy as np
import pytest

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.interleave import TELLING_FIELDS, are_interleaved, find_interleaved_field, number_passes


def place(*parts: tuple[str, list[float]]) -> tuple[np.ndarray, list[str]]:
    """Return distances and labels of slices, given as pairs of a label and its distances."""
    pairs = [(distance, label) for label, distances in parts for distance in distances]
    return np.array([distance for distance, _ in pairs]), [label for _, label in pairs]


def grid(first: float, step: float, count: int) -> list[float]:
    return [first + step * index for index in range(count)]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([("a", grid(0, 5, 8)), ("b", grid(2.5, 5, 8))], id="half-a-step"),
        pytest.param([("a", grid(0, 5, 8)), ("b", grid(2, 5, 8))], id="off-the-grid"),
        pytest.param([("a", grid(0, 6, 5)), ("b", grid(2, 6, 5)), ("c", grid(4, 6, 5))], id="three"),
        pytest.param([("a", grid(0, 5, 9)), ("b", grid(2.5, 5, 4)), ("", grid(22.5, 5, 4))], id="unlabeled"),
        pytest.param([("a", grid(0, 5, 12)), ("b", grid(51, 5, 12))], id="overlap-of-two"),
        pytest.param([("thick", grid(0, 5, 8)), ("thin", grid(0.5, 1, 36))], id="thick-and-thin"),
        pytest.param([("a", grid(0, 5, 8)), ("b", [12.5])], id="one-image-between"),
        pytest.param([("a", grid(0, 5, 8)), ("b", [2.5, 7.5, 12.5, 27.5, 32.5])], id="second-lacks-a-slice"),
    ],
)  # fmt: skip
def test_regular_stacks_over_the_same_range_are_interleaved(parts: list[tuple[str, list[float]]]) -> None:
    assert are_interleaved(*place(*parts))


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([("a", grid(0, 5, 8)), ("b", grid(40, 5, 8))], id="moving-table"),
        pytest.param([("a", grid(0, 5, 8)), ("b", grid(37, 5, 8))], id="ranges-that-meet-off-the-grid"),
        pytest.param([("a", [0, 5, 10, 20, 25]), ("b", [15])], id="one-slice-of-the-grid"),
        pytest.param([("a", [0, 5, 10, 15, 25]), ("b", [20, 30, 35, 40])], id="swapped-at-the-seam"),
        pytest.param([("a", grid(0, 5, 5)), ("b", [z for z in grid(0, 1, 21) if z % 5])], id="every-fifth"),
        pytest.param([(str(z), [z]) for z in grid(0, 5, 8)], id="a-label-per-slice"),
        pytest.param([("a", grid(0, 5, 8))], id="one-label"),
        pytest.param([("a", [0, 35]), ("b", grid(5, 5, 6))], id="other-first-and-last"),
    ],
)
def test_ranges_and_complements_are_not_interleaved(parts: list[tuple[str, list[float]]]) -> None:
    assert not are_interleaved(*place(*parts))


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        pytest.param([1, 2, 3, 4, 5, 6], [0] * 6, id="ascending"),
        pytest.param([6, 5, 4, 3, 2, 1], [0] * 6, id="descending"),
        pytest.param([1, 4, 2, 5, 3, 6], [0, 1, 0, 1, 0, 1], id="begins-again"),
        pytest.param([1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 0, 1], id="repeats"),
        pytest.param([1, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1], id="repeats-in-ranges"),
        pytest.param([7] * 6, [0, 1, 2, 3, 4, 5], id="one-number"),
        pytest.param([1, None, 2, 5, 3, 6], [0] * 6, id="unknown"),
    ],
)
def test_a_pass_ends_where_the_order_of_numbers_turns(numbers: list[int | None], expected: list[int]) -> None:
    assert number_passes(np.arange(6.0), numbers) == expected


@pytest.mark.parametrize("field", [*TELLING_FIELDS, "instance_number"])
def test_the_field_that_tells_interleaved_volumes_apart_is_named(field: str) -> None:
    slices = [
        SliceHeader(
            f"{z}.dcm",
            position=(0.0, 0.0, float(z)),
            orientation=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
            **{field: (z // 2 + 100 * (z % 2)) if field == "instance_number" else str(z % 2)},  # type: ignore[arg-type]
        )
        for z in range(8)
    ]

    assert find_interleaved_field(slices) == field
