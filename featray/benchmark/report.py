"""Everything a benchmark found: as text for a person, as one JSON document, as bars for the plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from featray.benchmark.bottleneck import verdict
from featray.benchmark.metrics import FLOORS, Alone, RunFigures, Spread, Stage, WayFigures, core_seconds

_DONE_IN = {"read": "the store", "decode": "featray", "write": "featray"}
_MB = 1e6
_UNKNOWN = "-"


@dataclass(frozen=True)
class Difference:
    """How far the features of a script are from featray's, at most over scans, relative to the largest value.

    Attributes:
        layer: Output name.
        relative: max |a - b| / max |b|.
    """

    layer: str
    relative: float


@dataclass(frozen=True)
class Report:
    """What `featray benchmark` found.

    Attributes:
        machine: Cores, memory, system, versions.
        scans: Distinct scans measured, found in the collection, whether they were made.
        listing_s: Seconds per scan of listing the collection, which is in no other figure.
        alone: Stages alone.
        ways: Engines and scripts, end to end.
        scaling: Engines with other numbers of workers or actors, by what was set.
        growth: Single runs over collections of growing size.
        differences: Of each script's features from featray's.
        cores: This process may use.
        rounds: Of everything.
    """

    machine: dict[str, Any]
    scans: dict[str, Any]
    listing_s: float
    alone: Alone
    ways: tuple[WayFigures, ...]
    cores: int
    rounds: int
    scaling: dict[str, WayFigures] = field(default_factory=dict)
    growth: tuple[RunFigures, ...] = ()
    differences: dict[str, tuple[Difference, ...]] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def ideal_rate(self) -> float:
        """Scans per second that the hardware allows."""
        return self.alone.ideal_rate(self.cores)

    def text(self) -> str:
        """Return tables and verdicts for a person."""
        parts = [self._head(), _table(_alone_rows(self.alone)), self._ideal(), _table(self._way_rows())]
        if any(way.stages for way in self.ways):
            parts.append(_table(self._stage_rows()))
        if self.scaling:
            parts.append(_table(self._scaling_rows()))
        if self.growth:
            parts.append(_table(_growth_rows(self.growth)))
        parts += [self._difference_lines()] if self.differences else []
        parts.append("\n".join(verdict(way, self.alone, self.cores) for way in self.ways))
        if self.files:
            parts.append("\n".join(self.files))
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return everything, JSON-ready, and what follows from it."""
        found = dataclasses.asdict(self)
        found["ideal_rate"] = self.ideal_rate
        found["model_rate"] = self.alone.model_rate
        for way, described in zip(self.ways, found["ways"], strict=True):
            described |= self._derived(way)
        for name, way in self.scaling.items():
            found["scaling"][name] |= self._derived(way)
        found["verdicts"] = [verdict(way, self.alone, self.cores) for way in self.ways]
        return found

    def bars(self) -> dict[str, dict[str, float]]:
        """Return core-seconds per scan by part for the ideal and for every way that has a rate."""
        floor = {name: self.alone.cpu_s[name].median for name in FLOORS}
        bars = {"ideal": {**floor, "idle": max(0.0, self.cores / self.ideal_rate - sum(floor.values()))}}
        return bars | {
            way.name: core_seconds(way, self.alone, self.cores) for way in self.ways if way.rate is not None
        }

    def rates(self) -> dict[str, float]:
        """Return scans per second for each of `bars`."""
        return {"ideal": self.ideal_rate} | {
            way.name: way.rate.median for way in self.ways if way.rate is not None
        }

    def _derived(self, way: WayFigures) -> dict[str, Any]:
        return {
            "efficiency": way.efficiency(self.ideal_rate),
            "cpu_efficiency": way.cpu_efficiency(self.alone.floor_s),
            "efficiency_with_listing": way.efficiency(self.ideal_rate, self.listing_s),
            "cores_busy": way.cores_busy(),
            "busy": {stage: way.busy(stage) for stage in way.stages},
            "core_seconds": core_seconds(way, self.alone, self.cores),
        }

    def _head(self) -> str:
        made = "phantoms made for this" if self.scans["made"] else f"of {self.scans['found']} found"
        sizes = f"{self.alone.bytes_read / _MB:.1f} MB as stored, {self.alone.bytes_raw / _MB:.1f} MB raw"
        return (
            f"{self.scans['distinct']} scans, {made}; on average {sizes}, {self.alone.patches:.3g} patches\n"
            f"{self.cores} cores; medians (smallest to largest) of {self.rounds} rounds"
            ", stages alone before each run"
        )

    def _ideal(self) -> str:
        floors = " + ".join(f"{name} {self.alone.cpu_s[name].median:.3f}" for name in FLOORS)
        return (
            f"ideal {self.ideal_rate:.2f} scans/s: {self.cores} cores over {floors} CPU s per scan"
            f", or the model alone, {self.alone.model_rate:.2f} scans/s, if that is less\n"
            "by CPU: efficiency if no core were ever idle, which other programs hardly change\n"
            f"listing took {self.listing_s:.4f} s per scan and is in no other figure"
        )

    def _way_rows(self) -> list[Sequence[str]]:
        rows: list[Sequence[str]] = [
            ("end to end", "scans/s", "efficiency", "by CPU", "CPU s/scan", "cores busy", "start-up s",
             "first scan s", "wall s", "peak GB", "store GB", "spilled", "cores of others")
        ]  # fmt: skip
        return rows + [self._way_row(way.name, way) for way in self.ways]

    def _way_row(self, name: str, way: WayFigures) -> Sequence[str]:
        spilled = {None: _UNKNOWN, False: "0", True: "yes"}[way.spilled]
        return (
            name,
            _spread(way.rate),
            _number(way.efficiency(self.ideal_rate)),
            _number(way.cpu_efficiency(self.alone.floor_s)),
            f"{way.cpu_s:.3f}",
            _number(way.cores_busy()),
            _number(way.start_up_s, 1),
            _number(way.first_opened_s, 1),
            f"{way.wall_s.median:.1f} ({way.scans[1]} scans)",
            _gigabytes(way.peak_bytes.get("tree")),
            _gigabytes(way.store_bytes),
            spilled,
            f"{way.others_cores:.2f}",
        )

    def _stage_rows(self) -> list[Sequence[str]]:
        """Return CPU seconds per scan of each stage end to end, and how busy its workers are."""
        rows: list[Sequence[str]] = [
            ("CPU s/scan end to end", "decode", "model", "write", "rest", "driver", "largest decoder GB",
             "decode busy", "model busy")
        ]  # fmt: skip
        nothing = Stage(0.0, 0.0, 1)
        for way in self.ways:
            if not way.stages:
                continue
            cpu = [f"{way.stages.get(name, nothing).cpu_s:.3f}" for name in ("decode", "model", "write")]
            busy = [self._busy(way, name) for name in ("decode", "model")]
            rest, driver = _number(way.overhead_s, 3), _number(way.cpu_by_role.get("driver"), 3)
            largest = _gigabytes(way.peak_bytes.get("largest decoder"))
            rows.append((way.name, *cpu, rest, driver, largest, *busy))
        return rows

    def _busy(self, way: WayFigures, stage: str) -> str:
        share = way.busy(stage)
        return _UNKNOWN if share is None else f"{100 * share:.0f} % of {way.stages[stage].at_once}"

    def _scaling_rows(self) -> list[Sequence[str]]:
        head = ("scaling", "scans/s", "efficiency", "by CPU", "CPU s/scan", "cores busy")
        return [head, *(self._way_row(name, way)[:6] for name, way in self.scaling.items())]

    def _difference_lines(self) -> str:
        return "\n".join(
            f"{name}: features differ from featray's by at most "
            + ", ".join(f"{one.relative:.1e} ({one.layer})" for one in found)
            for name, found in self.differences.items()
        )


