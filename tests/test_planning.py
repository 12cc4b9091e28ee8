"""The plan: what is listed against what is stored."""

from __future__ import annotations

import pyarrow as pa
import pytest

from featray.errors import Reason
from featray.planning import make_plan
from featray.schema import Scan

COLUMNS = ("scan_id", "status", "reason", "content", "recipe")


def scan(scan_id: str, content: str = "c") -> Scan:
    return Scan(scan_id, f"/data/{scan_id}", "nifti", (f"/data/{scan_id}",), content)


def ledger(*rows: tuple[str | None, ...]) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(COLUMNS, row, strict=True)) for row in rows],
        schema=pa.schema([(name, pa.string()) for name in COLUMNS]),
    )


@pytest.mark.parametrize(
    ("row", "state", "due"),
    [
        (None, "new", True),
        (("a", "ok", None, "c", "r"), "up_to_date", False),
        (("a", "ok", None, "old", "r"), "changed", False),
        (("a", "ok", None, "c", "old"), "stale", False),
        (("a", "failed", "truncated", "c", "r"), "failed", False),
        (("a", "failed", "storage", "c", "r"), "failed", True),
        (("a", "failed", "truncated", "old", "r"), "changed", True),
        (("a", "failed", "preprocess", "c", "old"), "stale", True),
        (("a", "excluded", "not_ct", "c", "old"), "up_to_date", False),
    ],
)
def test_a_scans_state_follows_from_content_recipe_and_status(
    row: tuple[str | None, ...] | None, state: str, due: bool
) -> None:
    plan = make_plan([scan("a")], ledger(*([row] if row else [])), "r")
    assert plan.states["a"] == state
    assert [todo.scan_id for todo in plan.todo] == (["a"] if due else [])


def test_a_stored_scan_that_is_not_listed_is_removed() -> None:
    plan = make_plan([scan("a")], ledger(("a", "ok", None, "c", "r"), ("gone", "ok", None, "c", "r")), "r")
    assert plan.counts == {"new": 0, "changed": 0, "stale": 0, "failed": 0, "removed": 1, "up_to_date": 1}
    assert plan.todo == ()


def test_stored_features_of_another_recipe_are_named() -> None:
    rows = ledger(
        ("a", "ok", None, "c", "old"), ("b", "ok", None, "old", "r"), ("c", "failed", "model", "c", "old")
    )
    plan = make_plan([scan("a"), scan("b"), scan("c")], rows, "r")
    assert plan.other_recipe == ("a",)


def test_a_scan_survives_the_way_to_a_worker_and_back() -> None:
    listed = Scan(
        scan_id="a",
        uri="/a",
        format="dicom",
        files=("/a/1", "/a/2"),
        content="c",
        mask="/m.nii",
        center_lps=(1.0, -2.5, 3.0),
        columns={"site": "x"},
        warnings=("oblique",),
        reason=Reason.NOT_CT,
        excluded=True,
    )
    assert Scan.from_json(listed.to_json()) == listed
