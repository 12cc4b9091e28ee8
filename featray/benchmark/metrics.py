"""Derive rates without start-up, efficiency and the use of core-seconds from measured times.

Plain arithmetic; runs nothing. Figures per scan are means over the scans that the larger run processes in
addition to those of the smaller run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REQUIRED_STAGES = ("decompress", "resize", "model")
"""Stages that every way of computing the features needs; their CPU seconds are the lower bound."""


@dataclass(frozen=True)
class Spread:
    """The median, smallest and largest of some values."""

    median: float
    low: float
    high: float

    @classmethod
    def from_values(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])


@dataclass(frozen=True)
class IsolatedStages:
    """Figures per scan of stages that were each measured in isolation.

    Attributes:
        cpu_s: CPU seconds by stage, with the model on one thread.
        wall_s: Wall seconds by stage. `model_all_cores` is the model on all cores: one call with TensorFlow's
            choice of threads, or two concurrent calls.
        fastest: Name of the fastest function, for stages that several functions can do.
        bytes_read: Size of the files.
        bytes_raw: Size of the decoded voxels.
        bytes_input: Size of the model inputs.
        patches: Number of model inputs.
    """

    cpu_s: dict[str, Spread]
    wall_s: dict[str, Spread]
    fastest: dict[str, str]
    bytes_read: float
    bytes_raw: float
    bytes_input: float
    patches: float

    @property
    def lower_bound_s(self) -> float:
        """CPU seconds per scan that every way of computing the features needs."""
        return sum(self.cpu_s[name].median for name in REQUIRED_STAGES)

    @property
    def model_rate(self) -> float:
        """Scans per second of the model in isolation on all cores; the best value, because it is a limit."""
        return 1 / self.wall_s["model_all_cores"].low

    def compute_ideal_rate(self, cores: int) -> float:
        """Return the scans per second that the hardware allows."""
        return min(cores / self.lower_bound_s, self.model_rate)


@dataclass(frozen=True)
class StageUsage:
    """The resources that one stage used, summed over processes.

    Attributes:
        wall_s: Wall seconds.
        cpu_s: CPU seconds.
        max_concurrent: Largest number of calls that ran at the same time.
    """

    wall_s: float
    cpu_s: float
    max_concurrent: int


NO_USAGE = StageUsage(0.0, 0.0, 1)
"""The usage of a stage that was never called."""


@dataclass(frozen=True)
class RunMetrics:
    """One run in a fresh process.

    Attributes:
        variant: Name of the engine or script.
        scans: Number of scans processed.
        wall_s: Wall seconds from the start to the end of the process.
        cpu_s: User and system CPU seconds of the whole process tree.
        cpu_by_role: CPU seconds by `driver`, `decoders`, `model`, `writers`; of other processes by name.
        first_opened_s: Seconds from the start until the first scan was opened; None if unknown.
        first_commit_s: Seconds from the start until the first features were committed; None if unknown.
        first_commit_cpu_s: CPU seconds of the process tree until then.
        stages: Usage by stage; empty if unknown.
        peak_bytes: Memory by `tree`, `driver`, `largest decoder`, `largest model`, as far as known.
        store_bytes: Peak memory of Ray's object store; None without an object store.
        spilled: Whether Ray moved objects from its store to disk; None without an object store.
        background_cores: Mean number of cores that other programs used during the run.
    """

    variant: str
    scans: int
    wall_s: float
    cpu_s: float
    cpu_by_role: dict[str, float] = field(default_factory=dict)
    first_opened_s: float | None = None
    first_commit_s: float | None = None
    first_commit_cpu_s: float | None = None
    stages: dict[str, StageUsage] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    store_bytes: int | None = None
    spilled: bool | None = None
    background_cores: float = 0.0


@dataclass(frozen=True)
class VariantMetrics:
    """One variant, which is an engine with its settings or a script, over all rounds.

    Attributes:
        name: Name of the engine or script.
        scans: Number of scans of the smaller and of the larger run.
        rate: Scans per second without start-up; None if the larger run took no longer than the smaller one.
        wall_s: Wall seconds of the larger run, including start-up.
        start_up_s: Wall seconds of the smaller run that its scans do not explain; None without a rate.
        first_opened_s: Seconds from the start until the first scan was opened; None if unknown.
        cpu_s: CPU seconds per scan of the whole process tree.
        stages: Usage per scan by stage; `max_concurrent` is the largest of any run.
        cpu_by_role: CPU seconds per scan by role of the process.
        overhead_s: CPU seconds per scan outside of all stages, used by featray itself and by the engine; None
            if the stages are unknown.
        peak_bytes: Largest memory of any run, by role of the process.
        store_bytes: Peak memory of Ray's object store; None without an object store.
        spilled: Whether Ray moved objects from its store to disk; None without an object store.
        background_cores: Mean number of cores that other programs used, largest of any run.
    """

    name: str
    scans: tuple[int, int]
    rate: Spread | None
    wall_s: Spread
    start_up_s: float | None
    first_opened_s: float | None
    cpu_s: float
    stages: dict[str, StageUsage]
    cpu_by_role: dict[str, float]
    overhead_s: float | None
    peak_bytes: dict[str, int]
    store_bytes: int | None
    spilled: bool | None
    background_cores: float = 0.0

    def compute_utilization(self, stage: str) -> float | None:
        """Return the share of time, without start-up, in which the workers of a stage are busy."""
        usage = self.stages.get(stage)
        if self.rate is None or usage is None:
            return None
        return usage.wall_s * self.rate.median / usage.max_concurrent

    def count_busy_cores(self) -> float | None:
        """Return the mean number of busy cores, without start-up."""
        return None if self.rate is None else self.cpu_s * self.rate.median

    def compute_efficiency(self, ideal_rate: float, listing_s: float = 0.0) -> float | None:
        """Return the rate divided by the ideal rate.

        Args:
            ideal_rate: Scans per second that the hardware allows.
            listing_s: Seconds per scan of listing, to include them in the time of a scan.
        """
        return None if self.rate is None else 1 / (1 / self.rate.median + listing_s) / ideal_rate

    def compute_cpu_efficiency(self, lower_bound_s: float) -> float | None:
        """Return the efficiency if no core were ever idle; other programs on the machine hardly change it.

        Args:
            lower_bound_s: CPU seconds per scan that every way of computing the features needs.
        """
        return lower_bound_s / self.cpu_s if self.cpu_s > 0 else None


def combine_isolated_stages(
    rounds: Sequence[Mapping[str, Any]], model_rounds: Sequence[Mapping[str, Any]]
) -> IsolatedStages:
    """Return the figures of isolated stages from the documents that `stage_timing.py` printed.

    Args:
        rounds: Documents of all stages, with the model on one thread: one for each measured run.
        model_rounds: Documents of the model on all cores, with any number of threads and calls.
    """
    wall = {name: Spread.from_values(one["wall_s"][name] for one in rounds) for name in rounds[0]["wall_s"]}
    wall["model_all_cores"] = Spread.from_values(one["wall_s"]["model"] for one in model_rounds)
    last = rounds[-1]
    return IsolatedStages(
        cpu_s={name: Spread.from_values(one["cpu_s"][name] for one in rounds) for name in last["cpu_s"]},
        wall_s=wall,
        fastest=dict(last["fastest"]),
        bytes_read=last["bytes_read"],
        bytes_raw=last["bytes_raw"],
        bytes_input=last["bytes_input"],
        patches=last["patches"],
    )


def combine_runs(runs: Sequence[RunMetrics]) -> VariantMetrics:
    """Return the figures of one variant from its smaller and larger runs, in the order of the rounds."""
    small, large = min(run.scans for run in runs), max(run.scans for run in runs)
    small_runs = [run for run in runs if run.scans == small]
    large_runs = [run for run in runs if run.scans == large]
    rate = _compute_rate(small_runs, large_runs)
    small_wall_s = statistics.median(run.wall_s for run in small_runs)
    stages = {name: _combine_stage(name, small_runs, large_runs) for name in large_runs[0].stages}
    cpu_s = _compute_per_scan(small_runs, large_runs, lambda run: run.cpu_s)
    first_opened = [run.first_opened_s for run in runs if run.first_opened_s is not None]
    return VariantMetrics(
        name=large_runs[0].variant,
        scans=(small, large),
        rate=rate,
        wall_s=Spread.from_values(run.wall_s for run in large_runs),
        start_up_s=None if rate is None else small_wall_s - small / rate.median,
        first_opened_s=statistics.median(first_opened) if first_opened else None,
        cpu_s=cpu_s,
        stages=stages,
        cpu_by_role=_combine_roles(small_runs, large_runs),
        overhead_s=cpu_s - sum(stage.cpu_s for stage in stages.values()) if stages else None,
        peak_bytes={
            role: max(run.peak_bytes.get(role, 0) for run in runs) for role in large_runs[0].peak_bytes
        },
        store_bytes=_find_largest(run.store_bytes for run in runs),
        spilled=None if large_runs[0].spilled is None else any(run.spilled for run in runs),
        background_cores=max(run.background_cores for run in runs),
    )


def split_core_seconds(variant: VariantMetrics, isolated: IsolatedStages, cores: int) -> dict[str, float]:
    """Return the core-seconds per scan by use; they add up to the time of all cores.

    The required stages are given as measured in isolation, also if the run needed less for them. In addition:
    `decode more`, the decoding of the run beyond that (reading, checks, statistics, and slower work while
    other stages run); `model more`, the same of the model; `write`; `engine`, CPU seconds outside of all
    stages; `idle`. For a script, whose stages are unknown: `work` and `idle`. Empty without a rate.
    """
    if variant.rate is None:
        return {}
    idle = max(0.0, cores / variant.rate.median - variant.cpu_s)
    if not variant.stages:
        return {"work": variant.cpu_s, "idle": idle}
    required = {name: isolated.cpu_s[name].median for name in REQUIRED_STAGES}
    used = {name: stage.cpu_s for name, stage in variant.stages.items()}
    required_decode_s = required["decompress"] + required["resize"]
    return {
        **required,
        "decode more": max(0.0, used.get("decode", 0.0) - required_decode_s),
        "model more": max(0.0, used.get("model", 0.0) - required["model"]),
        "write": used.get("write", 0.0),
        "engine": max(0.0, variant.overhead_s or 0.0),
        "idle": idle,
    }


def _compute_rate(small_runs: Sequence[RunMetrics], large_runs: Sequence[RunMetrics]) -> Spread | None:
    """Return the difference in scans divided by the difference in wall time, as a spread over the rounds."""
    seconds = [large.wall_s - small.wall_s for small, large in zip(small_runs, large_runs, strict=True)]
    scans = large_runs[0].scans - small_runs[0].scans
    if scans <= 0 or min(seconds) <= 0:
        return None
    return Spread.from_values(scans / value for value in seconds)


def _compute_per_scan(
    small_runs: Sequence[RunMetrics],
    large_runs: Sequence[RunMetrics],
    get_value: Callable[[RunMetrics], float],
) -> float:
    """Return by how much a value grows with each additional scan, as the median over the rounds."""
    scans = max(1, large_runs[0].scans - small_runs[0].scans)
    return statistics.median(
        (get_value(large) - get_value(small)) / scans
        for small, large in zip(small_runs, large_runs, strict=True)
    )


def _combine_roles(small_runs: Sequence[RunMetrics], large_runs: Sequence[RunMetrics]) -> dict[str, float]:
    """Return the CPU seconds per scan by role of the process."""
    return {
        role: _compute_per_scan(small_runs, large_runs, lambda run, role=role: run.cpu_by_role.get(role, 0.0))  # type: ignore[misc]
        for role in sorted({role for run in large_runs for role in run.cpu_by_role})
    }


def _combine_stage(
    name: str, small_runs: Sequence[RunMetrics], large_runs: Sequence[RunMetrics]
) -> StageUsage:
    """Return the usage per scan of one stage."""
    return StageUsage(
        wall_s=_compute_per_scan(small_runs, large_runs, lambda run: run.stages.get(name, NO_USAGE).wall_s),
        cpu_s=_compute_per_scan(small_runs, large_runs, lambda run: run.stages.get(name, NO_USAGE).cpu_s),
        max_concurrent=max(run.stages.get(name, NO_USAGE).max_concurrent for run in large_runs),
    )


def _find_largest(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None
