"""`featray export`: every reader can read the folder, and an incomplete export is not marked as complete."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.dataset as pads
import pytest

import featray
from featray.cli.main import main
from featray.commands import export
from featray.errors import ConfigError, FeatrayError, StorageError, UsageError
from featray.output.dataset import SCANS, Dataset
from featray.schema import Decoded, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RUN = "20260101T000000000-abcdef"
LAYERS = ("z_mean", "enc.map")
ROWS = [("a", 0, [1.0, 2.0]), ("b", 0, [2.0, 3.0]), ("b", 1, [2.0, 3.0]), ("c", 0, [3.0, 4.0])]


def compute_layers(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Compute two layers in place of a model; the values identify the input."""
    first = batch[:, 0, 0, 0]
    values = (np.stack([first, first + 1], axis=1), np.tile(first[:, None, None], (1, 2, 3)))
    return dict(zip(LAYERS, values, strict=True))


def commit_scans(
    dataset: Dataset,
    *scans: tuple[str, float, int],
    extra_columns: Sequence[str] = (),
    recipe: str = "r0",
    keep_days: float = 0,
    partition_by: Sequence[str] = ("layer",),
) -> int:
    """Commit scans (id, value, patches) with one recipe for both layers; return the version of the output."""
    decoded = []
    for scan_id, value, patches in scans:
        record = ScanRecord(scan_id, f"/data/{scan_id}", "nifti", content="c0")
        record.columns = {name: f"{name} {scan_id}" for name in extra_columns}
        tensor = np.full((patches, 2, 2, 2), value, np.float32)
        decoded.append(Decoded(record, tensor, np.zeros((patches, 3), np.int32)))
    recipes, extracted = dict.fromkeys(LAYERS, recipe), extract(compute_layers, decoded, recipe=recipe)
    receipt = write(extracted, dataset, partition_by, recipes, RUN)
    receipt.set_run("i0", recipes, RUN)
    Committer(dataset, partition_by, extra_columns, run_id=RUN, keep_versions_days=keep_days).commit(
        [receipt]
    )
    return dataset.open_snapshot().version


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return an output of three scans in two files per layer."""
    output = Dataset(Store(str(tmp_path / "out")))
    commit_scans(output, ("c", 3, 1), ("a", 1, 1))
    commit_scans(output, ("b", 2, 2))
    return output


def read_rows(folder: Path) -> list[tuple[str, int, list[float]]]:
    """Return scan_id, patch and feature of all rows of layer `z_mean`, sorted."""
    features = pads.dataset(str(folder / "features"), format="parquet", partitioning="hive")
    table = features.to_table(filter=pads.field("layer") == "z_mean").sort_by(
        [("scan_id", "ascending"), ("patch", "ascending")]
    )
    columns = [table[name].to_pylist() for name in ("scan_id", "patch", "feature")]
    return list(zip(*columns, strict=True))


def list_files(folder: Path) -> dict[str, int]:
    """Return the size of each file below a folder by its path."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def test_all_parquet_readers_read_the_same_rows(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    featray.export(dataset, folder)
    assert read_rows(folder) == ROWS
    frame = pd.read_parquet(folder / "features", filters=[("layer", "==", "z_mean")])
    frame = frame.sort_values(["scan_id", "patch"])
    rows = zip(frame["scan_id"], frame["patch"], map(list, frame["feature"]), strict=True)
    assert list(rows) == ROWS
    scanned = pl.scan_parquet(f"{folder}/features/", hive_partitioning=True)
    rows_of_layer = scanned.filter(pl.col("layer") == "z_mean").select("scan_id", "patch", "feature")
    assert rows_of_layer.sort("scan_id", "patch").collect().rows() == ROWS
    files = f"'{folder}/features/**/*.parquet', hive_partitioning = true"
    query = f"select scan_id, patch, feature from read_parquet({files}) where layer = 'z_mean' order by all"
    assert duckdb.sql(query).fetchall() == ROWS
    for scans in (pd.read_parquet(folder / "scans"), pl.read_parquet(folder / "scans/*.parquet").to_pandas()):
        assert sorted(scans["scan_id"]) == ["a", "b", "c"]
    assert duckdb.sql(f"select count(*) from '{folder}/scans/*.parquet'").fetchall() == [(3,)]


