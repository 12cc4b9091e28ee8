"""All results of a benchmark: as text for a person, as one JSON document, and as the bars of the plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from featray.benchmark.bottleneck import explain_rate
from featray.benchmark.metrics import (
    NO_USAGE,
    REQUIRED_STAGES,
    IsolatedStages,
    RunMetrics,
    Spread,
    VariantMetrics,
    split_core_seconds,
)
from featray.benchmark.start_up import StartUp

_MEASURED_BY = {"read": "the store", "decode": "featray", "write": "featray"}
_MB = 1e6
_UNKNOWN = "-"
_JSON_KEYS = {"isolated": "alone", "variants": "ways"}
"""Keys of `benchmark.json` that differ from the attributes of the report, for readers of older files."""


@dataclass(frozen=True)
class FeatureDifference:
    """The largest difference of a script's features from featray's over all scans.

    Attributes:
        layer: Output name of the layer.
        relative: max |a - b| / max |b|, where b are featray's features.
    """

    layer: str
    relative: float


@dataclass(frozen=True)
class BenchmarkReport:
    """The results of `featray benchmark`.

    Attributes:
        machine: Cores, memory, system, and versions of packages.
        scans: `source`, the URI of the collection; numbers of scans: `distinct`, `found` in the collection,
            `small` and `large` run; and `made`, whether the scans are phantoms.
        listing_s: Seconds per scan of listing the collection, which no other figure includes.
        isolated: Figures of the stages in isolation.
        variants: Figures of whole runs of each engine and script.
        cores: Number of cores that this process may use.
        rounds: Number of times that every measurement was repeated.
        scaling: Figures of engines with other numbers of workers or actors, by a description of the setting.
        collection_sizes: Single runs over collections of other sizes.
        cached: Figures of whole runs with an input cache that was empty or filled.
        cache_bytes: Size of the input cache per scan.
        start_up: Cost of each engine and script before its first scan is done.
        differences: Differences of the features from featray's, by script.
        failed_scripts: Error of each script that failed; a script that fails has no other figures.
        files: Paths of the written files.
    """

    machine: dict[str, Any]
    scans: dict[str, Any]
    listing_s: float
    isolated: IsolatedStages
    variants: tuple[VariantMetrics, ...]
    cores: int
    rounds: int
    scaling: dict[str, VariantMetrics] = field(default_factory=dict)
    collection_sizes: tuple[RunMetrics, ...] = ()
    cached: tuple[VariantMetrics, ...] = ()
    cache_bytes: float = 0.0
    start_up: tuple[StartUp, ...] = ()
    differences: dict[str, tuple[FeatureDifference, ...]] = field(default_factory=dict)
    failed_scripts: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @property
    def ideal_rate(self) -> float:
        """Scans per second that the hardware allows."""
        return self.isolated.compute_ideal_rate(self.cores)

    def text(self) -> str:
        """Return tables and explanations for a person."""
        parts = [
            self._describe_measurement(),
            _format_table(_make_isolated_rows(self.isolated)),
            self._explain_figures(),
            _format_table(self._make_variant_rows()),
        ]
        if any(variant.stages for variant in self.variants):
            parts.append(_format_table(self._make_stage_rows()))
        if self.start_up:
            parts.append(_format_table(_make_start_up_rows(self.start_up)))
        if self.cached:
            parts += [_format_table(self._make_cached_rows()), self._explain_cache()]
        if self.scaling:
            parts.append(_format_table(self._make_scaling_rows()))
        if self.collection_sizes:
            parts.append(_format_table(_make_collection_rows(self.collection_sizes)))
        parts += [self._format_differences()] if self.differences else []
        parts.append("\n".join(self._explain_rates()))
        parts += [f"{script} was not measured: {error}" for script, error in self.failed_scripts.items()]
        if self.files:
            parts.append("\n".join(self.files))
        return "\n\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return all results and the figures derived from them, JSON-ready."""
        values = dataclasses.asdict(self)
        for variant, entry in zip(self.variants, values["variants"], strict=True):
            entry |= self._derive_figures(variant)
        for variant, entry in zip(self.cached, values["cached"], strict=True):
            entry["share_of_model_rate"] = self._compare_with_model(variant)
        for name, variant in self.scaling.items():
            values["scaling"][name] |= self._derive_figures(variant)
        derived = {
            "ideal_rate": self.ideal_rate,
            "model_rate": self.isolated.model_rate,
            "verdicts": self._explain_rates(),
        }
        return {_JSON_KEYS.get(key, key): value for key, value in values.items()} | derived

    def bars(self) -> dict[str, dict[str, float]]:
        """Return core-seconds per scan by part, of the ideal and of every variant that has a rate."""
        required = {name: self.isolated.cpu_s[name].median for name in REQUIRED_STAGES}
        idle = max(0.0, self.cores / self.ideal_rate - sum(required.values()))
        return {"ideal": {**required, "idle": idle}} | {
            variant.name: split_core_seconds(variant, self.isolated, self.cores)
            for variant in self.variants
            if variant.rate is not None
        }

    def rates(self) -> dict[str, float]:
        """Return scans per second for each bar of `bars`."""
        return {"ideal": self.ideal_rate} | {
            variant.name: variant.rate.median for variant in self.variants if variant.rate is not None
        }

    def _explain_rates(self) -> list[str]:
        return [explain_rate(variant, self.isolated, self.cores) for variant in self.variants]

    def _derive_figures(self, variant: VariantMetrics) -> dict[str, Any]:
        return {
            "efficiency": variant.compute_efficiency(self.ideal_rate),
            "cpu_efficiency": variant.compute_cpu_efficiency(self.isolated.lower_bound_s),
            "efficiency_with_listing": variant.compute_efficiency(self.ideal_rate, self.listing_s),
            "cores_busy": variant.count_busy_cores(),
            "busy": {stage: variant.compute_utilization(stage) for stage in variant.stages},
            "core_seconds": split_core_seconds(variant, self.isolated, self.cores),
        }

    def _describe_measurement(self) -> str:
        """Say how many scans of which size were measured, on how many cores and how often."""
        isolated = self.isolated
        made = self.scans["made"]
        origin = (
            "phantoms" if made else f"a sample of the {self.scans['found']} scans of {self.scans['source']}"
        )
        sizes = f"{isolated.bytes_read / _MB:.1f} MB as stored, {isolated.bytes_raw / _MB:.1f} MB decoded"
        return (
            f"{self.scans['distinct']} distinct scans ({origin})\n"
            f"mean per scan: {sizes}, {isolated.patches:.3g} model inputs\n"
            f"{self.cores} cores; number of rounds: {self.rounds}; the stages are measured in isolation "
            "before each run\n"
            "figures: median (smallest to largest)"
        )

    def _explain_figures(self) -> str:
        required = " + ".join(f"{name} {self.isolated.cpu_s[name].median:.3f}" for name in REQUIRED_STAGES)
        return (
            f"ideal: {self.ideal_rate:.2f} scans/s. This is the smaller of\n"
            f"  {self.cores} cores / ({required} CPU s per scan) and\n"
            f"  the model in isolation on all cores, {self.isolated.model_rate:.2f} scans/s\n"
            "efficiency: scans/s divided by the ideal\n"
            "CPU efficiency: the efficiency if no core were ever idle; other programs hardly change it\n"
            f"listing took {self.listing_s:.4f} s per scan; no other figure includes it"
        )

    def _make_variant_rows(self) -> list[Sequence[str]]:
        rows: list[Sequence[str]] = [
            ("whole runs", "scans/s", "efficiency", "CPU efficiency", "CPU s/scan", "busy cores",
             "start-up s", "first scan s", "wall s", "peak GB", "object store GB", "spilled",
             "background cores")
        ]  # fmt: skip
        return rows + [self._make_variant_row(variant.name, variant) for variant in self.variants]

    def _make_variant_row(self, name: str, variant: VariantMetrics) -> Sequence[str]:
        spilled = {None: _UNKNOWN, False: "no", True: "yes"}[variant.spilled]
        return (
            name,
            _format_spread(variant.rate),
            _format_number(variant.compute_efficiency(self.ideal_rate)),
            _format_number(variant.compute_cpu_efficiency(self.isolated.lower_bound_s)),
            f"{variant.cpu_s:.3f}",
            _format_number(variant.count_busy_cores()),
            _format_number(variant.start_up_s, 1),
            _format_number(variant.first_opened_s, 1),
            f"{variant.wall_s.median:.1f} ({variant.scans[1]} scans)",
            _format_gigabytes(variant.peak_bytes.get("tree")),
            _format_gigabytes(variant.store_bytes),
            spilled,
            f"{variant.background_cores:.2f}",
        )

    def _make_stage_rows(self) -> list[Sequence[str]]:
        """Return the CPU seconds per scan of each stage in whole runs, and how busy its workers are."""
        rows: list[Sequence[str]] = [
            ("CPU s/scan in whole runs", "decode", "model", "write", "other", "driver", "largest decoder GB",
             "busy decode workers", "busy model calls")
        ]  # fmt: skip
        for variant in self.variants:
            if not variant.stages:
                continue
            stages = [variant.stages.get(name, NO_USAGE) for name in ("decode", "model", "write")]
            cpu = [f"{usage.cpu_s:.3f}" for usage in stages]
            other, driver = variant.overhead_s, variant.cpu_by_role.get("driver")
            largest = _format_gigabytes(variant.peak_bytes.get("largest decoder"))
            busy = [_format_utilization(variant, name) for name in ("decode", "model")]
            rows.append(
                (variant.name, *cpu, _format_number(other, 3), _format_number(driver, 3), largest, *busy)
            )
        return rows

    def _make_cached_rows(self) -> list[Sequence[str]]:
        head = ("with the input cache", "scans/s", "of the model alone", "CPU s/scan", "busy cores")
        variants = [*self.variants, *self.cached]
        return [
            head,
            *(
                (
                    variant.name,
                    _format_spread(variant.rate),
                    _format_number(self._compare_with_model(variant)),
                    f"{variant.cpu_s:.3f}",
                    _format_number(variant.count_busy_cores()),
                )
                for variant in variants
                if variant.stages
            ),
        ]

    def _compare_with_model(self, variant: VariantMetrics) -> float | None:
        """Return the rate of a run divided by that of the model in isolation on all cores."""
        return None if variant.rate is None else variant.rate.median / self.isolated.model_rate

    def _explain_cache(self) -> str:
        stored, raw = self.cache_bytes, self.isolated.bytes_input
        return (
            f"of the model alone: scans/s divided by {self.isolated.model_rate:.2f} scans/s, the model in "
            "isolation on all cores\n"
            f"the cache holds {stored / _MB:.2f} MB per scan; its model inputs are {raw / _MB:.2f} MB"
        )

    def _make_scaling_rows(self) -> list[Sequence[str]]:
        head = ("scaling", "scans/s", "efficiency", "CPU efficiency", "CPU s/scan", "busy cores")
        return [head, *(self._make_variant_row(name, variant)[:6] for name, variant in self.scaling.items())]

    def _format_differences(self) -> str:
        return "\n".join(
            f"{script}: largest relative difference of the features from featray's: "
            + ", ".join(f"{difference.relative:.1e} ({difference.layer})" for difference in differences)
            for script, differences in self.differences.items()
        )


