"""Test that the properties of a varied collection are independent, and that the report can use its labels."""

from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from featray.commands.demo import LARGE_SEED
from featray.commands.report.label_file import read_labels
from featray.config.models import SourceConfig
from featray.stages.list import list_scans
from featray.synthetic import varied_collection
from featray.synthetic.phantom import PhantomParameters
from featray.synthetic.varied_collection import draw_independent_parameters, make_varied_collection


def draw_many(count: int) -> list[PhantomParameters]:
    """Return the parameters of the first scans of the larger demo."""
    generators = [np.random.default_rng([LARGE_SEED, index, 1]) for index in range(count)]
    return [draw_independent_parameters(generator) for generator in generators]


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a collection of 24 scans with grids that are small and as different as those of the demo."""
    folder = tmp_path_factory.mktemp("varied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varied_collection, "SLICES", (4, 5, 6))
        patch.setattr(varied_collection, "MATRICES", (8, 10, 12))
        make_varied_collection(folder, 24)
    return folder


def test_no_property_depends_on_another() -> None:
    values = np.array([dataclasses.astuple(parameters) for parameters in draw_many(1500)], np.float64)
    correlations = np.corrcoef(values.T) - np.eye(values.shape[1])
    assert np.abs(correlations).max() < 0.1, "less than four standard errors"
    sizes = np.corrcoef(np.abs(values).T) - np.eye(values.shape[1])
    assert np.abs(sizes).max() < 0.1, "nor does the distance of the lesion from the middle"


def test_in_the_demo_of_200_scans_no_two_properties_are_correlated_by_more_than_a_seventh() -> None:
    values = np.array([dataclasses.astuple(parameters) for parameters in draw_many(200)], np.float64)
    assert np.abs(np.corrcoef(values.T) - np.eye(values.shape[1])).max() < 1 / 7


@pytest.mark.parametrize("body", list(itertools.product((300, 360), (190, 260), (0.85, 1.1))), ids=str)
def test_the_smallest_and_the_largest_lungs_contain_the_largest_lesion(
    body: tuple[float, float, float],
) -> None:
    width, depth, lung_size = body
    directions = np.random.default_rng(0).standard_normal((50, 3))
    surface = 24 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    half = np.array([0.18 * width, 0.36 * depth, 120]) * lung_size
    for drawn in draw_many(300):
        center = np.array([abs(drawn.lesion_x_mm) - 0.24 * width, drawn.lesion_y_mm, drawn.lesion_z_mm])
        assert (((center + surface) / half) ** 2).sum(axis=1).max() < 1


def test_grids_and_formats_vary_independently_of_each_other(collection: Path) -> None:
    rows = list(csv.DictReader((collection / "labels.csv").read_text(encoding="utf-8").splitlines()))
    assert len({row["scan_id"] for row in rows}) == 24
    assert all((collection / row["scan_id"]).exists() for row in rows)
    series = [row["scan_id"] for row in rows if row["scan_id"].startswith("dicom/")]
    assert 2 <= len(series) <= 10
    assert {len(list((collection / name).iterdir())) for name in series} == {4, 5, 6}


def test_every_column_of_the_labels_is_a_label_of_the_report(collection: Path) -> None:
    scan_ids = [scan.scan_id for scan in list_scans(SourceConfig(uri=str(collection))).scans]
    table = read_labels(collection / "labels.csv", scan_ids)
    assert not table.left_out
    assert (table.rows, table.unknown_rows, table.scans_without_row) == (24, 0, 0)
    kinds = {label.name: label.kind for label in table.labels}
    assert kinds == {
        field.name: "classes" if field.name == "table" else "number"
        for field in dataclasses.fields(PhantomParameters)
    }


def test_a_scan_does_not_depend_on_the_number_of_scans(tmp_path: Path, collection: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varied_collection, "SLICES", (4, 5, 6))
        patch.setattr(varied_collection, "MATRICES", (8, 10, 12))
        make_varied_collection(tmp_path, 8)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "labels.csv"]
    assert len(files) >= 8
    for path in files:
        assert path.read_bytes() == (collection / path.relative_to(tmp_path)).read_bytes()
