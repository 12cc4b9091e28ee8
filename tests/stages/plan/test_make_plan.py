"""Planning: the state of each scan, and the scans that each command processes."""

from __future__ import annotations

import pytest
from ledgers import (
    Row,
    get_due,
    get_states,
    get_todo,
    make_excluded_row,
    make_failed_row,
    make_scan,
    plan_scans,
)

from featray.errors import Reason
from featray.schema import Scan
from featray.stages.plan import STATES


@pytest.mark.parametrize(
    ("row", "state", "extract", "refresh"),
    [
        (None, "new", True, True),
        (Row("a"), "up_to_date", False, False),
        (Row("a", content="old"), "changed", False, True),
        (Row("a", {"z": "z0"}), "stale", False, True),
        (Row("a", {"z": "old"}, recipe="old"), "stale", False, True),
        (Row("a", {"z": "old"}, recipe="old", content="old"), "changed", False, True),
        (Row("a", {"other": "z0"}), "incomplete", True, True),
        (make_failed_row("a", {"z": "z1"}, reason="truncated"), "failed", False, False),
        (make_failed_row("a", {"z": "z1"}, reason="storage"), "failed", True, True),
        (make_failed_row("a", {"z": "z1"}, reason="truncated", content="old"), "changed", True, True),
        (make_failed_row("a", {"z": "z0"}), "stale", True, True),
        (make_failed_row("a", {"z": "old"}, recipe="old"), "stale", True, True),
        (make_failed_row("a", {"other": "z0"}), "stale", True, True),
        (make_failed_row("a", {"z": "z1"}, reason=None), "failed", False, False),
        (make_failed_row("a", {"other": "z0"}, reason="truncated", stage="read"), "failed", False, False),
        (make_failed_row("a", {"z": "z0"}, reason="preprocess", stage="preprocess"), "failed", False, False),
        (make_failed_row("a", {"z": "z0"}, reason="unreadable", stage="list"), "failed", False, False),
        (make_failed_row("a", {"z": "z0"}, reason="storage", stage="read"), "failed", True, True),
        (make_failed_row("a", {"z": "z0"}, reason="worker_crash", stage="read"), "stale", True, True),
        (make_failed_row("a", {"z": "z0"}, recipe="old", stage="read"), "stale", True, True),
    ],
)
def test_a_scans_state_follows_from_content_recipe_and_status(
    row: Row | None, state: str, extract: bool, refresh: bool
) -> None:
    for is_refresh, due in ((False, extract), (True, refresh)):
        plan = plan_scans(["a"], *([row] if row else []), refresh=is_refresh)
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
    reasons = {"m": "model", "s": "storage", "t": "truncated"}
    rows = [make_failed_row(name, {"z": "z1"}, reason=reason) for name, reason in reasons.items()]
    assert get_todo(plan_scans("mst", *rows, refresh=refresh, retry=retry)) == due


def test_an_excluded_scan_stays_excluded_with_other_recipes_and_layers() -> None:
    out = make_scan("a", reason=Reason.NOT_CT, excluded=True)
    for recipe in ("old", "inputs"):
        plan = plan_scans([out], make_excluded_row("a", recipe=recipe), refresh=True)
        assert (get_states(plan), get_todo(plan)) == ({"a": "up_to_date"}, [])
        assert plan.explain_scan("a") == "up to date: excluded by a rule (not_ct), and unchanged"


def test_a_scan_that_the_policy_newly_includes_or_excludes_is_changed() -> None:
    taken, left_out = make_scan("in"), make_scan("out", reason=Reason.DUPLICATE_ID, excluded=True)
    rows = (make_excluded_row("in"), Row("out"))
    assert get_due(plan_scans([taken, left_out], *rows)) == {"in": ()}
    plan = plan_scans([taken, left_out], *rows, refresh=True)
    assert get_due(plan) == {"in": (), "out": ()}
    assert "the policy now includes it" in plan.explain_scan("in")
    assert "the policy now excludes it (duplicate_id)" in plan.explain_scan("out")


def test_an_open_scan_that_was_excluded_when_it_was_read_stays_excluded() -> None:
    is_open = Scan("a", "/data/a", "auto", (), "c", open_path="/data/a")
    assert get_states(plan_scans([is_open], make_excluded_row("a", recipe="old"))) == {"a": "up_to_date"}