def _make_isolated_rows(isolated: IsolatedStages) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("stage in isolation", "CPU s/scan", "wall s/scan", "MB/s", "measured with")]
    sizes = {
        "read": isolated.bytes_read,
        "decompress": isolated.bytes_raw,
        "resize": isolated.bytes_raw,
        "decode": isolated.bytes_raw,
    }
    for name, cpu in isolated.cpu_s.items():
        wall = isolated.wall_s[name]
        size = sizes.get(name, isolated.bytes_input)
        function = isolated.fastest.get(name, "") if name in REQUIRED_STAGES else _MEASURED_BY.get(name, "")
        speed = f"{size / _MB / wall.median:.0f}" if name != "write" and wall.median else _UNKNOWN
        rows.append((name, _format_spread(cpu, 4), _format_spread(wall, 4), speed, function))
    wall = isolated.wall_s["model_all_cores"]
    speed = f"{isolated.bytes_input / _MB / wall.median:.0f}"
    return [*rows, ("model on all cores", _UNKNOWN, _format_spread(wall, 4), speed, "bare")]


def _make_start_up_rows(variants: Sequence[StartUp]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("start-up", "one scan: wall s", "CPU s", "peak GB", "first commit: wall s", "CPU s until then")
    ]
    for variant in variants:
        single = [_format_spread(spread, 1) for spread in (variant.wall_s, variant.cpu_s)]
        first = [_format_number(value, 1) for value in (variant.first_commit_s, variant.first_commit_cpu_s)]
        rows.append((variant.name, *single, _format_gigabytes(variant.peak_bytes), *first))
    return rows


def _make_collection_rows(runs: Sequence[RunMetrics]) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("collection sizes", "scans", "wall s", "scans/s with start-up", "CPU s", "peak GB")
    ]
    for run in runs:
        rate, peak = f"{run.scans / run.wall_s:.2f}", _format_gigabytes(run.peak_bytes.get("tree"))
        rows.append((run.variant, str(run.scans), f"{run.wall_s:.1f}", rate, f"{run.cpu_s:.1f}", peak))
    return rows


def _format_utilization(variant: VariantMetrics, stage: str) -> str:
    share = variant.compute_utilization(stage)
    return _UNKNOWN if share is None else f"{100 * share:.0f} % of {variant.stages[stage].max_concurrent}"


def _format_spread(spread: Spread | None, digits: int = 2) -> str:
    if spread is None:
        return _UNKNOWN
    return f"{spread.median:.{digits}f} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def _format_number(value: float | None, digits: int = 2) -> str:
    return _UNKNOWN if value is None else f"{value:.{digits}f}"


def _format_gigabytes(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{count / 1e9:.2f}"


def _format_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as aligned columns: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
