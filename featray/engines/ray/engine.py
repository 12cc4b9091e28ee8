"""Engine `ray`: decoding and the model in a pool of actors, writing in tasks, on Ray Data.

An actor without a GPU decodes for itself: scans pass through one process and its helpers, as with engine
`inline`, and Ray moves names in and features out. Beside GPUs decoding is tasks of its own, on any CPU of the
cluster, so that as many as it takes keep a GPU busy. What runs in the workers is `engines.ray_stages`, how
many of them there are `engines.ray_sizes`, and where, `engines.ray_cluster`.

Decoding is done in helper processes (`engines.attempts`), so a scan that crashes or hangs
there is settled inside its task and Ray sees nothing of it. What may still die is a worker as a whole: of
memory, with its node, by the model. Ray would try its task again for ever; so tries are bounded, and there
are up to three passes over what is left: a strict one stops at the first task that is lost; a tolerant one
goes on past them; what that loses is tried alone, so that only the guilty scans are given up.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import queue
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from featray.config import LimitsConfig, RunConfig
from featray.engines.base import Stages
from featray.engines.decoding.process_pool import end_early
from featray.engines.ray import cluster
from featray.engines.ray.head_start import Meanwhile
from featray.engines.ray.sizing import PoolSize, cpu_pool_size, gpu_pool_size, memory_claims, task_count
from featray.engines.ray.workers import DecodeAndExtractBatch, DecodeBatch, Decoding, ExtractBatch, WriteBatch
from featray.errors import FeatrayError, Reason
from featray.hardware import ModelThreads, Workers
from featray.schema import Receipt, Scan
from featray.stages.decode import Decoder

log = logging.getLogger(__name__)

WRITE_CPUS = 0.001
"""What a writer claims: it is rare and short, and must never wait behind decoding."""
_LOOK_S = 0.2
_WINDOW = 20_000
"""Scans given to Ray at once: it holds all of them in the driver, some 5 kB each; but between two windows the
actors start anew, which costs as much as some hundred tiny scans."""
_MEANWHILE_S = 2.0
"""How long the pool waits for the scans that are seen to in this process: these use the cores as well."""
_GPU_CALLS = 2
"""Batches that an actor with a GPU has at once: one is put together and sent there while one is computed."""
_PASSES = ((True, False), (False, False), (False, True))
"""Strict, alone: see the module."""
_SUSPECTS = 20
"""More scans than this left, and none that came through the model: the cluster is broken, not the scans."""
_INIT_DEATHS = 3
"""Times in a row that an actor may fail or die while it loads the model; each takes Ray some 20 s."""
_RAYS_ADVICE = re.compile(r"\nFailed to .*", re.DOTALL)
"""What Ray Data adds to an error's text: how to have it try again, in code."""
_CANARY = "\0canary"
"""A scan that needs no reading, sent along with suspects: when it comes back, workers and model live."""


