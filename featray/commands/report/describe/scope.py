"""Decide which candidates and which scans are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.describe.progress import Span
from featray.commands.report.feature_set import FeatureSet, Floats
from featray.commands.report.label_free.health import Positions
from featray.commands.report.label_free.neighbors import MAX_SCANS
from featray.commands.report.label_free.sampling import draw_sample

MAX_SAMPLE_BYTES = 400_000_000
"""Size of a sample of the widest candidate as float64. The measures need about four times as much."""
MAX_LOST_SHARE = 0.1
"""Share of the scans that may be left out of all measures because of values that are not finite."""


@dataclass(frozen=True, eq=False)
class Scope:
    """The candidates and scans that are measured.

    Attributes:
        scans: Number of all scans.
        non_finite: (candidates,) number of scans with NaN or infinity in each candidate.
        candidates: Positions of the measured candidates. The others have so many scans with values that are
            not finite that too few scans would remain for all candidates.
        used: Positions of the scans that are finite in all measured candidates.
    """

    scans: int
    non_finite: NDArray[np.int64]
    candidates: tuple[int, ...]
    used: Positions

    @property
    def lost(self) -> int:
        """Number of scans that are left out of all measures."""
        return self.scans - len(self.used)


def find_scope(features: FeatureSet, span: Span) -> Scope:
    """Read all features once, and return the candidates and scans that can be measured."""
    masks = [
        np.stack([np.isfinite(block).all(axis=1) for block in blocks])
        for blocks in read_blocks(features, range(len(features.views)), span, "Looking for broken values")
    ]
    is_finite = np.concatenate(masks, axis=1) if masks else np.zeros((len(features.views), 0), bool)
    candidates = _choose_candidates(is_finite)
    used = np.flatnonzero(is_finite[candidates].all(axis=0)) if candidates else np.empty(0, np.int64)
    return Scope(is_finite.shape[1], (~is_finite).sum(axis=1), tuple(candidates), used)


def _choose_candidates(is_finite: NDArray[np.bool_]) -> list[int]:
    """Return the candidates (rows) that can be measured together; those with few broken scans come first."""
    chosen: list[int] = []
    common = np.ones(is_finite.shape[1], bool)
    counts = is_finite.sum(axis=1)
    needed = max(1, (1 - MAX_LOST_SHARE) * counts.max(initial=0))
    for candidate in np.argsort(-counts, kind="stable").tolist():
        remaining = common & is_finite[candidate]
        if remaining.sum() >= needed:
            chosen.append(candidate)
            common = remaining
    return sorted(chosen)


def read_blocks(
    features: FeatureSet, candidates: Sequence[int], span: Span, text: str
) -> Iterator[list[Floats]]:
    """Yield blocks of scans of some candidates, and report the progress with `text`."""
    scans, done = len(features.scan_ids), 0
    for blocks in features.read_blocks():
        span.report(f"{text}: scan {done:,} of {scans:,}", done, scans)
        yield [blocks[candidate] for candidate in candidates]
        done += len(blocks[0])


def draw_scans(used: Positions, units: Sequence[int], seed: int) -> Positions:
    """Return the scans that represent all `used` ones where all pairs of scans are compared.

    They are fewer for wide candidates; see `MAX_SAMPLE_BYTES`.
    """
    limit = min(MAX_SCANS, max(1, MAX_SAMPLE_BYTES // (8 * max(units))))
    return used[draw_sample(len(used), limit, seed).rows]
