"""Fixtures: an output of six phantoms, which each test gets as a copy."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from small_model import save_small_model

import featray
from featray.config import Config, load
from featray.output.dataset import SCANS, Dataset
from featray.recipe import make_inputs_id, make_recipe
from featray.storage.store import Store

LAYERS: list[Any] = ["z_mean", "conv_2", {"layer": "conv_1", "pool": "grid", "grid": [2, 2, 2], "as": "grid"}]


@dataclass(frozen=True)
class Project:
    """A collection, a model and an output in one folder.

    Attributes:
        folder: The folder.
        values: The config as a dict.
    """

    folder: Path
    values: dict[str, Any]

    def config(self, **sections: dict[str, Any]) -> Config:
        """Return the config, with keys of sections replaced."""
        return load({name: {**keys, **sections.get(name, {})} for name, keys in self.values.items()})

    @property
    def dataset(self) -> Dataset:
        return Dataset(Store(str(self.folder / "out")))

    @property
    def recipe(self) -> str:
        return make_inputs_id(make_recipe(self.config(), {}))

    def scans(self) -> pa.Table:
        """Return the scans that are ok, sorted."""
        table = self.dataset.read(SCANS).sort_by("scan_id")
        return table.filter(pa.compute.equal(table["status"], "ok"))


def make_values(folder: Path) -> dict[str, Any]:
    return {
        "source": {"uri": str(folder / "ct")},
        "preprocess": {"size": [8, 32, 32]},
        "model": {"uri": str(folder / "model.keras"), "layers": LAYERS, "batch_size": 4},
        "output": {"uri": str(folder / "out")},
        "run": {"engine": "inline", "decode": {"workers": 0}},
    }


@pytest.fixture(scope="session")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with six phantoms, a model and its output."""
    from featray.synthetic.phantom import make_collection

    folder = tmp_path_factory.mktemp("inputs")
    make_collection(folder / "ct", 6, shape_zyx=(12, 40, 48), seed=3)
    save_small_model(folder / "model.keras", 1)
    featray.extract(make_values(folder))
    return folder


@pytest.fixture
def project(extracted: Path, tmp_path: Path) -> Project:
    """Return a copy of the project, whose scans have the times that the output recorded."""
    folder = tmp_path / "project"
    shutil.copytree(extracted, folder)  # keeps the modification times
    return Project(folder, make_values(folder))
