"""The present version continues an output that an earlier version of featray wrote.

Version 0.1.0 had one recipe for all layers of a run. The first run of the present version changes all rows to
one recipe per layer, in one commit and without extracting.

`tests/earlier_versions/README.md` says what the kept folders hold and how they were made.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from commits import LATER, assert_consistent, make_committer, run_until_killed

import featray
from featray.errors import ConfigError
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.delta_log import TableLog
from featray.output.file_change import FileChange
from featray.output.ledger import LEDGER_ROW_COLUMNS, Ledger, find_stored_cells
from featray.output.rewrite import FileRewriter
from featray.recipe import RecipeIds, make_recipe_ids
from featray.storage.store import Store

KEPT = Path(__file__).resolve().parent / "earlier_versions"
MODIFIED_S = 1_700_000_000
"""Modification time of all files of the kept collections, in seconds since the epoch."""
NEW_NAME = "model.custom_objects=[featray.synthetic.vae:Sampling]"
DIFFERENT_IN_EACH_RUN = {"uri", "run_id", "read_s", "decode_s", "preprocess_s", "infer_s"}
MORE_LAYERS = (
    "model.layers=[encoder/z_mean, encoder/z, encoder/z_log_var, "
    "{layer: encoder/conv_2, pool: avgmax, as: conv2}]"
)
LAYERS = ("encoder.z_mean", "encoder.z", "conv2")


def copy_kept(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a kept folder, with the modification times that the earlier version saw."""
    folder = tmp_path / "project"
    shutil.copytree(KEPT / version, folder)
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (MODIFIED_S, MODIFIED_S))
    monkeypatch.chdir(folder)  # the config names its files relative to its folder
    return folder


@pytest.fixture(params=["0.1.0"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a folder whose output has all scans of its config."""
    return copy_kept(request.param, tmp_path, monkeypatch)


@pytest.fixture
def killed_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder whose output has scans of a run and of a refresh that was killed."""
    return copy_kept("0.1.0-f131d91", tmp_path, monkeypatch)


def stored_run(project: Path) -> dict[str, Any]:
    """Return what the run of the earlier version recorded."""
    file = min(project.glob("out/runs/*/run.json"))  # ids of runs sort by time
    run: dict[str, Any] = json.loads(file.read_text())
    return run


def read_bytes(folder: Path) -> dict[str, bytes]:
    """Return the content of all files by name, except the headers that the last listing has read.

    The present version groups DICOM files in another way, so it reads and stores the headers once more.
    """
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "listing.parquet"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_plain(table: Path) -> pa.Table:
    """Return all rows of a table as a reader without featray sees them, sorted."""
    rows = pads.dataset(table, format="parquet", partitioning="hive").to_table()
    keys = [name for name in ("layer", "scan_id", "patch") if name in rows.column_names]
    return rows.sort_by([(key, "ascending") for key in keys])


def scan_rows(output: Path) -> dict[str, dict[str, Any]]:
    return {row["scan_id"]: row for row in read_plain(output / "scans").to_pylist()}


def layer_values(output: Path, layer: str) -> tuple[list[str], list[str], np.ndarray]:
    """Return the scan ids, recipe ids and values (n, width) of one layer."""
    rows = read_plain(output / "features").filter(pads.field("layer") == layer)
    return rows["scan_id"].to_pylist(), rows["recipe"].to_pylist(), np.array(rows["feature"].to_pylist())


def read_cells(output: Path) -> dict[str, dict[str, str]]:
    """Return scan_id → layer → recipe id of the features, as a reader without featray sees them."""
    cells: dict[str, dict[str, str]] = {}
    rows = read_plain(output / "features")
    columns = [rows[key].to_pylist() for key in ("scan_id", "layer", "recipe")]
    for scan_id, layer, recipe in zip(*columns, strict=True):
        assert cells.setdefault(scan_id, {}).setdefault(layer, recipe) == recipe
    return cells


def layer_recipes(project: Path) -> dict[str, str]:
    """Return layer → recipe id that follows from what the earlier version recorded."""
    return make_recipe_ids(stored_run(project)["recipe"]).layers


def assert_carried_over(project: Path, recipes: RecipeIds) -> None:
    """Check the recipes and cells in both tables of the output."""
    rows = scan_rows(project / "out")
    ok = {scan_id for scan_id, row in rows.items() if row["status"] == "ok"}
    assert read_cells(project / "out") == dict.fromkeys(ok, recipes.layers)
    for scan_id, row in rows.items():
        assert row["recipe"] == recipes.inputs
        assert dict(row["layers"]) == (recipes.layers if scan_id in ok else {})
        assert dict(row["failed_layers"]) == ({} if scan_id in ok else recipes.layers)


@pytest.mark.slow
@pytest.mark.parametrize("command", [featray.extract, featray.refresh])
def test_the_first_run_gives_every_row_the_recipes_of_its_layers_and_extracts_nothing(
    project: Path, command: Callable[..., featray.Summary]
) -> None:
    recipes = make_recipe_ids(stored_run(project)["recipe"])
    features, scans = read_plain(project / "out/features"), read_plain(project / "out/scans")
    version = Dataset(Store("out")).open_snapshot().commit_number
    summary = command("config.yaml")
    assert (summary.found, summary.ok, summary.failed, summary.done) == (6, 5, 1, 0)
    assert summary.run_id, "the run has changed the output"
    assert Dataset(Store("out")).open_snapshot().commit_number == version + 1
    assert (summary.recipe, summary.layer_recipes) == (recipes.inputs, recipes.layers)
    assert_carried_over(project, recipes)
    assert read_plain(project / "out/features").drop(["recipe"]).equals(features.drop(["recipe"]))
    carried = read_plain(project / "out/scans").drop(["recipe", "layers", "failed_layers"])
    assert carried.equals(scans.drop(["recipe"]))
    assert featray.verify("out").findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], [NEW_NAME]], ids=["old name of Sampling", "new name of Sampling"])