def test_the_folder_holds_copies_of_the_outputs_files_and_the_marker(
    dataset: Dataset, tmp_path: Path
) -> None:
    featray.export(dataset, tmp_path / "plain")
    names = set(list_files(tmp_path / "plain"))
    snapshot = dataset.open_snapshot()
    own = {f"{table}/{file.path}" for table in ("features", "scans") for file in snapshot.files(table)}
    assert names == {*own, "export.json"}
    for name in own:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_marker_describes_the_folder(dataset: Dataset, tmp_path: Path) -> None:
    result = featray.export(dataset, tmp_path / "plain")
    marker = json.loads((tmp_path / "plain" / "export.json").read_text())
    snapshot = dataset.open_snapshot()
    assert (marker["version"], marker["versions"]) == (snapshot.version, snapshot.versions)
    assert marker["recipes"] == {"enc.map": {"r0": 3}, "z_mean": {"r0": 3}}
    assert marker["scans"] == {"ok": 3}
    layers = {layer["layer"]: (layer["rows"], layer["files"]) for layer in marker["layers"]}
    assert layers == {"enc.map": (4, 2), "z_mean": (4, 2)}
    sizes = list_files(tmp_path / "plain")
    del sizes["export.json"]
    assert marker["files"] == sizes
    assert result.copied == len(sizes)
    assert "2 layers, 8 rows, 3 scans" in result.text()


def test_only_requested_layers_are_exported_with_all_scans(dataset: Dataset, tmp_path: Path) -> None:
    featray.export(dataset, tmp_path / "plain", layers=["enc/map"])
    assert [path.name for path in (tmp_path / "plain/features").iterdir()] == ["layer=enc.map"]
    marker = json.loads((tmp_path / "plain" / "export.json").read_text())
    assert marker["recipes"] == {"enc.map": {"r0": 3}}
    assert len(pd.read_parquet(tmp_path / "plain/scans")) == 3
    with pytest.raises(UsageError, match="did you mean 'z_mean'"):
        featray.export(dataset, tmp_path / "other", layers=["z_men"])
    assert not (tmp_path / "other").exists()


def test_an_older_version_is_exported_if_the_output_keeps_it(dataset: Dataset, tmp_path: Path) -> None:
    older = commit_scans(dataset, ("d", 9, 1), keep_days=1)
    commit_scans(dataset, ("a", 7, 1), keep_days=1)
    featray.export(dataset, tmp_path / "old", older)
    assert read_rows(tmp_path / "old") == [*ROWS, ("d", 0, [9.0, 10.0])]
    featray.export(dataset, tmp_path / "new")
    assert read_rows(tmp_path / "new")[0] == ("a", 0, [7.0, 8.0])


def test_a_version_with_deleted_files_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    before = dataset.open_snapshot().version
    commit_scans(dataset, ("a", 7, 1))
    with pytest.raises(ConfigError, match=r"kept for 0 days .*Leave the version out"):
        featray.export(dataset, tmp_path / "plain", before)
    assert not (tmp_path / "plain/export.json").exists()
    featray.export(dataset, tmp_path / "plain")  # continues the failed call
    assert read_rows(tmp_path / "plain")[0] == ("a", 0, [7.0, 8.0])


@pytest.mark.parametrize("refreshes", [1, 3])
def test_an_output_that_is_refreshed_during_the_copy_is_exported_as_one_version(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refreshes: int
) -> None:
    values = iter(range(10, 10 + refreshes))
    original = export._copy_local_file

    def copy_and_refresh(path: str, to: str) -> None:
        original(path, to)
        if (value := next(values, None)) is not None:
            commit_scans(dataset, ("a", value, 1), ("c", value, 1))

    monkeypatch.setattr(export, "_copy_local_file", copy_and_refresh)
    monkeypatch.setattr(export, "_PARALLEL_COPIES", 1)
    result = featray.export(dataset, tmp_path / "plain")
    last = 9.0 + refreshes
    expected = [("a", 0, [last, last + 1]), *ROWS[1:3], ("c", 0, [last, last + 1])]
    assert read_rows(tmp_path / "plain") == expected
    assert result.version == dataset.open_snapshot().version
    assert sorted(pd.read_parquet(tmp_path / "plain/scans")["scan_id"]) == ["a", "b", "c"]
    assert set(list_files(tmp_path / "plain")) == {*result.files, "export.json"}


