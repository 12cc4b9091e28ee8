"""The lazy Ray Data pipeline of one pass: listed scans in, receipts out.

An actor without a GPU decodes its own scans: they pass through one process and its worker processes, as with
engine `inline`, and Ray moves names in and features out. With GPUs, decoding runs in tasks of its own, on any
CPU of the cluster, so that enough of them keep a GPU busy.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from featray.config import RunConfig
from featray.engines.base import Decoding, Stages
from featray.engines.ray import cluster
from featray.engines.ray.actor_model import ModelLoading
from featray.engines.ray.failures import hide_deprecations, raise_original_errors
from featray.engines.ray.passes import Pass
from featray.engines.ray.sizing import (
    CPUS_BEFORE_GROWTH,
    GPU_CALLS,
    PoolSize,
    count_processes,
    count_task_cpus,
    count_workers,
    cpu_pool_size,
    divide_processes,
    gpu_pool_size,
    task_count,
)
from featray.engines.ray.workers import (
    DecodeAndExtractBatch,
    DecodeBatch,
    ExtractBatch,
    WorkerDecoding,
    WriteBatch,
)
from featray.hardware import Workers
from featray.schema import Receipt, Scan

WRITE_CPUS = 0.0001
"""CPU claim of a writer; it runs rarely and briefly, and must never wait for decoding."""
FREE_SHARE = 0.01
"""Share of the configured CPUs that actors and decode tasks do not claim, so that all writers fit in.

