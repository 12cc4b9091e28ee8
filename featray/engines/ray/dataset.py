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
from featray.engines.ray.failures import hide_deprecations, raise_original_errors
from featray.engines.ray.passes import Pass
from featray.engines.ray.sizing import PoolSize, cpu_pool_size, gpu_pool_size, task_count
from featray.engines.ray.workers import (
    DecodeAndExtractBatch,
    DecodeBatch,
    ExtractBatch,
    ModelLoading,
    WorkerDecoding,
    WriteBatch,
)
from featray.hardware import Workers
from featray.schema import Receipt, Scan

GPU_CALLS = 2
"""Batches that an actor with a GPU has at once: one is put together and sent while one is computed."""
WRITE_CPUS = 0.001
"""CPU claim of a writer; it runs rarely and briefly, and must never wait for decoding."""
_MAX_INIT_DEATHS = 3
"""Times in a row that an actor may fail or die while it loads the model; each takes Ray about 20 s."""


class PassPipeline:
    """The Ray Data pipeline of one pass over some scans; it runs when its receipts are read.

    Attributes:
        workers: Number of workers of each kind.
    """

    def __init__(
        self, run: RunConfig, decoding: Decoding, stages: Stages, current: Pass, memory: int | None
    ) -> None:
        isolates = current.isolates_scans
        self._run, self._stages, self._pass, self._memory = run, stages, current, memory
        self._decoding = replace(decoding, batch_scans=1) if isolates else decoding
        self._retries = decoding.limits.attempts - 1
        self.workers: Workers | None = None

    def receipts(self, scans: Sequence[Scan]) -> Generator[Receipt]:
        """Run the pass; yield receipts in order of completion."""
        _configure_ray_data(self._pass)
        dataset = self._build(scans)
        with raise_original_errors():
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for text in batch["receipt"].to_pylist():
                    yield Receipt.from_json(text)

    def _build(self, scans: Sequence[Scan]) -> Any:
        import ray

        isolates = self._pass.isolates_scans
        with hide_deprecations():
            tasks = task_count(scans, cluster.cpus(), self._decoding.batch_scans, isolates=isolates)
            listed = ray.data.from_items(
                [{"scan": scan.to_json()} for scan in scans], override_num_blocks=tasks
            )
            has_gpus = bool(self._run.actors.num_gpus)
            extracted = (
                self._decode_then_extract(listed)
                if has_gpus
                else self._decode_and_extract(listed, len(scans))
            )
            return extracted.map_batches(
                WriteBatch,
                fn_constructor_args=[self._stages.write],
                batch_size=1 if isolates else self._stages.scans_per_file,
                batch_format="pyarrow",
                # Actors, because Ray ends idle processes of tasks, and a new process imports for seconds.
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, len(cluster.nodes()))),
                num_cpus=WRITE_CPUS,
                max_task_retries=self._retries,
            )

    def _decode_and_extract(self, listed: Any, scans: int) -> Any:
        """Decode and extract in actors that share the CPUs."""
        actors, memory = self._run.actors, self._memory
        processes = max(1, int(actors.num_cpus))
        # Ray only schedules by the memory claim; the worker process enforces the limit of a scan.
        size = cpu_pool_size(self._run, cluster.nodes(), listed.num_blocks(), processes * (memory or 0))
        processes = min(processes, math.ceil(scans / size.first))
        setup = WorkerDecoding(self._decoding, processes, scans_ahead=2 * self._decoding.batch_scans)
        self.workers = Workers(size.first * processes, size.first, cluster.cpus())
        return listed.map_batches(
            DecodeAndExtractBatch,
            fn_constructor_args=[self._model_loading(), setup],
            batch_size=None,
            compute=_make_pool(size, self._pass),
            num_cpus=max(0.0, actors.num_cpus - WRITE_CPUS),  # actors fill the machine; writers must fit in
            memory=None if memory is None else processes * memory,
            max_task_retries=self._task_retries(),
        )

    def _decode_then_extract(self, listed: Any) -> Any:
        """Decode in tasks, extract in actors that have GPUs."""
        actors, batch_scans = self._run.actors, self._decoding.batch_scans
        setup = WorkerDecoding(replace(self._decoding, batch_scans=1), processes=1, scans_ahead=1)
        size = gpu_pool_size(self._run, cluster.nodes())
        tasks = (cluster.cpus() - size.most * actors.num_cpus) / self._run.decode.num_cpus
        self.workers = Workers(max(1, int(tasks)), size.most * GPU_CALLS, cluster.cpus(), has_gpus=True)
        decoded = listed.map_batches(
            DecodeBatch(setup),
            batch_size=None,
            num_cpus=max(WRITE_CPUS, self._run.decode.num_cpus - WRITE_CPUS),  # so that a writer fits in
            memory=self._memory,
            max_retries=self._retries,
        )
        return decoded.map_batches(
            ExtractBatch,
            fn_constructor_args=[self._model_loading()],
            batch_size=batch_scans,
            compute=_make_pool(size, self._pass, calls=1 if self._pass.isolates_scans else GPU_CALLS),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus,
            max_task_retries=self._task_retries(),
        )

    def _model_loading(self) -> ModelLoading:
        return ModelLoading(self._stages.load_extractor, self._stages.recipe)

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
