"""Measure how often neighbors share the label or the scanner.

Of the pairs of a scan and one of its neighbors that share either the label or the scanner and not both, the
robustness index is the share that has the label in common (E. de Jong, E. Marcus and J. Teuwen, Current
pathology foundation models are unrobust to medical center differences, arXiv 2501.18055; in this form J.
Kömen et al., Towards robust foundation models for digital pathology, arXiv 2507.17845). Unrelated features
have the index of all pairs of scans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.neighbors import NEIGHBORS, find_neighbors


@dataclass(frozen=True)
class NeighborSharing:
    """How often the neighbors of scans share the label and the scanner in one candidate.

    Attributes:
        label: Share of the neighbors that have the label in common with the scan.
        scanner: Share of the neighbors that have the scanner in common.
        index: Robustness index; NaN if no pair shares exactly one of both.
    """

    label: float
    scanner: float
    index: float


def measure_sharing(
    features: NDArray[Any], labels: NDArray[np.intp], scanners: NDArray[np.intp]
) -> NeighborSharing:
    """Return how often the nearest neighbors of each scan share its label and its scanner.

    Args:
        features: (scans, units), finite. Each patient should have one scan, because scans of one patient
            share everything.
        labels: Class of each scan.
        scanners: Scanner of each scan, as a number.
    """
    neighbors = find_neighbors(features, NEIGHBORS).rows
    same_label = labels[neighbors] == labels[:, None]
    same_scanner = scanners[neighbors] == scanners[:, None]
    return _count_pairs(same_label, same_scanner)


def measure_chance(labels: NDArray[np.intp], scanners: NDArray[np.intp]) -> NeighborSharing:
    """Return how often the two scans of a pair share the label and the scanner, over all pairs."""
    different = ~np.eye(len(labels), dtype=bool)
    same_label = (labels[:, None] == labels)[different]
    same_scanner = (scanners[:, None] == scanners)[different]
    return _count_pairs(same_label, same_scanner)


def _count_pairs(same_label: NDArray[np.bool_], same_scanner: NDArray[np.bool_]) -> NeighborSharing:
    only_label = int((same_label & ~same_scanner).sum())
    only_scanner = int((same_scanner & ~same_label).sum())
    either = only_label + only_scanner
    index = only_label / either if either else float("nan")
    return NeighborSharing(float(same_label.mean()), float(same_scanner.mean()), index)
