"""Compute the features of models with random weights: decoded scans in, one file per seed and layer out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featray.commands.report.feature_set import FeatureFile
from featray.commands.report.inputs.model_features import LayerModel, ScanGroups
from featray.commands.report.inputs.row_file import RowFile
from featray.schema import Decoded


@dataclass(frozen=True)
class RandomFeatures:
    """Features of a layer of a model with random weights.

    Attributes:
        layer: Name of the layer.
        seed: Seed of the weights.
        file: Features; the rows are the scans that were decoded.
    """

    layer: str
    seed: int
    file: FeatureFile


class RandomModelRuns:
    """Runs models with random weights on scans.

    Args:
        models: Seed → the model and the layers.
        scan_ids: Ids of the scans, in the order in which they are decoded.
        group_size: Number of scans that run together.
        folder: Folder for the temporary files.
    """

    def __init__(
        self, models: Mapping[int, LayerModel], scan_ids: Sequence[str], group_size: int, folder: Path
    ) -> None:
        self._models = dict(models)
        self._rows = {scan_id: row for row, scan_id in enumerate(scan_ids)}
        self._groups = ScanGroups(scan_ids, group_size)
        self._files = {
            (seed, layer): RowFile(folder / f"random-{seed}-{number}.values", len(scan_ids))
            for seed, model in self._models.items()
            for number, layer in enumerate(model.layers)
        }

    def add(self, decoded: Decoded) -> None:
        """Add a scan that was decoded or has failed."""
        group = self._groups.add(decoded)
        for seed, model in self._models.items() if group else ():
            for scan, vectors in zip(group, model.compute(group), strict=True):
                for layer, vector in (vectors or {}).items():
                    self._files[seed, layer].put(self._rows[scan.record.scan_id], vector)

    def take(self, rows: Sequence[int]) -> tuple[tuple[RandomFeatures, ...], tuple[str, ...]]:
        """Return the features of some scans, and the layers that lack the features of one of them.

        Args:
            rows: Increasing positions of the scans in `scan_ids`.
        """
        found, missing = [], []
        for (seed, layer), row_file in self._files.items():
            file = row_file.take(rows)
            if file is None:
                missing.append(layer)
            else:
                found.append(RandomFeatures(layer, seed, file))
        return tuple(found), tuple(dict.fromkeys(missing))
