"""`featray.refresh`: the output is brought in step with the collection, and otherwise not changed."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
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


def open_output(config: dict[str, Any]) -> Dataset:
    return Dataset(Store(config["output"]["uri"]))


def read_layer(config: dict[str, Any], layer: str = "encoder.z_mean") -> dict[str, np.ndarray]:
    """Return scan_id → feature of one layer; check that each scan has one row."""
    layer_filter = pads.field("layer") == layer
    rows = open_output(config).read(FEATURES, ("scan_id", "feature"), layer_filter).to_pylist()
    features = {row["scan_id"]: np.array(row["feature"]) for row in rows}
    assert len(features) == len(rows), "a scan has two rows"
    return features


def read_scans(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return scan_id → row of the scans table."""
    return {row["scan_id"]: row for row in open_output(config).read(SCANS).to_pylist()}


def list_files(config: dict[str, Any]) -> dict[str, int]:
    """Return path → time of the last change, for all files of the output."""
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
    config: dict[str, Any] = config_of()
    config["source"] = {"uri": str(collection)}
    return config


@pytest.mark.slow
def test_a_refresh_of_an_unchanged_collection_writes_nothing_and_reports_this(config: dict[str, Any]) -> None:
    featray.refresh(config)
    before = list_files(config)
    summary = featray.refresh(config)
    assert list_files(config) == before
    assert (summary.done, summary.removed, summary.exit_code) == (0, 0, 0)
    assert "nothing to do: 6 scans are up to date" in summary.text()