class RayEngine:
    """See the module."""

    name = "ray"

    def __init__(self, run: RunConfig, limits: LimitsConfig) -> None:
        self._run, self._limits = run, limits
        self.threads = ModelThreads(
            each=max(1, int(run.actors.num_cpus)), calls=_GPU_CALLS if run.actors.num_gpus else 1
        )
        self._started = False
        self._workers: Workers | None = None
        self._connecting: Future[None] | None = None
        self._meanwhile = Meanwhile(limits, run.decode.memory, self.threads)
        # It lives as long as the cluster: Ray's processes end with the thread that has started them.
        self._thread = ThreadPoolExecutor(1, "featray-connect")

    def __enter__(self) -> RayEngine:
        """Connect to nothing yet: a run that finds nothing to do needs no cluster."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the cluster; one that this engine started ends."""
        self._meanwhile.close()
        end_early()
        if self._connecting is not None:
            self._connecting.exception()  # only waits: what it raised is told where the cluster is needed
        if self._started:
            import ray

            ray.shutdown()
        self._thread.shutdown()

    def begin(self, scans: Sequence[Scan], decode: Decoder, batch_scans: int) -> None:
        """Connect while this process loads the model; a few scans are begun where Ray must be started."""
        if cluster.is_to_start(self._run) and not self._run.actors.num_gpus:
            self._meanwhile.begin(scans, decode, batch_scans)
        self._connecting = self._thread.submit(self._connect)

    def workers(self) -> Workers | None:
        """Return what the last pass had."""
        return self._workers

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield receipts in order of completion; see the module for scans whose workers die.

        Raises:
            FeatrayError: Workers die whatever the scan: the cluster is to blame, and no scan is given up.
        """
        from featray.engines.ray.metrics import Metrics  # imports ray

        others = self._meanwhile.start(scans, stages, stop)
        self.connect()
        metrics = Metrics(len(scans))
        for receipt in self._with_meanwhile(self._on_ray(others, stages, stop), stop):
            metrics.add(receipt, self._workers)
            yield receipt

    def _with_meanwhile(self, receipts: Iterator[Receipt], stop: threading.Event) -> Iterator[Receipt]:
        """Yield the receipts, and in between those of the scans that are seen to in this process."""
        yield from self._meanwhile.taken(_MEANWHILE_S)
        for receipt in receipts:
            yield from self._meanwhile.taken(0)
            yield receipt
        yield from self._meanwhile.taken(0 if stop.is_set() else None)

    def _on_ray(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        some_came_through = False
        for claim, some in self._claimed_windows(scans):
            window = {scan.scan_id: scan for scan in some}
            for receipt in self._window(window, stages, claim, stop, some_came_through):
                some_came_through |= any(record.status == "ok" for record in receipt.records)
                yield receipt
            if stop.is_set():
                return

    def _window(
        self,
        left: dict[str, Scan],
        stages: Stages,
        memory: int | None,
        stop: threading.Event,
        some_came_through: bool,
    ) -> Iterator[Receipt]:
        """Yield the receipts of some scans; `left` loses those that are settled."""
        lives = False
        for strict, alone in _PASSES:
            scans = [*left.values(), *([_canary()] if alone else [])]
            with _crashes_logged() as stopped:
                for receipt in _until(stop, self._pass(scans, stages, memory, strict, alone)):
                    records = [record for record in receipt.records if record.scan_id != _CANARY]
                    lives |= len(records) < len(receipt.records)
                    some_came_through |= any(record.status == "ok" for record in records)
                    for record in records:
                        del left[record.scan_id]
                    if records:
                        yield receipt
            if stop.is_set() or not left:
                return
            if "ActorDiedError" in stopped and not some_came_through:
                raise _broken(len(left))  # the model's processes die as they load it; a scan cannot do that
            gc.collect()  # the frames that the error came through hold the pass's actors, and these hold CPUs
            if not strict and not some_came_through and len(left) > _SUSPECTS:
                raise _broken(len(left))
        if not lives:
            raise _broken(len(left))
        yield _given_up(list(left.values()), stages, self._limits.attempts)

    def connect(self) -> None:
        """Join the cluster, or start one, unless that has been done; raises as `ray_cluster.connect`."""
        self._connect() if self._connecting is None else self._connecting.result()

    def _connect(self) -> None:
        end_early()  # whoever wanted it has taken it
        self._started = cluster.connect(self._run, self._limits)

    def _claimed_windows(self, scans: Sequence[Scan]) -> Iterator[tuple[int | None, Sequence[Scan]]]:
        """Yield the memory to claim for each worker that decodes, and scans to do with that claim."""
        for claim, some in memory_claims(scans, self._run, cluster.nodes()):
            for first in range(0, len(some), _WINDOW):
                yield claim, some[first : first + _WINDOW]

    def _pass(
        self, scans: list[Scan], stages: Stages, memory: int | None, strict: bool, alone: bool
    ) -> Iterator[Receipt]:
        _configure(strict)
        dataset = self._dataset(scans, stages, memory, alone)
        with _own_errors():
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for text in batch["receipt"].to_pylist():
                    yield Receipt.from_json(text)

    def _dataset(self, scans: list[Scan], stages: Stages, memory: int | None, alone: bool) -> Any:
        """Return the lazy pipeline; it runs when its receipts are read.

        Args:
            scans: To do.
            stages: As given to the engine.
            memory: Bytes that each worker that decodes claims.
            alone: Whether no scan shares a task.
        """
        import ray

        batch = 1 if alone else stages.batch_scans
        rows = [{"scan": scan.to_json()} for scan in scans]
        with _without_deprecations():
            tasks = task_count(scans, cluster.cpus(), batch, alone)
            listed = ray.data.from_items(rows, override_num_blocks=tasks)
            extract = self._apart if self._run.actors.num_gpus else self._together
            return extract(listed, stages, memory, batch, alone).map_batches(
                WriteBatch,
                fn_constructor_args=[stages.write],
                batch_size=1 if alone else stages.scans_per_file,
                batch_format="pyarrow",
                # Actors, for Ray ends idle processes of tasks, and a new one imports for seconds.
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, len(cluster.nodes()))),
                num_cpus=WRITE_CPUS,
                max_task_retries=self._limits.attempts - 1,
            )

    def _together(self, listed: Any, stages: Stages, memory: int | None, batch: int, alone: bool) -> Any:
        """Decode and extract in actors that share the CPUs."""
        actors = self._run.actors
        helpers = max(1, int(actors.num_cpus))
        # The claim is a plan; what bounds a scan is what the config says, or the machine.
        how = Decoding(stages.decode, self._limits, self._run.decode.memory, helpers, ahead=2 * batch)
        size = cpu_pool_size(self._run, cluster.nodes(), listed.num_blocks(), helpers * (memory or 0))
        self._workers = Workers(size.first * helpers, size.first, cluster.cpus())
        return listed.map_batches(
            DecodeAndExtractBatch,
            fn_constructor_args=[stages.load_extractor, how, batch],
            batch_size=None,
            compute=_pool_of(size, alone),
            num_cpus=max(0.0, actors.num_cpus - WRITE_CPUS),  # actors fill the machine; writers must fit in
            memory=None if memory is None else helpers * memory,
            max_task_retries=max(self._limits.attempts - 1, int(alone)),
        )

    def _apart(self, listed: Any, stages: Stages, memory: int | None, batch: int, alone: bool) -> Any:
        """Decode in tasks, extract in actors that have GPUs."""
        actors, retries = self._run.actors, self._limits.attempts - 1
        how = Decoding(stages.decode, self._limits, self._run.decode.memory, helpers=1, ahead=1)
        size = gpu_pool_size(self._run, cluster.nodes())
        left = (cluster.cpus() - size.most * actors.num_cpus) / self._run.decode.num_cpus
        self._workers = Workers(max(1, int(left)), size.most * _GPU_CALLS, cluster.cpus(), has_gpus=True)
        decoded = listed.map_batches(
            DecodeBatch(how),
            batch_size=None,
            num_cpus=max(WRITE_CPUS, self._run.decode.num_cpus - WRITE_CPUS),  # else no writer may fit in
            memory=memory,
            max_retries=retries,
        )
        return decoded.map_batches(
            ExtractBatch,
            fn_constructor_args=[stages.load_extractor],
            batch_size=batch,
            compute=_pool_of(size, alone, calls=1 if alone else _GPU_CALLS),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus,
            max_task_retries=max(retries, int(alone)),
        )


def _until(stop: threading.Event, receipts: Iterator[Receipt]) -> Iterator[Receipt]:
    """Yield receipts until there are no more, or `stop` is set: also while the next one is waited for."""
    arrived: queue.SimpleQueue[Receipt | BaseException | None] = queue.SimpleQueue()

    def pump() -> None:
        try:
            for receipt in receipts:
                arrived.put(receipt)
            arrived.put(None)
        except BaseException as error:  # raised again where the receipts are used
            arrived.put(error)

    threading.Thread(target=pump, name="featray-receipts", daemon=True).start()
    while not (stop.is_set() and arrived.empty()):
        try:
            item = arrived.get(timeout=_LOOK_S)
        except queue.Empty:
            continue
        if item is None:
            return
        if isinstance(item, BaseException):
            try:
                raise item
            finally:
                del item  # else the error would hold this frame, and this frame the error
        yield item


def _canary() -> Scan:
    return Scan(_CANARY, "", "auto", (), "", reason=Reason.WORKER_CRASH, message="only to see who lives")


def _given_up(scans: list[Scan], stages: Stages, attempts: int) -> Receipt:
    message = f"its worker died in each of {attempts} attempts that it had alone"
    decoded = [stages.decode.failed(scan, Reason.WORKER_CRASH, message, attempts) for scan in scans]
    return Receipt((), tuple(scan.record for scan in decoded))


def _broken(scans: int) -> FeatrayError:
    return FeatrayError(
        f"{scans} scans did not come through because workers died, and nothing else came through either: the "
        "cluster is to blame, not the scans. Look at memory and at the Ray logs, then run again; what was "
        "committed is kept."
    )


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what one of our stages has raised on purpose, without Ray's wrapping and advice."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, FeatrayError):
            raise
        cause.args = (_RAYS_ADVICE.sub("", str(cause)), *cause.args[1:])
        raise cause from None


@contextlib.contextmanager
def _crashes_logged() -> Iterator[list[str]]:
    """Let a pass end early when workers die, and put the error's name on the list that this yields.

    Anything else, such as a bug, passes through.
    """
    from ray import exceptions
    from ray.data.exceptions import ExecutionTimeoutError

    crashes = (
        exceptions.ActorDiedError,
        exceptions.ActorUnavailableError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
        ExecutionTimeoutError,
    )
    stopped: list[str] = []
    try:
        yield stopped
    except crashes as error:
        stopped.append(type(error).__name__)
        log.warning("a pass stopped early: %s; what it finished is kept", type(error).__name__)


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    """Keep quiet about bounded retries: Ray 2.60 has no other form for them yet than the old one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*ray_remote_args.*")
        yield


def _pool_of(size: PoolSize, alone: bool, calls: int = 1) -> Any:
    import ray

    return ray.data.ActorPoolStrategy(
        min_size=size.least,
        max_size=size.most,
        initial_size=size.first,
        max_tasks_in_flight_per_actor=1 if alone else None,  # else others die with it
        max_concurrent_calls_per_actor=calls,
        enable_true_multi_threading=calls > 1,
    )


def _configure(strict: bool) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = _INIT_DEATHS
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    context.max_errored_blocks = 0 if strict else -1
    context.raise_original_map_exception = True  # else what a stage raises on purpose is only a traceback
    context.wait_for_min_actors_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It logs each lost task with a traceback; what is to be said about those, this module says. And a handler
    # that keeps such a record would keep the frames in it, with them the pass's actors, and so their CPUs.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Of no use to anybody when the one scan left is the one that kills its worker.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")
