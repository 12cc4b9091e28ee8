"""Engine `ray`: decoding and the model in a pool of actors, writing in a few actors, on Ray Data.

`dataset.py` builds the pipeline of one pass; `passes.py` defines the passes. Scans are decoded in
worker processes (`featray.engines.decoding`), so a scan that crashes or hangs its process is settled inside
its task and Ray does not notice. A whole Ray worker may still die: because memory runs out, with its node, or
in the model. The strict pass stops at the first lost task. The tolerant pass processes the other scans and
continues after lost tasks. Scans that have no result after both passes get a task each in a third pass.
A run of a few scans starts no Ray; see `few_scans.py`.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from featray.config import RunConfig
from featray.engines.base import Decoding, Stages
from featray.engines.decoding.process_pool import end_early
from featray.engines.decoding.work_clock import WorkClock
from featray.engines.inline import InlineEngine
from featray.engines.prefetch import prefetch
from featray.engines.ray import cluster, few_scans
from featray.engines.ray.dataset import PassPipeline
from featray.engines.ray.failures import end_pass_on_crash
from featray.engines.ray.head_start import HeadStart
from featray.engines.ray.model_files import send_model
from featray.engines.ray.passes import MAX_SUSPECTS, FaultCounter, Pass, Window
from featray.engines.ray.sizing import count_threads, enlarge_actors, memory_claims
from featray.engines.ray.start_up import shut_down
from featray.hardware import Capacity, ModelPlace, Workers, count_usable_cores
from featray.schema import Receipt, Scan

_WINDOW_SCANS = 20_000
"""Scans given to Ray at once. Ray holds all of them in the driver, about 5 kB each. Between two windows the
actors start again, which costs as much as some hundred tiny scans."""
_HEAD_START_S = 2.0
"""Seconds that the pool waits for the scans that the driver processes, because they use the same cores."""
_START_WAIT_S = 5.0
"""Seconds that a run that was stopped waits for Ray to start, so that it can end Ray properly."""
_POLL_S = 0.2


class RayEngine:
    """Runs the stages on a Ray cluster; see the module.

    Args:
        run: Address, actors and decode tasks.
        decoding: How scans are decoded.
    """

    name = "ray"

    def __init__(self, run: RunConfig, decoding: Decoding) -> None:
        run = enlarge_actors(run, count_usable_cores()) if cluster.is_to_start(run) else run
        self._run, self._decoding = run, decoding
        self.threads = count_threads(run)
        # This process needs no memory of a GPU: actors run the model, and it runs a few scans on the CPU.
        self.place = ModelPlace.ELSEWHERE if run.actors.num_gpus else ModelPlace.CPU
        self._has_connected = False
        self._has_results = False
        self._faults = FaultCounter()
        self._clock: WorkClock | None = None
        self._was_suspended = False
        self._pipeline: PassPipeline | None = None
        self._connecting: Future[None] | None = None
        self._decoding_since: float | None = None
        self._head_start = HeadStart(decoding, self.threads)
        self._driver: InlineEngine | None = None  # if this process computes all scans
        # This thread lives as long as the cluster, because Ray's processes end with the thread that started
        # them.
        self._thread = ThreadPoolExecutor(1, "featray-connect")

    def __enter__(self) -> RayEngine:
        """Do nothing yet: a run that finds nothing to do needs no cluster."""
        return self

    def __exit__(self, *error: object) -> None:
        """Leave the cluster; a local Ray that this engine started ends."""
        self._head_start.close()
        if self._driver is not None:
            self._driver.__exit__(*error)
        end_early()
        if self._clock is not None:
            self._clock.close()
        if self._connecting is None or wait([self._connecting], _START_WAIT_S).done:
            self._leave()
        else:  # the run was stopped, and Ray cannot be stopped while it starts
            self._connecting.add_done_callback(lambda _: self._leave())
        self._thread.shutdown(wait=False)

    def connect(self) -> None:
        """Join or start the cluster, unless that has been done; raises as `cluster.connect` does."""
        self._connect() if self._connecting is None else self._connecting.result()

    def measure_capacity(self) -> Capacity | None:
        """Return the present capacity of the cluster; None for a local Ray, which is not started."""
        if not cluster.can_grow(self._run):
            return None
        self.connect()
        return cluster.measure_capacity(self._run)

    def prefetch_scans(self, scans: Sequence[Scan]) -> None:
        """Connect while this process loads the model; decode a few scans here if Ray must be started."""
        if few_scans.is_without_ray(self._run, self._decoding, len(scans)):
            self._driver = InlineEngine(self._run.decode.workers or None, self._decoding)
            self.threads = self._driver.threads
            self._driver.prefetch_scans(scans)
            return
        if cluster.is_to_start(self._run) and not self._run.actors.num_gpus:
            self._head_start.prefetch_scans(scans)
        self._decoding_since = time.monotonic()
        self._connecting = self._thread.submit(self._connect)

    def workers(self) -> Workers | None:
        """Return the number of workers of each kind in the last pass."""
        if self._driver is not None:
            return self._driver.workers()
        return None if self._pipeline is None else self._pipeline.workers()

    def decoding_since(self) -> float | None:
        """Return when the start of the cluster or the first pass began."""
        if self._driver is not None:
            return self._driver.decoding_since()
        return self._decoding_since

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield receipts in order of completion; see the module for scans whose workers die.

        Raises:
            FeatrayError: Workers die with every scan, so that the cluster is at fault. No scan is given up.
        """
        if driver := self._choose_driver(len(scans)):
            yield from driver.receipts(scans, stages, stop)
            return
        self._decoding_since = self._decoding_since or time.monotonic()
        remaining = self._head_start.start(scans, stages, stop)
        if not self._connect_unless_stopped(stop):
            yield from self._head_start.take_receipts(_HEAD_START_S)
            return
        # Imported only now, because two threads that import Ray at the same time disturb each other.
        from featray.engines.ray.metrics import Metrics

        if cluster.can_grow(self._run) or not self._has_connected:
            stages = send_model(stages)  # workers of a Ray that was there may have another working directory
        self._metrics = Metrics(stages.run_id, len(scans))
        yield from self._take_head_start(_HEAD_START_S)
        for window, current in self._make_passes(remaining, stop):
            for receipt in self._run_pass(window, current, stages, stop):
                yield from self._take_head_start(0)
                yield receipt
            if current is Pass.ALONE and window.unsettled and not (stop.is_set() or self._was_suspended):
                yield self._count(window.give_up(self._decoding))
        yield from self._take_head_start(0 if stop.is_set() else None)

    def _choose_driver(self, scans: int) -> InlineEngine | None:
        """Return the engine that processes all scans that are due in this process; None if Ray does."""
        if self._driver is not None and scans > few_scans.MAX_SCANS:  # more are due than the new ones
            self._driver.__exit__()
            self._driver = None
        elif (
            self._driver is None
            and self._connecting is None
            and few_scans.is_without_ray(self._run, self._decoding, scans)
        ):
            self._driver = InlineEngine(self._run.decode.workers or None, self._decoding, self.threads)
        return self._driver

    def _connect_unless_stopped(self, stop: threading.Event) -> bool:
        """Connect; return false as soon as `stop` is set. A stop may itself disturb Ray while it starts."""
        self._connecting = self._connecting or self._thread.submit(self._connect)
        while not stop.is_set():
            if wait([self._connecting], _POLL_S).done and not stop.is_set():
                self._connecting.result()
                return True
        return False

    def _run_pass(
        self, window: Window, current: Pass, stages: Stages, stop: threading.Event
    ) -> Iterator[Receipt]:
        """Yield the receipts of one pass, which a thread reads, so that a stop ends the wait at once."""
        self._pipeline = PassPipeline(self._run, self._decoding, stages, current, window.memory)
        receipts = self._pipeline.receipts(window.scans_for(current))
        clock = self._clock = self._clock or WorkClock()
        lost_s = clock.lost_s()
        with end_pass_on_crash() as crash_names:
            for receipt in prefetch(receipts, count=0, stop=stop):
                workers = self.workers()
                self._faults.check(receipt, workers.model if workers else 1)
                settled = window.settle(receipt)
                if settled is not None:
                    self._has_results |= any(record.status == "ok" for record in settled.records)
                    yield self._count(settled)
        # Ray Data, which ends a pass without progress, counts the time in which this process was suspended.
        self._was_suspended = "ExecutionTimeoutError" in crash_names and clock.lost_s() > lost_s
        if window.unsettled and not (stop.is_set() or self._was_suspended):
            self._refuse_broken_cluster(window, current, crash_names)

    def _make_passes(self, scans: Sequence[Scan], stop: threading.Event) -> Iterator[tuple[Window, Pass]]:
        """Yield each window with the passes that it needs: the next pass only if scans are unsettled."""
        for window in self._make_windows(scans):
            for current in Pass:
                yield from self._repeat_pass(window, current, stop)

    def _repeat_pass(
        self, window: Window, current: Pass, stop: threading.Event
    ) -> Iterator[tuple[Window, Pass]]:
        """Yield the pass once, and again as often as it ends because this process was suspended."""
        self._was_suspended = True
        while window.unsettled and self._was_suspended and not stop.is_set():
            self._was_suspended = False
            yield window, current

    def _take_head_start(self, timeout_s: float | None) -> list[Receipt]:
        return [self._count(receipt) for receipt in self._head_start.take_receipts(timeout_s)]

    def _count(self, receipt: Receipt) -> Receipt:
        """Add a receipt to the metrics and return it."""
        self._metrics.add(receipt, self.workers())
        return receipt

    def _refuse_broken_cluster(self, window: Window, current: Pass, crash_names: list[str]) -> None:
        """Raise if the passes so far show that the cluster, not a scan, is at fault."""
        if "ActorDiedError" in crash_names and not self._has_results:
            # Actors died while they loaded the model, which no scan can cause.
            raise window.make_cluster_error()
        gc.collect()  # frames of the error keep the pass's actors alive, and with them their CPUs
        if current.tolerates_lost_tasks and not self._has_results and len(window.unsettled) > MAX_SUSPECTS:
            raise window.make_cluster_error()

    def _make_windows(self, scans: Sequence[Scan]) -> Iterator[Window]:
        """Yield the scans in windows, each with the memory that its workers claim."""
        for memory, claimed in memory_claims(scans, self._run, cluster.decode_nodes(self._run)):
            for first in range(0, len(claimed), _WINDOW_SCANS):
                window = claimed[first : first + _WINDOW_SCANS]
                yield Window({scan.scan_id: scan for scan in window}, memory)

    def _leave(self) -> None:
        if self._has_connected:
            shut_down()

    def _connect(self) -> None:
        end_early()  # the head start has taken the worker process by now, if it needs one
        self._has_connected = cluster.connect(self._run, self._decoding.limits)
