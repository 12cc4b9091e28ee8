"""Decode scans in worker processes: listed scans in, decoded scans out, in order of completion.

A scan whose process dies is decoded again; if its process dies in every attempt, the scan fails with
`worker_crash`. A scan that takes too long fails with `timeout`; if its process was suspended for too long, it
is decoded again. Tensors return through shared memory. Tiny
scans are sent many at a time, and one by one if that fails. Engine `inline` uses a pool in the driver, engine
`ray` a pool in each of its workers.
"""

from __future__ import annotations

import mmap
import pickle
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from featray.engines.base import Decoding
from featray.engines.decoding.process_pool import TaskResult, WorkerPool
from featray.engines.decoding.shared_memory import attach_buffer, create_buffers
from featray.errors import Reason
from featray.schema import NO_TENSOR, Decoded, Scan
from featray.stages.decode import Decoder

MAX_BUFFER_BYTES = 64 * 2**20
"""Size of the largest tensor that is returned through shared memory; a larger one goes through the pipe."""
TINY_SCAN_BYTES = 64 * 2**10
"""Listed size up to which scans share a message, because a message costs more than decoding them."""
TINY_SCANS_PER_TASK = 32
MAX_SUSPENSIONS = 10
"""Times that a scan is decoded again because its process was suspended for too long."""


@dataclass(frozen=True)
class _Attempt:
    """One attempt to decode one scan, or several tiny ones.

    Attributes:
        scans: One scan; or several scans, and then all tensors go through the pipe.
        buffer: Name of the shared-memory buffer for the tensor of a single scan; None for the pipe.
        number: Number of the attempt, from 1.
        suspensions: Number of times that the process of this attempt was suspended for too long.
        holds_place: Whether the attempt takes one of the pool's places.
    """

    scans: tuple[Scan, ...]
    buffer: str | None
    number: int = 1
    suspensions: int = 0
    holds_place: bool = True


_SettledScan = tuple[Decoded, _Attempt]
_DueLayers = dict[str, tuple[str, ...] | None]
"""Id of each prefetched scan → its due layers; None if the scan is not due."""


@dataclass(frozen=True)
class _DecodeWork:
    """The function that a worker process runs on each attempt."""

    decoder: Decoder
    buffers: dict[str, mmap.mmap | None] = field(default_factory=dict)

    def prepare(self) -> None:
        """Prepare the worker process before the first attempt."""
        self.decoder.prepare()

    def __call__(self, attempt: _Attempt) -> list[Decoded]:
        decoded = [self.decoder(scan) for scan in attempt.scans]
        for scan in decoded:
            scan.record.attempts = attempt.number
        if attempt.buffer is None or len(decoded) > 1:
            return decoded
        return [_move_to_buffer(decoded[0], self._attach(attempt.buffer))]

    def _attach(self, name: str) -> mmap.mmap | None:
        if name not in self.buffers:
            self.buffers[name] = attach_buffer(name)
        return self.buffers[name]