def _alone_rows(alone: Alone) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("stage alone", "CPU s/scan", "wall s/scan", "MB/s", "how")]
    sizes = {"decompress": alone.bytes_raw, "resize": alone.bytes_raw, "decode": alone.bytes_raw}
    for name, cpu in alone.cpu_s.items():
        wall = alone.wall_s[name]
        size = sizes.get(name, alone.bytes_read if name == "read" else alone.bytes_input)
        how = alone.fastest.get(name, "") if name in FLOORS else _DONE_IN.get(name, "")
        speed = f"{size / _MB / wall.median:.0f}" if name != "write" and wall.median else _UNKNOWN
        rows.append((name, _spread(cpu, 4), _spread(wall, 4), speed, how))
    wall = alone.wall_s["model_all_cores"]
    speed = f"{alone.bytes_input / _MB / wall.median:.0f}"
    return [*rows, ("model", _UNKNOWN, _spread(wall, 4), speed, "on all cores")]


def _growth_rows(runs: Sequence[RunFigures]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("growth", "scans", "wall s", "scans/s with start-up", "CPU s", "peak GB")]
    for run in runs:
        rate, peak = f"{run.scans / run.wall_s:.2f}", _gigabytes(run.peak_bytes.get("tree"))
        rows.append((run.way, str(run.scans), f"{run.wall_s:.1f}", rate, f"{run.cpu_s:.1f}", peak))
    return rows


def _spread(found: Spread | None, digits: int = 2) -> str:
    if found is None:
        return _UNKNOWN
    return f"{found.median:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _number(value: float | None, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _gigabytes(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{count / 1e9:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as columns: the first one to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
