"""Show how much small changes of the scans change the features, as a table with a row per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from featray.commands.report.describe.texts import count
from featray.commands.report.inputs.stability import LayerStability
from featray.commands.report.label_free.stability import GOOD_ICC, MIN_SCANS
from featray.commands.report.page.model import Cell, DataTable

_COSINES = "Cosine between different scans"


def make_stability_table(
    stability: Sequence[LayerStability], names: Mapping[str, str], scans: int
) -> DataTable | None:
    """Return the stability of all layers; None if it was not measured.

    Args:
        stability: One entry per layer and perturbation.
        names: Layer → name of the candidate.
        scans: Number of scans on which it was measured.
    """
    if not stability:
        return None
    perturbations = {one.perturbation.name: one.perturbation.description for one in stability}
    columns, explanations = ["Layer (view)"], {}
    for name, description in perturbations.items():
        columns += [_title_icc(name), _title_cosine(name)]
        explanations[_title_icc(name)] = (
            f"Share of the units with an intraclass correlation ICC(2,1) of at least {GOOD_ICC} between the "
            f"scan and the scan after {description}; a dash with fewer than {MIN_SCANS} scans."
        )
        explanations[_title_cosine(name)] = (
            f"Mean cosine between the features of a scan before and after {description}."
        )
    columns.append(_COSINES)
    explanations[_COSINES] = (
        "Mean cosine between the features of different scans. Only cosines well above it mean stability."
    )
    by_layer: dict[str, dict[str, LayerStability]] = {}
    for one in stability:
        by_layer.setdefault(one.layer, {})[one.perturbation.name] = one
    return DataTable(
        columns=tuple(columns),
        rows=tuple(
            _make_row(name, by_layer[layer], list(perturbations))
            for layer, name in names.items()
            if layer in by_layer
        ),
        explanations=explanations,
        reading=(
            f"How much small changes of the model input change the features, on {count(scans, 'scan')}. A "
            "layer that changes little is not better for that: a layer that holds nothing is stable too."
        ),
    )


def _make_row(
    name: str, found: Mapping[str, LayerStability], perturbations: Sequence[str]
) -> tuple[Cell, ...]:
    cells: list[Cell] = [name]
    between = None
    for perturbation in perturbations:
        one = found.get(perturbation)
        if one is None:
            cells += [None, None]
            continue
        cosines = one.cosines.cosine[one.cosines.is_defined]
        cells += [one.reliability.good_share, float(np.mean(cosines)) if len(cosines) else None]
        between = one.cosines.between_scans
    return (*cells, between)


def _title_icc(perturbation: str) -> str:
    return f"Stable units, {perturbation}"


def _title_cosine(perturbation: str) -> str:
    return f"Cosine, {perturbation}"
