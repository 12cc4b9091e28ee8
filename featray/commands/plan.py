"""`featray plan`: what is to be done and why, and what it will take, from a sample of the user's own scans.

Changes nothing: the sample's features are thrown away.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from featray.checks import check
from featray.collection.listing import sample_by_size
from featray.config import ConfigInput
from featray.engines.base import Decoding, Stages
from featray.engines.prefetch import parallel_map
from featray.hardware import ModelThreads, count_usable_cores
from featray.job import Job, RunScope, make_decoding, make_engine
from featray.model.runtime import list_gpu_names
from featray.output.dataset import Dataset
from featray.schema import Decoded, Scan
from featray.stages.extract import extract
from featray.stages.plan import STATES, Plan

SAMPLE_SCANS = 6
"""Scans decoded for the estimate, from small to large."""
SAMPLE_SECONDS = 20.0
"""After so long no further one is decoded."""
_MODEL_ROUNDS = 3
_MAX_CANDIDATES = 5000
"""Scans among which those are chosen; every so many, if there are more to do."""


@dataclass(frozen=True)
class Estimate:
    """What the run is expected to take; all from a sample, so a guide and no promise.

    Attributes:
        sampled: Scans the figures come from; 0 means there was none to sample.
        decode_s: Seconds to read, decode and preprocess a scan of mean size.
        infer_s: Seconds of the model for one scan, called as the engine does in one process.
        scans_per_s: On this machine, whatever the cluster has; start-up apart.
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
class PlanResult:
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
        time_and_size = f"{_duration(guess.seconds)}, {_size(guess.output_bytes)} of values"
        return [
            f"estimate from {guess.sampled} scans: {guess.scans_per_s:.2f} scans/s, {time_and_size}, "
            f"{guess.memory_bytes / 1e9:.1f} GB per process"
        ]


def plan(config: ConfigInput, overrides: list[str] | None = None, *, explain: bool = False) -> PlanResult:
    """Return what `extract` and `refresh` would find and do; writes nothing.

    Args:
        config: As for `extract`.
        overrides: `key.path=value` texts.
        explain: Whether to say of every scan what its state is and why.

    Raises:
        UsageError: The config, the source or the model cannot be used; lists every problem.
    """
    checked, listing = check(config, overrides)
    dataset = Dataset.open(checked.output)
    engine = make_engine(checked, len(listing.scans))
    job = Job.prepare(checked, engine)
    stored = dataset.find_snapshot()
    found = job.make_plan(listing, stored, RunScope())
    wanted = (
        found
        if found.todo or not found.refresh_todo
        else job.make_plan(listing, stored, RunScope(refresh=True))
    )
    return PlanResult(
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
        scans=list(found.explain_all()) if explain else (),
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
    checked, listing = check(config, overrides)
    dataset = Dataset.open(checked.output)
    job = Job.prepare(checked, make_engine(checked, len(listing.scans)))
    return job.make_plan(listing, dataset.find_snapshot(), RunScope()).explain_scan(scan_id)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds:.0f} s"


def _size(count: int) -> str:
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB") if count >= 1e6 else (1e3, "kB")
    return f"{count / unit:.1f} {name}"


def _estimate(job: Job, dataset: Dataset, plan: Plan) -> Estimate:
    if not plan.todo:
        return Estimate()
    some = plan.todo[:: -(-len(plan.todo) // _MAX_CANDIDATES)]
    readable = [scan for scan in some if scan.reason is None]
    count = len(readable) * len(plan.todo) // len(some)
    stages, decoding = job.make_stages(dataset, count), make_decoding(job.config)
    decoded = _decoded(decoding, sample_by_size(readable, SAMPLE_SCANS))
    good = [one for _, one in decoded if one.record.status == "ok"]
    if not good:
        return Estimate()
    extract(stages.extractor, good, recipe=stages.recipe)
    decode_s = _decode_seconds(decoded, readable)
    infer_s = _model_seconds(stages, good, decoding.batch_scans, job.threads.calls)
    scans_per_s = _rate(decode_s, infer_s, job.threads)
    patches = statistics.mean(scan.record.patches for scan in good)
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


def _decoded(decoding: Decoding, scans: Sequence[Scan]) -> list[tuple[Scan, Decoded]]:
    """Decode scans, as many as there is time for; the first one twice, for the first time is start-up."""
    found: list[tuple[Scan, Decoded]] = []
    until = time.monotonic() + SAMPLE_SECONDS
    for scan in scans:
        if not found:
            decoding.decoder(scan)
        elif time.monotonic() > until:
            break
        found.append((scan, decoding.decoder(scan)))
    return found


def _decode_seconds(decoded: Sequence[tuple[Scan, Decoded]], scans: Sequence[Scan]) -> float:
    """Return the seconds of a scan of mean size: as much per byte as the sample's, where sizes are known."""
    good = [(scan, one.record) for scan, one in decoded if one.record.status == "ok"]
    mean = statistics.mean(record.read_s + record.decode_s + record.preprocess_s for _, record in good)
    if not all(scan.size for scan in scans):
        return mean
    sizes, sampled = [scan.size for scan in scans], [scan.size for scan, _ in good]
    return mean * statistics.mean(sizes) / statistics.mean(sampled)


def _model_seconds(stages: Stages, decoded: Sequence[Decoded], batch_scans: int, calls: int) -> float:
    """Return the model's wall seconds per scan when it is called as often at once as the engine does."""
    batch = [decoded[number % len(decoded)] for number in range(batch_scans)]
    run_model = functools.partial(extract, stages.extractor, recipe=stages.recipe)
    took = []
    for _ in range(_MODEL_ROUNDS):
        start = time.perf_counter()
        list(parallel_map(run_model, [batch] * calls, calls))
        took.append((time.perf_counter() - start) / (calls * len(batch)))
    return statistics.median(took)


def _rate(decode_s: float, infer_s: float, threads: ModelThreads) -> float:
    """Return the scans per second of this machine: decoding takes one core, the model those of its threads.

    With a GPU the model takes none of decoding's cores, and the slower of the two decides.
    """
    cores = count_usable_cores()
    if list_gpu_names():
        return min(cores / decode_s, 1 / infer_s)
    model_cores = cores if threads.each is None else min(cores, threads.each + threads.calls - 1)
    return cores / (decode_s + model_cores * infer_s)