def test_the_second_run_finds_nothing_to_do_with_either_name_of_the_sampling_layer(
    project: Path, overrides: list[str]
) -> None:
    featray.extract("config.yaml")
    before = read_bytes(project / "out")
    for command in (featray.extract, featray.refresh):
        summary = command("config.yaml", overrides)
        assert "nothing to do: 5 scans are up to date" in summary.text()
        assert (summary.done, summary.removed, summary.run_id) == (0, 0, "")
    assert read_bytes(project / "out") == before


@pytest.mark.slow
def test_a_layer_is_added_without_extracting_the_layers_of_the_earlier_version(project: Path) -> None:
    recipes, run_id = layer_recipes(project), stored_run(project)["run_id"]
    before = read_plain(project / "out/features")
    summary = featray.extract("config.yaml", [MORE_LAYERS])
    assert (summary.ok, summary.failed, summary.done) == (5, 1, 5), "the failed scan cannot be read"
    assert summary.layer_recipes.items() > recipes.items()
    after = read_plain(project / "out/features")
    is_new = pads.field("layer") == "encoder.z_log_var"
    assert set(after.filter(is_new)["run_id"].to_pylist()) == {summary.run_id}
    assert len(after.filter(is_new)) == 5
    assert after.filter(~is_new).drop(["recipe"]).equals(before.drop(["recipe"]))
    assert set(before["run_id"].to_pylist()) == {run_id}
    rows = scan_rows(project / "out").values()
    assert [dict(row["layers"]) for row in rows if row["status"] == "ok"] == [summary.layer_recipes] * 5
    assert featray.verify("out").findings == ()


@pytest.mark.slow
def test_the_first_run_also_renames_and_drops_layers(project: Path) -> None:
    before = layer_values(project / "out", "conv2")
    layers = "model.layers=[encoder/z_mean, {layer: encoder/conv_2, pool: avgmax, as: renamed}]"
    summary = featray.refresh("config.yaml", [layers], drop_layers=True)
    assert (summary.done, summary.renamed_layers) == (0, {"conv2": "renamed"})
    assert summary.dropped_layers == ("encoder.z",)
    recipe = layer_recipes(project)["conv2"]
    scan_ids, recipes, values = layer_values(project / "out", "renamed")
    assert (scan_ids, recipes) == (before[0], [recipe] * 5)
    np.testing.assert_array_equal(values, before[2])
    assert all(of_scan == summary.layer_recipes for of_scan in read_cells(project / "out").values())
    assert featray.verify("out").findings == ()


