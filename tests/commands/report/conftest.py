"""Makes sets of features from arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pytest
from numpy.typing import NDArray

from featray.commands.report.feature_set import FeatureFile, FeatureSet, View
from featray.schema import SCAN_COLUMNS

FeatureSetMaker = Callable[..., FeatureSet]


def make_view(path: str, units: int, view: str = "vector") -> View:
    return View(path.rpartition("/")[2], view, path, units, (units,), "recipe")


def make_scans(scan_ids: tuple[str, ...], columns: Mapping[str, Any]) -> pa.Table:
    """Return rows of the table `scans` with some of its columns, and manifest columns of any names."""
    table = pa.table({"scan_id": list(scan_ids)})
    for name, values in columns.items():
        kind = SCAN_COLUMNS.field(name).type if name in SCAN_COLUMNS.names else pa.string()
        table = table.append_column(name, pa.array(values, kind))
    return table


@pytest.fixture(scope="session")
def make_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[NDArray[Any]], FeatureFile]:
    """Return a function that writes an array (scans, units) to a temporary file."""

    def make(values: NDArray[Any]) -> FeatureFile:
        file = FeatureFile.create(tmp_path_factory.mktemp("features") / "values", *values.shape)
        file.open("r+")[:] = values
        return file

    return make


@pytest.fixture(scope="session")
def make_set(make_file: Callable[[NDArray[Any]], FeatureFile]) -> FeatureSetMaker:
    """Return a function that makes a set of features from arrays (scans, units) by path in the model."""

    def make(
        layers: Mapping[str, NDArray[Any]],
        columns: Mapping[str, Any] | None = None,
        views: Mapping[str, str] | None = None,
    ) -> FeatureSet:
        scans = len(next(iter(layers.values())))
        scan_ids = tuple(f"scan-{number:05d}" for number in range(scans))
        return FeatureSet(
            scan_ids=scan_ids,
            views=tuple(
                make_view(path, values.shape[1], (views or {}).get(path, "vector"))
                for path, values in layers.items()
            ),
            files=tuple(map(make_file, layers.values())),
            scans=make_scans(scan_ids, columns or {}),
            left_out=(),
            version=1,
        )

    return make
