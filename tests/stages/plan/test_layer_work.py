"""The cells that a plan counts, and the sentence about what a run does."""

from __future__ import annotations

import pytest
from ledgers import Cells, Row, make_excluded_row, make_failed_row, make_scan, plan_scans

from featray.errors import Reason
from featray.stages.plan.layer_work import LayerWork, describe_work

FOUR = dict.fromkeys("abcd", LayerWork(0, 0, 0, 24_000, is_new=False))
NEW = LayerWork(24_000, 0, 0, 0, is_new=True)


@pytest.mark.parametrize(
    ("new", "changed", "layers", "text"),
    [
        (0, 0, FOUR, ""),
        (
            0,
            0,
            {**FOUR, "x": NEW, "y": NEW},
            "2 new layers for 24,000 scans; 4 layers are up to date and stay as they are",
        ),
        (1, 0, FOUR, "1 new scan; 4 layers are up to date and stay as they are"),
        (
            1200,
            3,
            {"a": FOUR["a"]},
            "1,200 new scans; 3 changed scans; 1 layer is up to date and stays as it is",
        ),
        (7, 0, {"a": LayerWork(0, 0, 0, 0, is_new=True)}, "7 new scans"),
        (0, 0, {"a": LayerWork(0, 5, 0, 0, is_new=False)}, "1 stale layer for 5 scans"),
        (
            0,
            0,
            {"a": LayerWork(0, 5, 0, 2, is_new=False), "b": LayerWork(0, 7, 0, 0, is_new=False)},
            "1 stale layer for 7 scans; 1 stale layer for 5 scans",
        ),
        (
            0,
            0,
            {"a": LayerWork(3, 0, 0, 4, is_new=False), "b": LayerWork(2, 0, 0, 5, is_new=False), "x": NEW},
            "1 new layer for 24,000 scans; 1 incomplete layer for 3 scans; 1 incomplete layer for 2 scans",
        ),
    ],
)
def test_one_sentence_says_what_there_is_to_compute(
    new: int, changed: int, layers: dict[str, LayerWork], text: str
) -> None:
    assert describe_work(new, changed, layers) == text


def test_every_cell_of_a_listed_scan_is_counted_once() -> None:
    layers = {"z": "z1", "y": "y1"}
    rows = (
        Row("done", layers),
        Row("half"),
        Row("stale", {"z": "z0", "y": "y1"}),
        Row("changed", layers, content="old"),
        Row("other inputs", {"z": "old"}, recipe="old"),
        make_failed_row("failed", {"y": "y1"}, {"z": "z1"}),
        make_excluded_row("excluded"),
        Row("away", {"z": "z0"}),
        Row("gone", {"z": "z0"}),
    )
    special = [
        make_scan("away", "?", reason=Reason.STORAGE),
        make_scan("excluded", reason=Reason.NOT_CT, excluded=True),
    ]
    listed = ["done", "half", "stale", "changed", "other inputs", "failed", "first", "second"]
    plan = plan_scans([*listed, *special], *rows, layers=layers)
    assert plan.count_cells() == {
        "new": 4,
        "changed": 2,
        "missing": 1,
        "stale": 3,
        "failed": 1,
        "up_to_date": 5,
    }
    assert plan.layers == {
        "z": LayerWork(missing=0, stale=2, failed=0, up_to_date=3, is_new=False),
        "y": LayerWork(missing=1, stale=1, failed=1, up_to_date=2, is_new=False),
    }


@pytest.mark.parametrize(
    ("stored", "layers", "text"),
    [
        ({"z": "z1"}, {"z": "z1"}, ""),
        (
            {"z": "z1"},
            {"z": "z1", "y": "y1", "x": "x1"},
            "2 new layers for 3 scans; 1 layer is up to date and stays as it is",
        ),
        ({"z": "z1"}, {"y": "y1"}, "1 new layer for 3 scans"),
        ({"z": "z1"}, {"new": "z1"}, ""),
        (
            {"z": "z0", "y": "y1"},
            {"z": "z1", "y": "y1"},
            "1 stale layer for 3 scans; 1 layer is up to date and stays as it is",
        ),
    ],
)
def test_a_plan_describes_its_work(stored: Cells, layers: Cells, text: str) -> None:
    assert plan_scans("abc", *(Row(name, stored) for name in "abc"), layers=layers).describe_work() == text
