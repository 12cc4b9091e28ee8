"""`featray export --vectors`: exact fixed-size vectors with columns of scans, never half an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from commits import RUN, make_committer, make_decoded

import featray
from featray.cli.main import main
from featray.commands import export_vectors
from featray.errors import ConfigError, FeatrayError, StorageError, UsageError
from featray.output import vector_file
from featray.output.dataset import Dataset
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

RECIPES = {"z_mean": "r0", "enc.map": "r1"}


def commit_scans(
    dataset: Dataset, *scans: tuple[str, float, int], map_shape: Sequence[int] = (2, 3), recipe: str = "r0"
) -> None:
    """Commit scans (id, value, patches): `z_mean` is (value, value + 1), `enc.map` the value everywhere."""

    def compute_layers(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        first = batch[:, 0, 0, 0]
        grid = np.broadcast_to(first.reshape(-1, *(1 for _ in map_shape)), (len(first), *map_shape))
        return {"z_mean": np.stack([first, first + 1], axis=1), "enc.map": grid}

    decoded = [make_decoded(*scan) for scan in scans]
    for one in decoded:
        one.record.shape, one.record.spacing = [4, 5, 6], [float(len(one.tensor)), 0.5, 0.5]
        one.origins[:, 0] = np.arange(len(one.tensor)) * 2
    recipes = {**RECIPES, "z_mean": recipe}
    receipt = write(extract(compute_layers, decoded, recipe=recipe), dataset, ("layer",), recipes, RUN)
    receipt.set_run("i0", recipes, RUN)
    make_committer(dataset).commit([receipt])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Return an output of four scans in three files per layer; `b` has two patches."""
    output = Dataset(Store(str(tmp_path / "out")))
    commit_scans(output, ("c", 3, 1), ("a", 1, 1))
    commit_scans(output, ("b", 2, 2))
    commit_scans(output, ("d", 0.1, 1))
    return output


