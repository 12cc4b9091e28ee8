"""Planning: the state of each scan, the scans that each command processes, and the explanations."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pytest

from featray.errors import Reason, UsageError
from featray.schema import Scan
from featray.stages.list import Listing
from featray.stages.plan import STATES, Plan, make_plan

COLUMNS = ("scan_id", "status", "reason", "content", "recipe")
Row = tuple[str | None, ...]


def make_scan(scan_id: str, content: str = "c", **more: Any) -> Scan:
    return Scan(scan_id, f"/data/{scan_id}", "nifti", (f"/data/{scan_id}",), content, **more)


def make_ledger(*rows: Row, columns: tuple[str, ...] = COLUMNS) -> pa.Table:
    return pa.Table.from_pylist(
        [dict(zip(columns, row, strict=True)) for row in rows],
        schema=pa.schema([(name, pa.string()) for name in columns]),
    )


def plan_scans(scans: Collection[Scan], *rows: Row, **more: Any) -> Plan:
    listing = Listing(tuple(sorted(scans, key=lambda scan: scan.scan_id)))
    return make_plan(listing, make_ledger(*rows), "r", **more)


def get_states(plan: Plan) -> dict[str, str]:
    return {explanation["scan_id"]: explanation["state"] for explanation in plan.explain_all()}


def get_todo(plan: Plan) -> list[str]:
    return [scan.scan_id for scan in plan.todo]


@pytest.mark.parametrize(
    ("row", "state", "extract", "refresh"),
    [
        (None, "new", True, True),
        (("a", "ok", None, "c", "r"), "up_to_date", False, False),
        (("a", "ok", None, "old", "r"), "changed", False, True),
        (("a", "ok", None, "c", "old"), "stale", False, True),
        (("a", "ok", None, "old", "old"), "changed", False, True),
        (("a", "failed", "truncated", "c", "r"), "failed", False, False),
        (("a", "failed", "storage", "c", "r"), "failed", True, True),
        (("a", "failed", "truncated", "old", "r"), "changed", True, True),
        (("a", "failed", "preprocess", "c", "old"), "stale", True, True),
        (("a", "failed", None, "c", "r"), "failed", False, False),
    ],
)
def test_a_scans_state_follows_from_content_recipe_and_status(
    row: Row | None, state: str, extract: bool, refresh: bool
) -> None:
    for is_refresh, due in ((False, extract), (True, refresh)):
        plan = plan_scans([make_scan("a")], *([row] if row else []), refresh=is_refresh)
        assert get_states(plan) == {"a": state}
        assert get_todo(plan) == (["a"] if due else [])
        assert plan.refresh_todo == refresh
        assert plan.counts == {**dict.fromkeys(STATES, 0), state: 1}


@pytest.mark.parametrize("refresh", [False, True])
@pytest.mark.parametrize(
    ("retry", "due"),
    [(None, ["s"]), ([], ["s"]), (["truncated"], ["s", "t"]), ([Reason.MODEL, "truncated"], ["m", "s", "t"])],
)
def test_failed_scans_are_tried_again_for_the_chosen_reasons(
    retry: list[str] | None, due: list[str], refresh: bool
) -> None:
    rows = (("m", "failed", "model", "c", "r"), ("s", "failed", "storage", "c", "r"))
    plan = plan_scans(
        [make_scan(name) for name in "mst"],
        *rows,
        ("t", "failed", "truncated", "c", "r"),
        refresh=refresh,
        retry=retry,
    )
    assert get_todo(plan) == due


def test_an_excluded_scan_stays_excluded_with_another_recipe() -> None:
    out = make_scan("a", reason=Reason.NOT_CT, excluded=True)
    plan = plan_scans([out], ("a", "excluded", "not_ct", "c", "old"), refresh=True)
    assert (get_states(plan), get_todo(plan)) == ({"a": "up_to_date"}, [])
    assert plan.explain_scan("a") == "up to date: excluded by a rule (not_ct), and unchanged"


def test_a_scan_that_the_policy_newly_includes_or_excludes_is_changed() -> None:
    taken, left_out = make_scan("in"), make_scan("out", reason=Reason.DUPLICATE_ID, excluded=True)
    rows = (("in", "excluded", "not_ct", "c", "r"), ("out", "ok", None, "c", "r"))
    assert get_todo(plan_scans([taken, left_out], *rows)) == ["in"]
    plan = plan_scans([taken, left_out], *rows, refresh=True)
    assert get_todo(plan) == ["in", "out"]
    assert "the policy now includes it" in plan.explain_scan("in")
    assert "the policy now excludes it (duplicate_id)" in plan.explain_scan("out")


def test_an_open_scan_that_was_excluded_when_it_was_read_stays_excluded() -> None:
    is_open = replace(make_scan("a"), files=(), format="auto")
    assert get_states(plan_scans([is_open], ("a", "excluded", "not_ct", "c", "old"))) == {"a": "up_to_date"}


def test_a_stored_scan_that_is_not_listed_is_removed() -> None:
    rows = (("a", "ok", None, "c", "r"), ("z", "ok", None, "c", "r"), ("gone", "ok", None, "c", "r"))
    plan = plan_scans([make_scan("a")], *rows, refresh=True)
    assert plan.counts == {**dict.fromkeys(STATES, 0), "removed": 2, "up_to_date": 1}
    assert (list(plan.removed), get_todo(plan)) == (["gone", "z"], [])
    assert "`refresh` deletes it" in plan.explain_scan("gone")


def test_the_rows_of_unreachable_scans_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    away = [
        make_scan(name, "?", reason=Reason.STORAGE, message="away") for name in ("bad", "good", "new", "out")
    ]
    rows = (
        ("bad", "failed", "truncated", "c", "r"),
        ("good", "ok", None, "c", "old"),
        ("out", "excluded", "not_ct", "c", "r"),
    )
    plan = plan_scans(away, *rows, refresh=True)
    assert get_states(plan) == {"bad": "changed", "good": "up_to_date", "new": "new", "out": "up_to_date"}
    assert get_todo(plan) == ["bad", "new"]
    assert plan.unreachable == 2
    assert "2 stored scans cannot be reached now (storage)" in caplog.text
    assert "the listing could not reach it now (storage); its stored features are kept" in plan.explain_scan(
        "good"
    )


def test_scans_in_an_unreadable_archive_or_folder_are_not_removed() -> None:
    away = [make_scan(name, reason=Reason.STORAGE) for name in ("x/case.zip", "x/s/001.dcm")]
    kept = ("x/case.zip/a", "x/case.zip/b/c", "x/s", "x/s#1a2b")
    gone = ("x/case", "x/sub", "y", "y/x/s")
    plan = plan_scans(away, *((name, "ok", None, "c", "r") for name in (*kept, *gone)), refresh=True)
    assert list(plan.removed) == list(gone)
    assert (plan.unreachable, plan.counts["up_to_date"]) == (4, 4)
    assert "its folder or archive cannot be read now (storage)" in plan.explain_scan("x/s#1a2b")


def test_scans_with_features_of_another_recipe_are_counted() -> None:
    rows = (
        ("a", "ok", None, "c", "old"),
        ("b", "ok", None, "old", "r"),
        ("c", "failed", "model", "c", "old"),
    )
    assert plan_scans([make_scan("a"), make_scan("b"), make_scan("c")], *rows).other_recipe == 1


def test_a_plan_explains_the_state_of_each_scan() -> None:
    columns = (*COLUMNS, "stage", "run_id")
    rows = make_ledger(
        ("changed", "ok", None, "b2b2b2b2b2b2", "r", None, "run-7"),
        ("failed", "failed", "truncated", "c", "r", "read", "run-7"),
        ("passing", "failed", "storage", "c", "r", "read", "run-7"),
        ("same", "ok", None, "c", "r", None, "run-7"),
        ("stale", "ok", None, "c", "old", None, "run-7"),
        columns=columns,
    )
    names = ("failed", "new", "passing", "same", "stale")
    listing = Listing((make_scan("changed", "a1a1a1a1a1a1"), *map(make_scan, names)))
    plan = make_plan(listing, rows, "r")
    only = "it has features, so only `refresh` processes it again"
    assert {explanation["scan_id"]: explanation["why"] for explanation in plan.explain_all()} == {
        "changed": f"changed: content is a1a1a1a1, and was b2b2b2b2 when run run-7 processed it; {only}",
        "failed": "failed: truncated at read; unchanged, so only `refresh --retry-failed` tries it again",
        "new": "new: listed, and not stored yet",
        "passing": "failed: storage at read; the cause may be gone, so it is tried again",
        "same": "up to date: content and recipe are the same as those stored",
        "stale": f"stale: processed by run run-7 with recipe old, and this config's recipe is r; {only}",
    }
    assert all(
        plan.explain_scan(explanation["scan_id"]) == explanation["why"] for explanation in plan.explain_all()
    )
    assert only not in make_plan(listing, rows, "r", refresh=True).explain_scan("changed")


def test_the_error_for_an_unknown_id_names_similar_ids() -> None:
    plan = plan_scans([make_scan("site/case-1.nii"), make_scan("site/case-2.nii")])
    with pytest.raises(UsageError, match=r"no scan has the id 'case-1'.*site/case-1\.nii$"):
        plan.explain_scan("case-1")
    with pytest.raises(UsageError, match=r"similar ids: site/case-"):
        plan.explain_scan("site/caze-1.nii")


def test_a_plan_equals_the_result_of_comparing_scan_by_scan() -> None:
    """Compare random listings and ledgers with an independent, slow implementation of the rules."""
    rng = random.Random(0)
    for _ in range(60):
        listed = {str(n): make_scan(str(n), rng.choice("ab")) for n in range(30) if rng.random() < 0.7}
        stored = {
            str(n): (str(n), status, reason, rng.choice("ab"), rng.choice("rs"))
            for n in range(30)
            for status, reason in [rng.choice([("ok", None), ("failed", "model"), ("failed", "storage")])]
            if rng.random() < 0.7
        }
        for refresh in (False, True):
            plan = plan_scans(listed.values(), *stored.values(), refresh=refresh)
            expected = {name: _expect_state(scan.content, stored.get(name)) for name, scan in listed.items()}
            due = sorted(name for name in listed if _expect_due(expected[name], stored.get(name), refresh))
            assert get_states(plan) == expected | dict.fromkeys(stored.keys() - listed.keys(), "removed")
            assert get_todo(plan) == due


def _expect_state(content: str, row: Row | None) -> str:
    if row is None:
        return "new"
    if row[3] != content:
        return "changed"
    return "stale" if row[4] != "r" else "up_to_date" if row[1] == "ok" else "failed"


def _expect_due(state: str, row: Row | None, refresh: bool) -> bool:
    if row is None or row[1] == "ok":
        return row is None or (refresh and state in ("changed", "stale"))
    return state != "failed" or row[2] == "storage"


def test_a_scan_survives_conversion_to_json_and_back() -> None:
    scan = Scan(
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
    assert Scan.from_json(scan.to_json()) == scan
