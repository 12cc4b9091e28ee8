"""`featray plan`: count the scans that `extract` and `refresh` would process, and estimate time and size.

Configuration in, counts and an estimate out. For the estimate, a few scans are decoded and run through the
model; their features are discarded. Nothing is written.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import psutil

from featray.checks import check
from featray.collection.listing import Listing, sample_by_size
from featray.config import ConfigInput
from featray.engines.base import Decoding, Engine, Stages
from featray.engines.prefetch import parallel_map
from featray.errors import ConfigError
from featray.hardware import Capacity, ModelPlace, ModelThreads, count_usable_cores
from featray.job import Job, RunScope, make_decoding, make_engine
from featray.model import OutputLayer
from featray.model.runtime import list_gpu_names
from featray.output.dataset import Dataset
from featray.schema import Decoded, Scan
from featray.stages.extract import extract
from featray.stages.input_cache import InputCache
from featray.stages.plan import STATES, Plan
from featray.stages.report import (
    describe_cleared_failures,
    describe_lost_layers,
    describe_other_layers,
    format_layer_counts,
)

log = logging.getLogger(__name__)

SAMPLE_SCANS = 6
"""Scans that are decoded for the estimate, from small to large."""
SAMPLE_SECONDS = 20.0
"""Time after which no other scan is decoded for the estimate."""
_MODEL_ROUNDS = 3
"""Number of times that the model is timed; the median counts."""
_MAX_CANDIDATES = 5000
"""Scans from which the sample is taken; of more scans, every n-th is a candidate."""


@dataclass(frozen=True)
class Estimate:
    """Expected time, memory and output size of a run, extrapolated from a sample of its scans.

    Only the due layers of each scan count.

    Attributes:
        command: Command that is estimated: `refresh` if `extract` would refuse or has nothing to do.
        sampled: Number of scans in the sample; 0 if there was no scan to sample, and then no estimate.
        from_cache: Number of scans in the sample whose model input is in the input cache.
        decode_s: Seconds to read, decode and preprocess a scan of average size, or to take it from the cache.
        infer_s: Seconds of the model for the due layers of one scan, called as the engine calls it in one
            process.
        scans_per_s: Scans per second without start-up, on the present nodes of the cluster with cores as fast
            as this machine's, or on this machine.
        seconds: Time for all scans to process.
        output_bytes: Size of the values to compute, before compression.
        memory_bytes: Memory of this process after the sample; each worker process needs about as much.
        nodes: Nodes of the cluster that the estimate counts on; 0 for this machine alone.
        cores: CPU cores of these nodes.
        gpus: GPUs of these nodes.
        actors: Processes that run the model on these nodes.
    """

    command: str = "extract"
    sampled: int = 0
    from_cache: int = 0
    decode_s: float = 0.0
    infer_s: float = 0.0
    scans_per_s: float = 0.0
    seconds: float = 0.0
    output_bytes: int = 0
    memory_bytes: int = 0
    nodes: int = 0
    cores: float = 0.0
    gpus: float = 0.0
    actors: int = 0


@dataclass(frozen=True)
class PlanResult:
    """Counts of the scans that `extract` and `refresh` would process, and an estimate.

    Attributes:
        found: Number of listed scans.
        new: Number of scans without a row in the scans table.
        changed: Number of scans with other content than their row.
        stale: Number of scans with cells of another recipe, or that failed with another recipe.
        failed: Number of unchanged scans that failed before.
        incomplete: Number of unchanged scans that lack layers of the config.
        removed: Number of stored scans that are no longer listed; `refresh` would remove them.
        up_to_date: Number of unchanged scans that are stored or excluded.
        todo: Number of scans that `extract` would process. It refuses if `other_recipe` is not 0.
        refresh_todo: Number of scans that `refresh` would process.
        other_recipe: Number of scans with cells of another recipe.
        can_keep_both: Whether one output can hold these cells and those of this config under other names.
        unreachable: Number of stored scans that the listing could not reach; their rows are kept.
        recipe: Recipe id of reading and preprocessing of this config.
        engine: Engine that `extract` would use.
        layers: Output names.
        layer_recipes: Layer of the config → its recipe id.
        cells: State → number of cells (scan x layer of the config); `new` are those of new scans, `missing`
            those that stored scans lack.
        work: A sentence about the work to do and the up-to-date layers; empty without work.
        other_layers: Stored layer that the config does not name → number of scans that have it.
        lost_layers: The same layers → number of scans whose cell a refresh removes, because their content
            has changed.
        incompatible_layers: The same layers → number of scans whose cell `refresh --drop-layers` removes,
            because they were read or preprocessed in another way; without the option, `refresh` refuses.
        cleared_failures: Number of failed scans that a run sets to ok without computing, because they have
            all layers of the config.
        renamed_layers: Stored layer → its name in the config, for layers that only have another name.
        ignored: File name suffix → number of files that belong to no scan.
        estimate: Estimate of the next run.
        scans: scan_id, state and why of every scan; empty unless requested.
    """

    found: int
    new: int
    changed: int
    stale: int
    failed: int
    incomplete: int
    removed: int
    up_to_date: int
    todo: int
    refresh_todo: int
    other_recipe: int
    can_keep_both: bool
    unreachable: int
    recipe: str
    engine: str
    layers: tuple[str, ...]
    layer_recipes: dict[str, str] = field(default_factory=dict)
    cells: dict[str, int] = field(default_factory=dict)
    work: str = ""
    other_layers: dict[str, int] = field(default_factory=dict)
    lost_layers: dict[str, int] = field(default_factory=dict)
    incompatible_layers: dict[str, int] = field(default_factory=dict)
    renamed_layers: dict[str, str] = field(default_factory=dict)
    cleared_failures: int = 0
    ignored: dict[str, int] = field(default_factory=dict)
    estimate: Estimate = field(default_factory=Estimate)
    scans: Sequence[dict[str, str]] = ()

    def text(self) -> str:
        """Return the result as text for the terminal."""
        states = ", ".join(f"{getattr(self, state)} {state.replace('_', ' ')}" for state in STATES)
        lines = [f"found {self.found} scans: {states}"]
        if cells := _join_counts(self.cells):
            lines.append(f"cells (scan x layer): {cells}")
        if self.unreachable:
            lines.append(f"{self.unreachable} stored scans cannot be reached now; their features are kept")
        if self.cleared_failures:
            lines.append(describe_cleared_failures(self.cleared_failures))
        if self.other_layers:
            lines.append(describe_other_layers(self.other_layers))
        table_changes = self.removed or self.renamed_layers or self.cleared_failures
        if not (self.todo or self.refresh_todo or table_changes):
            return "\n".join([*lines, "nothing to do", *self._describe_scans()])
        if self.work:
            lines.append(f"to compute: {self.work}")
        if self.renamed_layers:
            names = ", ".join(f"{old} to {new}" for old, new in self.renamed_layers.items())
            lines.append(f"to rename, without computing: layer {names}")
        lines += [self._describe_extract(), self._describe_refresh()]
        run = f"{len(self.layers)} layers, engine {self.engine}"
        lines.append(f"{run}; `--why ID` explains the state of one scan")
        return "\n".join([*lines, *self._describe_estimate(), *self._describe_scans()])

    def _describe_scans(self) -> list[str]:
        return [f"{scan['scan_id']}: {scan['why']}" for scan in self.scans]

    def _describe_extract(self) -> str:
        if self.other_recipe:
            problem = f"{self.other_recipe} scans have features of another recipe"
            way = (
                "give the layers of this config other names"
                if self.can_keep_both
                else "choose another output"
            )
            return (
                f"extract: refuses, because {problem}, which `featray refresh` replaces; to keep both, {way}"
            )
        has_work = self.todo or self.renamed_layers or self.cleared_failures
        return f"extract: would process {self.todo} scans" if has_work else "extract: nothing to do"

    def _describe_refresh(self) -> str:
        work = f"process {self.refresh_todo} scans and remove {self.removed}"
        lost = f"; {describe_lost_layers(self.lost_layers)}" if self.lost_layers else ""
        if not self.incompatible_layers:
            return f"refresh: would {work}{lost}"
        layers = format_layer_counts(self.incompatible_layers)
        problem = f"it would remove layers that were read or preprocessed in another way: {layers}"
        return f"refresh: refuses, because {problem}; with --drop-layers it would {work}{lost}"

    def _describe_estimate(self) -> list[str]:
        estimate = self.estimate
        if not estimate.sampled:
            return []
        cached = f" ({estimate.from_cache} of them in the input cache)" if estimate.from_cache else ""
        duration, size = _format_duration(estimate.seconds), _format_size(estimate.output_bytes)
        cluster = (
            f" on {estimate.nodes} nodes with {estimate.cores:g} cores, {estimate.gpus:g} GPUs and "
            f"{estimate.actors} actors"
            if estimate.nodes
            else ""
        )
        return [
            f"estimate of {estimate.command} from {estimate.sampled} scans{cached}{cluster}: "
            f"{estimate.scans_per_s:.2f} scans/s, {duration}, "
            f"{size} of values, {estimate.memory_bytes / 1e9:.1f} GB of memory per process"
        ]


def plan(
    config: ConfigInput,
    overrides: list[str] | None = None,
    *,
    explain: bool = False,
    show: bool = False,
) -> PlanResult:
    """Count the scans that `extract` and `refresh` would process, and estimate the run. Write nothing.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        overrides: `key.path=value` texts, which take precedence over the file.
        explain: Whether to explain the state of every scan; the result then has an entry for each.
        show: Whether to show progress on stderr while the source is listed.

    Raises:
        UsageError: The config, the source or the model cannot be used; lists every problem.
    """
    checked, listing = check(config, overrides, show=show)
    dataset = Dataset.open(checked.output)
    with make_engine(checked) as engine:
        if engine.place is ModelPlace.ELSEWHERE and list_gpu_names():
            engine.place = ModelPlace.ANY  # the estimate runs the model here, on a GPU as the actors will
        return _make_result(Job.prepare(checked, engine), engine, dataset, listing, explain=explain)


def _make_result(
    job: Job, engine: Engine, dataset: Dataset, listing: Listing, *, explain: bool
) -> PlanResult:
    stored = dataset.find_snapshot()
    extract_plan = job.make_plan(listing, stored, RunScope())
    return PlanResult(
        found=len(listing.scans),
        **extract_plan.counts,
        todo=len(extract_plan.todo),
        refresh_todo=extract_plan.refresh_todo,
        other_recipe=extract_plan.other_recipe,
        can_keep_both=extract_plan.can_keep_both,
        unreachable=extract_plan.unreachable,
        recipe=job.run.recipe_id,
        engine=engine.name,
        layers=job.run.layers,
        layer_recipes=job.recipes.layers,
        cells=extract_plan.count_cells(),
        work=extract_plan.describe_work(),
        other_layers=dict(extract_plan.other_layers),
        lost_layers=dict(extract_plan.lost_layers),
        incompatible_layers=dict(extract_plan.incompatible_layers),
        renamed_layers=dict(extract_plan.renames),
        cleared_failures=len(extract_plan.cleared_failures),
        ignored=listing.ignored,
        estimate=_estimate_next_run(job, engine, dataset, listing, extract_plan),
        scans=list(extract_plan.explain_all()) if explain else (),
    )


def explain_scan(config: ConfigInput, scan_id: str, overrides: list[str] | None = None) -> str:
    """Return one sentence about a scan: its state and the facts that the state follows from.

    Args:
        config: Path of a YAML file, a dict, or a `Config`.
        scan_id: Id of a listed or stored scan.
        overrides: `key.path=value` texts, which take precedence over the file.

    Raises:
        UsageError: The config, the source or the model cannot be used, or no scan has this id.
    """
    checked, listing = check(config, overrides)
    dataset = Dataset.open(checked.output)
    job = Job.prepare(checked, make_engine(checked))
    return job.make_plan(listing, dataset.find_snapshot(), RunScope()).explain_scan(scan_id)


def _join_counts(cells: Mapping[str, int]) -> str:
    """Return the states that any cell has, with their numbers of cells."""
    return ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in cells.items() if count)


def _format_duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{seconds:.0f} s"


def _format_size(size_bytes: int) -> str:
    for unit_bytes, unit in ((1e9, "GB"), (1e6, "MB")):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.1f} {unit}"
    return f"{size_bytes / 1e3:.1f} kB"


def _estimate_next_run(job: Job, engine: Engine, dataset: Dataset, listing: Listing, plan: Plan) -> Estimate:
    """Estimate `extract`, or `refresh` if `extract` refuses or has nothing to do.

    Args:
        job: The run.
        engine: Its engine.
        dataset: The output.
        listing: Every scan of the collection.
        plan: The plan of `extract`.
    """
    if plan.refresh_todo and (plan.other_recipe or not plan.todo):
        refresh = RunScope(refresh=True)
        refresh_plan = job.make_plan(listing, dataset.find_snapshot(), refresh)
        return replace(_estimate_run(job, engine, dataset, refresh_plan), command=refresh.command)
    return _estimate_run(job, engine, dataset, plan)


def _estimate_run(job: Job, engine: Engine, dataset: Dataset, plan: Plan) -> Estimate:
    """Decode a few scans of the plan, run the model on them, and extrapolate to all scans."""
    if not plan.todo:
        return Estimate()
    candidates = plan.todo[:: -(-len(plan.todo) // _MAX_CANDIDATES)]
    readable = [scan for scan in candidates if scan.reason is None]
    count = len(readable) * len(plan.todo) // len(candidates)
    cache = InputCache.from_config(job.config, is_read_only=True)
    stages, decoding = job.make_stages(dataset, count), make_decoding(job.config, cache=cache)
    sample = _decode_sample(decoding, sample_by_size(readable, SAMPLE_SCANS))
    usable = [decoded for _, decoded in sample if decoded.record.status == "ok"]
    if not usable:
        return Estimate()
    stages.load_here()
    extract(stages.extractor, usable, recipe=stages.recipe)  # the first call builds the model's function
    decode_s = _estimate_decode_s(sample, readable)
    infer_s = _measure_infer_s(stages, usable, decoding.batch_scans, job.threads.calls)
    capacity = _find_capacity(engine)
    scans_per_s = (
        _estimate_rate(decode_s, infer_s, job.threads)
        if capacity is None
        else _estimate_cluster_rate(decode_s, infer_s, job, capacity)
    )
    patches = statistics.mean(decoded.record.patches for decoded in usable)
    values = _average_values(job.extractor.layers, readable)
    return Estimate(
        sampled=len(usable),
        from_cache=sum(decoded.record.is_from_cache for decoded in usable),
        decode_s=decode_s,
        infer_s=infer_s,
        scans_per_s=scans_per_s,
        seconds=count / scans_per_s,
        output_bytes=int(4 * values * patches * count),
        memory_bytes=psutil.Process().memory_info().rss,
        nodes=capacity.nodes if capacity else 0,
        cores=capacity.cores if capacity else 0.0,
        gpus=capacity.gpus if capacity else 0.0,
        actors=capacity.actors if capacity else 0,
    )


def _find_capacity(engine: Engine) -> Capacity | None:
    """Return the capacity of the engine's cluster; None, and a message, if it cannot be rated now.

    An engine on this machine alone also gives None, without a message.
    """
    try:
        capacity = engine.measure_capacity()
    except ConfigError as error:
        log.warning("%s; the estimate is for this machine", error)
        return None
    if capacity is not None and not capacity.cores:
        log.warning("the cluster has no node for this run yet; the estimate is for this machine")
        return None
    return capacity


def _average_values(layers: Sequence[OutputLayer], scans: Sequence[Scan]) -> float:
    """Return the average number of values of the due layers for one model input.

    Args:
        layers: All layers of the config.
        scans: Scans to process, or an even selection of them.
    """
    values = {layer.name: layer.values for layer in layers}
    return statistics.mean(sum(values[name] for name in scan.due_layers or values) for scan in scans)


def _decode_sample(decoding: Decoding, scans: Sequence[Scan]) -> list[tuple[Scan, Decoded]]:
    """Decode scans until `SAMPLE_SECONDS` are over; at least one.

    The first scan is decoded twice, because its first time includes imports.
    """
    sample: list[tuple[Scan, Decoded]] = []
    deadline = time.monotonic() + SAMPLE_SECONDS
    for scan in scans:
        if not sample:
            decoding.decoder(scan)
        elif time.monotonic() > deadline:
            break
        sample.append((scan, decoding.decoder(scan)))
    return sample


def _estimate_decode_s(sample: Sequence[tuple[Scan, Decoded]], scans: Sequence[Scan]) -> float:
    """Return the decode seconds of a scan of average size.

    The seconds of the sample are scaled by file size, if the sizes of all scans are known and no scan came
    from the input cache, whose entries have similar sizes.

    Args:
        sample: Decoded scans of the sample, with their listing entries.
        scans: All scans to process, or an even selection of them.
    """
    usable = [(scan, decoded.record) for scan, decoded in sample if decoded.record.status == "ok"]
    mean = statistics.mean(record.read_s + record.decode_s + record.preprocess_s for _, record in usable)
    if any(record.is_from_cache for _, record in usable) or not all(scan.size for scan in scans):
        return mean
    sizes, sample_sizes = [scan.size for scan in scans], [scan.size for scan, _ in usable]
    return mean * statistics.mean(sizes) / statistics.mean(sample_sizes)


def _measure_infer_s(stages: Stages, decoded: Sequence[Decoded], batch_scans: int, calls: int) -> float:
    """Return the wall seconds of the model per scan, with `calls` batches at once as in the engine."""
    batch = [decoded[number % len(decoded)] for number in range(batch_scans)]
    run_model = functools.partial(extract, stages.extractor, recipe=stages.recipe)
    seconds_per_scan = []
    for _ in range(_MODEL_ROUNDS):
        start = time.perf_counter()
        list(parallel_map(run_model, [batch] * calls, calls))
        seconds_per_scan.append((time.perf_counter() - start) / (calls * len(batch)))
    return statistics.median(seconds_per_scan)


def _estimate_rate(decode_s: float, infer_s: float, threads: ModelThreads) -> float:
    """Return the scans per second of this machine.

    With a GPU the model takes no core, and the slower of decoding and the model limits the rate.
    """
    cores = count_usable_cores()
    if list_gpu_names():
        return min(cores / decode_s, 1 / infer_s)
    return cores / (decode_s + _count_model_cores(threads) * infer_s)


def _estimate_cluster_rate(decode_s: float, infer_s: float, job: Job, capacity: Capacity) -> float:
    """Return the scans per second of a cluster if its cores are as fast as those of this machine.

    With GPUs, its model is at least as fast as on this machine.
    """
    run = job.config.run
    if run.actors.num_gpus:
        return min(capacity.workers.decode * run.decode.num_cpus / decode_s, capacity.actors / infer_s)
    cores = min(capacity.cores, capacity.actors * run.actors.cpus or math.inf)
    return cores / (decode_s + _count_model_cores(job.threads) * infer_s)


def _count_model_cores(threads: ModelThreads) -> int:
    """Return the cores of this machine that the calls of the model took; decoding a scan takes one core."""
    cores = count_usable_cores()
    return cores if threads.each is None else min(cores, threads.each + threads.calls - 1)