@pytest.mark.slow
def test_one_refresh_adds_new_scans_replaces_changed_ones_and_drops_removed_ones(
    config: dict[str, Any], collection: Path, phantoms: Path
) -> None:
    featray.extract(config)
    before = read_layer(config)
    shutil.copy(phantoms / "nifti" / "phantom_008.nii.gz", collection / "new.nii.gz")
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "b.nii.gz")
    (collection / "c.nii.gz").unlink()
    summary = featray.refresh(config)
    assert (summary.found, summary.ok, summary.done, summary.removed) == (6, 6, 2, 1)
    assert "removed 1 scans that are no longer in the collection" in summary.text()

    after = read_layer(config)
    assert (
        sorted(after)
        == sorted(read_scans(config))
        == sorted(f"{n}.nii.gz" for n in ["a", "b", "d", "e", "f", "new"])
    )
    assert not np.allclose(after["b.nii.gz"], before["b.nii.gz"])
    np.testing.assert_array_equal(after["a.nii.gz"], before["a.nii.gz"])
    fresh = {**config, "output": {"uri": config["output"]["uri"] + "-fresh"}}
    featray.extract(fresh)
    for scan, value in read_layer(fresh).items():
        np.testing.assert_allclose(after[scan], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_only_changed_scans_are_read_again(
    config: dict[str, Any], collection: Path, phantoms: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featray.stages import read

    featray.extract(config)
    shutil.copy(phantoms / "nifti" / "phantom_009.nii.gz", collection / "b.nii.gz")
    opened, original = [], read._fetch
    monkeypatch.setattr(read, "_fetch", lambda fs, path: opened.append(path) or original(fs, path))
    featray.refresh(config)
    assert [Path(path).name for path in opened] == ["b.nii.gz"]


@pytest.mark.slow
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
    before = list_files(config)
    assert featray.refresh(config).done == 0
    assert (opened, list_files(config)) == ([], before)
    open_output(config).store.delete([checks.HEADER_CACHE])
    assert featray.refresh(config).done == 0
    assert opened, "without the header cache, listing must read every header"


@pytest.mark.slow
def test_extract_keeps_changed_and_removed_scans_and_reports_what_refresh_would_do(
    config: dict[str, Any], collection: Path
) -> None:
    featray.extract(config)
    os.utime(collection / "b.nii.gz", ns=(1, 1))
    (collection / "c.nii.gz").unlink()
    before = list_files(config)
    summary = featray.extract(config)
    assert list_files(config) == before
    assert "1 scans have changed; `featray refresh` replaces their features" in summary.text()
    assert "1 stored scans are no longer in the collection; `featray refresh`" in summary.text()


@pytest.mark.slow
def test_extract_refuses_another_recipe_and_refresh_replaces_all_scans(
    config: dict[str, Any],
) -> None:
    first = featray.extract(config)
    with pytest.raises(ConfigError, match="featray refresh"):
        featray.extract(config, ["preprocess.window=[-500, 500]"])
    second = featray.refresh(config, ["preprocess.window=[-500, 500]"])
    assert second.done == 6
    assert {row["recipe"] for row in read_scans(config).values()} == {second.recipe} != {first.recipe}
    stored = set(open_output(config).read(FEATURES, ("recipe",))["recipe"].to_pylist())
    assert stored == set(second.layer_recipes.values())
    assert not stored & set(first.layer_recipes.values())


@pytest.mark.slow
def test_a_scan_that_became_unreadable_fails_with_a_reason_and_loses_its_features(
    config: dict[str, Any], collection: Path
) -> None:
    featray.extract(config)
    (collection / "b.nii.gz").write_bytes(b"no longer a scan")
    summary = featray.refresh(config, ["limits.max_failed_fraction=0.5"])
    assert (summary.ok, summary.failed, summary.exit_code) == (5, 1, 0)
    assert read_scans(config)["b.nii.gz"]["reason"] == "unreadable"
    assert "b.nii.gz" not in read_layer(config)


@pytest.mark.slow
def test_failed_scans_are_tried_again_only_on_request_or_when_they_have_changed(
    config: dict[str, Any], collection: Path, phantoms: Path
) -> None:
    (collection / "b.nii.gz").write_bytes(b"not yet a scan")
    assert featray.extract(config).failed == 1
    assert featray.refresh(config).done == 0
    assert featray.refresh(config, retry=["timeout"]).done == 0
    assert featray.refresh(config, retry=["unreadable"]).done == 1
    shutil.copy(phantoms / "nifti" / "phantom_001.nii.gz", collection / "b.nii.gz")
    assert featray.refresh(config).ok == 6


@pytest.mark.slow
def test_a_refresh_that_would_remove_most_scans_is_refused_before_anything_changes(
    config: dict[str, Any], collection: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "ALWAYS_REMOVABLE", 2)
    featray.extract(config)
    for name in "abcd":
        (collection / f"{name}.nii.gz").unlink()
    before = list_files(config)
    with pytest.raises(ConfigError, match="4 of 6 stored scans are no longer in the collection"):
        featray.refresh(config)
    assert list_files(config) == before
    assert featray.refresh(config, ["limits.max_removed_fraction=1"]).removed == 4
    assert sorted(read_layer(config)) == ["e.nii.gz", "f.nii.gz"]


@pytest.mark.slow
def test_an_interrupted_refresh_exits_with_130_and_the_next_one_completes_it(config: dict[str, Any]) -> None:
    featray.extract(config)
    stop = threading.Event()
    stop.set()
    summary = featray.refresh(config, ["preprocess.window=[-500, 500]"], stop=stop)
    assert (summary.exit_code, summary.interrupted) == (130, True)
    assert len(read_layer(config)) == 6, "stored features must be kept until they are replaced"
    assert featray.refresh(config, ["preprocess.window=[-500, 500]"]).exit_code == 0


def test_finished_receipts_are_committed_when_the_engine_fails() -> None:
    committed: list[Receipt] = []

    def commit_slowly(receipts: Sequence[Receipt]) -> None:
        committed.extend(receipts)
        time.sleep(0.01)  # so that the queue delays the commit of the next receipts

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


@pytest.mark.slow
def test_with_keep_versions_days_readers_can_read_an_earlier_version(
    config: dict[str, Any], collection: Path
) -> None:
    config["output"]["keep_versions_days"] = 1
    featray.extract(config)
    before, version = read_layer(config), open_output(config).open_snapshot().version
    (collection / "a.nii.gz").unlink()
    featray.refresh(config)
    earlier = open_output(config).open_snapshot(version)
    rows = earlier.read(FEATURES, ("scan_id",), pads.field("layer") == "encoder.z_mean")
    assert sorted(rows["scan_id"].to_pylist()) == sorted(before)
    assert "a.nii.gz" not in read_layer(config)


@pytest.mark.slow
def test_the_run_folder_names_the_command(config: dict[str, Any]) -> None:
    summary = featray.refresh(config)
    run = json.loads(open_output(config).store.read(f"runs/{summary.run_id}/run.json"))
    assert (run["command"], run["summary"]["done"]) == ("refresh", 6)


def test_the_number_of_scans_per_file_is_about_the_square_root_of_all_scans() -> None:
    assert [_scans_per_file(n, 32) for n in (5, 100, 10_000, 1_000_000)] == [8, 10, 100, 1000]
    assert _scans_per_file(1_000_000, 2**22) == 4


@pytest.mark.slow
def test_a_changed_data_file_of_a_detached_header_is_extracted_again(
    config: dict[str, Any], collection: Path
) -> None:
    sitk = pytest.importorskip("SimpleITK")
    for number, name in enumerate("ab"):
        image = sitk.Cast(sitk.ReadImage(str(collection / f"{name}.nii.gz")), sitk.sitkInt16)
        sitk.WriteImage(image, str(collection / f"{name}.mhd"), useCompression=bool(number))
    featray.extract(config)
    before = read_layer(config)
    for name in "ab":
        assert np.allclose(before[f"{name}.mhd"], before[f"{name}.nii.gz"], rtol=1e-5, atol=1e-6)

    voxels = np.fromfile(collection / "a.raw", np.int16)
    (voxels + 300).tofile(collection / "a.raw")
    summary = featray.refresh(config)
    assert (summary.found, summary.ok, summary.done, summary.removed) == (8, 8, 1, 0)
    after = read_layer(config)
    assert [name for name in after if not np.array_equal(after[name], before[name])] == ["a.mhd"]
    scan = read_scans(config)["b.mhd"]
    assert scan["bytes_read"] == sum((collection / f"b.{end}").stat().st_size for end in ("mhd", "zraw"))
    assert (scan["format"], scan["uri"]) == ("mha", str(collection / "b.mhd"))
