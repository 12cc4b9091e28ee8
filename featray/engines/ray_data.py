"""Engine `ray`: decode in tasks, the model in a pool of actors, writing in tasks, on Ray Data.

The only file that imports Ray. Rows between the stages: a listed scan as JSON → its record, tensor
and origins → its record and features → one receipt per file's worth of scans.

A task decodes in a helper process of its worker (`engines.attempts`), so a scan that crashes or hangs
there is settled inside its task and Ray sees nothing of it. What may still die is a worker as a whole: of
memory, with its node, by the model. Ray would try its task again for ever; so tries are bounded, and there
are up to three passes over what is left: a strict one stops at the first task that is lost; a tolerant one
goes on past them; what that loses is tried alone, so that only the guilty scans are given up.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import math
import os
import queue
import re
import socket
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from featray.config import LimitsConfig, RunConfig
from featray.engines import Stages
from featray.engines.attempts import Attempts
from featray.engines.helpers import Helpers
from featray.engines.memory import decode_memory
from featray.errors import ConfigError, FeatrayError, Reason
from featray.machine import usable_cores
from featray.quiet import hold_back
from featray.schema import Decoded, Receipt, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.extract import extract

log = logging.getLogger(__name__)

WRITE_CPUS = 0.001
"""What a writer claims: it is rare and short, and must never wait behind decoding."""
_CHATTER = re.compile(rb".* logging\.cc:\d+: Set ray log level")
_LOOK_S = 0.2
_KNOCK_S = 10.0
_WINDOWS = (2_000, 8_000, 20_000)
"""Scans given to Ray at once, first, next and from then on: it holds all of them in the driver, some 5 kB
each, and takes 1 ms for each before it begins; but between two windows the actors start anew."""
_BLOCK_BYTES = 8 * 2**20
_BLOCK_SCANS = 64
"""Small scans share a task, for a task costs some 30 ms: up to so many bytes of files and so many scans."""
_TASKS_PER_CPU = 8
"""Tasks that the scans make at least, for each CPU: else some CPUs would be idle in the end."""
_PASSES = ((True, False), (False, False), (False, True))
"""Strict, alone: see the module."""
_SUSPECTS = 20
"""More scans than this left, and none that came through the model: the cluster is broken, not the scans."""
_INIT_DEATHS = 3
"""Times in a row that an actor may fail or die while it loads the model; each takes Ray some 20 s."""
_CANARY = "\0canary"
"""A scan that needs no reading, sent along with suspects: when it comes back, workers and model live."""


class RayEngine:
    """See the module."""

    name = "ray"

    def __init__(self, run: RunConfig, limits: LimitsConfig) -> None:
        self._run, self._limits = run, limits
        self._started = False

    def __enter__(self) -> RayEngine:
        """Do nothing yet: a run that finds nothing to do needs no cluster."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the cluster; one that this engine started ends."""
        if self._started:
            import ray

            ray.shutdown()

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield receipts in order of completion; see the module for scans whose workers die.

        Raises:
            FeatrayError: Workers die whatever the scan: the cluster is to blame, and no scan is given up.
        """
        self.connect()
        decode = _DecodeRow(stages.decode, self._limits, self._run.decode.memory)
        some_came_through = False
        for some in _windows(scans):
            window = {scan.scan_id: scan for scan in some}
            for receipt in self._window(window, stages, decode, stop, some_came_through):
                some_came_through |= any(record.status == "ok" for record in receipt.records)
                yield receipt
            if stop.is_set():
                return

    def _window(
        self,
        left: dict[str, Scan],
        stages: Stages,
        decode: _DecodeRow,
        stop: threading.Event,
        some_came_through: bool,
    ) -> Iterator[Receipt]:
        """Yield the receipts of some scans; `left` loses those that are settled."""
        lives = False
        for strict, alone in _PASSES:
            scans = [*left.values(), *([_canary()] if alone else [])]
            with _crashes_logged() as stopped:
                for receipt in _until(stop, self._pass(scans, stages, decode, strict, alone)):
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
        """Join the cluster of `run.address` or RAY_ADDRESS, or start a local one.

        Raises:
            ConfigError: Nothing answers at the address, or a local Ray has not what a stage claims.
        """
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's own chatter; user code still speaks
        # A thread of Ray Data that outlives a stopped run would else start a cluster of its own.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        # Ray alone would try a task for ever that it kills for lack of memory.
        os.environ.setdefault("RAY_task_oom_retries", str(self._limits.attempts - 1))
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # ours are handled; these are of Ray's own
        import ray

        address = self._run.address or os.environ.get("RAY_ADDRESS")
        _refuse_unreachable(address)
        if not ray.is_initialized():
            with hold_back(_CHATTER):
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **({} if address else _local()),
                )
            self._started = True
        _compare_claims(self._run, ray.cluster_resources(), grows=bool(address))

    def _pass(
        self, scans: list[Scan], stages: Stages, decode: _DecodeRow, strict: bool, alone: bool
    ) -> Iterator[Receipt]:
        _configure(strict)
        dataset = self._dataset(scans, stages, decode, alone)
        with _own_errors():
            for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                for text in batch["receipt"].to_pylist():
                    yield Receipt.from_json(text)

    def _dataset(self, scans: list[Scan], stages: Stages, decode: _DecodeRow, alone: bool) -> Any:
        """Return the lazy pipeline; it runs when its receipts are read. `alone`: no scan shares a batch."""
        import ray

        actors, retries = self._run.actors, self._limits.attempts - 1
        rows = [{"scan": scan.to_json()} for scan in scans]
        pool = ray.data.ActorPoolStrategy(
            min_size=actors.min,
            max_size=_max_actors(self._run),
            max_tasks_in_flight_per_actor=1 if alone else None,  # else others die with it
        )
        tasks = len(scans) if alone else _tasks(scans, ray.cluster_resources().get("CPU", 1))
        with _without_deprecations():
            return (
                ray.data.from_items(rows, override_num_blocks=tasks)
                .map(
                    decode,
                    num_cpus=_decode_cpus(self._run),
                    memory=self._run.decode.memory,
                    max_retries=retries,
                )
                .map_batches(
                    _ExtractBatch,
                    fn_constructor_args=[stages.load_extractor],
                    batch_size=1 if alone else stages.batch_scans,
                    compute=pool,
                    num_cpus=actors.num_cpus,
                    num_gpus=actors.num_gpus or None,
                    max_task_retries=max(retries, int(alone)),
                )
                .map_batches(
                    _WriteBatch(stages.write),
                    batch_size=1 if alone else stages.scans_per_file,
                    batch_format="pyarrow",
                    num_cpus=WRITE_CPUS,
                    max_retries=retries,
                )
            )


class _DecodeRow:
    """Row of a listed scan → row of a model input, made in a helper of this worker."""

    def __init__(self, decode: Decoder, limits: LimitsConfig, memory: int | None) -> None:
        self._decode, self._limits, self._memory = decode, limits, memory
        self._run = uuid.uuid4().hex

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        try:
            decoded = self._attempts().one(Scan.from_json(row["scan"]))
        except BaseException:  # such as a cancelled pass: what the helper is at must not answer the next scan
            _end_workers()
            raise
        return {
            "record": decoded.record.to_json(),
            "tensor": decoded.tensor.reshape(-1).copy(),  # flat: Ray mixes no ranks in a column
            "shape": np.array(decoded.tensor.shape),
            "origins": decoded.origins,
        }

    def _attempts(self) -> Attempts:
        """Return this worker's helper; it starts with the first scan, and ends with the worker."""
        from ray import cloudpickle

        if self._run not in _workers:
            _end_workers()  # of an earlier run
            helpers = Helpers(1, self._limits.scan_timeout_s, decode_memory(self._memory))
            attempts = Attempts(helpers, self._decode, self._limits, 1, dumps=cloudpickle.dumps)
            _workers[self._run] = helpers, attempts
        return _workers[self._run][1]


