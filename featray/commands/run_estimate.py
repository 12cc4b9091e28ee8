"""Estimate a run: a plan in, its expected time, memory and output size out.

A few scans are decoded and run through the model; their features are discarded. Nothing is written.
"""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from featray.collection.listing import sample_by_size
from featray.engines.base import Decoding, Engine, Stages
from featray.engines.prefetch import parallel_map
from featray.errors import ConfigError
from featray.hardware import Capacity, ModelThreads, count_usable_cores
from featray.job import Job, make_decoding
from featray.model import OutputLayer
from featray.model.runtime import list_gpu_names
from featray.output.dataset import Dataset
from featray.schema import Decoded, Scan
from featray.stages.extract import extract
from featray.stages.input_cache import InputCache
from featray.stages.plan import Plan

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


def estimate_run(job: Job, engine: Engine, dataset: Dataset, plan: Plan) -> Estimate:
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