class ScanDecodePool:
    """Decodes scans in a pool of worker processes, with a limited number of scans in flight.

    Args:
        pool: The processes; they work for this object alone until it is closed.
        decoding: How scans are decoded.
        size: Number of scans (or messages with tiny scans) that are being decoded or wait for the model.
        dumps: Pickles the decoder for the processes.
    """

    def __init__(
        self,
        pool: WorkerPool,
        decoding: Decoding,
        size: int,
        dumps: Callable[[Any], bytes] = pickle.dumps,
    ) -> None:
        self._pool, self._decoding = pool, decoding
        self._buffers = {
            buffer.name: buffer for buffer in create_buffers(size, _buffer_bytes(decoding.decoder))
        }
        self._free_places: list[str | None] = [*self._buffers] or [None] * size
        self._prefetched: set[str] = set()
        self._running = 0
        pool.set_work(dumps(_DecodeWork(decoding.decoder)))

    def close(self) -> None:
        """Free the shared memory."""
        for buffer in self._buffers.values():
            buffer.close()

    def prefetch(self, scans: Sequence[Scan]) -> None:
        """Submit as many scans as there are places; the next call of `batches` yields them first."""
        waiting = deque(scans)
        while waiting and self._free_places:
            self._prefetched |= {scan.scan_id for scan in self._submit_next(waiting)}

    def batches(
        self, scans: Sequence[Scan], stop: threading.Event, batches_in_use: int = 1
    ) -> Generator[list[Decoded]]:
        """Yield lists of `batch_scans` decoded scans, in order of completion.

        Args:
            scans: Scans to decode. A prefetched scan that is not among them is dropped; one that is among
                them gets its due layers from there, because another run may have committed layers meanwhile.
            stop: Once it is set, only scans that were submitted are still yielded.
            batches_in_use: Number of lists that the caller uses at once: a list stays valid until that many
                later lists are asked for. The last lists stay valid, and keep their places.

        Raises:
            FeatrayError: No worker process can start.
        """
        waiting, due_layers = self._take_prefetched(scans)
        size = self._decoding.batch_scans
        ready: list[_SettledScan] = []
        in_use: deque[list[_SettledScan]] = deque()
        while waiting or self._running or ready:
            if stop.is_set():
                waiting.clear()
            while waiting and self._free_places:
                self._submit_next(waiting)
            if self._running and len(ready) < size:
                ready += self._collect(due_layers)
            while len(ready) >= size or (ready and not self._running and not waiting):
                batch, ready = ready[:size], ready[size:]
                yield [decoded for decoded, _ in batch]
                in_use.append(batch)
                if len(in_use) == batches_in_use:
                    self._release_batch(in_use.popleft())

    def _take_prefetched(self, scans: Sequence[Scan]) -> tuple[deque[Scan], _DueLayers]:
        """Return the scans that are not prefetched, and the due layers of each prefetched scan."""
        prefetched, self._prefetched = self._prefetched, set()
        due_layers: _DueLayers = dict.fromkeys(prefetched)
        waiting: deque[Scan] = deque()
        for scan in scans:
            if scan.scan_id in prefetched:
                due_layers[scan.scan_id] = scan.due_layers
            else:
                waiting.append(scan)
        return waiting, due_layers

    def _submit_next(self, waiting: deque[Scan]) -> tuple[Scan, ...]:
        """Submit the next scan, or the next tiny scans together; return them."""
        scans = [waiting.popleft()]
        while waiting and len(scans) < TINY_SCANS_PER_TASK and _is_tiny(scans[-1]) and _is_tiny(waiting[0]):
            scans.append(waiting.popleft())
        self._submit(_Attempt(tuple(scans), self._free_places.pop()))
        return tuple(scans)

    def _submit(self, attempt: _Attempt) -> None:
        self._pool.submit(attempt)
        self._running += 1

    def _release_batch(self, batch: list[_SettledScan]) -> None:
        for decoded, attempt in batch:
            decoded.tensor = NO_TENSOR  # the buffer may be written again
            self._release_place(attempt)

    def _release_place(self, attempt: _Attempt) -> None:
        if attempt.holds_place:
            self._free_places.append(attempt.buffer)

    def _collect(self, due_layers: _DueLayers) -> list[_SettledScan]:
        """Wait for results; return the settled scans, and submit the others again.

        Args:
            due_layers: Due layers of each prefetched scan.
        """
        settled = []
        for result in self._pool.wait():
            self._running -= 1
            for decoded, attempt in self._settle(result):
                due = due_layers.get(decoded.record.scan_id, decoded.record.due_layers)
                if due is None:
                    self._release_place(attempt)
                else:
                    decoded.record.due_layers = list(due)
                    settled.append((decoded, attempt))
        return settled

    def _settle(self, result: TaskResult) -> list[_SettledScan]:
        attempt: _Attempt = result.task
        max_attempts = self._decoding.limits.attempts
        if result.failure == "suspended" and attempt.suspensions < MAX_SUSPENSIONS:
            self._submit(replace(attempt, suspensions=attempt.suspensions + 1))
            return []
        if len(attempt.scans) > 1:
            self._release_place(attempt)
            attempt = replace(attempt, buffer=None, holds_place=False)
        if result.failure and len(attempt.scans) > 1:  # one of them caused it: each is decoded alone
            number = min(attempt.number + 1, max_attempts)
            for scan in attempt.scans:
                self._submit(replace(attempt, scans=(scan,), number=number))
            return []
        if result.failure == "crash" and attempt.number < max_attempts:
            self._submit(replace(attempt, number=attempt.number + 1))
            return []
        scans = [self._fail(result)] if result.failure else result.result
        return [(self._load_tensor(decoded, attempt), attempt) for decoded in scans]

    def _fail(self, result: TaskResult) -> Decoded:
        attempt: _Attempt = result.task
        (scan,) = attempt.scans
        decoder = self._decoding.decoder
        if result.failure in ("timeout", "suspended"):
            return decoder.fail_late(scan, attempt.number)
        message = f"its process died in each of {attempt.number} attempts (exit code {result.exit_code})"
        return decoder.fail(scan, Reason.WORKER_CRASH, message, attempt.number)

    def _load_tensor(self, decoded: Decoded, attempt: _Attempt) -> Decoded:
        """Return the scan with its tensor in the shared-memory buffer, if it was returned through one."""
        if attempt.buffer is None or decoded.shared_shape is None:
            return decoded
        return replace(decoded, tensor=self._buffers[attempt.buffer].tensor(decoded.shared_shape))


def _is_tiny(scan: Scan) -> bool:
    return 0 < scan.size <= TINY_SCAN_BYTES  # 0: the size is not known


def _move_to_buffer(decoded: Decoded, buffer: mmap.mmap | None) -> Decoded:
    """Copy the tensor into the buffer if it fits; the returned scan then has only the tensor's shape."""
    tensor = decoded.tensor
    if buffer is None or tensor.size == 0 or tensor.nbytes > len(buffer):
        return decoded
    np.copyto(np.ndarray(tensor.shape, np.float32, buffer), tensor)
    return replace(decoded, tensor=NO_TENSOR, shared_shape=tensor.shape)


def _buffer_bytes(decoder: Decoder) -> int:
    """Return the size of a whole-volume model input if the config fixes it, otherwise the maximum."""
    size, fit = decoder.preprocess.size, decoder.preprocess.fit
    if size is None or fit == "patches":
        return MAX_BUFFER_BYTES
    return min(MAX_BUFFER_BYTES, 4 * int(np.prod(size)))