_workers: dict[str, tuple[Helpers, Attempts]] = {}
"""By run, the helper of this worker process: Ray unpickles `_DecodeRow` anew for each task."""


def _end_workers() -> None:
    for helpers, attempts in _workers.values():
        helpers.close()
        attempts.close()
    _workers.clear()


class _ExtractBatch:
    """Rows of model inputs → rows of features; holds the model."""

    def __init__(self, load_extractor: Any) -> None:
        self._extractor = load_extractor()

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        decoded = [
            Decoded(ScanRecord.from_json(record), np.asarray(tensor).reshape(shape), np.asarray(origins))
            for record, tensor, shape, origins in zip(
                batch["record"], batch["tensor"], batch["shape"], batch["origins"], strict=True
            )
        ]
        return extract(self._extractor, decoded)


class _WriteBatch:
    """Rows of features → one receipt."""

    def __init__(self, write: Any) -> None:
        self._write = write

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.table({"receipt": [self._write(table).to_json()]})


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


def _windows(scans: Sequence[Scan]) -> Iterator[Sequence[Scan]]:
    first = 0
    for size in itertools.chain(_WINDOWS, itertools.repeat(_WINDOWS[-1])):
        if first >= len(scans):
            return
        yield scans[first : first + size]
        first += size


def _tasks(scans: Sequence[Scan], cpus: float) -> int:
    """Return how many tasks decode the scans: one each, unless they are small and many."""
    by_size = math.ceil(sum(scan.size for scan in scans) / _BLOCK_BYTES)
    by_count = math.ceil(len(scans) / _BLOCK_SCANS)
    return min(len(scans), max(by_size, by_count, int(_TASKS_PER_CPU * cpus)))


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what one of our stages has raised on purpose, without Ray's wrapping."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, FeatrayError):
            raise error.cause from None
        raise


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


