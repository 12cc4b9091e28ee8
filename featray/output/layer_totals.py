"""Rows, files and bytes of each layer: data files of one version in, one total per layer out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from featray.schema import DataFile


@dataclass(frozen=True)
class LayerTotals:
    """Totals of one layer in one version of an output.

    Attributes:
        layer: Name of the layer.
        rows: Number of rows, which is scans x patches.
        files: Number of data files.
        size_bytes: Size of these files.
    """

    layer: str
    rows: int
    files: int
    size_bytes: int


def sum_by_layer(files: Iterable[DataFile]) -> tuple[LayerTotals, ...]:
    """Return the totals of each layer, sorted by name.

    Args:
        files: Data files of the table `features`; each belongs to the layer of its partition.
    """
    by_layer: defaultdict[str, list[DataFile]] = defaultdict(list)
    for file in files:
        by_layer[str(file.partition_values["layer"])].append(file)
    return tuple(
        LayerTotals(
            layer=layer,
            rows=sum(file.rows for file in layer_files),
            files=len(layer_files),
            size_bytes=sum(file.size for file in layer_files),
        )
        for layer, layer_files in sorted(by_layer.items())
    )