def test_an_interrupted_export_has_no_marker_and_the_same_call_continues_it(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = export._copy_local_file, []

    def copy_until_killed(path: str, to: str) -> None:
        calls.append(to)
        if len(calls) == 3:
            Path(f"{to}.{'0' * 32}.tmp").parent.mkdir(parents=True, exist_ok=True)
            Path(f"{to}.{'0' * 32}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        original(path, to)

    monkeypatch.setattr(export, "_copy_local_file", copy_until_killed)
    monkeypatch.setattr(export, "_PARALLEL_COPIES", 1)
    with pytest.raises(KeyboardInterrupt):
        featray.export(dataset, tmp_path / "plain")
    remaining = list_files(tmp_path / "plain")
    assert "export.json" not in remaining
    assert "export.started.json" in remaining
    monkeypatch.setattr(export, "_copy_local_file", original)
    result = featray.export(dataset, tmp_path / "plain")
    complete = {name for name in remaining if name.startswith("features/") and name.endswith(".parquet")}
    assert len(complete) >= 2
    assert result.copied == len(result.files) - len(complete)
    assert read_rows(tmp_path / "plain") == ROWS
    assert set(list_files(tmp_path / "plain")) == {*result.files, "export.json"}


@pytest.mark.slow
def test_the_same_command_completes_an_export_whose_process_was_killed(
    dataset: Dataset, tmp_path: Path
) -> None:
    code = (
        "import os, sys, time; from featray.commands import export; from featray.cli.main import main\n"
        "original = export._copy_local_file\n"
        "def copy_slowly(path, to): original(path, to); os.write(1, b'one\\n'); time.sleep(60)\n"
        "export._copy_local_file = copy_slowly\n"
        "main(sys.argv[1:])"
    )
    command = ["export", dataset.store.root, str(tmp_path / "plain")]
    with subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert first == b"one\n"
    assert not (tmp_path / "plain/export.json").exists()
    assert main(command) == 0
    assert read_rows(tmp_path / "plain") == ROWS


def test_a_folder_with_other_files_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \(notes.txt\); name a folder that is new"):
        featray.export(dataset, tmp_path / "mine")
    assert list_files(tmp_path / "mine") == {"notes.txt": 1}
    with pytest.raises(ConfigError, match="is a file"):
        featray.export(dataset, tmp_path / "mine" / "notes.txt")
    featray.export(dataset, tmp_path / "plain")
    with pytest.raises(ConfigError, match="holds a complete export"):
        featray.export(dataset, tmp_path / "plain")


def test_a_folder_inside_the_output_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in ("out", "out/features/plain", "link/plain"):
        with pytest.raises(ConfigError, match="inside the output"):
            featray.export(dataset, tmp_path / place)


def test_an_incomplete_export_with_foreign_files_is_refused_and_not_changed(
    dataset: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    started = {"version": 1, "files": ["scans/part-x.parquet"]}
    (tmp_path / "plain/export.started.json").write_text(json.dumps(started))
    (tmp_path / "plain/scans").mkdir()
    (tmp_path / "plain/scans/mine.parquet").write_text("x")
    with pytest.raises(ConfigError, match=r"not part of it \(scans/mine.parquet\)"):
        featray.export(dataset, tmp_path / "plain")
    assert (tmp_path / "plain/scans/mine.parquet").exists()


def test_files_of_scans_are_exported_with_columns_that_were_added_later(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    commit_scans(dataset, *((f"a{number}", 1, 1) for number in range(4)))
    commit_scans(dataset, ("b", 2, 1), extra_columns=["site"])
    assert len(dataset.open_snapshot().files(SCANS)) == 2
    featray.export(dataset, tmp_path / "plain")
    expected = {**{f"a{number}": None for number in range(4)}, "b": "site b"}
    scans = pl.read_parquet(f"{tmp_path}/plain/scans/*.parquet")
    assert dict(scans.select("scan_id", "site").iter_rows()) == expected
    rows = duckdb.sql(f"select scan_id, site from '{tmp_path}/plain/scans/*.parquet'").fetchall()
    assert dict(rows) == expected
    marker = json.loads((tmp_path / "plain/export.json").read_text())
    assert marker["files"].items() <= list_files(tmp_path / "plain").items()


def test_each_partition_column_is_a_level_of_folders(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    commit_scans(dataset, ("a/ü", 1, 1), extra_columns=["site"], partition_by=("layer", "site"))
    featray.export(dataset, tmp_path / "plain")
    scanned = pl.scan_parquet(f"{tmp_path}/plain/features/", hive_partitioning=True).collect()
    assert scanned.filter(layer="z_mean")["site"].to_list() == ["site a/ü"]


def test_an_output_with_a_damaged_or_missing_file_is_not_exported(dataset: Dataset, tmp_path: Path) -> None:
    file = Path(dataset.store.root) / "features" / dataset.open_snapshot().files("features")[0].path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"1 files: features/layer=.*featray verify"):
        featray.export(dataset, tmp_path / "plain")
    assert not (tmp_path / "plain/export.json").exists()
    file.unlink()
    with pytest.raises(FeatrayError, match="is missing; `featray verify`"):
        featray.export(dataset, tmp_path / "plain")


def test_two_recipes_in_one_export_are_reported(dataset: Dataset, tmp_path: Path) -> None:
    commit_scans(dataset, ("d", 4, 1), recipe="r1")
    result = featray.export(dataset, tmp_path / "plain")
    assert result.recipes == {layer: {"r0": 3, "r1": 1} for layer in LAYERS}
    for layer in LAYERS:
        recipes = "2 recipes, which must not be compared: r0 (3 scans), r1 (1 scans)"
        assert f"layer {layer} has values of {recipes}" in result.text()


def test_an_export_to_another_kind_of_store_is_complete(
    dataset: Dataset, request: pytest.FixtureRequest
) -> None:
    fs = fsspec.filesystem("memory")
    request.addfinalizer(lambda: fs.rm("/plain", recursive=True))
    result = featray.export(dataset, "memory://plain")
    assert set(fs.find("/plain")) == {f"/plain/{name}" for name in (*result.files, "export.json")}
    for name in result.files:
        assert fs.cat_file(f"/plain/{name}") == dataset.store.read(name)


def test_an_object_store_copies_features_itself_and_no_secret_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    s3_folder: str,
    s3_options: dict[str, Any],
) -> None:
    (tmp_path / "options.yaml").write_text(json.dumps(s3_options))
    remote = Dataset(Store(f"{s3_folder}/out", s3_options))
    commit_scans(remote, ("a", 1, 1), ("c", 3, 1))
    commit_scans(remote, ("b", 2, 2))
    featray.export(remote, tmp_path / "plain")
    assert read_rows(tmp_path / "plain") == ROWS
    with monkeypatch.context() as patch:
        patch.setattr(Store, "read", _fail_on_features(Store.read))
        featray.export(remote, f"{s3_folder}/plain")
    there = Store(f"{s3_folder}/plain", s3_options)
    sizes, local_sizes = there.list_file_sizes(), list_files(tmp_path / "plain")
    del sizes["export.json"], local_sizes["export.json"]
    assert sizes == local_sizes
    local = Dataset(Store(str(tmp_path / "out")))
    commit_scans(local, ("z", 5, 1))
    arguments = [
        local.store.root,
        f"{s3_folder}/other",
        "--storage-options",
        str(tmp_path / "options.yaml"),
    ]
    assert main(["export", *arguments, "--json"]) == 0
    assert s3_options["secret"] not in capsys.readouterr().out
    for place in ("plain", "other"):
        assert s3_options["secret"].encode() not in Store(f"{s3_folder}/{place}", s3_options).read(
            "export.json"
        )


def _fail_on_features(read: Callable[[Store, str], bytes]) -> Any:
    def read_scans_only(store: Store, name: str) -> bytes:
        assert not name.startswith("features/layer"), "a file of features was read by this machine"
        return read(store, name)

    return read_scans_only


def test_the_command_prints_json_and_reports_errors_without_secrets(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = dataset.store.root
    version = str(dataset.open_snapshot().version)
    command = ["export", place, str(tmp_path / "plain"), "--version", version, "--layer", "z_mean", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [layer["layer"] for layer in answer["layers"]] == ["z_mean"]
    assert main(command) == 2
    assert "complete export" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    for text in ("{key: PLANTED", "[PLANTED]", str(tmp_path / "no.yaml")):
        assert main(["export", place, "memory://x", "--storage-options", text]) == 2
        assert "PLANTED" not in capsys.readouterr().err
    assert main(["export", place, str(tmp_path / "second")]) == 0
    assert "2 layers, 8 rows, 3 scans" in capsys.readouterr().out