def _decode_cpus(run: RunConfig) -> float:
    """Return what a decode task claims, never equal to an actor's claim.

    Equal claims would make Ray fuse decoding into the actor and so run it behind the model.
    """
    claim = run.decode.num_cpus
    return claim - WRITE_CPUS if claim == run.actors.num_cpus and not run.actors.num_gpus else claim


def _max_actors(run: RunConfig) -> int:
    """Return the pool's upper bound: as asked, or what leaves most CPUs to decoding."""
    import ray

    actors = run.actors
    if actors.max is not None:
        return actors.max
    resources = ray.cluster_resources()
    if actors.num_gpus:
        return max(actors.min, int(resources.get("GPU", 0) / actors.num_gpus))
    # Decoding a scan costs two to three times the CPU of a small 3-D encoder; a third is the model's.
    return max(actors.min, int(resources.get("CPU", 1) / 3 / max(actors.num_cpus, 0.1)))


def _configure(strict: bool) -> None:
    import ray

    context = ray.data.DataContext.get_current()
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = _INIT_DEATHS
    context.max_consecutive_actor_init_deaths = _INIT_DEATHS
    context.max_errored_blocks = 0 if strict else -1
    context.wait_for_min_actors_s = -1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # It logs each lost task with a traceback; what is to be said about those, this module says. And a handler
    # that keeps such a record would keep the frames in it, with them the pass's actors, and so their CPUs.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Of no use to anybody when the one scan left is the one that kills its worker.
    warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")


def _refuse_unreachable(address: str | None) -> None:
    """Knock at HOST:PORT first: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\s\]]+)\]?:(\d+)", address or "")
    if not found:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_KNOCK_S).close()
    except OSError as error:
        problem = f"run.address: nothing answers at {address} ({type(error).__name__})"
        raise ConfigError(f"{problem}; is the cluster up, and the port that of its head?") from None


def _local() -> dict[str, Any]:
    """Return how to start a Ray on this machine: an actor and a decode task share a lone core."""
    return {"include_dashboard": False, **({"num_cpus": 2} if usable_cores() < 2 else {})}


def _compare_claims(run: RunConfig, resources: Mapping[str, float], *, grows: bool) -> None:
    """Refuse claims a local Ray can never meet: Ray would wait for ever. A cluster may still grow."""
    pool = run.actors.min * run.actors.num_cpus
    claims = {
        "run.actors.num_cpus": (run.actors.num_cpus, "CPU"),
        "run.actors.num_gpus": (run.actors.num_gpus, "GPU"),
        "run.decode.num_cpus": (run.decode.num_cpus, "CPU"),
        "run.decode.memory": (run.decode.memory or 0, "memory"),
        "run.actors (min times num_cpus) beside run.decode": (pool + _decode_cpus(run), "CPU"),
    }
    problems = [
        f"{key}: {claim:g} is claimed, Ray has {resources.get(kind, 0):g} {kind}"
        for key, (claim, kind) in claims.items()
        if claim > resources.get(kind, 0)
    ]
    if problems and not grows:
        raise ConfigError(problems)
    for problem in problems:
        log.warning("%s now; waiting for the cluster to grow", problem)
