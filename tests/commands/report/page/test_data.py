"""The JSON document and the Arrow tables."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from featray.commands.report.page.data import (
    encode_document,
    make_maps_table,
    make_neighbors_table,
    make_points_table,
)
from featray.commands.report.page.files import make_files
from featray.commands.report.page.model import (
    Column,
    Matrix,
    NeighborLists,
    Outlier,
    PageModel,
    ScanMap,
    Scans,
)

ModelMaker = Callable[..., PageModel]


def make_small_model() -> PageModel:
    columns = (Column("x", ("a", None, "b\x00")), Column("age", (1, 2.5, None)))
    return PageModel(
        "small",
        scans=Scans(("s0", "s1", "s2"), columns),
        maps=(
            ScanMap("z", "PCA", np.array([0.0, 1.0, np.nan]), np.array([3.0, 4.0, np.nan])),
            ScanMap("z", "t-SNE", np.array([5.0, 6.0, 7.0]), np.array([8.0, 9.0, 10.0])),
        ),
        neighbors=(
            NeighborLists(
                "z",
                np.array([[1, 2], [0, -1], [-1, -1]]),
                np.array([[0.1, 0.2], [0.1, np.nan], [np.nan, np.nan]]),
            ),
        ),
        outliers=(Outlier(2, "z", float("nan"), "far"),),
        agreement=(Matrix("CKA", "", ("a",), ("b",), np.array([[np.nan]])),),
    )


def test_the_document_is_json_with_null_for_missing_numbers() -> None:
    document = json.loads(encode_document(make_small_model()))
    assert document["format"] == 1
    assert document["scans_shown"] == 3
    assert document["outliers"] == [
        {"scan": 2, "candidate": "z", "score": None, "reason": "far", "scan_id": "s2"}
    ]
    assert document["agreement"][0]["values"] == [[None]]


def test_the_document_names_candidates_as_the_scores_do_and_holds_no_images(make_model: ModelMaker) -> None:
    document = json.loads(encode_document(make_model()))
    names = {candidate["name"] for candidate in document["candidates"]}
    assert {score["candidate"] for label in document["labels"] for score in label["scores"]} == names
    assert document["extremes"]["low"][0]["scan_id"] == "site-0/patient-0000/ct.nii.gz"
    assert not {"slices", "maps", "neighbors", "scans"} & document.keys()


def test_numpy_numbers_become_json_numbers() -> None:
    outlier = Outlier(0, "z", np.float32(1.5), "far")  # type: ignore[arg-type]
    model = dataclasses.replace(make_small_model(), outliers=(outlier,))
    assert json.loads(encode_document(model))["outliers"][0]["score"] == 1.5


def test_the_points_table_has_coordinates_neighbors_and_columns() -> None:
    table = make_points_table(make_small_model())
    assert table.to_pydict() == {
        "scan_id": ["s0", "s1", "s2"],
        "x": [0.0, 1.0, None],
        "y": [3.0, 4.0, None],
        "neighbors": [
            {"ids": [1, 2], "distances": [0.1, 0.2]},
            {"ids": [0], "distances": [0.1]},
            {"ids": [], "distances": []},
        ],
        "column_x": ["a", None, "b\x00"],
        "age": [1.0, 2.5, None],
    }


def test_the_maps_table_has_a_row_for_each_scan_on_each_map() -> None:
    rows = make_maps_table(make_small_model()).to_pylist()
    assert len(rows) == 5
    assert rows[1] == {"candidate": "z", "method": "PCA", "scan_id": "s1", "x": 1.0, "y": 4.0}


def test_the_neighbors_table_has_a_row_for_each_neighbor() -> None:
    rows = make_neighbors_table(make_small_model()).to_pylist()
    assert [(row["scan_id"], row["rank"], row["neighbor"]) for row in rows] == [
        ("s0", 1, "s1"),
        ("s0", 2, "s2"),
        ("s1", 1, "s0"),
    ]


def test_tables_of_an_empty_model_have_no_rows() -> None:
    model = PageModel("empty")
    assert [make(model).num_rows for make in (make_points_table, make_maps_table, make_neighbors_table)] == [
        0,
        0,
        0,
    ]


def test_the_files_of_a_report_are_the_page_and_all_files_that_it_links_to(make_model: ModelMaker) -> None:
    files = make_files(make_model(), include_images=False)
    links = set(re.findall(r'href="([^"#]+)"', files["report.html"].decode()))
    assert links == files.keys() - {"report.html"}
    assert pq.read_table(pa.BufferReader(files["points.parquet"])).num_rows == 60


def test_a_report_without_scans_has_no_tables() -> None:
    assert set(make_files(PageModel("empty"))) == {"report.html", "report.json"}
