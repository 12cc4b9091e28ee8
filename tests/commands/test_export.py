"""Export: one version as a plain folder, whole or not marked whole, that every reader takes as it is."""

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
ROWS = [("a", 0, [1.0, 2.0]), ("b", 0, [2.0, 3.0]), ("b", 1, [2.0, 3.0]), ("c", 0, [3.0, 4.0])]


def layers_of(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
    """Stand in for a model: two layers whose values say which input they came from."""
    first = batch[:, 0, 0, 0]
    return {
        "z_mean": np.stack([first, first + 1], axis=1),
        "enc.map": np.tile(first[:, None, None], (1, 2, 3)),
    }


def add(
    dataset: Dataset,
    *scans: tuple[str, float, int],
    carried: Sequence[str] = (),
    recipe: str = "r0",
    keep_days: float = 0,
    partition_by: Sequence[str] = ("layer",),
) -> int:
    """Commit scans (id, value, patches); return the version of the output."""
    made = []
    for scan_id, value, patches in scans:
        record = ScanRecord(scan_id, f"/data/{scan_id}", "nifti", content="c0", recipe=recipe, run_id=RUN)
        record.columns = {name: f"{name} {scan_id}" for name in carried}
        tensor = np.full((patches, 2, 2, 2), value, np.float32)
        made.append(Decoded(record, tensor, np.zeros((patches, 3), np.int32)))
    receipt = write(extract(layers_of, made, recipe=recipe), dataset, partition_by, recipe, RUN)
    Committer(dataset, partition_by, carried, run_id=RUN, keep_versions_days=keep_days).commit([receipt])
    return dataset.open_snapshot().version


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return an output of three scans in two files per layer."""
    made = Dataset(Store(str(tmp_path / "out")))
    add(made, ("c", 3, 1), ("a", 1, 1))
    add(made, ("b", 2, 2))
    return made


def exported(folder: Path) -> list[tuple[str, int, list[float]]]:
    found = pads.dataset(str(folder / "features"), format="parquet", partitioning="hive")
    table = found.to_table(filter=pads.field("layer") == "z_mean").sort_by(
        [("scan_id", "ascending"), ("patch", "ascending")]
    )
    columns = [table[name].to_pylist() for name in ("scan_id", "patch", "feature")]
    return list(zip(*columns, strict=True))


def files_below(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def test_every_reader_takes_the_folder_as_it_is_and_all_agree(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    featray.export(dataset, folder)
    assert exported(folder) == ROWS
    frame = pd.read_parquet(folder / "features", filters=[("layer", "==", "z_mean")])
    frame = frame.sort_values(["scan_id", "patch"])
    rows = zip(frame["scan_id"], frame["patch"], map(list, frame["feature"]), strict=True)
    assert list(rows) == ROWS
    scanned = pl.scan_parquet(f"{folder}/features/", hive_partitioning=True)
    chosen = scanned.filter(pl.col("layer") == "z_mean").select("scan_id", "patch", "feature")
    assert chosen.sort("scan_id", "patch").collect().rows() == ROWS
    places = f"'{folder}/features/**/*.parquet', hive_partitioning = true"
    query = f"select scan_id, patch, feature from read_parquet({places}) where layer = 'z_mean' order by all"
    assert duckdb.sql(query).fetchall() == ROWS
    for scans in (pd.read_parquet(folder / "scans"), pl.read_parquet(folder / "scans/*.parquet").to_pandas()):
        assert sorted(scans["scan_id"]) == ["a", "b", "c"]
    assert duckdb.sql(f"select count(*) from '{folder}/scans/*.parquet'").fetchall() == [(3,)]


def test_the_files_are_the_outputs_own_and_nothing_is_beside_them(dataset: Dataset, tmp_path: Path) -> None:
    featray.export(dataset, tmp_path / "plain")
    names = set(files_below(tmp_path / "plain"))
    snapshot = dataset.open_snapshot()
    own = {f"{table}/{file.path}" for table in ("features", "scans") for file in snapshot.files(table)}
    assert names == {*own, "export.json"}
    for name in own:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_the_marker_says_what_the_folder_holds(dataset: Dataset, tmp_path: Path) -> None:
    found = featray.export(dataset, tmp_path / "plain")
    marker = json.loads((tmp_path / "plain" / "export.json").read_text())
    snapshot = dataset.open_snapshot()
    assert (marker["version"], marker["versions"]) == (snapshot.version, snapshot.versions)
    assert marker["recipes"] == {"r0": 3}
    assert marker["scans"] == {"ok": 3}
    layers = {layer["layer"]: (layer["rows"], layer["files"]) for layer in marker["layers"]}
    assert layers == {"enc.map": (4, 2), "z_mean": (4, 2)}
    sizes = files_below(tmp_path / "plain")
    del sizes["export.json"]
    assert marker["files"] == sizes
    assert found.copied == len(sizes)
    assert "2 layers, 8 rows, 3 scans" in found.text()


def test_only_wanted_layers_are_exported_with_all_scans(dataset: Dataset, tmp_path: Path) -> None:
    featray.export(dataset, tmp_path / "plain", layers=["enc/map"])
    assert [path.name for path in (tmp_path / "plain/features").iterdir()] == ["layer=enc.map"]
    assert len(pd.read_parquet(tmp_path / "plain/scans")) == 3
    with pytest.raises(UsageError, match="did you mean 'z_mean'"):
        featray.export(dataset, tmp_path / "other", layers=["z_men"])
    assert not (tmp_path / "other").exists()


def test_an_older_version_is_exported_while_the_output_keeps_it(dataset: Dataset, tmp_path: Path) -> None:
    kept = add(dataset, ("d", 9, 1), keep_days=1)
    add(dataset, ("a", 7, 1), keep_days=1)
    featray.export(dataset, tmp_path / "old", kept)
    assert exported(tmp_path / "old") == [*ROWS, ("d", 0, [9.0, 10.0])]
    featray.export(dataset, tmp_path / "new")
    assert exported(tmp_path / "new")[0] == ("a", 0, [7.0, 8.0])


def test_a_version_whose_files_are_gone_is_told(dataset: Dataset, tmp_path: Path) -> None:
    before = dataset.open_snapshot().version
    add(dataset, ("a", 7, 1))
    with pytest.raises(ConfigError, match=r"kept for 0 days .*Leave the version out"):
        featray.export(dataset, tmp_path / "plain", before)
    assert not (tmp_path / "plain/export.json").exists()
    featray.export(dataset, tmp_path / "plain")  # takes over what the failed call left
    assert exported(tmp_path / "plain")[0] == ("a", 0, [7.0, 8.0])


@pytest.mark.parametrize("overtaken", [1, 3])
def test_an_output_refreshed_meanwhile_is_exported_as_one_version(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overtaken: int
) -> None:
    values = iter(range(10, 10 + overtaken))
    original = export._copy_local

    def overtaking(path: str, to: str) -> None:
        original(path, to)
        if (value := next(values, None)) is not None:
            add(dataset, ("a", value, 1), ("c", value, 1))

    monkeypatch.setattr(export, "_copy_local", overtaking)
    monkeypatch.setattr(export, "_COPIES", 1)
    found = featray.export(dataset, tmp_path / "plain")
    last = 9.0 + overtaken
    expected = [("a", 0, [last, last + 1]), *ROWS[1:3], ("c", 0, [last, last + 1])]
    assert exported(tmp_path / "plain") == expected
    assert found.version == dataset.open_snapshot().version
    assert sorted(pd.read_parquet(tmp_path / "plain/scans")["scan_id"]) == ["a", "b", "c"]
    assert set(files_below(tmp_path / "plain")) == {*found.files, "export.json"}


def test_a_killed_export_is_not_marked_and_the_same_call_goes_on(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = export._copy_local, []

    def killed(path: str, to: str) -> None:
        calls.append(to)
        if len(calls) == 3:
            Path(f"{to}.{'0' * 32}.tmp").parent.mkdir(parents=True, exist_ok=True)
            Path(f"{to}.{'0' * 32}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        original(path, to)

    monkeypatch.setattr(export, "_copy_local", killed)
    monkeypatch.setattr(export, "_COPIES", 1)
    with pytest.raises(KeyboardInterrupt):
        featray.export(dataset, tmp_path / "plain")
    left = files_below(tmp_path / "plain")
    assert "export.json" not in left
    assert "export.started.json" in left
    monkeypatch.setattr(export, "_copy_local", original)
    found = featray.export(dataset, tmp_path / "plain")
    whole = {name for name in left if name.startswith("features/") and name.endswith(".parquet")}
    assert len(whole) >= 2
    assert found.copied == len(found.files) - len(whole)
    assert exported(tmp_path / "plain") == ROWS
    assert set(files_below(tmp_path / "plain")) == {*found.files, "export.json"}


def test_an_export_killed_for_real_is_finished_by_the_same_command(dataset: Dataset, tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from featray.commands import export; from featray.cli.main import main\n"
        "original = export._copy_local\n"
        "def slow(path, to): original(path, to); os.write(1, b'one\\n'); time.sleep(60)\n"
        "export._copy_local = slow\n"
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
    assert exported(tmp_path / "plain") == ROWS


def test_a_folder_with_anything_else_in_it_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds files already \(notes.txt\); name a folder that is new"):
        featray.export(dataset, tmp_path / "mine")
    assert files_below(tmp_path / "mine") == {"notes.txt": 1}
    with pytest.raises(ConfigError, match="is a file"):
        featray.export(dataset, tmp_path / "mine" / "notes.txt")
    featray.export(dataset, tmp_path / "plain")
    with pytest.raises(ConfigError, match="holds a whole export"):
        featray.export(dataset, tmp_path / "plain")


def test_a_folder_inside_the_output_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for place in ("out", "out/features/plain", "link/plain"):
        with pytest.raises(ConfigError, match="inside the output"):
            featray.export(dataset, tmp_path / place)


def test_a_half_done_export_with_foreign_files_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    started = {"version": 1, "files": ["scans/part-x.parquet"]}
    (tmp_path / "plain/export.started.json").write_text(json.dumps(started))
    (tmp_path / "plain/scans").mkdir()
    (tmp_path / "plain/scans/mine.parquet").write_text("x")
    with pytest.raises(ConfigError, match=r"not of it \(scans/mine.parquet\)"):
        featray.export(dataset, tmp_path / "plain")
    assert (tmp_path / "plain/scans/mine.parquet").exists()


def test_files_of_scans_that_lack_a_later_column_get_it(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    add(dataset, *((f"a{number}", 1, 1) for number in range(4)))
    add(dataset, ("b", 2, 1), carried=["site"])
    assert len(dataset.open_snapshot().files(SCANS)) == 2
    featray.export(dataset, tmp_path / "plain")
    expected = {**{f"a{number}": None for number in range(4)}, "b": "site b"}
    scans = pl.read_parquet(f"{tmp_path}/plain/scans/*.parquet")
    assert dict(scans.select("scan_id", "site").iter_rows()) == expected
    rows = duckdb.sql(f"select scan_id, site from '{tmp_path}/plain/scans/*.parquet'").fetchall()
    assert dict(rows) == expected
    marker = json.loads((tmp_path / "plain/export.json").read_text())
    assert marker["files"].items() <= files_below(tmp_path / "plain").items()


def test_further_partition_columns_are_further_folders(tmp_path: Path) -> None:
    dataset = Dataset(Store(str(tmp_path / "out")))
    add(dataset, ("a/ü", 1, 1), carried=["site"], partition_by=("layer", "site"))
    featray.export(dataset, tmp_path / "plain")
    scanned = pl.scan_parquet(f"{tmp_path}/plain/features/", hive_partitioning=True).collect()
    assert scanned.filter(layer="z_mean")["site"].to_list() == ["site a/ü"]


def test_a_damaged_file_is_no_whole_export(dataset: Dataset, tmp_path: Path) -> None:
    file = Path(dataset.store.root) / "features" / dataset.open_snapshot().files("features")[0].path
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"1 files: features/layer=.*featray verify"):
        featray.export(dataset, tmp_path / "plain")
    assert not (tmp_path / "plain/export.json").exists()
    file.unlink()
    with pytest.raises(FeatrayError, match="is missing; `featray verify`"):
        featray.export(dataset, tmp_path / "plain")


def test_two_recipes_are_told(dataset: Dataset, tmp_path: Path) -> None:
    add(dataset, ("d", 4, 1), recipe="r1")
    found = featray.export(dataset, tmp_path / "plain")
    assert found.recipes == {"r0": 3, "r1": 1}
    assert "2 recipes, which must not be compared: r0 (3 scans), r1 (1 scans)" in found.text()


def test_another_store_takes_an_export(dataset: Dataset, request: pytest.FixtureRequest) -> None:
    fs = fsspec.filesystem("memory")
    request.addfinalizer(lambda: fs.rm("/plain", recursive=True))
    found = featray.export(dataset, "memory://plain")
    assert set(fs.find("/plain")) == {f"/plain/{name}" for name in (*found.files, "export.json")}
    for name in found.files:
        assert fs.cat_file(f"/plain/{name}") == dataset.store.read(name)


def test_within_one_object_store_nothing_secret_is_written_and_nothing_moves_through_here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    s3_folder: str,
    s3_options: dict[str, Any],
) -> None:
    (tmp_path / "options.yaml").write_text(json.dumps(s3_options))
    remote = Dataset(Store(f"{s3_folder}/out", s3_options))
    add(remote, ("a", 1, 1), ("c", 3, 1))
    add(remote, ("b", 2, 2))
    featray.export(remote, tmp_path / "plain")
    assert exported(tmp_path / "plain") == ROWS
    with monkeypatch.context() as watched:
        watched.setattr(Store, "read", _only_scans(Store.read))
        featray.export(remote, f"{s3_folder}/plain")
    there = Store(f"{s3_folder}/plain", s3_options)
    sizes, local_sizes = there.list_file_sizes(), files_below(tmp_path / "plain")
    del sizes["export.json"], local_sizes["export.json"]
    assert sizes == local_sizes
    local = Dataset(Store(str(tmp_path / "out")))
    add(local, ("z", 5, 1))
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


def _only_scans(read: Callable[[Store, str], bytes]) -> Any:
    def watched(store: Store, name: str) -> bytes:
        assert not name.startswith("features/layer"), "features pass through this machine"
        return read(store, name)

    return watched


def test_the_command_answers_by_json_and_says_what_is_wrong(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = dataset.store.root
    version = str(dataset.open_snapshot().version)
    command = ["export", place, str(tmp_path / "plain"), "--version", version, "--layer", "z_mean", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [layer["layer"] for layer in answer["layers"]] == ["z_mean"]
    assert main(command) == 2
    assert "whole export" in json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    for text in ("{key: PLANTED", "[PLANTED]", str(tmp_path / "no.yaml")):
        assert main(["export", place, "memory://x", "--storage-options", text]) == 2
        assert "PLANTED" not in capsys.readouterr().err
    assert main(["export", place, str(tmp_path / "second")]) == 0
    assert "2 layers, 8 rows, 3 scans" in capsys.readouterr().out
