"""Options of a report, which the user gives besides the output and the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Attributes:
        layers: Names of the layers to compare; empty for all.
        version: Version of the output; None for the newest.
        images: Whether the page may hold middle slices, which are patient data.
        random_weights: Whether the same model with random weights is a baseline.
        stability: Whether to measure how much small changes of the scans change the features.
        seed: Decides samples, folds, permutations and maps.
        show: Whether to show the progress on stderr.
    """

    layers: Sequence[str] = ()
    version: int | None = None
    images: bool = True
    random_weights: bool = False
    stability: bool = False
    seed: int = 0
    show: bool = False