def test_a_stored_scan_that_is_not_listed_is_removed() -> None:
    plan = plan_scans("a", *map(Row, ("a", "z", "gone")), refresh=True)
    assert plan.counts == {**dict.fromkeys(STATES, 0), "removed": 2, "up_to_date": 1}
    assert (list(plan.removed), get_todo(plan)) == (["gone", "z"], [])
    assert "`refresh` deletes it" in plan.explain_scan("gone")


def test_the_rows_of_unreachable_scans_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    names = ("bad", "good", "half", "new", "out")
    away = [make_scan(name, "?", reason=Reason.STORAGE, message="away") for name in names]
    rows = (
        make_failed_row("bad", {"z": "z1"}),
        Row("good", {"z": "old"}, recipe="old"),
        make_failed_row("half", {"y": "y1"}, {"z": "z1"}),
        make_excluded_row("out"),
    )
    plan = plan_scans(away, *rows, layers={"z": "z1", "y": "y1"}, refresh=True)
    kept = dict.fromkeys(("good", "half", "out"), "up_to_date")
    assert get_states(plan) == {"bad": "changed", "new": "new"} | kept
    assert get_due(plan) == {"bad": (), "new": ()}
    assert (plan.unreachable, list(plan.cleared_failures)) == (3, [])
    assert "3 stored scans cannot be reached now (storage)" in caplog.text
    for name in ("good", "half"):
        why = "the listing could not reach it now (storage); its stored features are kept"
        assert why in plan.explain_scan(name)
    assert "its stored row is kept" in plan.explain_scan("out")


def test_scans_in_an_unreadable_archive_or_folder_are_not_removed() -> None:
    away = [make_scan(name, reason=Reason.STORAGE) for name in ("x/case.zip", "x/s/001.dcm")]
    kept = ("x/case.zip/a", "x/case.zip/b/c", "x/s", "x/s#1a2b")
    gone = ("x/case", "x/sub", "y", "y/x/s")
    plan = plan_scans(away, *map(Row, (*kept, *gone)), refresh=True)
    assert list(plan.removed) == list(gone)
    assert (plan.unreachable, plan.counts["up_to_date"]) == (4, 4)
    assert "its folder or archive cannot be read now (storage)" in plan.explain_scan("x/s#1a2b")


def test_scans_with_features_of_another_recipe_are_counted() -> None:
    rows = (
        Row("a", {"z": "old"}, recipe="old"),
        Row("b", content="old"),
        make_failed_row("c", {"z": "old"}, recipe="old"),
        Row("d", {"z": "z0"}),
        Row("e", {"other": "z0"}),
        Row("gone", {"z": "z0"}),
    )
    assert plan_scans("abcde", *rows).other_recipe == 3


def test_a_new_layer_of_stored_scans_is_the_only_due_layer() -> None:
    for refresh in (False, True):
        plan = plan_scans("ab", Row("a"), Row("b"), layers={"z": "z1", "y": "y1"}, refresh=refresh)
        assert get_states(plan) == {"a": "incomplete", "b": "incomplete"}
        assert get_due(plan) == {"a": ("y",), "b": ("y",)}
        assert plan.other_recipe == 0


def test_an_interrupted_addition_continues_with_the_cells_that_are_missing() -> None:
    layers = {"z": "z1", "y": "y1", "x": "x1"}
    rows = (Row("a"), Row("b", {"z": "z1", "y": "y1"}), Row("c", layers), Row("d", {"x": "x1", "z": "z1"}))
    plan = plan_scans("abcde", *rows, layers=layers)
    assert get_due(plan) == {"a": ("y", "x"), "b": ("x",), "d": ("y",), "e": ()}
    assert plan.counts["up_to_date"] == 1


def test_a_layer_that_failed_is_tried_again_only_on_request() -> None:
    row, layers = make_failed_row("a", {"y": "y1"}, {"z": "z1"}), {"z": "z1", "y": "y1"}
    for refresh in (False, True):
        plan = plan_scans("a", row, layers=layers, refresh=refresh)
        assert (get_states(plan), get_due(plan)) == ({"a": "failed"}, {})
        retried = plan_scans("a", row, layers=layers, refresh=refresh, retry=["model"])
        assert get_due(retried) == {"a": ("y",)}


