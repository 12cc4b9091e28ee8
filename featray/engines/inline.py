"""Engine `inline`: helper processes decode, this process holds the model and writes. No Ray.

Each scan is decoded by one of a few helper processes, so a decoder that crashes or hangs takes only
its own scan with it. Tensors come back through shared memory. With no helpers everything happens in
this process, for a debugger.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field, replace
from multiprocessing import popen_spawn_posix, spawn
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
import pyarrow as pa
from pebble import ProcessExpired, ProcessFuture, ProcessPool

from featray.config import LimitsConfig
from featray.engines import Stages
from featray.errors import Reason
from featray.schema import Decoded, Receipt, Scan
from featray.stages.decode import Decoder
from featray.stages.extract import extract

FLUSH_S = 10.0
"""Write what is finished at least this often, so a kill costs little."""
SLOT_BYTES = 64 * 2**20
"""Largest tensor that travels through shared memory; a larger one is sent through the pipe."""


_NOTHING = np.zeros((0, 1, 1, 1), np.float32)


class InlineEngine:
    """See the module. `workers` None means one helper per core, 0 none at all."""

    name = "inline"

    def __init__(self, workers: int | None, limits: LimitsConfig) -> None:
        self._workers = len(os.sched_getaffinity(0)) if workers is None else workers
        self._limits = limits
        self._pool: ProcessPool | None = None

    def __enter__(self) -> InlineEngine:
        """Start the helpers; they import their libraries while this process loads the model."""
        if self._workers:
            self._pool = ProcessPool(
                max_workers=self._workers, initializer=_start_helper, context=_SpawnWithoutMain()
            )
            for _ in range(self._workers):
                self._pool.schedule(_warm_up)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the helpers."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield a receipt for every file's worth of scans, or every ten seconds."""
        rows: list[pa.Table] = []
        flushed = time.monotonic()
        for batch in self._batches(scans, stages, stop):
            rows.append(extract(stages.extractor, batch))
            full = sum(len(table) for table in rows) >= stages.scans_per_file
            if full or time.monotonic() - flushed > FLUSH_S:
                yield stages.write(pa.concat_tables(rows))
                rows, flushed = [], time.monotonic()
        if rows:
            yield stages.write(pa.concat_tables(rows))

    def _batches(
        self, scans: Sequence[Scan], stages: Stages, stop: threading.Event
    ) -> Iterator[list[Decoded]]:
        """Yield decoded scans in lists of `batch_scans`, in order of completion."""
        if self._pool is None:
            yield from _decode_here(scans, stages, stop)
            return
        window = _Window(self._pool, stages.decode, self._limits, 2 * self._workers + 2 * stages.batch_scans)
        try:
            yield from window.batches(scans, stages.batch_scans, stop)
        finally:
            window.close()


