"""Figures in, sentences out: what a run is bound by, what would lift it, how near it is to the ideal."""

from __future__ import annotations

from featray.benchmark.metrics import FLOORS, Alone, WayFigures, core_seconds

BUSY = 0.9
"""Share of time from which on workers, or cores, count as always busy."""
QUIET = 0.1
"""Share of the cores that other programs may use without spoiling the figures."""
WORDS = {
    "read": "reading",
    "decompress": "decompression",
    "resize": "resizing",
    "model": "the model",
    "decode more": "reading, checks and statistics",
    "model more": "the model beyond its time alone",
    "write": "writing",
    "engine": "featray and its engine",
    "idle": "cores idle or used by others",
    "work": "all that it does",
}
"""How people call the parts of a run."""


def verdict(way: WayFigures, alone: Alone, cores: int) -> str:
    """Return in plain language what bounds a way, what would lift it, and what it loses to the ideal."""
    if way.rate is None:
        unclear = "too few scans to tell, start-up drowned them; give --many a larger number"
        return f"{way.name}: {unclear}{_doubt(way, cores)}"
    bound = _bound(way, alone, cores) if {"decode", "model"} <= way.stages.keys() else ""
    return f"{way.name}: {bound}{_nearness(way, alone, cores)}{_doubt(way, cores)}"


def _bound(way: WayFigures, alone: Alone, cores: int) -> str:
    decode, model, cores_busy = way.busy("decode") or 0.0, way.busy("model") or 0.0, way.cores_busy() or 0.0
    idle = f"the model is idle {_percent(1 - model)}"
    if cores_busy >= BUSY * cores:
        return f"bound by the {cores} cores: {_lift(way, cores, 'cores')}; {idle}. "
    if model >= BUSY:
        return f"bound by the model: {_lift(way, cores, 'model')}. "
    if decode >= BUSY:
        return f"bound by {_of_decoding(alone)}: {_lift(way, cores, 'decode')}; {idle}. "
    return (
        f"bound by none of its parts but by waiting: decode workers are idle {_percent(1 - decode)}, {idle}, "
        f"{cores_busy:.1f} of {cores} cores are busy. "
    )


def _lift(way: WayFigures, cores: int, part: str) -> str:
    """Return what as many again of one part would do, as far as the others allow."""
    assert way.rate is not None
    count = cores if part == "cores" else way.stages[part].at_once
    plural = "s" if count > 1 else ""
    what = {
        "cores": f"more core{plural}",
        "model": "more of it at once",
        "decode": f"more decode worker{plural}",
    }[part]
    # Decode workers and actors come with the cores; cores do not come with them.
    doubled = {"cores", "model", "decode"} if part == "cores" else {part}
    per_scan = {"cores": way.cpu_s / cores} | {
        name: way.stages[name].wall_s / way.stages[name].at_once for name in ("decode", "model")
    }
    now = way.rate.median
    # Differences of two short runs may come out as nothing; they limit nothing then.
    limits = [(1 + (name in doubled)) / seconds for name, seconds in per_scan.items() if seconds > 0]
    then = min(2 * now, *limits)
    if then < 1.05 * now:
        return f"{count} {what} would not lift it above {now:.1f} scans/s"
    return f"{count} {what} would lift it from {now:.1f} to {then:.1f} scans/s"


def _of_decoding(alone: Alone) -> str:
    """Return what takes the most wall time of decoding, alone."""
    parts = {name: alone.wall_s[name].median for name in ("read", "decompress", "resize")}
    return WORDS[max(parts, key=lambda name: parts[name])]


def _nearness(way: WayFigures, alone: Alone, cores: int) -> str:
    assert way.rate is not None
    ideal = alone.ideal_rate(cores)
    lost = {name: seconds for name, seconds in core_seconds(way, alone, cores).items() if name not in FLOORS}
    total = cores / way.rate.median
    most = sorted(lost, key=lambda name: -lost[name])[:2]
    losses = ", ".join(f"{WORDS[name]} {_percent(lost[name] / total)}" for name in most if lost[name] > 0)
    nearness = f"{way.rate.median:.2f} of {ideal:.2f} scans/s, efficiency {way.rate.median / ideal:.2f}"
    return f"{nearness}; most of the rest: {losses}" if losses and way.stages else nearness


def _doubt(way: WayFigures, cores: int) -> str:
    if way.others_cores < QUIET * cores:
        return ""
    return (
        f". Other programs kept up to {way.others_cores:.1f} of the {cores} cores busy meanwhile: measure "
        "again on a quiet machine"
    )


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.0f} %"
