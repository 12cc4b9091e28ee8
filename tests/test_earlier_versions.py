"""The present version continues an output that an earlier version of featray wrote.

`tests/earlier_versions/README.md` says what the kept folders hold and how they were made.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pytest

import featray

KEPT = Path(__file__).resolve().parent / "earlier_versions"
MODIFIED_S = 1_700_000_000
"""Modification time of all files of the kept collections, in seconds since the epoch."""
NEW_NAME = "model.custom_objects=[featray.synthetic.vae:Sampling]"
DIFFERENT_IN_EACH_RUN = {"uri", "run_id", "read_s", "decode_s", "preprocess_s", "infer_s"}
LAYERS = ("encoder.z_mean", "encoder.z", "conv2")


@pytest.fixture(params=["0.1.0"])
def project(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of a kept folder, with the modification times that the earlier version saw."""
    folder = tmp_path / "project"
    shutil.copytree(KEPT / request.param, folder)
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (MODIFIED_S, MODIFIED_S))
    monkeypatch.chdir(folder)  # the config names its files relative to its folder
    return folder


def stored_run(project: Path) -> dict[str, Any]:
    (file,) = project.glob("out/runs/*/run.json")
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


@pytest.mark.slow
def test_extract_finds_nothing_to_do_and_the_same_recipe_id(project: Path) -> None:
    before = read_bytes(project / "out")
    summary = featray.extract("config.yaml")
    assert "nothing to do: 5 scans are up to date" in summary.text()
    assert (summary.found, summary.ok, summary.failed, summary.done, summary.run_id) == (6, 5, 1, 0, "")
    assert summary.recipe == stored_run(project)["recipe_id"]
    assert read_bytes(project / "out") == before


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], [NEW_NAME]], ids=["old name of Sampling", "new name of Sampling"])
def test_refresh_finds_nothing_to_do_with_either_name_of_the_sampling_layer(
    project: Path, overrides: list[str]
) -> None:
    before = read_bytes(project / "out")
    summary = featray.refresh("config.yaml", overrides)
    assert "nothing to do: 5 scans are up to date" in summary.text()
    assert (summary.done, summary.removed, summary.run_id) == (0, 0, "")
    assert summary.recipe == stored_run(project)["recipe_id"]
    assert read_bytes(project / "out") == before


def test_verify_finds_everything_in_order(project: Path) -> None:
    verification = featray.verify("out")
    assert verification.findings == ()
    assert verification.exit_code == 0
    assert verification.scans == {"ok": 5, "failed": 1, "excluded": 0}
    assert verification.rows == dict.fromkeys(LAYERS, 5)


@pytest.mark.slow
def test_refresh_replaces_the_one_scan_whose_file_has_changed(project: Path) -> None:
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
def test_a_new_extraction_gives_the_stored_values_and_recipe_ids(project: Path) -> None:
    summary = featray.extract("config.yaml", ["output.uri=new"])
    assert (summary.ok, summary.failed, summary.done) == (5, 1, 6)
    for layer in LAYERS:
        old_ids, old_recipes, old_values = layer_values(project / "out", layer)
        new_ids, new_recipes, new_values = layer_values(project / "new", layer)
        assert (new_ids, new_recipes) == (old_ids, old_recipes)
        np.testing.assert_allclose(new_values, old_values, rtol=1e-5, err_msg=layer)
    old_scans, new_scans = scan_rows(project / "out"), scan_rows(project / "new")
    assert new_scans.keys() == old_scans.keys()
    for scan_id, old in old_scans.items():
        for name in old.keys() - DIFFERENT_IN_EACH_RUN:
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
    with caplog.at_level(logging.WARNING, "featray"):
        summary = featray.refresh("config.yaml")
    assert (summary.found, summary.done, summary.run_id) == (6, 0, "")
    assert not caplog.records
    (project / "out" / "runs" / "listing.parquet").unlink()
    summary = featray.refresh("config.yaml")
    assert summary.reasons["unreadable"] == 10  # each of the ten files, now that their headers are read