@pytest.fixture
def one_file_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each file of the output become a file of the export."""
    monkeypatch.setattr(export_vectors, "_FILE_BYTES", 1)


def read_layer(folder: Path, layer: str = "z_mean") -> pa.Table:
    """Return all rows of a layer, sorted."""
    table = pads.dataset(str(folder / f"layer={layer}"), format="parquet").to_table()
    return table.sort_by([("scan_id", "ascending"), ("patch", "ascending")])


def get_matrix(table: pa.Table) -> np.ndarray:
    """Return the vectors as an array (rows, width)."""
    return table["feature"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_each_patch_is_a_row_with_its_vector_and_the_columns_of_its_scan(
    dataset: Dataset, tmp_path: Path
) -> None:
    result = featray.export_vectors(dataset, tmp_path / "v", columns=["spacing", "shape"])
    table = read_layer(tmp_path / "v")
    assert table.schema.field("feature").type == pa.list_(pa.float32(), 2)
    assert tuple(table.column_names) == result.columns
    rows = [tuple(row.values()) for row in table.to_pylist()]
    assert rows == [
        ("a", 0, [0, 0, 0], [1, 2], "r0", [1, 0.5, 0.5], [4, 5, 6]),
        ("b", 0, [0, 0, 0], [2, 3], "r0", [2, 0.5, 0.5], [4, 5, 6]),
        ("b", 1, [2, 0, 0], [2, 3], "r0", [2, 0.5, 0.5], [4, 5, 6]),
        ("c", 0, [0, 0, 0], [3, 4], "r0", [1, 0.5, 0.5], [4, 5, 6]),
        ("d", 0, [0, 0, 0], [np.float32(0.1), np.float32(0.1) + 1], "r0", [1, 0.5, 0.5], [4, 5, 6]),
    ]


def test_vectors_equal_what_featray_reads_and_export_json_has_their_shape(
    dataset: Dataset, tmp_path: Path
) -> None:
    featray.export_vectors(dataset, tmp_path / "v")
    for layer, shape in (("z_mean", [2]), ("enc.map", [2, 3])):
        read = featray.read(dataset, layer)
        table = read_layer(tmp_path / "v", layer)
        np.testing.assert_array_equal(get_matrix(table), read.array.reshape(len(read), -1))
        assert table["scan_id"].to_pylist() == list(read.scan_ids)
        marker = json.loads((tmp_path / "v/export.json").read_text())
        (facts,) = [facts for facts in marker["layers"] if facts["layer"] == layer]
        assert (facts["shape"], facts["rows"], facts["dtype"]) == (shape, 5, "float32")


def test_files_and_row_groups_are_split_without_changing_a_row(
    dataset: Dataset, tmp_path: Path, one_file_each: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_file, "_GROUP_ROWS", 1)
    result = featray.export_vectors(dataset, tmp_path / "v", layers=["z_mean"], columns=["spacing"])
    assert sorted(result.files) == [f"layer=z_mean/part-{number:05d}.parquet" for number in range(3)]
    groups = [pq.ParquetFile(tmp_path / "v" / path).num_row_groups for path in result.files]
    assert sum(groups) == 5
    table = read_layer(tmp_path / "v")
    assert table["scan_id"].to_pylist() == ["a", "b", "b", "c", "d"]
    assert [spacing[0] for spacing in table["spacing"].to_pylist()] == [1, 2, 2, 1, 1]
    np.testing.assert_array_equal(get_matrix(table), featray.read(dataset, "z_mean").array)


@pytest.mark.parametrize("other", [(4, 3), (3, 2)], ids=["other-width", "other-shape-of-the-same-width"])
def test_a_layer_with_several_shapes_is_refused_with_the_way_out(
    dataset: Dataset, tmp_path: Path, other: Sequence[int]
) -> None:
    commit_scans(dataset, ("e", 4, 1), map_shape=other)
    with pytest.raises(UsageError) as caught:
        featray.export_vectors(dataset, tmp_path / "v")
    assert f"2 different shapes (2x3, {other[0]}x{other[1]})" in str(caught.value)
    for way_out in ("--layer z_mean", "`pool: avg`", "featray.read(…).arrays"):
        assert way_out in str(caught.value)
    assert not (tmp_path / "v").exists()
    featray.export_vectors(dataset, tmp_path / "v", layers=["z_mean"])
    assert len(read_layer(tmp_path / "v")) == 6


def test_two_recipes_are_reported_and_each_row_has_its_own(dataset: Dataset, tmp_path: Path) -> None:
    commit_scans(dataset, ("e", 4, 2), recipe="r9")
    result = featray.export_vectors(dataset, tmp_path / "v")
    assert result.recipes == {"z_mean": {"r0": 4, "r9": 1}, "enc.map": {"r1": 5}}
    assert "layer z_mean has values of 2 recipes, which must not be compared" in result.text()
    assert read_layer(tmp_path / "v")["recipe"].to_pylist() == ["r0"] * 5 + ["r9"] * 2


def test_float16_says_what_rounding_has_changed(dataset: Dataset, tmp_path: Path) -> None:
    commit_scans(dataset, ("tiny", 1e-9, 1))
    result = featray.export_vectors(dataset, tmp_path / "v", float16=True)
    table = read_layer(tmp_path / "v")
    assert table.schema.field("feature").type == pa.list_(pa.float16(), 2)
    exact = featray.read(dataset, "z_mean").array
    np.testing.assert_array_equal(get_matrix(table), exact.astype(np.float16))
    (rounding,) = [layer.rounding for layer in result.layers if layer.layer == "z_mean"]
    assert rounding is not None
    error = float(np.abs(exact.astype(np.float16).astype(np.float32) - exact).max())
    assert (rounding.values, rounding.largest, rounding.max_error) == (12, 4.0, error)
    assert rounding.zeroed == 1
    assert f"values up to 4 changed by at most {error:.2g}; 1 of 12 values became 0" in result.text()


def test_a_value_that_float16_cannot_hold_is_refused_and_float32_completes_the_folder(
    dataset: Dataset, tmp_path: Path, one_file_each: None
) -> None:
    commit_scans(dataset, ("e", 65_504, 1), ("f", 70_000, 1))
    with pytest.raises(UsageError, match=r"values up to 7e\+04, but float16 holds at most 65504"):
        featray.export_vectors(dataset, tmp_path / "v", float16=True)
    assert not (tmp_path / "v/export.json").exists()
    result = featray.export_vectors(dataset, tmp_path / "v")
    assert result.written == len(result.files)
    assert get_matrix(read_layer(tmp_path / "v")).max() == 70_001


def test_the_same_call_continues_an_interrupted_export(
    dataset: Dataset, tmp_path: Path, one_file_each: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    featray.export_vectors(dataset, tmp_path / "whole", columns=["spacing"], float16=True)
    with monkeypatch.context() as patch:
        interrupt_writes(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            featray.export_vectors(dataset, tmp_path / "v", columns=["spacing"], float16=True)
    remaining = list_files(tmp_path / "v")
    assert {"export.started.json", "layer=enc.map/part-00000.parquet"} < remaining
    assert "export.json" not in remaining
    (tmp_path / "v/layer=enc.map/part-00001.parquet").write_bytes(b"not Parquet")
    result = featray.export_vectors(dataset, tmp_path / "v", columns=["spacing"], float16=True)
    assert result.written == 5
    assert list_files(tmp_path / "v") == {*result.files, "export.json"}
    whole = json.loads((tmp_path / "whole/export.json").read_text())
    assert result.files == whole["files"]
    assert json.loads((tmp_path / "v/export.json").read_text())["layers"] == whole["layers"]


def interrupt_writes(patch: pytest.MonkeyPatch, after: int) -> None:
    """Let the export write so many files and then raise KeyboardInterrupt."""
    original, calls = Store.write, []

    def write_until_interrupted(store: Store, name: str, data: bytes) -> None:
        calls.extend([name] * name.endswith(".parquet"))
        if len(calls) > after:
            raise KeyboardInterrupt
        original(store, name, data)

    patch.setattr(Store, "write", write_until_interrupted)
    patch.setattr(export_vectors, "_PARALLEL_FILES", 1)


@pytest.mark.slow
def test_files_of_a_call_with_other_options_or_of_another_version_are_not_kept(
    dataset: Dataset, tmp_path: Path, one_file_each: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({}, {"columns": ["spacing"]}, {"float16": True}):
        with monkeypatch.context() as patch:
            interrupt_writes(patch, after=2)
            with pytest.raises(KeyboardInterrupt):
                featray.export_vectors(dataset, tmp_path / "v", **options)
    commit_scans(dataset, ("a", 7, 1))
    result = featray.export_vectors(dataset, tmp_path / "v", float16=True)
    assert result.written == len(result.files)
    assert read_layer(tmp_path / "v")["feature"].to_pylist()[0] == [7, 8]


@pytest.mark.slow
def test_an_output_that_is_refreshed_meanwhile_is_exported_as_one_version(
    dataset: Dataset, tmp_path: Path, one_file_each: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, values = Store.write, iter((8, 9))

    def write_and_refresh(store: Store, name: str, data: bytes) -> None:
        original(store, name, data)
        if "layer=" in name and store.root.endswith("/v") and (value := next(values, None)):
            commit_scans(dataset, ("a", value, 1), ("c", value, 1), ("d", value, 1))

    monkeypatch.setattr(Store, "write", write_and_refresh)
    monkeypatch.setattr(export_vectors, "_PARALLEL_FILES", 1)
    result = featray.export_vectors(dataset, tmp_path / "v")
    assert result.version == dataset.open_snapshot().version
    assert get_matrix(read_layer(tmp_path / "v"))[:, 0].tolist() == [9, 2, 2, 9, 9]


def test_a_damaged_file_or_a_row_without_its_scan_is_an_error(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans = pa.table({"scan_id": ["a", "b", "c"], "spacing": [[1.0]] * 3})
    with monkeypatch.context() as patch:
        patch.setattr(export_vectors.Selection, "read_scan_columns", lambda _: scans)
        with pytest.raises(FeatrayError, match=r"1 rows of features belong to scans that .*featray verify"):
            featray.export_vectors(dataset, tmp_path / "v", columns=["spacing"])
    file = Path(dataset.store.root) / "features" / dataset.open_snapshot().files("features")[0].path
    table = pq.read_table(file, partitioning=None)
    pq.write_table(pa.concat_tables([table, table]), file)
    with pytest.raises(FeatrayError, match=r"have 6 rows instead of 5; `featray verify`|is damaged"):
        featray.export_vectors(dataset, tmp_path / "v")
    assert not (tmp_path / "v/export.json").exists()


def test_the_folder_is_checked_as_for_a_plain_export(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="inside the output"):
        featray.export_vectors(dataset, tmp_path / "out/v")
    featray.export(dataset, tmp_path / "plain")
    with pytest.raises(ConfigError, match="holds a complete export"):
        featray.export_vectors(dataset, tmp_path / "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"holds other files \(notes.txt\)"):
        featray.export_vectors(dataset, tmp_path / "mine")


def test_a_file_that_another_program_adds_meanwhile_prevents_the_marker(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Store.write

    def write_two(store: Store, name: str, data: bytes) -> None:
        original(store, name, data)
        if name.endswith(".parquet"):
            original(store, f"{name}.copy", data)

    monkeypatch.setattr(Store, "write", write_two)
    with pytest.raises(StorageError, match="differs from what was written to it"):
        featray.export_vectors(dataset, tmp_path / "v")
    assert not (tmp_path / "v/export.json").exists()


def test_an_export_to_another_kind_of_store_is_complete_and_continued(
    dataset: Dataset, one_file_each: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    request.addfinalizer(lambda: fs.rm("/vectors", recursive=True))
    with monkeypatch.context() as patch:
        interrupt_writes(patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            featray.export_vectors(dataset, "memory://vectors")
    result = featray.export_vectors(dataset, "memory://vectors")
    assert (result.written, len(result.files)) == (4, 6)
    assert set(fs.find("/vectors")) == {f"/vectors/{name}" for name in (*result.files, "export.json")}


def test_an_output_without_features_cannot_be_exported(dataset: Dataset, tmp_path: Path) -> None:
    empty = Dataset(Store(str(tmp_path / "empty")))
    make_committer(empty).commit([])
    with pytest.raises(ConfigError, match="has no features"):
        featray.export_vectors(empty, tmp_path / "v")


@pytest.mark.parametrize("float16", [False, True], ids=["float32", "float16"])
def test_duckdb_computes_distances_of_the_arrays(dataset: Dataset, tmp_path: Path, float16: bool) -> None:
    featray.export_vectors(dataset, tmp_path / "v", layers=["z_mean"], float16=float16)
    vectors = pads.dataset(str(tmp_path / "v/layer=z_mean"), format="parquet")
    distance = "array_distance(feature::float[2], [2, 3]::float[2])"
    # DuckDB reads float16 from Parquet, but not from Arrow.
    for source in (f"'{tmp_path}/v/layer=z_mean/*.parquet'", *(() if float16 else ("vectors",))):
        rows = duckdb.sql(f"select scan_id, {distance} d from {source} where d < 2 order by all").fetchall()
        assert [name for name, _ in rows] == ["a", "b", "b", "c"]
        np.testing.assert_allclose([value for _, value in rows], [2**0.5, 0, 0, 2**0.5], rtol=1e-6)
    assert vectors.schema.field("feature").type.list_size == 2
    if not float16:
        assert duckdb.sql("select distinct typeof(feature) from vectors").fetchall() == [("FLOAT[2]",)]


def test_the_command_exports_vectors_and_refuses_options_that_do_not_fit(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", dataset.store.root, str(tmp_path / "v")]
    for option in (["--float16"], ["--columns", "spacing"]):
        assert main([*command, *option]) == 2
        assert "add --vectors" in capsys.readouterr().err
    assert main([*command, "--vectors", "--columns", "spacin"]) == 2
    assert "no column 'spacin'; did you mean 'spacing'" in capsys.readouterr().err
    assert main([*command, "--vectors", "--layer", "enc/map", "--columns", "spacing, uri", "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [layer["layer"] for layer in answer["layers"]] == ["enc.map"]
    assert answer["columns"][-2:] == ["spacing", "uri"]
    assert main([*command[:2], str(tmp_path / "w"), "--vectors", "--float16"]) == 0
    assert "z_mean: 5 rows of 2 float16; values up to 4" in capsys.readouterr().out
