"""Engine `inline`: helper processes decode, this process holds the model and writes. No Ray.

Each scan is decoded by one of a few helpers, so a decoder that crashes or hangs takes only its own scan
with it. Tensors come back through shared memory. With no helpers everything happens in this process,
for a debugger.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.shared_memory import SharedMemory

import numpy as np
import pyarrow as pa

from featray.config import LimitsConfig
from featray.engines import Stages
from featray.engines.helpers import Helpers, Outcome
from featray.errors import Reason
from featray.machine import usable_cores
from featray.schema import NO_TENSOR, Decoded, Receipt, Scan
from featray.stages.decode import Decoder
from featray.stages.extract import extract

FLUSH_S = 10.0
"""Write what is finished at least this often, so a kill costs little."""
SLOT_BYTES = 64 * 2**20
"""Largest tensor that travels through shared memory; a larger one is sent through the pipe."""


class InlineEngine:
    """See the module. `workers` None means one helper per core, 0 none at all."""

    name = "inline"

    def __init__(self, workers: int | None, limits: LimitsConfig) -> None:
        self._workers = usable_cores() if workers is None else workers
        self._limits = limits
        self._helpers: Helpers | None = None

    def __enter__(self) -> InlineEngine:
        """Start the helpers; they import their libraries while this process loads the model."""
        if self._workers:
            self._helpers = Helpers(self._workers, self._limits.scan_timeout_s)
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the helpers."""
        if self._helpers is not None:
            self._helpers.close()

    def connect(self) -> None:
        """Do nothing: there is nothing to join."""

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
        if self._helpers is None:
            yield from _decode_here(scans, stages, stop)
            return
        size = 2 * self._workers + 2 * stages.batch_scans
        window = _Window(self._helpers, stages.decode, self._limits, size)
        try:
            yield from window.batches(scans, stages.batch_scans, stop)
        finally:
            window.close()


def _decode_here(scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[list[Decoded]]:
    for first in range(0, len(scans), stages.batch_scans):
        if stop.is_set():
            return
        yield [stages.decode(scan) for scan in scans[first : first + stages.batch_scans]]


@dataclass(frozen=True)
class _Attempt:
    """One try to decode one scan into one slot of shared memory (None: through the pipe)."""

    scan: Scan
    slot: str | None
    number: int = 1


@dataclass(frozen=True)
class _Work:
    """What a helper does with an attempt."""

    decode: Decoder

    def __call__(self, attempt: _Attempt) -> Decoded:
        decoded = self.decode(attempt.scan)
        decoded.record.attempts = attempt.number
        return decoded if attempt.slot is None else _park(decoded, _attached(attempt.slot))


class _Window:
    """A bounded number of scans between the listing and the model."""

    def __init__(self, helpers: Helpers, decode: Decoder, limits: LimitsConfig, size: int) -> None:
        self._helpers, self._decode, self._limits = helpers, decode, limits
        self._slots = {slot.name: slot for slot in _make_slots(size, _slot_bytes(decode))}
        self._free: list[str | None] = [*self._slots] or [None] * size
        self._running = 0
        helpers.use(_Work(decode))

    def close(self) -> None:
        """Give the shared memory back."""
        for slot in self._slots.values():
            slot.unlink()
            with contextlib.suppress(BufferError):  # a batch in use when the run was cut short
                slot.close()

    def batches(self, scans: Sequence[Scan], batch: int, stop: threading.Event) -> Iterator[list[Decoded]]:
        """Yield lists of `batch` decoded scans; a list is valid until the next one is asked for."""
        waiting = deque(scans)
        ready: list[tuple[Decoded, str | None]] = []
        while waiting or self._running or ready:
            if stop.is_set():
                waiting.clear()
            while waiting and self._free:
                self._submit(_Attempt(waiting.popleft(), self._free.pop()))
            if self._running and len(ready) < batch:
                ready += self._collect()
            while len(ready) >= batch or (ready and not self._running and not waiting):
                taken, ready = ready[:batch], ready[batch:]
                yield [decoded for decoded, _ in taken]
                for decoded, slot in taken:
                    decoded.tensor = NO_TENSOR  # lets go of the slot
                    self._free.append(slot)

    def _submit(self, attempt: _Attempt) -> None:
        self._helpers.submit(attempt)
        self._running += 1

    def _collect(self) -> list[tuple[Decoded, str | None]]:
        """Wait for outcomes; return those that are settled, and try the others again."""
        settled = []
        for outcome in self._helpers.wait():
            self._running -= 1
            attempt: _Attempt = outcome.task
            if outcome.error == "crash" and attempt.number < self._limits.attempts:
                self._submit(replace(attempt, number=attempt.number + 1))
            else:
                settled.append((self._settle(outcome), attempt.slot))
        return settled

    def _settle(self, outcome: Outcome) -> Decoded:
        attempt: _Attempt = outcome.task
        if outcome.error == "crash":
            message = f"its process died in each of {attempt.number} attempts (exit code {outcome.exit_code})"
            return self._decode.failed(attempt.scan, Reason.WORKER_CRASH, message, attempt.number)
        if outcome.error == "timeout":
            return self._decode.late(attempt.scan, attempt.number)
        decoded: Decoded = outcome.result
        if attempt.slot is None or decoded.parked is None:
            return decoded
        tensor = np.ndarray(decoded.parked, np.float32, self._slots[attempt.slot].buf)
        return replace(decoded, tensor=tensor)


_attachments: dict[str, SharedMemory] = {}


def _attached(name: str) -> SharedMemory:
    """Return the driver's slot as this helper sees it."""
    if name not in _attachments:
        _attachments[name] = SharedMemory(name)
    return _attachments[name]


def _park(decoded: Decoded, slot: SharedMemory) -> Decoded:
    """Move the tensor into the slot if it fits; what remains says its shape and weighs nothing."""
    tensor = decoded.tensor
    if tensor.size == 0 or tensor.nbytes > slot.size:
        return decoded
    np.copyto(np.ndarray(tensor.shape, np.float32, slot.buf), tensor)
    return replace(decoded, tensor=NO_TENSOR, parked=tensor.shape)


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
