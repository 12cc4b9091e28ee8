"""What was measured in, what it means out: rates without start-up, efficiency, where the core-seconds go.

Plain arithmetic on plain numbers; runs nothing. Per scan means over the scans by which two runs differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FLOORS = ("decompress", "resize", "model")
"""The stages without which there are no features; their sum is the ideal."""


@dataclass(frozen=True)
class Spread:
    """A median, and the smallest and largest of what it was taken from."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1])


@dataclass(frozen=True)
class Alone:
    """Stages measured alone, per scan.

    Attributes:
        cpu_s: CPU seconds by stage, the model on one thread.
        wall_s: Wall seconds, likewise; `model_all_cores` is the model on all cores, called once with as many
            threads as it likes, or twice at once.
        fastest: Which way was the fastest, for stages that can be done in several.
        bytes_read: Of the files.
        bytes_raw: Of the voxels as decoded.
        bytes_input: Of the model input.
        patches: Model inputs.
    """

    cpu_s: dict[str, Spread]
    wall_s: dict[str, Spread]
    fastest: dict[str, str]
    bytes_read: float
    bytes_raw: float
    bytes_input: float
    patches: float

    @property
    def floor_s(self) -> float:
        """CPU seconds without which there are no features."""
        return sum(self.cpu_s[name].median for name in FLOORS)

    @property
    def model_rate(self) -> float:
        """Scans per second of the model alone, on all that it can use: the best seen, for it is a limit."""
        return 1 / self.wall_s["model_all_cores"].low

    def ideal_rate(self, cores: int) -> float:
        """Return the scans per second that the hardware allows."""
        return min(cores / self.floor_s, self.model_rate)


@dataclass(frozen=True)
class Stage:
    """What one stage did in one run, summed over processes: calls, wall and CPU seconds, most at one time."""

    wall_s: float
    cpu_s: float
    at_once: int


@dataclass(frozen=True)
class RunFigures:
    """One run in a fresh process.

    Attributes:
        way: Engine, or the name of a script.
        scans: Taken.
        wall_s: From start to end of the process.
        cpu_s: User and system, of the whole process tree.
        cpu_by_role: The same by `driver`, `decoders`, `model`, `writers`; others by the process's name.
        first_opened_s: Until the first scan was opened; None where it is not known.
        stages: By name; empty where it is not known.
        peak_bytes: By `tree`, `driver`, `largest decoder`, `largest model`, as far as they are known.
        store_bytes: Peak of Ray's object store; None without one.
        spilled: Whether anything was spilled from it; None likewise.
        others_cores: How many cores other programs kept busy meanwhile.
    """

    way: str
    scans: int
    wall_s: float
    cpu_s: float
    cpu_by_role: dict[str, float] = field(default_factory=dict)
    first_opened_s: float | None = None
    stages: dict[str, Stage] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    store_bytes: int | None = None
    spilled: bool | None = None
    others_cores: float = 0.0


@dataclass(frozen=True)
class WayFigures:
    """One way from scans to features, over all rounds.

    Attributes:
        name: Engine, or the name of a script.
        scans: Of the smaller and the larger run.
        rate: Scans per second without start-up; None where the larger run took no longer.
        wall_s: Of the larger run, start-up included.
        start_up_s: What the smaller run took beyond its scans.
        first_opened_s: Until the first scan was opened.
        cpu_s: Per scan, whole process tree.
        stages: Per scan; `at_once` is the most in any run.
        cpu_by_role: Per scan.
        overhead_s: CPU seconds per scan outside of all stages: featray itself, the engine.
        peak_bytes: Highest of any run.
        store_bytes: Peak of Ray's object store; None without one.
        spilled: Whether anything was spilled from it; None likewise.
        others_cores: How many cores other programs kept busy meanwhile, at most in any run.
    """

    name: str
    scans: tuple[int, int]
    rate: Spread | None
    wall_s: Spread
    start_up_s: float | None
    first_opened_s: float | None
    cpu_s: float
    stages: dict[str, Stage]
    cpu_by_role: dict[str, float]
    overhead_s: float | None
    peak_bytes: dict[str, int]
    store_bytes: int | None
    spilled: bool | None
    others_cores: float = 0.0

    def busy(self, stage: str) -> float | None:
        """Return the share of time in which the stage's workers work, start-up apart."""
        found = self.stages.get(stage)
        if self.rate is None or found is None:
            return None
        return found.wall_s * self.rate.median / found.at_once

    def cores_busy(self) -> float | None:
        """Return how many cores are kept busy, start-up apart."""
        return None if self.rate is None else self.cpu_s * self.rate.median

    def efficiency(self, ideal_rate: float, listing_s: float = 0.0) -> float | None:
        """Return the rate as a share of the ideal one; with listing's seconds per scan if they are given."""
        return None if self.rate is None else 1 / (1 / self.rate.median + listing_s) / ideal_rate

    def cpu_efficiency(self, floor_s: float) -> float | None:
        """Return the efficiency if no core were ever idle; other programs on the machine hardly change it."""
        return floor_s / self.cpu_s if self.cpu_s > 0 else None