def _decode_here(scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[list[Decoded]]:
    for first in range(0, len(scans), stages.batch_scans):
        if stop.is_set():
            return
        yield [stages.decode(scan) for scan in scans[first : first + stages.batch_scans]]


@dataclass
class _Attempt:
    """One try to decode one scan, in one slot of shared memory (None: through the pipe)."""

    scan: Scan
    number: int
    slot: SharedMemory | None
    decoded: Decoded = field(init=False)


class _Window:
    """A bounded number of scans in flight in a pool of helpers."""

    def __init__(self, pool: ProcessPool, decode: Decoder, limits: LimitsConfig, size: int) -> None:
        self._pool, self._decode, self._limits = pool, decode, limits
        self._slots = _make_slots(size, _slot_bytes(decode))
        self._free: list[SharedMemory | None] = list(self._slots) or [None] * size
        self._done: queue.SimpleQueue[tuple[_Attempt, ProcessFuture]] = queue.SimpleQueue()
        self._running = 0

    def close(self) -> None:
        """Give the shared memory back."""
        for slot in self._slots:
            slot.unlink()
            with contextlib.suppress(BufferError):  # a batch in use when the run was cut short
                slot.close()

    def batches(self, scans: Sequence[Scan], batch: int, stop: threading.Event) -> Iterator[list[Decoded]]:
        """Yield lists of `batch` decoded scans; a list is valid until the next one is asked for."""
        waiting = deque(scans)
        ready: list[_Attempt] = []
        while waiting or self._running or ready:
            if stop.is_set():
                waiting.clear()
            while waiting and self._free:
                self._submit(_Attempt(waiting.popleft(), 1, self._free.pop()))
            if self._running:
                ready += self._collect()
            if len(ready) >= batch or not (self._running or waiting):
                yield [attempt.decoded for attempt in ready]
                for attempt in ready:
                    attempt.decoded.tensor_nzyx = _NOTHING  # lets go of the slot
                    self._free.append(attempt.slot)
                ready = []

    def _submit(self, attempt: _Attempt) -> None:
        name = attempt.slot.name if attempt.slot else None
        future = self._pool.schedule(
            _decode_in_helper, args=(self._decode, attempt.scan, name), timeout=self._limits.scan_timeout_s
        )
        self._running += 1
        future.add_done_callback(lambda done: self._done.put((attempt, done)))

    def _collect(self) -> list[_Attempt]:
        """Wait for one scan; return it when it is settled, nothing when it is tried again."""
        attempt, future = self._done.get()
        self._running -= 1
        try:
            attempt.decoded = _unpark(future.result(), attempt.slot)
        except FutureTimeoutError:
            message = f"no result after {self._limits.scan_timeout_s:g} s (limits.scan_timeout_s)"
            attempt.decoded = self._decode.failed(attempt.scan, Reason.TIMEOUT, message, attempt.number)
        except ProcessExpired as error:
            if attempt.number < self._limits.attempts:
                self._submit(replace(attempt, number=attempt.number + 1))
                return []
            message = f"its process died in each of {attempt.number} attempts (exit code {error.exitcode})"
            attempt.decoded = self._decode.failed(attempt.scan, Reason.WORKER_CRASH, message, attempt.number)
        attempt.decoded.record.attempts = attempt.number
        return [attempt]


def _start_helper() -> None:
    # Ctrl-C reaches the whole process group; only the driver decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _warm_up() -> None:
    """Import what decoding needs; unpickling this function's module has done so already."""


def _decode_in_helper(decode: Decoder, scan: Scan, slot: str | None) -> Decoded:
    decoded = decode(scan)
    return decoded if slot is None else _park(decoded, _attached(slot))


_attachments: dict[str, SharedMemory] = {}


def _attached(name: str) -> SharedMemory:
    if name not in _attachments:
        _attachments[name] = SharedMemory(name)
    return _attachments[name]


def _park(decoded: Decoded, slot: SharedMemory) -> Decoded:
    """Move the tensor into the slot if it fits; what remains says its shape and weighs nothing."""
    tensor = decoded.tensor_nzyx
    if tensor.size == 0 or tensor.nbytes > slot.size:
        return decoded
    np.copyto(np.ndarray(tensor.shape, np.float32, slot.buf), tensor)
    return replace(decoded, tensor_nzyx=_NOTHING, parked=tensor.shape)


def _unpark(decoded: Decoded, slot: SharedMemory | None) -> Decoded:
    if slot is None or decoded.parked is None:
        return decoded
    return replace(decoded, tensor_nzyx=np.ndarray(decoded.parked, np.float32, slot.buf))


def _slot_bytes(decode: Decoder) -> int:
    size = decode.preprocess.size
    return SLOT_BYTES if size is None else min(SLOT_BYTES, 4 * int(np.prod(size)))


def _make_slots(count: int, size: int) -> list[SharedMemory]:
    """Return shared memory for `count` tensors, or none where the machine has too little of it."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return []
    if free < 2 * count * size:  # a container often has 64 MB; writing past it would kill the process
        return []
    return [SharedMemory(create=True, size=size) for _ in range(count)]


_preparation_lock = threading.Lock()


class _Popen(popen_spawn_posix.Popen):
    """Spawn without importing the caller's `__main__` again.

    A user's script need not guard its call of featray with `if __name__ == "__main__"`: everything
    a helper runs is importable from featray itself.
    """

    def _launch(self, process_obj: Any) -> None:
        with _preparation_lock:
            original = spawn.get_preparation_data
            spawn.get_preparation_data = _without_main(original)
            try:
                super()._launch(process_obj)  # type: ignore[misc]  # not in the type stubs
            finally:
                spawn.get_preparation_data = original


def _without_main(original: Any) -> Any:
    def get_preparation_data(name: str) -> dict[str, Any]:
        data: dict[str, Any] = original(name)
        return {key: value for key, value in data.items() if not key.startswith("init_main")}

    return get_preparation_data


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  # the name multiprocessing calls
        return _Popen(process_obj)


class _SpawnWithoutMain(SpawnContext):
    Process = _Process
