"""Refresh: the output follows the collection, and an unchanged collection changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import pytest

import featray
from featray import checks, pipeline
from featray.errors import ConfigError
from featray.job import _scans_per_file
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.schema import Receipt
from featray.stages.report import RunTotals
from featray.storage.store import Store
from featray.terminal.progress import Progress


def dataset_of(config: dict[str, Any]) -> Dataset:
    return Dataset(Store(config["output"]["uri"]))


def values_of(config: dict[str, Any], layer: str = "encoder.z_mean") -> dict[str, np.ndarray]:
    rows = dataset_of(config).read(FEATURES, ("scan_id", "feature"), pads.field("layer") == layer).to_pylist()
    found = {row["scan_id"]: np.array(row["feature"]) for row in rows}
    assert len(found) == len(rows), "a scan is there twice"
    return found


def scans_of(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["scan_id"]: row for row in dataset_of(config).read(SCANS).to_pylist()}


def tree_of(config: dict[str, Any]) -> dict[str, int]:
    folder = Path(config["output"]["uri"])
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def collection(phantoms: Path, tmp_path: Path) -> Path:
    """Return a copy of six phantoms that a test may change: a.nii.gz … f.nii.gz."""
    folder = tmp_path / "ct"
    folder.mkdir()
    for number, name in enumerate("abcdef"):
        shutil.copy(phantoms / "nifti" / f"phantom_{number:03}.nii.gz", folder / f"{name}.nii.gz")
    return folder


@pytest.fixture
def config(config_of: Any, collection: Path) -> dict[str, Any]:
    made: dict[str, Any] = config_of(source={"uri": str(collection)})
    made["source"] = {"uri": str(collection)}
    return made


def test_a_refresh_of_an_unchanged_collection_writes_nothing_and_says_so(config: dict[str, Any]) -> None:
    featray.refresh(config)
    before = tree_of(config)
    summary = featray.refresh(config)
    assert tree_of(config) == before
    assert (summary.done, summary.removed, summary.exit_code) == (0, 0, 0)
    assert "nothing to do: 6 scans are up to date" in summary.text()


def test_new_changed_and_removed_scans_are_followed_in_one_refresh(
    config: dict[str, Any], collection: Path, phantoms: Path
) -> None:
    featray.extract(config)
    before = values_of(config)
    shutil.copy(phantoms / "nifti" / "phantom_008.nii.gz", collection / "new.nii.gz")
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "b.nii.gz")
    (collection / "c.nii.gz").unlink()
    summary = featray.refresh(config)
    assert (summary.found, summary.ok, summary.done, summary.removed) == (6, 6, 2, 1)
    assert "removed 1 scans that are no longer in the collection" in summary.text()

    after = values_of(config)
    assert (
        sorted(after)
        == sorted(scans_of(config))
        == sorted(f"{n}.nii.gz" for n in ["a", "b", "d", "e", "f", "new"])
    )
    assert not np.allclose(after["b.nii.gz"], before["b.nii.gz"])
    np.testing.assert_array_equal(after["a.nii.gz"], before["a.nii.gz"])
    fresh = {**config, "output": {"uri": config["output"]["uri"] + "-fresh"}}
    featray.extract(fresh)
    for scan, value in values_of(fresh).items():
        np.testing.assert_allclose(after[scan], value, rtol=1e-5, atol=1e-6)


def test_only_what_changed_is_read_again(
    config: dict[str, Any], collection: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featray.stages import read

    featray.extract(config)
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "b.nii.gz")
    opened, original = [], read._fetch
    monkeypatch.setattr(read, "_fetch", lambda fs, path: opened.append(path) or original(fs, path))
    featray.refresh(config)
    assert [Path(path).name for path in opened] == ["b.nii.gz"]


def test_headers_of_unchanged_dicom_folders_are_not_read_again(
    config_of: Any, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featray.collection import discover

    config = config_of()
    assert config["source"]["uri"] == str(phantoms)
    featray.extract(config)
    opened, original = [], discover.read_header
    monkeypatch.setattr(
        discover, "read_header", lambda stream, name: opened.append(name) or original(stream, name)
    )
    before = tree_of(config)
    assert featray.refresh(config).done == 0
    assert (opened, tree_of(config)) == ([], before)
    dataset_of(config).store.delete([checks.HEADER_CACHE])
    assert featray.refresh(config).done == 0
    assert opened, "without its memory, listing looks at every header, so the test can fail"


def test_extract_leaves_changed_and_removed_scans_and_says_what_refresh_would_do(
    config: dict[str, Any], collection: Path
) -> None:
    featray.extract(config)
    os.utime(collection / "b.nii.gz", ns=(1, 1))
    (collection / "c.nii.gz").unlink()
    before = tree_of(config)
    summary = featray.extract(config)
    assert tree_of(config) == before
    assert "1 scans have changed since; `featray refresh`" in summary.text()
    assert "1 stored scans are no longer in the collection; `featray refresh`" in summary.text()


def test_another_recipe_is_refused_by_extract_and_replaces_everything_in_refresh(
    config: dict[str, Any],
) -> None:
    first = featray.extract(config)
    with pytest.raises(ConfigError, match="featray refresh"):
        featray.extract(config, ["preprocess.window=[-500, 500]"])
    second = featray.refresh(config, ["preprocess.window=[-500, 500]"])
    assert second.done == 6
    assert {row["recipe"] for row in scans_of(config).values()} == {second.recipe} != {first.recipe}
    assert set(dataset_of(config).read(FEATURES, ("recipe",))["recipe"].to_pylist()) == {second.recipe}


def test_layers_that_are_no_longer_asked_for_go_with_a_refresh(config: dict[str, Any]) -> None:
    featray.extract(config)
    featray.refresh(config, ["model.layers=[encoder/z_mean]"])
    assert set(dataset_of(config).read(FEATURES, ("layer",))["layer"].to_pylist()) == {"encoder.z_mean"}
    folders = {Path(name).parent.name for name in tree_of(config) if "/features/layer=" in name}
    assert folders == {"layer=encoder.z_mean"}


def test_a_scan_that_is_broken_now_loses_its_features_and_says_why(
    config: dict[str, Any], collection: Path
) -> None:
    featray.extract(config)
    (collection / "b.nii.gz").write_bytes(b"no scan any more")
    summary = featray.refresh(config, ["limits.max_failed_fraction=0.5"])
    assert (summary.ok, summary.failed, summary.exit_code) == (5, 1, 0)
    assert scans_of(config)["b.nii.gz"]["reason"] == "unreadable"
    assert "b.nii.gz" not in values_of(config)


def test_failed_scans_are_tried_again_only_when_asked_or_changed(
    config: dict[str, Any], collection: Path, phantoms: Path
) -> None:
    (collection / "b.nii.gz").write_bytes(b"no scan yet")
    assert featray.extract(config).failed == 1
    assert featray.refresh(config).done == 0
    assert featray.refresh(config, retry=["timeout"]).done == 0
    assert featray.refresh(config, retry=["unreadable"]).done == 1
    shutil.copy(phantoms / "nifti" / "phantom_001.nii.gz", collection / "b.nii.gz")
    assert featray.refresh(config).ok == 6


def test_a_refresh_that_would_drop_most_of_the_output_is_refused_before_anything_changes(
    config: dict[str, Any], collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "ALWAYS_REMOVABLE", 2)
    featray.extract(config)
    for name in "abcd":
        (collection / f"{name}.nii.gz").unlink()
    before = tree_of(config)
    with pytest.raises(ConfigError, match="4 of 6 stored scans are no longer in the collection"):
        featray.refresh(config)
    assert tree_of(config) == before
    assert featray.refresh(config, ["limits.max_removed_fraction=1"]).removed == 4
    assert sorted(values_of(config)) == ["e.nii.gz", "f.nii.gz"]


def test_an_interrupted_refresh_is_not_called_done_and_goes_on_where_it_was(config: dict[str, Any]) -> None:
    featray.extract(config)
    stop = threading.Event()
    stop.set()
    summary = featray.refresh(config, ["preprocess.window=[-500, 500]"], stop=stop)
    assert (summary.exit_code, summary.interrupted) == (130, True)
    assert len(values_of(config)) == 6, "what is there is kept until it is replaced"
    assert featray.refresh(config, ["preprocess.window=[-500, 500]"]).exit_code == 0


def test_finished_receipts_are_committed_when_the_engine_fails() -> None:
    committed: list[Receipt] = []

    def commit_slowly(receipts: Sequence[Receipt]) -> None:
        committed.extend(receipts)
        threading.Event().wait(0.01)  # so that the next receipts are held back for a while

    receipts = [Receipt((), ()) for _ in range(3)]
    committer: Any = SimpleNamespace(commit=commit_slowly, dataset=None)
    queue = pipeline._CommitQueue(committer, Progress(3, show=False), RunTotals())

    def put_and_fail() -> None:
        with queue:
            for receipt in receipts:
                queue.put(receipt)
            raise RuntimeError("the cluster is gone")

    with pytest.raises(RuntimeError, match="gone"):
        put_and_fail()
    assert committed == receipts


def test_versions_are_kept_for_readers_when_asked(config: dict[str, Any], collection: Path) -> None:
    config["output"]["keep_versions_days"] = 1
    featray.extract(config)
    before, version = values_of(config), dataset_of(config).open_snapshot().version
    (collection / "a.nii.gz").unlink()
    featray.refresh(config)
    earlier = dataset_of(config).open_snapshot(version)
    rows = earlier.read(FEATURES, ("scan_id",), pads.field("layer") == "encoder.z_mean")
    assert sorted(rows["scan_id"].to_pylist()) == sorted(before)
    assert "a.nii.gz" not in values_of(config)


def test_the_run_folder_says_which_command_it_was(config: dict[str, Any]) -> None:
    summary = featray.refresh(config)
    run = json.loads(dataset_of(config).store.read(f"runs/{summary.run_id}/run.json"))
    assert (run["command"], run["summary"]["done"]) == ("refresh", 6)


def test_many_scans_give_files_and_commits_of_about_the_square_root_of_their_number() -> None:
    assert [_scans_per_file(n, 32) for n in (5, 100, 10_000, 1_000_000)] == [8, 10, 100, 1000]
    assert _scans_per_file(1_000_000, 2**22) == 4
