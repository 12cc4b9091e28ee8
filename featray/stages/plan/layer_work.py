"""Count and describe the work per layer: states of cells in, counts and one sentence out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.stages.plan.cell_states import FAILED, MISSING, STALE, UP_TO_DATE, CellStates


@dataclass(frozen=True)
class LayerWork:
    """Numbers of stored scans by the state of their cell of one layer.

    Attributes:
        missing: Scans without the layer.
        stale: Scans with the layer by another recipe.
        failed: Scans whose cell was tried with this recipe and failed.
        up_to_date: Scans with the layer by this recipe.
        is_new: Whether no stored scan has a layer of this name.
    """

    missing: int
    stale: int
    failed: int
    up_to_date: int
    is_new: bool


def count_layer_work(
    cells: CellStates, scans_of_kind: NDArray[np.int64], stored: Collection[str]
) -> dict[str, LayerWork]:
    """Return the work of each layer of the config.

    Args:
        cells: States of the cells of each kind of scan.
        scans_of_kind: int (kinds,), number of scans to count.
        stored: Names of the layers that the output holds.
    """
    work = {}
    for column, layer in enumerate(cells.layers):
        states = cells.states[:, column]
        count = {state: int(scans_of_kind[states == state].sum()) for state in range(UP_TO_DATE + 1)}
        work[layer] = LayerWork(
            missing=count[MISSING],
            stale=count[STALE],
            failed=count[FAILED],
            up_to_date=count[UP_TO_DATE],
            is_new=layer not in stored,
        )
    return work


def describe_work(new: int, changed: int, layers: Mapping[str, LayerWork]) -> str:
    """Return one sentence about the work to do and the up-to-date layers; empty without work.

    Args:
        new: Number of new scans.
        changed: Number of changed scans.
        layers: Layer of the config → its work.
    """
    parts = [format_count(new, "new scan")] if new else []
    parts += [format_count(changed, "changed scan")] if changed else []
    parts += _describe_groups("new layer", (work.missing for work in layers.values() if work.is_new))
    parts += _describe_groups(
        "incomplete layer", (work.missing for work in layers.values() if not work.is_new)
    )
    parts += _describe_groups("stale layer", (work.stale for work in layers.values()))
    whole = [work for work in layers.values() if not (work.missing or work.stale) and work.up_to_date]
    if whole and parts:
        is_one = len(whole) == 1
        stays = "is up to date and stays as it is" if is_one else "are up to date and stay as they are"
        parts.append(f"{format_count(len(whole), 'layer')} {stays}")
    return "; ".join(parts)


def _describe_groups(noun: str, scans_of_layers: Iterable[int]) -> list[str]:
    """Return one part per number of scans, such as `2 new layers for 24,000 scans`; none for no scans."""
    groups = Counter(scans for scans in scans_of_layers if scans)
    return [
        f"{format_count(layers, noun)} for {format_count(scans, 'scan')}"
        for scans, layers in sorted(groups.items(), reverse=True)
    ]


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 scan` or `24,000 scans`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