@pytest.mark.slow
def test_the_version_before_the_first_run_stays_readable_if_versions_are_kept(project: Path) -> None:
    before = featray.read("out", "conv2")
    summary = featray.extract("config.yaml", ["output.keep_versions_days=1"])
    earlier, now = featray.read("out", "conv2", before.version), featray.read("out", "conv2")
    assert before.recipe == earlier.recipe == stored_run(project)["recipe_id"]
    assert now.recipe == summary.layer_recipes["conv2"]
    for found in (earlier, now):
        assert list(found.scan_ids) == list(before.scan_ids)
        np.testing.assert_array_equal(found.array, before.array)
    assert featray.verify("out").findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], [MORE_LAYERS]], ids=["same layers", "one more layer"])
def test_the_config_explains_the_rows_if_the_run_that_wrote_them_was_killed_and_recorded_nothing(
    project: Path, overrides: list[str]
) -> None:
    recipes = make_recipe_ids(stored_run(project)["recipe"])
    shutil.rmtree(project / "out/runs")
    summary = featray.extract("config.yaml", overrides)
    assert summary.done == (5 if overrides else 0)
    cells = read_cells(project / "out")
    assert len(cells) == 5
    assert all(of_scan == summary.layer_recipes for of_scan in cells.values())
    assert summary.layer_recipes.items() >= recipes.layers.items()
    assert featray.verify("out").findings == ()


@pytest.mark.slow
def test_rows_that_neither_a_run_nor_the_config_explains_are_replaced_by_refresh_only(project: Path) -> None:
    shutil.rmtree(project / "out/runs")
    before, values = read_bytes(project / "out/features"), layer_values(project / "out", "conv2")[2]
    other_window = ["preprocess.window=[-1000, 500]"]
    with pytest.raises(ConfigError, match=r"5 scans .*another recipe.*`featray refresh` extracts them"):
        featray.extract("config.yaml", other_window)
    assert read_bytes(project / "out/features") == before
    summary = featray.refresh("config.yaml", other_window)
    assert (summary.ok, summary.failed, summary.done) == (5, 1, 6)
    assert set(map(str, read_cells(project / "out").values())) == {str(summary.layer_recipes)}
    assert not np.allclose(layer_values(project / "out", "conv2")[2], values)
    assert featray.verify("out").findings == ()


def write_again_as_before(output: Path, kept: Path, scan_id: str, tables: Sequence[str]) -> None:
    """Write the rows of one scan as the earlier version wrote them, and remove its other rows of `tables`."""
    dataset, run_id = Dataset(Store(str(output))), "20270101T000000000-000000"
    snapshot = dataset.open_snapshot()
    is_scan = pads.field("scan_id") == scan_id
    rewriter = FileRewriter(dataset, run_id)
    for table in (FEATURES, SCANS):
        removal = rewriter.remove_rows(table, snapshot.files(table), [scan_id] if table in tables else [])
        added = []
        for file in Dataset(Store(str(kept))).open_snapshot().files(table):
            rows = pads.dataset(kept / table / file.path).to_table(filter=is_scan)
            added.append(dataset.write_file(table, file.partition_values, rows, run_id))
        log = TableLog.open(dataset.store, table)
        assert log is not None
        log.append(FileChange((*added, *removal.add), removal.remove), log.commit_number + 1, run_id)
        dataset.store.delete([f"{table}/{file.path}" for file in removal.remove])


@pytest.mark.slow
@pytest.mark.parametrize("tables", [(FEATURES, SCANS), (SCANS,)], ids=["of a scan", "of a failed scan"])
def test_rows_that_the_earlier_version_wrote_after_the_first_run_are_changed_too(
    project: Path, tables: Sequence[str]
) -> None:
    """Version 0.1.0 does not know that a failed scan may have features, so it leaves them in the table."""
    kept, scan_id = project / "kept", "nifti/phantom_002.nii.gz"
    shutil.copytree(project / "out", kept)
    recipes = make_recipe_ids(stored_run(project)["recipe"])
    featray.extract("config.yaml")
    features = read_plain(project / "out/features")
    write_again_as_before(project / "out", kept, scan_id, tables)
    assert scan_rows(project / "out")[scan_id]["layers"] is None
    assert (featray.verify("out").findings == ()) == (FEATURES in tables)
    summary = featray.extract("config.yaml")
    assert (summary.ok, summary.done, bool(summary.run_id)) == (5, 0, True)
    assert_carried_over(project, recipes)
    assert read_plain(project / "out/features").equals(features)
    assert featray.verify("out").findings == ()
    assert featray.extract("config.yaml").run_id == ""


