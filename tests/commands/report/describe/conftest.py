"""Makes sets of features from arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from numpy.typing import NDArray

from featray.commands.report.describe.describe_features import LabelFreeParts, describe_features
from featray.commands.report.feature_set import FeatureFile, FeatureSet, View
from featray.commands.report.page.files import make_files
from featray.commands.report.page.model import Candidate, PageModel
from featray.schema import SCAN_COLUMNS

FeatureSetMaker = Callable[..., FeatureSet]


def make_view(path: str, units: int, view: str = "vector", is_sampling: bool | None = None) -> View:
    return View(path.rpartition("/")[2], view, path, units, (units,), "recipe", is_sampling)


def make_scans(scan_ids: tuple[str, ...], columns: Mapping[str, Any]) -> pa.Table:
    """Return rows of the table `scans` with some of its columns, and manifest columns of any names."""
    table = pa.table({"scan_id": list(scan_ids)})
    for name, values in columns.items():
        kind = SCAN_COLUMNS.field(name).type if name in SCAN_COLUMNS.names else pa.string()
        table = table.append_column(name, pa.array(values, kind))
    return table


@pytest.fixture
def make_set(tmp_path: Path) -> FeatureSetMaker:
    """Return a function that makes a set of features from arrays (scans, units) by path in the model."""

    def make(
        layers: Mapping[str, NDArray[Any]],
        columns: Mapping[str, Any] | None = None,
        views: Mapping[str, str] | None = None,
    ) -> FeatureSet:
        scans = len(next(iter(layers.values())))
        files = []
        for number, values in enumerate(layers.values()):
            file = FeatureFile.create(tmp_path / f"{number}.values", *values.shape)
            file.open("r+")[:] = values
            files.append(file)
        scan_ids = tuple(f"scan-{number:05d}" for number in range(scans))
        return FeatureSet(
            scan_ids=scan_ids,
            views=tuple(
                make_view(path, values.shape[1], (views or {}).get(path, "vector"))
                for path, values in layers.items()
            ),
            files=tuple(files),
            scans=make_scans(scan_ids, columns or {}),
            left_out=(),
            version=1,
        )

    return make


def describe_with_defaults(features: FeatureSet, **options: Any) -> LabelFreeParts:
    defaults: dict[str, Any] = {"columns": (), "seed": 0, "on_step": lambda text, share: None}
    return describe_features(features, **(defaults | options))


@pytest.fixture
def describe() -> Callable[..., LabelFreeParts]:
    """Return a function that describes features, with defaults for everything except the features."""
    return describe_with_defaults


def make_page_files(features: FeatureSet, parts: LabelFreeParts) -> dict[str, bytes]:
    candidates = tuple(
        Candidate(view.layer, view.view, view.units, 4 * view.units, 400 * view.units)
        for view in features.views
    )
    names = ("health", "vetoes", "agreement", "scans", "maps", "neighbors", "outliers", "methods", "cautions")
    content = {name: getattr(parts, name) for name in names}
    return make_files(PageModel(title="output", candidates=candidates, **content))


@pytest.fixture
def render() -> Callable[[FeatureSet, LabelFreeParts], dict[str, bytes]]:
    """Return a function that makes the files of a page that has only the parts without labels."""
    return make_page_files
