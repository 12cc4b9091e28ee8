"""Explanations: why a scan has its state, in one sentence."""

from __future__ import annotations

import pytest
from ledgers import Row, make_excluded_row, make_failed_row, make_scan, plan_scans

from featray.errors import Reason, UsageError

LAYERS = {"z": "z1", "y": "y1", "x": "x1"}
ONLY_REFRESH = "it has features, so only `refresh` processes it again"
EXPLAINED = [
    (
        Row("changed", content="b2b2b2b2b2b2"),
        f"changed: content is a1a1a1a1, and was b2b2b2b2 when run run-7 processed it; {ONLY_REFRESH}",
    ),
    (make_excluded_row("excluded"), "up to date: excluded by a rule (not_ct), and unchanged"),
    (
        make_failed_row("failed", LAYERS, reason="truncated", stage="read"),
        "failed: truncated at read; unchanged, so only `refresh --retry-failed` tries it again",
    ),
    (
        make_failed_row("failed and half", {"y": "y1", "x": "x1"}, {"z": "z1"}, stage="extract"),
        "failed: model at extract, for layers y, x; unchanged, so only `refresh --retry-failed` tries it "
        "again",
    ),
    (
        make_failed_row("failed and new", {"z": "z1", "y": "y1"}),
        "failed: model; tried again, because no run has tried layer x",
    ),
    (
        make_failed_row("failed elsewhere", {"other": "o"}, LAYERS),
        "up to date: content and recipes are the same as those stored; it failed (model) for a layer that "
        "this config does not name, so the next run sets it to ok without computing",
    ),
    (
        make_failed_row("failed with others", {"y": "y0", "x": "x0"}, {"z": "z1"}),
        "stale: failed by run run-7 (model); tried again, because that run tried other layers, or another "
        "recipe of layers y, x",
    ),
    (Row("half", {"z": "z1", "y": "y1"}), "incomplete: content is unchanged; it lacks layer x"),
    (Row("one", {"y": "y1"}), "incomplete: content is unchanged; it lacks layers z, x"),
    (
        Row("other inputs", recipe="old"),
        "stale: read and preprocessed by run run-7 with recipe old, and this config's recipe is inputs; "
        f"{ONLY_REFRESH}",
    ),
    (
        make_failed_row("other inputs, failed", LAYERS, recipe="old", run_id=""),
        "stale: read and preprocessed with recipe old, and this config's recipe is inputs",
    ),
    (
        make_failed_row("passing", LAYERS, reason="storage", stage="read"),
        "failed: storage at read; the cause may be gone, so it is tried again",
    ),
    (Row("same", LAYERS), "up to date: content and recipes are the same as those stored"),
    (
        Row("stale", {"z": "z0", "y": "y0", "x": "x1"}),
        "stale: processed by run run-7 with another recipe of layers z, y than this config's; "
        f"{ONLY_REFRESH}",
    ),
]


def test_a_plan_explains_the_state_of_each_scan() -> None:
    rows = [row for row, _ in EXPLAINED]
    special = {
        "changed": make_scan("changed", "a1a1a1a1a1a1"),
        "excluded": make_scan("excluded", reason=Reason.NOT_CT, excluded=True),
    }
    scans = [special.get(row.scan_id, row.scan_id) for row in rows]
    plan = plan_scans([*scans, "new"], *rows, layers=LAYERS)
    expected = {row.scan_id: why for row, why in EXPLAINED} | {"new": "new: listed, and not stored yet"}
    assert {explanation["scan_id"]: explanation["why"] for explanation in plan.explain_all()} == expected
    assert {name: plan.explain_scan(name) for name in expected} == expected
    refresh = plan_scans(scans, *rows, layers=LAYERS, refresh=True)
    assert not any(ONLY_REFRESH in explanation["why"] for explanation in refresh.explain_all())


def test_an_explanation_names_a_few_of_many_layers() -> None:
    plan = plan_scans("a", Row("a", {"l0": "r0"}), layers={f"l{n}": f"r{n}" for n in range(9)})
    assert plan.explain_scan("a").endswith("it lacks layers l1, l2, l3, l4, l5 and 3 more")


def test_a_scan_that_the_listing_could_not_reach_is_explained_by_what_is_kept() -> None:
    away = [make_scan(name, "?", reason=Reason.STORAGE) for name in "ab"]
    plan = plan_scans(away, make_failed_row("a", {"y": "y1"}, {"z": "z1"}), make_excluded_row("b"))
    kept = "up to date: the listing could not reach it now (storage); its stored"
    assert [plan.explain_scan(name) for name in "ab"] == [f"{kept} features are kept", f"{kept} row is kept"]


def test_the_error_for_an_unknown_id_names_similar_ids() -> None:
    plan = plan_scans(["site/case-1.nii", "site/case-2.nii"])
    with pytest.raises(UsageError, match=r"no scan has the id 'case-1'.*site/case-1\.nii$"):
        plan.explain_scan("case-1")
    with pytest.raises(UsageError, match=r"similar ids: site/case-"):
        plan.explain_scan("site/caze-1.nii")
