"""Explain the rate of a variant in plain language: its limit, the way to raise it, and its losses."""

from __future__ import annotations

from featray.benchmark.metrics import REQUIRED_STAGES, IsolatedStages, VariantMetrics, split_core_seconds
from featray.stages.report.totals import BUSY_SHARE

MAX_BACKGROUND_SHARE = 0.1
"""Share of the cores that other programs may use without making the figures unreliable."""
LABELS = {
    "read": "reading",
    "decompress": "decompression",
    "resize": "resizing",
    "model": "the model",
    "decode more": "decoding overhead",
    "model more": "model overhead",
    "write": "writing",
    "engine": "the engine and featray itself",
    "work": "the script's own work",
    "idle": "idle cores",
}
"""Names of stages and of uses of core-seconds in texts."""


def explain_rate(variant: VariantMetrics, isolated: IsolatedStages, cores: int) -> str:
    """Return a text about the limit of a variant, the resource that would raise its rate, and its losses.

    Args:
        variant: Figures of whole runs.
        isolated: Figures of the stages in isolation, per scan.
        cores: Number of cores that a run may use.
    """
    warning = _warn_of_background_load(variant, cores)
    if variant.rate is None:
        return (
            f"{variant.name}: no rate, because in one round the larger run took no longer than the smaller "
            f"one; give --large a larger number{warning}"
        )
    has_stages = {"decode", "model"} <= variant.stages.keys()
    limit = _describe_limit(variant, isolated, cores) if has_stages else ""
    return f"{variant.name}: {limit}{_describe_efficiency(variant, isolated, cores)}{warning}"


def _describe_limit(variant: VariantMetrics, isolated: IsolatedStages, cores: int) -> str:
    decode, model = variant.compute_utilization("decode") or 0.0, variant.compute_utilization("model") or 0.0
    busy_cores = variant.count_busy_cores() or 0.0
    idle_model = f"the model is idle {_format_percent(1 - model)} of the time"
    if busy_cores >= BUSY_SHARE * cores:
        return f"limited by the {cores} cores: {_predict_rate(variant, cores, 'cores')}; {idle_model}. "
    if model >= BUSY_SHARE:
        return f"limited by the model: {_predict_rate(variant, cores, 'model')}. "
    if decode >= BUSY_SHARE:
        part = _find_slowest_decoding_part(isolated)
        return f"limited by {part}: {_predict_rate(variant, cores, 'decode')}; {idle_model}. "
    return (
        f"limited by waiting, not by a stage: decode workers are idle {_format_percent(1 - decode)} of the "
        f"time, {idle_model}, {busy_cores:.1f} of {cores} cores are busy. "
    )


def _predict_rate(variant: VariantMetrics, cores: int, resource: str) -> str:
    """Predict the rate with twice the amount of a resource, within the limits of the other resources.

    Args:
        variant: Figures of whole runs, with a rate and the stages `decode` and `model`.
        cores: Number of cores that a run may use.
        resource: `cores`, `model` (concurrent calls) or `decode` (worker processes).
    """
    assert variant.rate is not None
    count = cores if resource == "cores" else variant.stages[resource].max_concurrent
    noun = {"cores": "core", "model": "concurrent model call", "decode": "decode worker"}[resource]
    addition = f"{count} more {noun}{'s' if count > 1 else ''}"
    # A machine with more cores gets more decode workers and model calls; the reverse does not hold.
    doubled = {"cores", "model", "decode"} if resource == "cores" else {resource}
    seconds_per_scan = {"cores": variant.cpu_s / cores} | {
        name: variant.stages[name].wall_s / variant.stages[name].max_concurrent
        for name in ("decode", "model")
    }
    current = variant.rate.median
    # The difference of two short runs may be 0 or negative; such a resource sets no limit.
    limits = [(1 + (name in doubled)) / seconds for name, seconds in seconds_per_scan.items() if seconds > 0]
    predicted = min(2 * current, *limits)
    if predicted < 1.05 * current:
        return f"{addition} would not raise the rate above {current:.1f} scans/s"
    return f"{addition} would raise the rate from {current:.1f} to {predicted:.1f} scans/s"


def _find_slowest_decoding_part(isolated: IsolatedStages) -> str:
    """Return the label of the part of decoding that takes the most wall time in isolation."""
    seconds = {name: isolated.wall_s[name].median for name in ("read", "decompress", "resize")}
    return LABELS[max(seconds, key=lambda name: seconds[name])]


def _describe_efficiency(variant: VariantMetrics, isolated: IsolatedStages, cores: int) -> str:
    """Return the rate, the ideal rate, the efficiency, and the two largest losses of core-seconds."""
    assert variant.rate is not None
    rate, ideal = variant.rate.median, isolated.compute_ideal_rate(cores)
    uses = split_core_seconds(variant, isolated, cores)
    losses = {name: seconds for name, seconds in uses.items() if name not in REQUIRED_STAGES}
    total = cores / rate
    largest = sorted(losses, key=lambda name: -losses[name])[:2]
    parts = [
        f"{LABELS[name]} {_format_percent(losses[name] / total)}" for name in largest if losses[name] > 0
    ]
    efficiency = f"{rate:.2f} of the ideal {ideal:.2f} scans/s, efficiency {rate / ideal:.2f}"
    if not parts or not variant.stages:
        return efficiency
    return f"{efficiency}; largest losses, as shares of all core-seconds: {', '.join(parts)}"


def _warn_of_background_load(variant: VariantMetrics, cores: int) -> str:
    if variant.background_cores < MAX_BACKGROUND_SHARE * cores:
        return ""
    return (
        f". Other programs used up to {variant.background_cores:.1f} of the {cores} cores during the runs: "
        "measure again on an idle machine"
    )


def _format_percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.0f} %"