def test_a_failed_scan_is_tried_with_all_its_missing_layers_if_one_of_them_is_new() -> None:
    row, layers = make_failed_row("a", {"y": "y1"}, {"z": "z1"}), {"z": "z1", "y": "y1", "x": "x1"}
    for refresh in (False, True):
        plan = plan_scans("a", row, layers=layers, refresh=refresh)
        assert (get_states(plan), get_due(plan)) == ({"a": "failed"}, {"a": ("y", "x")})


def test_a_scan_that_failed_together_with_a_layer_that_the_config_no_longer_names_is_tried_again() -> None:
    row = make_failed_row("a", {"z": "z1", "y": "y1"}, reason="non_finite_features", stage="extract")
    assert get_due(plan_scans("a", row)) == {"a": ("z",)}
    assert get_due(plan_scans("a", row, layers={"z": "z1", "y": "y2"})) == {"a": ("z", "y")}
    assert get_due(plan_scans("a", row, layers={"z": "z1", "y": "y1"})) == {}
    alone = make_failed_row("a", {"z": "z1"}, reason="non_finite_features", stage="extract")
    assert get_due(plan_scans("a", alone)) == {}, "it is tried once, not by every run"


def test_a_scan_that_cannot_be_decoded_is_not_tried_again_for_a_new_layer() -> None:
    layers = {"z": "z1", "y": "y1"}
    undecodable = make_failed_row("a", {"z": "z1"}, reason="truncated", stage="read")
    plan = plan_scans("ab", undecodable, Row("b"), layers=layers)
    assert (get_states(plan)["a"], get_due(plan)) == ("failed", {"b": ("y",)})
    assert plan.describe_work() == "1 new layer for 1 scan; 1 layer is up to date and stays as it is"
    retried = plan_scans("ab", undecodable, Row("b"), layers=layers, retry=["truncated"])
    assert get_due(retried) == {"a": ("z", "y"), "b": ("y",)}
    decoded_before = make_failed_row("a", {"y": "y1"}, {"z": "z1"}, reason="timeout", stage="read")
    assert get_due(plan_scans("a", decoded_before, layers={**layers, "x": "x1"})) == {"a": ("y", "x")}


def test_a_layer_that_failed_with_another_recipe_is_tried_again_and_the_other_layers_stay() -> None:
    row, layers = make_failed_row("a", {"y": "y0"}, {"z": "z1"}), {"z": "z1", "y": "y1"}
    for refresh in (False, True):
        plan = plan_scans("a", row, layers=layers, refresh=refresh)
        assert (get_states(plan), get_due(plan)) == ({"a": "stale"}, {"a": ("y",)})
        assert plan.other_recipe == 0


def test_a_refresh_replaces_only_the_stale_layers() -> None:
    row, layers = Row("a", {"z": "z1", "y": "y0", "other": "o"}), {"z": "z1", "y": "y1"}
    assert get_due(plan_scans("a", row, layers=layers, refresh=True)) == {"a": ("y",)}
    plan = plan_scans("a", row, layers=layers)
    assert (get_states(plan), get_due(plan), plan.other_recipe) == ({"a": "stale"}, {}, 1)
    assert plan.can_keep_both


def test_a_refresh_adds_the_layers_that_a_stale_scan_lacks() -> None:
    layers = {"z": "z1", "y": "y1", "x": "x1"}
    rows = (Row("a", {"z": "z0", "y": "y1"}), make_failed_row("b", {"x": "x1"}, {"z": "z0", "y": "y1"}))
    plan = plan_scans("ab", *rows, layers=layers, refresh=True)
    assert get_due(plan) == {"a": ("z", "x"), "b": ("z", "x")}


@pytest.mark.parametrize("row", [Row("a", recipe="old"), Row("a", recipe=None)])
def test_another_reading_or_preprocessing_replaces_whole_scans(row: Row) -> None:
    layers = {"z": "z1", "y": "y1"}
    plan = plan_scans("a", row, layers=layers, refresh=True)
    assert (get_states(plan), get_due(plan)) == ({"a": "stale"}, {"a": ()})
    plan = plan_scans("a", row, layers=layers)
    assert (get_due(plan), plan.other_recipe, plan.can_keep_both) == ({}, 1, False)


