"""Run a model on decoded scans for the report: tensors in, one vector per scan and layer out.

Scans finish to be decoded in any order, and the last digits of a feature may depend on the batch. So that the
report has equal numbers each time, scans run in groups that do not depend on that order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.config import Config
from featray.model import Extractor
from featray.recipe import make_recipe, make_recipe_ids
from featray.schema import Decoded, ScanRecord
from featray.stages.extract import extract

Vector = NDArray[np.float32]
LayerVectors = Mapping[str, Vector]
"""Layer → values of one scan, flat; the mean over its patches."""


@dataclass(frozen=True)
class LayerModel:
    """A model and the layers that the report computes with it.

    Attributes:
        extractor: The model.
        layers: Names of the layers.
        seed_recipe: Recipe id from which the seeds of sampling layers are made, as in a run.
    """

    extractor: Extractor
    layers: tuple[str, ...]
    seed_recipe: str

    def compute(self, scans: Sequence[Decoded]) -> list[LayerVectors | None]:
        """Return the values of each scan; None for a scan on which the model fails or gives NaN."""
        copies = [
            replace(scan, record=replace(scan.record, due_layers=list(self.layers), warnings=[]))
            for scan in scans
        ]
        table = extract(self.extractor, copies, recipe=self.seed_recipe)
        return [_read_row(table.slice(row, 1)) for row in range(len(table))]


def choose_layers(
    config: Config, extractor: Extractor, recipes: Mapping[str, str]
) -> tuple[LayerModel, tuple[str, ...]]:
    """Return the model with the layers that it computes as the output holds them, and the other layers.

    Args:
        config: The config.
        extractor: Its model.
        recipes: Layer → recipe id of its features in the output.
    """
    ids = make_recipe_ids(make_recipe(config, extractor.recipe_part()))
    layers = tuple(name for name, recipe in recipes.items() if ids.layers.get(name) == recipe)
    others = tuple(name for name in recipes if name not in layers)
    return LayerModel(extractor, layers, ids.seed), others


class ScanGroups:
    """Collects decoded scans until a group is complete.

    The tensors are copied, because the decode pool writes over them. Only groups that wait for a scan are in
    memory, and these are few, because scans are decoded about in order.

    Args:
        scan_ids: Ids of the scans, in the order in which they are decoded.
        size: Number of scans in a group.
    """

    def __init__(self, scan_ids: Sequence[str], size: int) -> None:
        self._groups = {scan_id: number // size for number, scan_id in enumerate(scan_ids)}
        self._missing: dict[int, set[str]] = {}
        for scan_id, number in self._groups.items():
            self._missing.setdefault(number, set()).add(scan_id)
        self._scans: dict[int, list[Decoded]] = {number: [] for number in self._missing}

    def add(self, decoded: Decoded) -> list[Decoded]:
        """Add a scan that was decoded or has failed; return its group if it is complete, else nothing.

        Scans of no group are ignored, and scans that have failed are left out of their group.
        """
        scan_id = decoded.record.scan_id
        number = self._groups.get(scan_id)
        if number is None:
            return []
        if decoded.record.status == "ok":
            self._scans[number].append(replace(decoded, tensor=decoded.tensor.copy()))
        self._missing[number].discard(scan_id)
        if self._missing[number]:
            return []
        return sorted(self._scans.pop(number), key=lambda scan: scan.record.scan_id)


def _read_row(row: pa.Table) -> LayerVectors | None:
    """Return the values of one row that `extract` made."""
    if ScanRecord.from_json(row["record"][0].as_py()).status != "ok":
        return None
    return dict(_average_patches(row["features"].combine_chunks().flatten()))


def _average_patches(features: pa.StructArray) -> Iterator[tuple[str, Vector]]:
    layers = np.array(features.field("layer").to_pylist())
    values = features.field("feature")
    for layer in dict.fromkeys(layers.tolist()):
        rows = values.filter(pa.array(layers == layer))
        patches = rows.flatten().to_numpy().reshape(len(rows), -1)
        yield layer, patches.mean(axis=0, dtype=np.float64).astype(np.float32)