def alone_of(rounds: Sequence[Mapping[str, Any]], model_rounds: Sequence[Mapping[str, Any]]) -> Alone:
    """Return the figures of stages alone from what `alone.py` printed each time.

    Args:
        rounds: All stages, the model on one thread, before each run.
        model_rounds: The model alone on all cores, in any ways.
    """
    wall = {name: Spread.of(one["wall_s"][name] for one in rounds) for name in rounds[0]["wall_s"]}
    wall["model_all_cores"] = Spread.of(one["wall_s"]["model"] for one in model_rounds)
    last = rounds[-1]
    return Alone(
        cpu_s={name: Spread.of(one["cpu_s"][name] for one in rounds) for name in last["cpu_s"]},
        wall_s=wall,
        fastest=dict(last["fastest"]),
        bytes_read=last["bytes_read"],
        bytes_raw=last["bytes_raw"],
        bytes_input=last["bytes_input"],
        patches=last["patches"],
    )


def way_of(runs: Sequence[RunFigures]) -> WayFigures:
    """Return the figures of one way from its runs over fewer and over more scans, round by round."""
    few, many = min(run.scans for run in runs), max(run.scans for run in runs)
    short = [run for run in runs if run.scans == few]
    long = [run for run in runs if run.scans == many]
    rate = _rate(short, long)
    start = statistics.median(run.wall_s for run in short)
    stages = {name: _stage(name, short, long) for name in long[0].stages}
    cpu = _per_scan(short, long, lambda run: run.cpu_s)
    opened = [run.first_opened_s for run in runs if run.first_opened_s is not None]
    return WayFigures(
        name=long[0].way,
        scans=(few, many),
        rate=rate,
        wall_s=Spread.of(run.wall_s for run in long),
        start_up_s=None if rate is None else start - few / rate.median,
        first_opened_s=statistics.median(opened) if opened else None,
        cpu_s=cpu,
        stages=stages,
        cpu_by_role={
            role: _per_scan(short, long, lambda run, role=role: run.cpu_by_role.get(role, 0.0))  # type: ignore[misc]
            for role in sorted({role for run in long for role in run.cpu_by_role})
        },
        overhead_s=cpu - sum(stage.cpu_s for stage in stages.values()) if stages else None,
        peak_bytes={what: max(run.peak_bytes.get(what, 0) for run in runs) for what in long[0].peak_bytes},
        store_bytes=_largest(run.store_bytes for run in runs),
        spilled=None if long[0].spilled is None else any(run.spilled for run in runs),
        others_cores=max(run.others_cores for run in runs),
    )


def core_seconds(way: WayFigures, alone: Alone, cores: int) -> dict[str, float]:
    """Return where the cores' time goes per scan; what is measured below its floor counts as the floor.

    Beyond the floors: `decode more` is reading, checks and statistics, and what decoding takes longer
    beside other work; `model more` likewise; `engine` is all CPU outside of stages; `idle` is none.
    """
    if way.rate is None:
        return {}
    idle = max(0.0, cores / way.rate.median - way.cpu_s)
    if not way.stages:
        return {"work": way.cpu_s, "idle": idle}
    floor = {name: alone.cpu_s[name].median for name in FLOORS}
    used = {name: stage.cpu_s for name, stage in way.stages.items()}
    decode_floor = floor["decompress"] + floor["resize"]
    return {
        **floor,
        "decode more": max(0.0, used.get("decode", 0.0) - decode_floor),
        "model more": max(0.0, used.get("model", 0.0) - floor["model"]),
        "write": used.get("write", 0.0),
        "engine": max(0.0, way.overhead_s or 0.0),
        "idle": idle,
    }


def _rate(short: Sequence[RunFigures], long: Sequence[RunFigures]) -> Spread | None:
    """Return the spread over rounds of difference in scans over difference in wall time."""
    seconds = [many.wall_s - few.wall_s for few, many in zip(short, long, strict=True)]
    scans = long[0].scans - short[0].scans
    if scans <= 0 or min(seconds) <= 0:
        return None
    return Spread.of(scans / one for one in seconds)


def _per_scan(
    short: Sequence[RunFigures], long: Sequence[RunFigures], of: Callable[[RunFigures], float]
) -> float:
    """Return the median over rounds of what each further scan took."""
    scans = max(1, long[0].scans - short[0].scans)
    return statistics.median((of(many) - of(few)) / scans for few, many in zip(short, long, strict=True))


def _stage(name: str, short: Sequence[RunFigures], long: Sequence[RunFigures]) -> Stage:
    nothing = Stage(0.0, 0.0, 1)
    return Stage(
        wall_s=_per_scan(short, long, lambda run: run.stages.get(name, nothing).wall_s),
        cpu_s=_per_scan(short, long, lambda run: run.stages.get(name, nothing).cpu_s),
        at_once=max(run.stages.get(name, nothing).at_once for run in long),
    )


def _largest(values: Iterable[int | None]) -> int | None:
    found = [value for value in values if value is not None]
    return max(found) if found else None