@pytest.mark.slow
def test_a_kill_at_any_step_of_the_first_run_changes_all_rows_or_none(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = stored_run(project)["recipe"]

    def carry_over(dataset: Dataset) -> None:
        committer = make_committer(dataset, LATER)
        committer.carry_over(Ledger.read(committer.snapshot(), recipe).earlier_recipes)

    def read_recipes(dataset: Dataset) -> list[Any]:
        names = ("scan_id", "recipe")
        return [dataset.read(table, names).sort_by("scan_id").to_pylist() for table in (FEATURES, SCANS)]

    before = read_recipes(Dataset(Store("out")))
    seen = []
    for kill_at in itertools.count():
        folder = project / f"out{kill_at}"
        shutil.copytree(project / "out", folder)
        dataset = Dataset(Store(str(folder)))
        killed = run_until_killed(lambda: carry_over(dataset), monkeypatch, kill_at)  # noqa: B023  # called at once
        seen.append(read_recipes(dataset))
        carry_over(dataset)
        make_committer(dataset, LATER).delete_orphans()
        assert_consistent(dataset)
        if not killed:
            break
    assert before != seen[-1]
    assert all(state in (before, seen[-1]) for state in seen)
    assert before in seen[:-1]
    assert seen[-1] in seen[:-1]


def test_verify_finds_everything_in_order(project: Path) -> None:
    verification = featray.verify("out")
    assert verification.findings == ()
    assert verification.exit_code == 0
    assert verification.scans == {"ok": 5, "failed": 1, "excluded": 0}
    assert verification.rows == dict.fromkeys(LAYERS, 5)


def test_verify_finds_everything_in_order_if_the_recipes_of_two_runs_have_different_layers() -> None:
    verification = featray.verify(str(KEPT / "0.1.0-f131d91" / "out"))
    assert verification.findings == ()
    assert verification.rows == {"conv2_grid": 2, "encoder.z_mean": 6}


def test_verify_finds_the_scans_of_a_layer_that_has_lost_its_files(project: Path) -> None:
    shutil.rmtree(project / "out" / "features" / "layer=conv2")
    (finding,) = featray.verify("out").findings
    assert (finding.kind, finding.layer, finding.scans) == ("missing_file", "conv2", 5)


@pytest.mark.slow
def test_refresh_replaces_the_one_scan_whose_file_has_changed(project: Path) -> None:
    featray.extract("config.yaml")
    before, values_before = scan_rows(project / "out"), layer_values(project / "out", "encoder.z_mean")
    changed, source = "nifti/phantom_001.nii.gz", project / "collection" / "nifti" / "phantom_002.nii.gz"
    (project / "collection" / changed).write_bytes(source.read_bytes())
    summary = featray.refresh("config.yaml")
    assert (summary.done, summary.removed, summary.states["changed"]) == (1, 0, 1)
    after = scan_rows(project / "out")
    assert after.pop(changed)["run_id"] == summary.run_id != before.pop(changed)["run_id"]
    assert after == before
    scan_ids, recipes, values = layer_values(project / "out", "encoder.z_mean")
    assert (scan_ids, recipes) == values_before[:2]
    for index, scan_id in enumerate(scan_ids):
        expected = values_before[2][
            scan_ids.index("nifti/phantom_002.nii.gz") if scan_id == changed else index
        ]
        np.testing.assert_allclose(values[index], expected, rtol=1e-5)


@pytest.mark.slow
def test_a_new_extraction_gives_the_stored_values_except_of_layers_that_sample(project: Path) -> None:
    """The seeds of encoder.z depended on the layers beside it in 0.1.0, and do not any more."""
    summary = featray.extract("config.yaml", ["output.uri=new"])
    assert (summary.ok, summary.failed, summary.done) == (5, 1, 6)
    recipes = layer_recipes(project)
    for layer in LAYERS:
        old_ids, _, old_values = layer_values(project / "out", layer)
        new_ids, new_recipes, new_values = layer_values(project / "new", layer)
        assert (new_ids, new_recipes) == (old_ids, [recipes[layer]] * 5)
        if layer != "encoder.z":
            np.testing.assert_allclose(new_values, old_values, rtol=1e-5, err_msg=layer)
    old_scans, new_scans = scan_rows(project / "out"), scan_rows(project / "new")
    assert new_scans.keys() == old_scans.keys()
    for scan_id, old in old_scans.items():
        for name in old.keys() - DIFFERENT_IN_EACH_RUN - {"recipe"}:
            expected = pytest.approx(old[name], rel=1e-5) if isinstance(old[name], float) else old[name]
            assert new_scans[scan_id][name] == expected, (scan_id, name)


@pytest.mark.slow
def test_after_one_listing_the_headers_of_unchanged_dicom_files_are_not_read_again(
    project: Path, caplog: pytest.LogCaptureFixture
) -> None:
    featray.refresh("config.yaml")  # the headers that the earlier version stored are read once more
    for path in (project / "collection" / "dicom").rglob("*.dcm"):
        path.write_bytes(bytes(path.stat().st_size))  # a header that is read again is now unreadable
        os.utime(path, (MODIFIED_S, MODIFIED_S))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "featray"):
        summary = featray.refresh("config.yaml")
    assert (summary.found, summary.done, summary.run_id) == (6, 0, "")
    assert not caplog.records
    (project / "out" / "runs" / "listing.parquet").unlink()
    summary = featray.refresh("config.yaml")
    assert summary.reasons["unreadable"] == 10  # each of the ten files, now that their headers are read


