"""The output: other programs read its files and tables, and the columns are those of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from commits import RUN, compute_layers, make_decoded, write_receipt

from featray.output.dataset import Dataset
from featray.schema import ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.storage.store import Store


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(Store(str(tmp_path / "out")))


@pytest.fixture
def committed(dataset: Dataset) -> Path:
    committer = Committer(dataset, ("layer",), run_id=RUN)
    committer.commit([write_receipt(dataset, make_decoded("b", 2), make_decoded("a", 1))])
    committer.commit([write_receipt(dataset, make_decoded("c", 3, patches=2))])
    return Path(dataset.store.root)


def test_pyarrow_reads_a_layer_folder(committed: Path) -> None:
    found = pads.dataset(str(committed / "features"), format="parquet", partitioning="hive")
    table = found.to_table(filter=pads.field("layer") == "z_mean")
    rows = zip(table["scan_id"].to_pylist(), table["feature"].to_pylist(), strict=True)
    assert sorted(rows) == [("a", [1, 2]), ("b", [2, 3]), ("c", [3, 4]), ("c", [3, 4])]


def test_pandas_reads_a_layer_folder(committed: Path) -> None:
    frames = [pd.read_parquet(path) for path in sorted((committed / "features/layer=map").glob("*.parquet"))]
    frame = pd.concat(frames).set_index(["scan_id", "patch"]).sort_index()
    assert frame.loc[("b", 0), "feature"].tolist() == [2] * 6
    assert frame.loc[("c", 1), "shape"].tolist() == [2, 3]


def test_polars_reads_a_layer_folder_and_the_table(committed: Path) -> None:
    plain = pl.read_parquet(str(committed / "features/layer=z_mean/*.parquet"))
    table = pl.scan_delta(str(committed / "features")).filter(pl.col("layer") == "z_mean").collect()
    assert plain.sort("scan_id", "patch")["feature"].to_list() == [[1, 2], [2, 3], [3, 4], [3, 4]]
    assert table.sort("scan_id", "patch")["feature"].to_list() == [[1, 2], [2, 3], [3, 4], [3, 4]]


def test_duckdb_reads_a_layer_folder(committed: Path) -> None:
    rows = duckdb.sql(
        f"select scan_id, patch, feature[2] from '{committed}/features/layer=z_mean/*.parquet' order by all"
    ).fetchall()
    assert rows == [("a", 0, 2.0), ("b", 0, 3.0), ("c", 0, 4.0), ("c", 1, 4.0)]


CELLS = {"z_mean": "r0", "map": "r1"}
"""Layer → recipe id, which each scan of `committed` has in the column `layers` of `scans`."""


def test_pyarrow_reads_the_cells_of_each_scan(committed: Path) -> None:
    table = pads.dataset(str(committed / "scans"), format="parquet").to_table()
    assert table["layers"].to_pylist(maps_as_pydicts="strict") == [CELLS] * 3
    assert table["failed_layers"].to_pylist(maps_as_pydicts="strict") == [{}] * 3
    of_layer = pc.map_lookup(table["layers"], pa.scalar("map"), "first")
    assert of_layer.to_pylist() == ["r1"] * 3


def test_pandas_reads_the_cells_of_each_scan(committed: Path) -> None:
    frames = [pd.read_parquet(path) for path in sorted((committed / "scans").glob("*.parquet"))]
    frame = pd.concat(frames).set_index("scan_id")
    assert [dict(cells) for cells in frame["layers"]] == [CELLS] * 3
    assert dict(frame.loc["a", "failed_layers"]) == {}


def test_polars_reads_the_cells_of_each_scan(committed: Path) -> None:
    plain = pl.read_parquet(str(committed / "scans/*.parquet"))
    table = pl.scan_delta(str(committed / "scans")).collect()
    for frame in (plain, table):
        rows = frame.sort("scan_id").select("scan_id", "layers", "failed_layers").rows()
        assert [(scan_id, dict(cells), dict(failed)) for scan_id, cells, failed in rows] == [
            (scan_id, CELLS, {}) for scan_id in "abc"
        ]


def test_duckdb_reads_the_cells_of_each_scan(committed: Path) -> None:
    rows = duckdb.sql(
        "select scan_id, layers['map'], map_keys(layers), cardinality(failed_layers) "
        f"from '{committed}/scans/*.parquet' order by scan_id"
    ).fetchall()
    assert rows == [(scan_id, "r1", ["map", "z_mean"], 0) for scan_id in "abc"]


def test_the_cells_of_each_scan_have_the_type_of_the_contract(committed: Path) -> None:
    schema = pq.read_schema(next((committed / "scans").glob("*.parquet")))
    for name in ("layers", "failed_layers"):
        kind = schema.field(name).type
        assert (kind.key_type, kind.item_type) == (pa.string(), pa.string())


def test_features_have_the_columns_and_types_of_the_contract(committed: Path) -> None:
    schema = pq.read_schema(next((committed / "features/layer=z_mean").glob("*.parquet")))
    assert [(field.name, str(field.type)) for field in schema] == [
        ("scan_id", "string"),
        ("patch", "int32"),
        ("origin", "list<element: int32>"),
        ("feature", "list<element: float>"),
        ("shape", "list<element: int32>"),
        ("recipe", "string"),
        ("run_id", "string"),
    ]


def test_a_retried_writer_writes_the_same_files_again(dataset: Dataset) -> None:
    assert (
        write_receipt(dataset, make_decoded("a", 1)).files
        == write_receipt(dataset, make_decoded("a", 1)).files
    )
    assert len(dataset.store.list_files("features")) == 2


def test_additional_partition_columns_come_from_the_scans(dataset: Dataset) -> None:
    first, second = make_decoded("a", 1), make_decoded("b", 2)
    first.record.columns["site"], second.record.columns["site"] = "A/B ü", ""
    committer = Committer(dataset, ("layer", "site"), ["site"], run_id=RUN)
    committer.commit([write_receipt(dataset, first, second, partition_by=("layer", "site"))])
    found = pl.scan_delta(str(dataset.store.path("features"))).filter(pl.col("layer") == "map").collect()
    assert dict(found.select("scan_id", "site").iter_rows()) == {"a": "A/B ü", "b": None}
    assert dict(
        pl.scan_delta(dataset.store.path("scans")).collect().select("scan_id", "site").iter_rows()
    ) == {
        "a": "A/B ü",
        "b": "",
    }


def test_non_finite_features_fail_only_their_scan(dataset: Dataset) -> None:
    table = extract(compute_layers, [make_decoded("good", 1), make_decoded("bad", float("nan"))], recipe="r0")
    records = {r.scan_id: r for r in map(ScanRecord.from_json, table["record"].to_pylist())}
    assert records["good"].status == "ok"
    assert (records["bad"].status, records["bad"].reason) == ("failed", "non_finite_features")
    assert [len(features) for features in table["features"].to_pylist()] == [2, 0]


def test_a_scan_that_the_model_rejects_does_not_affect_the_other_scans_of_its_batch() -> None:
    def reject_sevens(batch: np.ndarray, seeds: Sequence[str]) -> dict[str, np.ndarray]:
        if (batch == 7).any():
            raise ValueError("no sevens")
        return compute_layers(batch, seeds)

    table = extract(
        reject_sevens, [make_decoded("a", 1), make_decoded("seven", 7), make_decoded("c", 3)], recipe="r0"
    )
    records = [ScanRecord.from_json(text) for text in table["record"].to_pylist()]
    assert [(r.scan_id, r.reason) for r in records] == [("a", None), ("seven", "model"), ("c", None)]


def test_an_empty_output_has_an_empty_scans_table(dataset: Dataset) -> None:
    assert len(dataset.read_scans(("scan_id",))) == 0
    assert isinstance(dataset.read_scans(("scan_id",)), pa.Table)