def test_another_reading_or_preprocessing_concerns_also_scans_without_a_layer_of_the_config() -> None:
    plan = plan_scans("a", Row("a", {"other": "o"}, recipe="old"))
    assert (get_states(plan), plan.other_recipe, plan.can_keep_both) == ({"a": "stale"}, 1, False)


def test_a_changed_scan_is_replaced_as_a_whole() -> None:
    row, layers = Row("a", {"z": "z1", "other": "o"}, content="old"), {"z": "z1", "y": "y1"}
    plan = plan_scans("a", row, layers=layers, refresh=True)
    assert (get_states(plan), get_due(plan)) == ({"a": "changed"}, {"a": ()})
    assert get_due(plan_scans("a", row, layers=layers)) == {}, "a layer must not be added from other content"


def test_only_refresh_replaces_the_features_of_a_changed_scan_that_failed_for_a_later_layer() -> None:
    row = make_failed_row("a", {"y": "y1"}, {"z": "z1"}, content="old")
    layers = {"z": "z1", "y": "y1"}
    assert get_due(plan_scans("a", row, layers=layers)) == {}
    assert get_due(plan_scans("a", row, layers=layers, refresh=True)) == {"a": ()}


def test_a_failed_scan_with_all_layers_of_the_config_is_up_to_date() -> None:
    plan = plan_scans("a", make_failed_row("a", {"y": "y1"}, {"z": "z1"}))
    assert (get_states(plan), get_due(plan)) == ({"a": "up_to_date"}, {})
    assert list(plan.cleared_failures) == ["a"]


def test_scans_with_the_same_due_layers_follow_each_other() -> None:
    layers = {"z": "z1", "y": "y1"}
    rows = (
        Row("a"),
        Row("b", {"y": "y1"}),
        Row("c", {"z": "z1", "other": "o"}),
        Row("d", {"y": "y1", "other": "o"}),
        Row("e"),
        Row("f", {"z": "z0", "other": "o"}, recipe="old"),
    )
    plan = plan_scans("abcdefg", *rows, layers=layers, refresh=True)
    assert get_todo(plan) == ["f", "g", "a", "c", "e", "b", "d"]
    assert [scan.due_layers for scan in plan.todo[1:4]] == [(), ("y",), ("y",)]
    assert plan.todo[-1].due_layers == ("z",)


def test_layers_that_the_config_does_not_name_are_counted_and_stay() -> None:
    rows = (Row("a", {"z": "z1", "old": "o0"}), make_failed_row("b", {"z": "z1"}, {"old": "o0", "dead": "d"}))
    plan = plan_scans("ab", *rows)
    assert plan.other_layers == {"dead": 1, "old": 2}
    assert (get_due(plan), plan.removed) == ({}, [])


def test_layers_that_a_refresh_removes_although_the_config_does_not_name_them_are_counted() -> None:
    rows = (
        Row("changed", {"z": "z1", "y": "y1"}, content="old"),
        Row("same", {"z": "z1", "y": "y1", "x": "x1"}),
        Row("other inputs", {"z": "z0", "x": "x1"}, recipe="old"),
        Row("changed too", {"x": "x1"}, content="old", recipe="old"),
        make_failed_row("failed", {"z": "z0"}, {"x": "x1"}, recipe="old"),
        Row("gone", {"x": "x1"}, recipe="old"),
    )
    for refresh in (False, True):
        plan = plan_scans([row.scan_id for row in rows[:-1]], *rows, refresh=refresh)
        assert plan.other_layers == {"x": 5, "y": 2}
        assert plan.lost_layers == {"x": 1, "y": 1}
        assert plan.incompatible_layers == {"x": 2}


def test_two_models_in_one_output_leave_each_other_alone() -> None:
    stored = {"first.z": "z1", "first.y": "y1"}
    plan = plan_scans("a", Row("a", stored), layers={"second.z": "z2", "second.y": "y2"})
    assert get_due(plan) == {"a": ("second.z", "second.y")}
    assert (plan.other_recipe, plan.other_layers) == (0, {"first.y": 1, "first.z": 1})