@pytest.mark.slow
def test_scans_of_two_runs_get_the_recipes_of_their_layers_and_only_missing_layers_are_extracted(
    killed_project: Path,
) -> None:
    earlier = read_plain(killed_project / "out/features")
    summary = featray.extract("config.yaml")
    assert (summary.found, summary.ok, summary.excluded, summary.done) == (4, 3, 1, 2)
    assert summary.layer_recipes.keys() == {"encoder.z_mean", "conv2_grid"}
    rows = scan_rows(killed_project / "out")
    assert rows.pop("dicom/phantom_003").items() >= {"layers": [], "failed_layers": []}.items()
    assert [dict(row["layers"]) for row in rows.values()] == [summary.layer_recipes] * 3
    assert [(row["recipe"], row["patches"]) for row in rows.values()] == [(summary.recipe, 2)] * 3
    assert read_cells(killed_project / "out") == dict.fromkeys(rows, summary.layer_recipes)
    after = read_plain(killed_project / "out/features")
    is_new = pads.field("run_id") == summary.run_id
    assert after.filter(~is_new).drop(["recipe"]).equals(earlier.drop(["recipe"]))
    new = after.filter(is_new).select(["layer", "scan_id", "patch"]).to_pylist()
    added = itertools.product(
        ["conv2_grid"], ["nifti/phantom_001.nii.gz", "nifti/phantom_002.nii.gz"], [0, 1]
    )
    assert [tuple(row.values()) for row in new] == list(added)
    assert featray.verify("out").findings == ()
    assert featray.extract("config.yaml").run_id == ""


def test_the_status_counts_only_the_scans_that_have_a_layer(killed_project: Path) -> None:
    first, second = "efd69e3a9ff9d722", "c6e35b5a9a51dc35"
    snapshot = Dataset(Store("out")).open_snapshot()
    cells = find_stored_cells(snapshot, snapshot.read_scans(LEDGER_ROW_COLUMNS))
    assert cells.count_recipes() == {"conv2_grid": {second: 1}, "encoder.z_mean": {second: 1, first: 2}}
    assert featray.verify("out").findings == ()


@pytest.mark.slow
def test_a_new_extraction_of_patches_and_grids_gives_the_stored_values_and_recipes(
    killed_project: Path,
) -> None:
    featray.extract("config.yaml")
    featray.extract("config.yaml", ["output.uri=new"])
    for layer in ("encoder.z_mean", "conv2_grid"):
        old_ids, old_recipes, old_values = layer_values(killed_project / "out", layer)
        new_ids, new_recipes, new_values = layer_values(killed_project / "new", layer)
        assert (new_ids, new_recipes) == (old_ids, old_recipes)
        np.testing.assert_allclose(new_values, old_values, rtol=1e-5, atol=1e-7, err_msg=layer)
