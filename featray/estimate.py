"""`featray plan`: what is to be done and why, and what it will take, from a sample of the user's own scans.

Changes nothing: the sample's features are thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from featray.checks import check
from featray.config import ConfigInput
from featray.dataset import Dataset
from featray.machine import usable_cores
from featray.pipeline import Job, Wanted, choose_engine
from featray.planning import STATES, Plan
from featray.schema import Scan
from featray.stages.extract import extract
from featray.storage import Store

SAMPLE = 3
"""Scans decoded for the estimate: of small, middle and large size."""
_LOOKED_AT = 5000
"""Scans among which those are chosen; every so many, if there are more to do."""


@dataclass(frozen=True)
class Estimate:
    """What the run is expected to take; all from a sample, so a guide and no promise.

    Attributes:
        sampled: Scans the figures come from; 0 means there was none to sample.
        decode_s: CPU seconds to read, decode and preprocess one scan.
        infer_s: Wall seconds of the model for one scan on this machine.
        scans_per_s: On this machine's cores, start-up apart.
        seconds: For all that is to do.
        output_bytes: Values of all layers, before compression.
        memory_bytes: Peak of this process in the sample; each worker needs about that.
    """

    sampled: int = 0
    decode_s: float = 0.0
    infer_s: float = 0.0
    scans_per_s: float = 0.0
    seconds: float = 0.0
    output_bytes: int = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class PlanReport:
    """What `extract` and `refresh` would find and do.

    Attributes:
        found: Scans listed; of these and the stored ones:
        new: Never seen.
        changed: Of other content than when they were taken up.
        stale: Taken up under another recipe.
        failed: Failed before, and unchanged.
        removed: Stored, but no longer listed; `refresh` would drop them.
        up_to_date: Stored, or left out by rule, and unchanged.
        todo: Scans that `extract` would take up; it refuses to while `other_recipe` is not 0.
        refresh_todo: Scans that `refresh` would take up.
        other_recipe: Scans whose stored features are of another recipe.
        unreachable: Stored scans that cannot be looked at now; they are kept.
        recipe: Id of this config's recipe.
        engine: That `extract` would use.
        layers: Output names.
        ignored: Files that are no scans, by suffix.
        estimate: What `extract` is expected to take; if it has nothing to do, what `refresh` is.
        scans: Where asked for, state and reason of every scan: scan_id, state, why.
    """

    found: int
    new: int
    changed: int
    stale: int
    failed: int
    removed: int
    up_to_date: int
    todo: int
    refresh_todo: int
    other_recipe: int
    unreachable: int
    recipe: str
    engine: str
    layers: tuple[str, ...]
    ignored: dict[str, int] = field(default_factory=dict)
    estimate: Estimate = field(default_factory=Estimate)
    scans: Sequence[dict[str, str]] = ()

    def text(self) -> str:
        """Return the plan for a person."""
        states = ", ".join(f"{getattr(self, state)} {state.replace('_', ' ')}" for state in STATES)
        lines = [f"found {self.found} scans: {states}"]
        if self.unreachable:
            lines.append(f"{self.unreachable} stored scans cannot be looked at now; they are kept")
        if not (self.todo or self.refresh_todo or self.removed):
            return "\n".join([*lines, "nothing to do"])
        lines += [self._extract_text(), self._refresh_text()]
        layers = f"{len(self.layers)} layers"
        lines.append(f"{layers}, engine {self.engine}, recipe {self.recipe}; `--why ID` tells why of a scan")
        return "\n".join([*lines, *self._estimate_text()])

    def _extract_text(self) -> str:
        if self.other_recipe:
            return f"extract: refuses, {self.other_recipe} scans have features of another recipe"
        return f"extract: would take up {self.todo}" if self.todo else "extract: nothing to do"

    def _refresh_text(self) -> str:
        return f"refresh: would take up {self.refresh_todo}, drop {self.removed}"

    def _estimate_text(self) -> list[str]:
        guess = self.estimate
        if not guess.sampled:
            return []
        return [
            f"estimate from {guess.sampled} scans: {guess.scans_per_s:.2f} scans/s, "
            f"{guess.seconds:.0f} s, {guess.output_bytes / 1e6:.1f} MB of values, "
            f"{guess.memory_bytes / 1e9:.1f} GB per process"
        ]


def plan(config: ConfigInput, overrides: list[str] | None = None, *, explain: bool = False) -> PlanReport:
    """Return what `extract` and `refresh` would find and do; writes nothing.

    Args:
        config: As for `extract`.
        overrides: `key.path=value` texts.
        explain: Whether to say of every scan what its state is and why.

    Raises:
        UsageError: The config, the source or the model cannot be used; lists every problem.
    """
    started = time.time()
    checked, listing = check(config, overrides)
    dataset = Dataset(Store(checked.output.uri, checked.output.storage_options))
    engine = choose_engine(checked, len(listing.scans))
    job = Job.prepare(checked, engine.name, started, threads=engine.threads)
    stored = dataset.find()
    found = job.plan(listing, stored, Wanted())
    wanted = (
        found if found.todo or not found.refresh_todo else job.plan(listing, stored, Wanted(refresh=True))
    )
    return PlanReport(
        found=len(listing.scans),
        **found.counts,
        todo=len(found.todo),
        refresh_todo=found.refresh_todo,
        other_recipe=found.other_recipe,
        unreachable=found.unreachable,
        recipe=job.run.recipe_id,
        engine=engine.name,
        layers=job.run.layers,
        ignored=listing.ignored,
        estimate=_estimate(job, dataset, wanted),
        scans=list(found.explain()) if explain else (),
    )


def why(config: ConfigInput, scan_id: str, overrides: list[str] | None = None) -> str:
    """Return one sentence: a scan's state, and what it follows from.

    Args:
        config: As for `extract`.
        scan_id: Of a listed or a stored scan.
        overrides: `key.path=value` texts.

    Raises:
        UsageError: As `plan`; or no scan has that id.
    """
    started = time.time()
    checked, listing = check(config, overrides)
    dataset = Dataset(Store(checked.output.uri, checked.output.storage_options))
    job = Job.prepare(checked, choose_engine(checked, len(listing.scans)).name, started)
    return job.plan(listing, dataset.find(), Wanted()).why(scan_id)


def spread(scans: Sequence[Scan]) -> list[Scan]:
    """Return up to SAMPLE scans spread over the sizes."""
    by_size = sorted(scans, key=lambda scan: scan.size)
    step = max(1, len(by_size) / SAMPLE)
    return [by_size[int((index + 0.5) * step)] for index in range(min(SAMPLE, len(by_size)))]


def _estimate(job: Job, dataset: Dataset, plan: Plan) -> Estimate:
    if not plan.todo:
        return Estimate()
    some = plan.todo[:: -(-len(plan.todo) // _LOOKED_AT)]
    readable = [scan for scan in some if scan.reason is None]
    count = len(readable) * len(plan.todo) // len(some)
    stages = job.stages(dataset, count)
    decoded = [stages.decode(scan) for scan in spread(readable)]
    good = [scan for scan in decoded if scan.record.status == "ok"]
    if not good:
        return Estimate()
    extract(stages.extractor, good)
    decode_s = _mean([scan.record.read_s + scan.record.decode_s + scan.record.preprocess_s for scan in good])
    infer_s = _mean([scan.record.infer_s for scan in good])
    # Decoding keeps one core busy, the model all of them; together they share the cores.
    scans_per_s = 1 / (decode_s / usable_cores() + infer_s)
    patches = _mean([float(scan.record.patches) for scan in good])
    values = sum(layer.values for layer in job.extractor.layers)
    return Estimate(
        sampled=len(good),
        decode_s=decode_s,
        infer_s=infer_s,
        scans_per_s=scans_per_s,
        seconds=count / scans_per_s,
        output_bytes=int(4 * values * patches * count),
        memory_bytes=psutil.Process().memory_info().rss,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