Ray Data reserves the claims of all writers; if these did not fit in, a pool could not grow by the last CPU.
Half of this share was too little on nodes with one CPU each."""
_MIN_GROWING_WRITERS = 8
"""Maximum number of writers at least on a cluster that may grow. It must be small: Ray Data reserves CPUs for
a pool without a maximum, which then keeps the pool of the model from growing."""
_MAX_INIT_DEATHS = 3
"""Times in a row that an actor may fail or die while it loads the model; each takes Ray about 20 s."""


class PassPipeline:
    """The Ray Data pipeline of one pass over some scans; it runs when its receipts are read."""

    def __init__(
        self, run: RunConfig, decoding: Decoding, stages: Stages, current: Pass, memory: int | None
    ) -> None:
        isolates = current.isolates_scans
        self._run, self._stages, self._pass, self._memory = run, stages, current, memory
        self._decoding = replace(decoding, batch_scans=1) if isolates else decoding
        self._scans_per_file = 1 if isolates else stages.scans_per_file
        self._retries = decoding.limits.attempts - 1
        self._grows = cluster.can_grow(run)
        self._workers: Workers | None = None

    def workers(self) -> Workers | None:
        """Return the number of workers of each kind; on a cluster that may grow, on its present nodes."""
        if self._workers is not None and self._grows:
            self._workers = self._count_workers()
        return self._workers

    def receipts(self, scans: Sequence[Scan]) -> Generator[Receipt]:
        """Run the pass; yield receipts in order of completion."""
        _configure_ray_data(self._pass)
        extracted = self._build(scans)
        with raise_original_errors():
            is_one_machine = cluster.named_address(self._run) is None and len(cluster.nodes()) == 1
            yield from self._write_here(extracted) if is_one_machine else self._write_there(extracted)

    def _write_here(self, extracted: Any) -> Generator[Receipt]:
        """Write the features in this process, because on one machine a writer only costs its imports."""
        for table in extracted.iter_batches(
            batch_size=self._scans_per_file, batch_format="pyarrow", prefetch_batches=0
        ):
            yield self._stages.write(table)

    def _write_there(self, extracted: Any) -> Generator[Receipt]:
        """Write the features on the nodes of the cluster, so that they need not pass through this process."""
        import ray

        with hide_deprecations():
            written = extracted.map_batches(
                WriteBatch,
                fn_constructor_args=[self._stages.write],
                batch_size=self._scans_per_file,
                batch_format="pyarrow",
                # Actors, because Ray ends idle processes of tasks, and a new process imports for seconds.
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self._count_writers()),
                num_cpus=WRITE_CPUS,
                max_task_retries=self._retries,
            )
        for batch in written.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for text in batch["receipt"].to_pylist():
                yield Receipt.from_json(text)

    def _build(self, scans: Sequence[Scan]) -> Any:
        """Return the pipeline from listed scans to features."""
        import ray

        with hide_deprecations():
            cpus = cluster.cpus() if cluster.actor_nodes(self._run) else CPUS_BEFORE_GROWTH
            tasks = task_count(scans, cpus, self._decoding.batch_scans, count_task_cpus(self._run))
            if self._pass.isolates_scans:
                tasks = len(scans)
            listed = ray.data.from_items(
                [{"scan": scan.to_json()} for scan in scans], override_num_blocks=tasks
            )
            if self._run.actors.num_gpus:
                return self._decode_then_extract(listed)
            return self._decode_and_extract(listed, len(scans))

    def _decode_and_extract(self, listed: Any, scans: int) -> Any:
        """Decode and extract in actors that share the CPUs."""
        actors, nodes = self._run.actors, cluster.actor_nodes(self._run)
        processes = count_processes(self._run, nodes, self._memory or 0)
        # Ray only schedules by the memory claim; the worker process enforces the limit of a scan.
        claim = processes * (self._memory or 0)
        size = cpu_pool_size(self._run, nodes, listed.num_blocks(), claim, grows=self._grows)
        processes = 1 if self._pass.isolates_scans else min(processes, math.ceil(scans / size.first))
        # Several tasks at once: while one waits for its first scans, or for its last batch, the others go on.
        calls, per_call = divide_processes(self._run, processes, self._memory or 0)
        setup = WorkerDecoding(self._decoding, per_call, scans_ahead=2 * self._decoding.batch_scans)
        self._workers = Workers(size.first * per_call * calls, size.first * calls, cluster.cpus())
        return listed.map_batches(
            DecodeAndExtractBatch,
            fn_constructor_args=[self._model_loading(), setup, calls],
            batch_size=None,
            compute=_make_pool(size, self._pass, calls),
            num_cpus=actors.cpus * (1 - FREE_SHARE),  # actors fill the machine; writers must fit in
            memory=claim or None,
            resources=actors.resources or None,
            label_selector=actors.label_selector or None,
            max_task_retries=self._task_retries(),
        )

    def _decode_then_extract(self, listed: Any) -> Any:
        """Decode in tasks, extract in actors that have GPUs."""
        actors, decode, batch_scans = self._run.actors, self._run.decode, self._decoding.batch_scans
        setup = WorkerDecoding(replace(self._decoding, batch_scans=1), processes=1, scans_ahead=1)
        size = gpu_pool_size(self._run, cluster.actor_nodes(self._run), grows=self._grows)
        self._workers = self._count_workers()
        decoded = listed.map_batches(
            DecodeBatch(setup),
            batch_size=None,
            num_cpus=decode.num_cpus * (1 - FREE_SHARE),  # so that a writer fits in
            memory=self._memory,
            resources=decode.resources or None,
            label_selector=decode.label_selector or None,
            max_retries=self._retries,
        )
        return decoded.map_batches(
            ExtractBatch,
            fn_constructor_args=[self._model_loading()],
            fn_constructor_kwargs={"isolates_scans": self._pass.isolates_scans},
            batch_size=batch_scans,
            compute=_make_pool(size, self._pass, calls=1 if self._pass.isolates_scans else GPU_CALLS),
            num_cpus=actors.cpus,
            num_gpus=actors.num_gpus,
            resources=actors.resources or None,
            label_selector=actors.label_selector or None,
            max_task_retries=self._task_retries(),
        )

    def _count_workers(self) -> Workers:
        run = self._run
        return count_workers(run, cluster.actor_nodes(run), cluster.decode_nodes(run), self._memory or 0)

    def _count_writers(self) -> int:
        """Return the maximum number of writers: one per node, more only if the cluster may grow."""
        return max(_MIN_GROWING_WRITERS if self._grows else 1, len(cluster.nodes()))

    def _model_loading(self) -> ModelLoading:
        stages = self._stages
        return ModelLoading(stages.load_extractor, stages.recipe, self._run.actors.num_gpus)

    def _task_retries(self) -> int:
        return max(self._retries, int(self._pass.isolates_scans))


def _make_pool(size: PoolSize, current: Pass, calls: int = 1) -> Any:
    import ray

    # Tasks in flight are lost together with their actor, so an isolated scan must be its only task.
    tasks_in_flight = 1 if current.isolates_scans else None
    return ray.data.ActorPoolStrategy(
        min_size=size.least,
        max_size=size.most,
        initial_size=size.first,
        max_tasks_in_flight_per_actor=tasks_in_flight,
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=calls > 1,
    )


def _configure_ray_data(current: Pass) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = _MAX_INIT_DEATHS
    context.max_consecutive_actor_init_deaths = _MAX_INIT_DEATHS
    context.max_errored_blocks = -1 if current.tolerates_lost_tasks else 0
    context.raise_original_map_exception = True  # without it an error of a stage is only a traceback
    context.wait_for_min_actors_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data logs each lost task with a traceback; this package logs a short line instead. A handler that
    # keeps such a record would also keep its frames alive, and with them the actors of the pass and their
    # CPUs.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # This warning is useless if the last scan of a run kills its worker.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
