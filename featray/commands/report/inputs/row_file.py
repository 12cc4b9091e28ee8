"""Collect one vector per scan in a temporary file, when neither the width nor the scans are known before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.feature_set import FeatureFile

Vector = NDArray[np.float32]


class RowFile:
    """Vectors of equal length of some scans, in a temporary file.

    Args:
        path: The file; it is created with the first vector.
        scans: Largest number of scans.
    """

    def __init__(self, path: Path, scans: int) -> None:
        self._path, self._scans = path, scans
        self._file: FeatureFile | None = None
        self._filled = np.zeros(scans, bool)

    def put(self, row: int, vector: Vector) -> None:
        """Store the vector of a scan, unless it has another length than the first one."""
        if self._file is None:
            self._file = FeatureFile.create(self._path, self._scans, len(vector))
        if len(vector) == self._file.units:
            self._file.open("r+")[row] = vector
            self._filled[row] = True

    def take(self, rows: Sequence[int]) -> FeatureFile | None:
        """Return a file with the vectors of some scans, in this order; None if one of them has none in it.

        Args:
            rows: Increasing numbers of rows. The rows are moved within the file, so it can be taken once.
        """
        if self._file is None or not rows or not self._filled[list(rows)].all():
            return None
        array = self._file.open("r+")
        for target, source in enumerate(rows):
            if target != source:
                array[target] = array[source]
        return FeatureFile(self._path, len(rows), self._file.units)
