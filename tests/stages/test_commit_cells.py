"""Commits of cells: layers are added, replaced, renamed and removed, and the cells beside them stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from commits import (
    LATER,
    RECIPES,
    RUN,
    assert_cells_agree,
    assert_consistent,
    list_committed,
    list_stored,
    make_committer,
    make_decoded,
    make_failed_receipt,
    read_cells,
    read_row,
    read_values,
    run_until_killed,
    write_receipt,
)

import featray
from featray.commands.vacuum import vacuum
from featray.errors import ConfigError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import TableLog
from featray.stages.commit import Committer
from featray.storage.store import Store

WITH_LATE = {**RECIPES, "late": "r2"}
"""Recipes of a config with one more layer."""
WITH_OTHER_MAP = {**RECIPES, "map": "r9"}
"""Recipes of a config whose layer `map` has changed."""


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(Store(str(tmp_path / "out")))


def commit_three(dataset: Dataset, **options: Any) -> Committer:
    """Commit a, b (two patches) and c with both layers, and the failed scan x; return the committer."""
    committer = make_committer(dataset, **options)
    scans = [make_decoded("a", 1), make_decoded("b", 2, patches=2), make_decoded("c", 3)]
    committer.commit([write_receipt(dataset, *scans), make_failed_receipt("x")])
    return committer


def add_late(dataset: Dataset, *scans: tuple[str, float, int]) -> Any:
    """Write the layer `late` of scans: id, value, patches."""
    decoded = [make_decoded(*scan, due_layers=["late"]) for scan in scans]
    return write_receipt(dataset, *decoded, recipes=WITH_LATE, run_id=LATER)


def replace_map(dataset: Dataset, scan_id: str, value: float) -> Any:
    """Write the layer `map` of a scan with another recipe."""
    scan = make_decoded(scan_id, value, due_layers=["map"])
    return write_receipt(dataset, scan, recipes=WITH_OTHER_MAP, run_id=LATER)


def read_files(dataset: Dataset) -> dict[str, tuple[bytes, int]]:
    """Return name → content and time of the last change, of all files of `features`."""
    paths = {name: Path(str(dataset.store.path(name))) for name in list_stored(dataset)}
    return {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in paths.items()}


def read_state(dataset: Dataset) -> Any:
    """Return everything that a reader of the output sees of the scans in `CHANGES`."""
    scans = dataset.read(SCANS, ("scan_id", "status", "reason", "layers", "failed_layers", "patches"))
    rows = dataset.read(FEATURES, ("scan_id", "layer", "patch", "recipe", "feature"))
    return sorted(map(str, scans.to_pylist())), sorted(map(str, rows.to_pylist()))


# Layers that are added


def test_adding_a_layer_neither_reads_nor_rewrites_the_files_of_other_layers(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = commit_three(dataset)
    before = read_files(dataset)
    receipts = [add_late(dataset, ("a", 5, 1), ("b", 6, 2)), add_late(dataset, ("c", 7, 1))]
    read: list[str] = []
    original = Store.read
    monkeypatch.setattr(Store, "read", lambda self, name: read.append(name) or original(self, name))
    committer.commit(receipts)
    assert not [name for name in read if name.startswith("features/layer=")]
    after = read_files(dataset)
    assert {name: after[name] for name in before} == before
    assert all("layer=late" in name for name in after.keys() - before.keys())
    assert read_cells(dataset) == {**dict.fromkeys("abc", WITH_LATE), "x": {}}
    assert read_values(dataset, "late") == {"a": 5, "b": 6, "c": 7}
    assert read_values(dataset) == {"a": 1, "b": 2, "c": 3}
    assert_consistent(dataset)


def test_a_layer_can_be_added_to_some_scans_now_and_to_the_others_later(dataset: Dataset) -> None:
    commit_three(dataset).commit([add_late(dataset, ("b", 6, 2))])
    assert read_cells(dataset) == {"a": RECIPES, "b": WITH_LATE, "c": RECIPES, "x": {}}
    assert_consistent(dataset)
    make_committer(dataset, LATER).commit([add_late(dataset, ("a", 5, 1), ("c", 7, 1))])
    assert read_cells(dataset) == {**dict.fromkeys("abc", WITH_LATE), "x": {}}
    assert_consistent(dataset)


def test_a_new_scan_has_all_layers_beside_scans_that_only_get_the_missing_one(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    new = write_receipt(dataset, make_decoded("new", 9), recipes=WITH_LATE, run_id=LATER)
    committer.commit([add_late(dataset, ("a", 5, 1)), new])
    assert read_cells(dataset) == {"a": WITH_LATE, "b": RECIPES, "c": RECIPES, "new": WITH_LATE, "x": {}}
    assert read_values(dataset) == {"a": 1, "b": 2, "c": 3, "new": 9}
    assert_consistent(dataset)


# Layers that are replaced


def test_a_stale_layer_of_some_scans_is_replaced_and_their_other_layers_stay(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    before = {name: content for name, content in read_files(dataset).items() if "layer=z_mean" in name}
    committer.commit([replace_map(dataset, "a", 7)])
    assert read_values(dataset, "map") == {"a": 7, "b": 2, "c": 3}
    assert read_cells(dataset) == {"a": WITH_OTHER_MAP, "b": RECIPES, "c": RECIPES, "x": {}}
    after = read_files(dataset)
    assert {name: after[name] for name in before} == before
    assert_consistent(dataset)


def test_a_missing_and_a_stale_layer_of_a_scan_come_in_one_commit(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    recipes = {**WITH_OTHER_MAP, "late": "r2"}
    scan = make_decoded("a", 7, due_layers=["map", "late"])
    version = dataset.open_snapshot().version
    committer.commit([write_receipt(dataset, scan, recipes=recipes, run_id=LATER)])
    assert dataset.open_snapshot().version == version + 1
    assert read_cells(dataset)["a"] == recipes
    assert [read_values(dataset, layer)["a"] for layer in ("z_mean", "map", "late")] == [1, 7, 7]
    assert_consistent(dataset)


def test_a_scan_whose_layers_are_all_due_loses_every_stored_cell_also_of_other_layers(
    dataset: Dataset,
) -> None:
    committer = commit_three(dataset)
    committer.commit([add_late(dataset, ("a", 5, 1), ("b", 6, 2))])
    committer.commit([write_receipt(dataset, make_decoded("a", 8), run_id=LATER)])
    assert read_cells(dataset) == {"a": RECIPES, "b": WITH_LATE, "c": RECIPES, "x": {}}
    assert read_values(dataset, "late") == {"b": 6}
    assert read_values(dataset) == {"a": 8, "b": 2, "c": 3}
    assert_consistent(dataset)


# Scans that fail


def test_a_scan_that_fails_when_a_layer_is_added_keeps_its_cells_and_what_describes_them(
    dataset: Dataset,
) -> None:
    scan = make_decoded("a", 1, patches=2)
    scan.record.shape, scan.record.spacing, scan.record.hu_max = [4, 5, 6], [2.0, 1.0, 1.0], 900.0
    make_committer(dataset).commit([write_receipt(dataset, scan)])
    before = read_row(dataset, "a")
    failed = make_failed_receipt("a", due_layers=["late"], recipes=WITH_LATE)
    make_committer(dataset, LATER).commit([failed])
    after = read_row(dataset, "a")
    changed = {name: value for name, value in after.items() if value != before[name]}
    assert changed == {
        "status": "failed",
        "reason": "truncated",
        "stage": "read",
        "message": "gone",
        "failed_layers": {"late": "r2"},
    }
    assert (after["patches"], after["layers"]) == (2, RECIPES)
    assert_consistent(dataset)


def test_a_scan_whose_stale_layer_fails_loses_this_cell_and_keeps_the_others(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    failed = make_failed_receipt("a", due_layers=["map", "late"], recipes={**WITH_OTHER_MAP, "late": "r2"})
    committer.commit([failed])
    row = read_row(dataset, "a")
    assert (row["status"], row["layers"]) == ("failed", {"z_mean": "r0"})
    assert row["failed_layers"] == {"map": "r9", "late": "r2"}
    assert read_values(dataset, "map") == {"b": 2, "c": 3}
    assert read_values(dataset) == {"a": 1, "b": 2, "c": 3}
    assert_consistent(dataset)


@pytest.mark.parametrize("stored", ["a", "x"], ids=["it kept cells", "it had none"])
def test_a_scan_that_is_computed_after_all_has_no_failed_layers(dataset: Dataset, stored: str) -> None:
    committer = commit_three(dataset)
    due = ["late"] if stored == "a" else []
    committer.commit([make_failed_receipt(stored, due_layers=due, recipes=WITH_LATE)])
    scan = make_decoded(stored, 5, due_layers=due)
    committer.commit([write_receipt(dataset, scan, recipes=WITH_LATE, run_id=LATER)])
    row = read_row(dataset, stored)
    assert (row["status"], row["reason"], row["message"]) == ("ok", None, None)
    assert (row["layers"], row["failed_layers"]) == (WITH_LATE, {})
    assert_consistent(dataset)


def test_a_scan_that_fails_as_a_whole_keeps_no_cells(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.commit([make_failed_receipt("a")])
    row = read_row(dataset, "a")
    assert (row["status"], row["layers"], row["patches"]) == ("failed", {}, 0)
    assert row["failed_layers"] == RECIPES
    assert_consistent(dataset)


def make_excluded_receipt(scan_id: str) -> Any:
    receipt = make_failed_receipt(scan_id)
    receipt.records[0].status = "excluded"
    receipt.set_run("i0", RECIPES, LATER)
    return receipt


def test_a_scan_that_is_now_excluded_has_neither_cells_nor_failed_layers(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.commit([make_excluded_receipt("a"), make_excluded_receipt("x")])
    for scan_id in "ax":
        row = read_row(dataset, scan_id)
        assert (row["status"], row["layers"], row["failed_layers"]) == ("excluded", {}, {})
    assert read_values(dataset) == {"b": 2, "c": 3}
    assert_consistent(dataset)


def list_cells_alone(dataset: Dataset) -> dict[str, set[tuple[str, str, str]]]:
    """Return table → scan, layer and recipe of its cells, read from the log of this table alone."""
    features = pl.scan_delta(str(dataset.store.path(FEATURES))).collect()
    scans = pl.scan_delta(str(dataset.store.path(SCANS))).collect()
    named = {
        (row["scan_id"], *cell)
        for row in scans.select("scan_id", "layers").to_dicts()
        for cell in row["layers"].items()
    }
    return {FEATURES: set(features.select("scan_id", "layer", "recipe").rows()), SCANS: named}


def test_programs_that_read_each_log_alone_see_no_cell_in_scans_that_features_lacks(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = commit_three(dataset)
    original, moments = TableLog.append, []

    def watched(self: TableLog, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        cells = list_cells_alone(dataset)
        moments.append(cells[SCANS] - cells[FEATURES])

    monkeypatch.setattr(TableLog, "append", watched)
    committer.commit([add_late(dataset, ("a", 5, 1), ("b", 6, 2))])
    committer.commit(
        [
            make_failed_receipt("a", due_layers=["map"]),
            make_failed_receipt("c", due_layers=["late"], recipes=WITH_LATE),
            make_excluded_receipt("b"),
            write_receipt(dataset, make_decoded("new", 4), recipes=WITH_LATE, run_id=LATER),
        ]
    )
    committer.drop_layers(["late"])
    assert moments == [set()] * 8
    assert read_cells(dataset)["c"] == RECIPES


# Names


def test_a_renamed_layer_has_its_rows_under_the_new_name_only(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.commit([make_failed_receipt("a", due_layers=["late"], recipes=WITH_LATE)])
    committer.rename_layers({"map": "features/map ü", "late": "later"})
    assert read_values(dataset, "features/map ü") == {"a": 1, "b": 2, "c": 3}
    assert read_values(dataset, "map") == {}
    assert read_cells(dataset)["b"] == {"z_mean": "r0", "features/map ü": "r1"}
    assert read_row(dataset, "a")["failed_layers"] == {"later": "r2"}
    assert read_row(dataset, "x")["failed_layers"] == {"z_mean": "r0", "features/map ü": "r1"}
    assert_consistent(dataset)


def test_a_commit_after_a_rename_replaces_the_renamed_cells(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.rename_layers({"map": "grid"})
    recipes = {"z_mean": "r0", "grid": "r9"}
    scan = make_decoded("a", 7, due_layers=["grid"])
    committer.commit([write_receipt(dataset, scan, recipes=recipes, run_id=LATER)])
    assert read_values(dataset, "grid") == {"a": 7, "b": 2, "c": 3}
    assert read_cells(dataset)["a"] == recipes
    assert_consistent(dataset)


def test_two_layers_can_swap_their_names(dataset: Dataset) -> None:
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), make_decoded("b", 2))])
    committer.commit([add_late(dataset, ("a", 5, 1), ("b", 6, 1))])
    committer.rename_layers({"z_mean": "late", "late": "z_mean"})
    assert read_values(dataset) == {"a": 5, "b": 6}
    assert read_values(dataset, "late") == {"a": 1, "b": 2}
    assert read_cells(dataset)["a"] == {"z_mean": "r2", "map": "r1", "late": "r0"}
    assert_consistent(dataset)


def test_layers_with_equal_rows_can_swap_their_names_in_the_run_that_wrote_them(dataset: Dataset) -> None:
    recipes = {"one": "same", "two": "same"}
    committer = make_committer(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 1), recipes=recipes)])
    committer.rename_layers({"one": "two", "two": "one"})
    assert read_values(dataset, "one") == read_values(dataset, "two") == {"a": 1}
    assert_consistent(dataset)


def test_a_layer_takes_the_name_that_another_renamed_layer_had(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.rename_layers({"z_mean": "map", "map": "grid"})
    assert read_cells(dataset)["a"] == {"map": "r0", "grid": "r1"}
    assert [len(feature) for feature in read_features(dataset, "map")] == [2] * 4
    assert [len(feature) for feature in read_features(dataset, "grid")] == [6] * 4
    assert_consistent(dataset)


def read_features(dataset: Dataset, layer: str) -> list[np.ndarray]:
    return list(featray.read(dataset, layer).array.reshape(4, -1))


def test_a_renamed_layer_keeps_its_other_partition_columns(dataset: Dataset) -> None:
    by = ("layer", "site")
    committer = Committer(dataset, by, ["site"], run_id=RUN)
    first, second = make_decoded("a", 1), make_decoded("b", 2)
    first.record.columns["site"], second.record.columns["site"] = "A/B ü%=1", ""
    committer.commit([write_receipt(dataset, first, second, partition_by=by)])
    committer.rename_layers({"map": "grid"})
    table = pl.scan_delta(str(dataset.store.path("features"))).filter(pl.col("layer") == "grid").collect()
    assert dict(table.select("scan_id", "site").iter_rows()) == {"a": "A/B ü%=1", "b": None}
    assert_consistent(dataset)


def test_layers_are_renamed_and_dropped_on_an_object_store(
    s3_folder: str, s3_options: dict[str, Any]
) -> None:
    dataset = Dataset(Store(s3_folder, s3_options))
    committer = commit_three(dataset)
    committer.commit([add_late(dataset, ("a", 5, 1))])
    committer.rename_layers({"map": "features/map ü", "late": "map"})
    committer.drop_layers(["z_mean"])
    assert read_values(dataset, "features/map ü") == {"a": 1, "b": 2, "c": 3}
    assert read_values(dataset, "map") == {"a": 5}
    assert read_cells(dataset)["a"] == {"features/map ü": "r1", "map": "r2"}
    assert_consistent(dataset)


# Layers that are dropped


def test_a_dropped_layer_is_in_neither_table_and_the_other_files_stay(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.commit([make_failed_receipt("a", due_layers=["late"], recipes=WITH_LATE)])
    before = read_files(dataset)
    committer.drop_layers(["map", "never there"])
    after = read_files(dataset)
    assert after == {name: content for name, content in before.items() if "layer=z_mean" in name}
    assert read_cells(dataset) == {**{scan_id: {"z_mean": "r0"} for scan_id in "abc"}, "x": {}}
    assert read_row(dataset, "x")["failed_layers"] == {"z_mean": "r0"}
    assert read_row(dataset, "a")["failed_layers"] == {"late": "r2"}
    assert_consistent(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 4, due_layers=["map"]))])
    assert read_cells(dataset)["a"] == RECIPES
    assert_consistent(dataset)


def test_a_scan_that_loses_its_last_layer_has_no_patches(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    committer.commit([make_failed_receipt("a", due_layers=["late"], recipes=WITH_LATE)])
    committer.drop_layers(["map"])
    assert [read_row(dataset, scan_id)["patches"] > 0 for scan_id in "abc"] == [True, True, True]
    committer.drop_layers(["z_mean"])
    for scan_id, status in (("a", "failed"), ("b", "ok"), ("c", "ok")):
        row = read_row(dataset, scan_id)
        assert (row["status"], row["patches"], list(row["layers"])) == (status, 0, [])
    assert_consistent(dataset)


def test_deleted_cells_leave_the_other_cells_and_a_scan_without_any_is_new_again(dataset: Dataset) -> None:
    committer = commit_three(dataset)
    before = read_files(dataset)
    committer.delete_cells("map", ["a", "x", "nobody"])
    assert read_cells(dataset) == {"a": {"z_mean": "r0"}, "b": RECIPES, "c": RECIPES, "x": {}}
    assert {name for name in before if "layer=z_mean" in name} <= read_files(dataset).keys()
    assert_consistent(dataset)
    committer.delete_cells("z_mean", ["a"])
    assert read_cells(dataset) == {"b": RECIPES, "c": RECIPES, "x": {}}
    assert_consistent(dataset)
    committer.commit([write_receipt(dataset, make_decoded("a", 4))])
    assert read_cells(dataset)["a"] == RECIPES
    assert_consistent(dataset)


# Kills

CHANGES: dict[str, Callable[[Committer, Dataset], None]] = {
    "added": lambda c, d: c.commit([add_late(d, ("a", 5, 1), ("b", 6, 2)), add_late(d, ("c", 7, 1))]),
    "replaced": lambda c, d: c.commit([replace_map(d, "a", 7), replace_map(d, "c", 8)]),
    "failed": lambda c, d: c.commit(
        [
            make_failed_receipt("a", due_layers=["map"], recipes=WITH_OTHER_MAP),
            make_failed_receipt("c", due_layers=["map"], recipes=WITH_OTHER_MAP),
        ]
    ),
    "failed when added": lambda c, d: c.commit(
        [make_failed_receipt("a", due_layers=["late"], recipes=WITH_LATE)]
    ),
    "all replaced": lambda c, d: c.commit(
        [write_receipt(d, make_decoded("a", 8), recipes={"z_mean": "r0"}, run_id=LATER)]
    ),
    "excluded": lambda c, d: c.commit([make_excluded_receipt("a")]),
    "renamed": lambda c, d: c.rename_layers({"map": "grid"}),
    "swapped": lambda c, d: c.rename_layers({"map": "z_mean", "z_mean": "map"}),
    "dropped": lambda c, d: c.drop_layers(["map"]),
    "cells deleted": lambda c, d: c.delete_cells("map", ["a", "b"]),
    "cleared": lambda c, d: c.clear_failures(["b"]),
}


def commit_with_failure(dataset: Dataset) -> Committer:
    """Commit three scans, of which b has failed when a layer was added; return the committer."""
    committer = commit_three(dataset)
    committer.commit([make_failed_receipt("b", due_layers=["late"], recipes=WITH_LATE)])
    return committer


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_step_leaves_all_or_nothing_of_a_change_and_the_next_run_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    complete = Dataset(Store(str(tmp_path / "complete")))
    committer = commit_with_failure(complete)
    before = read_state(complete)
    CHANGES[change](committer, complete)
    after = read_state(complete)
    assert after != before
    for kill_at in itertools.count():
        dataset = Dataset(Store(str(tmp_path / f"out{kill_at}")))
        committer = commit_with_failure(dataset)
        killed = run_until_killed(lambda: CHANGES[change](committer, dataset), monkeypatch, kill_at)  # noqa: B023  # called at once
        seen = read_state(dataset)
        assert seen in (before, after)
        assert_cells_agree(dataset)
        later = make_committer(dataset, LATER)
        assert read_state(dataset) == seen, "recovery changed what readers see"
        later.delete_orphans()
        assert_consistent(dataset)
        if seen == before:
            CHANGES[change](later, dataset)
            later.delete_orphans()
        assert read_state(dataset) == after
        assert_consistent(dataset)
        if not killed:
            assert kill_at > 3
            return


# Versions


@pytest.mark.parametrize("change", ["renamed", "swapped", "dropped", "added", "replaced", "all replaced"])
def test_an_earlier_version_can_be_read_after_a_change_of_layers_until_it_is_too_old(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    committer = commit_three(dataset, keep_versions_days=1)
    version = dataset.open_snapshot().version
    expected = {layer: featray.read(dataset, layer) for layer in RECIPES}
    CHANGES[change](committer, dataset)
    assert committer.delete_orphans() == []
    assert vacuum(dataset).deleted == 0
    for layer, values in expected.items():
        found = featray.read(dataset, layer, version)
        assert list(found.scan_ids) == list(values.scan_ids)
        np.testing.assert_array_equal(found.array, values.array)
    assert_cells_agree(dataset)


def test_the_files_of_a_renamed_and_of_a_dropped_layer_go_when_their_version_is_too_old(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    committer = commit_three(dataset, keep_versions_days=1)
    version = dataset.open_snapshot().version
    committer.rename_layers({"map": "grid"})
    committer.drop_layers(["z_mean"])
    assert {name.split("/")[1] for name in list_stored(dataset) - list_committed(dataset)} == {
        "layer=map",
        "layer=z_mean",
    }
    import time

    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 2 * 24 * 3600)
    assert vacuum(dataset).deleted > 0
    assert_consistent(dataset)
    with pytest.raises((ConfigError, FileNotFoundError)):
        featray.read(dataset, "map", version)
