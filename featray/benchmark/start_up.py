"""Compute the start-up of an engine or script: a run of one small scan, and the time to the first commit.

Plain arithmetic; runs nothing. `metrics.py` leaves start-up out of its rates.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from featray.benchmark.metrics import RunMetrics, Spread

_FEATURE_COMMITS = "features/_delta_log/*.json"


@dataclass(frozen=True)
class StartUp:
    """The start-up of one variant over all rounds.

    Attributes:
        name: Name of the engine or script.
        wall_s: Wall seconds of a run of one scan, the smallest of the sample.
        cpu_s: CPU seconds of the whole process tree in this run.
        peak_bytes: Largest memory of the tree in this run; None if unknown.
        first_commit_s: Wall seconds from the start of a run of many scans until its first commit; None for a
            script, which commits nothing before its end.
        first_commit_cpu_s: CPU seconds of the whole process tree until then.
    """

    name: str
    wall_s: Spread
    cpu_s: Spread
    peak_bytes: int | None
    first_commit_s: float | None
    first_commit_cpu_s: float | None


def combine_start_up(single: Sequence[RunMetrics], many: Sequence[RunMetrics]) -> StartUp:
    """Return the start-up of one variant.

    Args:
        single: Its runs of one scan, at least one.
        many: Its runs of more scans.
    """
    return StartUp(
        name=single[0].variant,
        wall_s=Spread.from_values(run.wall_s for run in single),
        cpu_s=Spread.from_values(run.cpu_s for run in single),
        peak_bytes=max((run.peak_bytes["tree"] for run in single if "tree" in run.peak_bytes), default=None),
        first_commit_s=_compute_median(run.first_commit_s for run in many),
        first_commit_cpu_s=_compute_median(run.first_commit_cpu_s for run in many),
    )


def find_first_commit(output: Path) -> float | None:
    """Return when the first features of an output were committed (seconds since the epoch); None if never."""
    entries = sorted(output.glob(_FEATURE_COMMITS))
    # The first entry makes the empty table.
    return entries[1].stat().st_mtime if len(entries) > 1 else None


def _compute_median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
