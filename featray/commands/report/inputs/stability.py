"""Measure how much the features of a few scans change when their model inputs change slightly.

In: decoded scans, one at a time. Out: reliability and cosines of each layer under each perturbation. Layers
that sample draw the same random numbers for all inputs of a scan, so that only the perturbation counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.inputs.model_features import LayerModel, LayerVectors, ScanGroups
from featray.commands.report.inputs.perturb import Perturbation
from featray.commands.report.label_free.stability import (
    CosineStability,
    Reliability,
    measure_cosines,
    measure_reliability,
)
from featray.schema import Decoded

_UNITS_PER_BLOCK = 8192
"""Units whose reliability is computed at once, to bound the memory."""


@dataclass(frozen=True)
class LayerStability:
    """Stability of a layer under a perturbation.

    Attributes:
        layer: Name of the layer.
        perturbation: The perturbation.
        reliability: Intraclass correlations of the units. Each scan has two repeats: the original and the
            perturbed one.
        cosines: Cosines between the original and the perturbed features of each scan.
    """

    layer: str
    perturbation: Perturbation
    reliability: Reliability
    cosines: CosineStability


class StabilityTest:
    """Runs a model on scans and on their perturbed inputs.

    Args:
        model: The model and the layers.
        perturbations: The changes to try.
        scan_ids: Ids of the scans, in the order in which they are decoded.
        group_size: Number of scans that run together.
    """

    def __init__(
        self,
        model: LayerModel,
        perturbations: Sequence[Perturbation],
        scan_ids: Sequence[str],
        group_size: int,
    ) -> None:
        self._model, self._perturbations = model, perturbations
        self._groups = ScanGroups(scan_ids, group_size)
        self._repeats: dict[str, list[LayerVectors]] = {}
        self.failed = 0
        """Number of scans on which the model failed."""

    def add(self, decoded: Decoded) -> None:
        """Add a scan that was decoded or has failed."""
        group = self._groups.add(decoded)
        if not group:
            return
        repeats = [self._model.compute(group)]
        for perturbation in self._perturbations:
            changed = [
                replace(scan, tensor=perturbation.apply(scan.tensor, scan.record.scan_id)) for scan in group
            ]
            repeats.append(self._model.compute(changed))
        for scan, *values in zip(group, *repeats, strict=True):
            complete = [vectors for vectors in values if vectors is not None]
            if len(complete) == len(repeats):
                self._repeats[scan.record.scan_id] = complete
            else:
                self.failed += 1

    @property
    def scans(self) -> int:
        """Number of scans whose features are known under all perturbations."""
        return len(self._repeats)

    def measure(self) -> tuple[LayerStability, ...]:
        """Return the stability of each layer under each perturbation; empty for fewer than two scans."""
        scans = [self._repeats[scan_id] for scan_id in sorted(self._repeats)]
        if len(scans) < 2:
            return ()
        return tuple(
            measure_stability(layer, perturbation, np.array(pairs))
            for layer in self._model.layers
            for number, perturbation in enumerate(self._perturbations, 1)
            if _have_one_size(pairs := [(scan[0][layer], scan[number][layer]) for scan in scans])
        )


def measure_stability(
    layer: str, perturbation: Perturbation, features: NDArray[np.float32]
) -> LayerStability:
    """Return the stability of a layer.

    Args:
        layer: Name of the layer.
        perturbation: The perturbation.
        features: (scans, 2, units), the original and the perturbed features.
    """
    units = features.shape[2]
    blocks = [
        measure_reliability(features[:, :, start : start + _UNITS_PER_BLOCK])
        for start in range(0, units, _UNITS_PER_BLOCK)
    ]
    return LayerStability(layer, perturbation, _join(blocks), measure_cosines(features))


def _join(blocks: Sequence[Reliability]) -> Reliability:
    """Return the reliability of all units from that of consecutive blocks of them."""
    return replace(
        blocks[0],
        icc_1_1=np.concatenate([block.icc_1_1 for block in blocks]),
        icc_2_1=np.concatenate([block.icc_2_1 for block in blocks]),
        icc_3_1=np.concatenate([block.icc_3_1 for block in blocks]),
        is_defined=np.concatenate([block.is_defined for block in blocks]),
    )


def _have_one_size(pairs: Sequence[Sequence[NDArray[np.float32]]]) -> bool:
    return len({vector.size for pair in pairs for vector in pair}) == 1
