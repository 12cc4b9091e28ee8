"""Draw the scans of the measures that cannot be streamed, such as neighbors and maps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """Scans that were drawn for a measure.

    Attributes:
        rows: int64, ascending positions of the drawn scans.
        available: Number of scans from which they were drawn.
    """

    rows: NDArray[np.int64]
    available: int

    @property
    def is_whole(self) -> bool:
        """Whether the sample holds all scans."""
        return len(self.rows) == self.available


def draw_sample(available: int, limit: int, seed: int = 0) -> Sample:
    """Return all scans if there are at most `limit`, otherwise `limit` scans drawn without replacement.

    The same arguments always give the same scans, so all candidates can use one sample.
    """
    if available < 0 or limit < 1:
        raise ValueError(f"cannot draw {limit} of {available} scans")
    if available <= limit:
        return Sample(np.arange(available), available)
    rows = np.random.default_rng(seed).choice(available, limit, replace=False)
    return Sample(np.sort(rows), available)
