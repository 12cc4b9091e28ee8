"""Decoding apart from the process that asks: each scan in a helper, tried again when its helper dies.

Scans in, decoded scans out, in order of completion. What kills its helper every time ends as
`worker_crash`, what takes too long as `timeout`. Tensors come back through shared memory. Both engines
decode this way: `inline` in the driver's helpers, `ray` in a helper of each worker.
"""

from __future__ import annotations

import mmap
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from featray.config import LimitsConfig
from featray.engines.helpers import Helpers, Outcome
from featray.engines.slots import attach, make_slots
from featray.errors import Reason
from featray.schema import NO_TENSOR, Decoded, Scan
from featray.stages.decode import Decoder

SLOT_BYTES = 64 * 2**20
"""Largest tensor that travels through shared memory; a larger one is sent through the pipe."""


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
    attached: dict[str, mmap.mmap | None] = field(default_factory=dict)

    def __call__(self, attempt: _Attempt) -> Decoded:
        decoded = self.decode(attempt.scan)
        decoded.record.attempts = attempt.number
        return decoded if attempt.slot is None else _park(decoded, self._slot(attempt.slot))

    def _slot(self, name: str) -> mmap.mmap | None:
        if name not in self.attached:
            self.attached[name] = attach(name)
        return self.attached[name]


class Attempts:
    """Up to `size` scans between the list and the model, each decoded in one of the helpers.

    Args:
        helpers: Where; they decode for this object alone until it is closed.
        decode: What they do with a scan.
        limits: `attempts` of each scan.
        size: Scans in flight or waiting for the model.
        dumps: Pickles `decode` for the helpers.
    """

    def __init__(
        self,
        helpers: Helpers,
        decode: Decoder,
        limits: LimitsConfig,
        size: int,
        dumps: Callable[[Any], bytes] = pickle.dumps,
    ) -> None:
        self._helpers, self._decode, self._limits = helpers, decode, limits
        self._slots = {slot.name: slot for slot in make_slots(size, _slot_bytes(decode))}
        self._free: list[str | None] = [*self._slots] or [None] * size
        self._running = 0
        helpers.use(dumps(_Work(decode)))

    def close(self) -> None:
        """Give the shared memory back."""
        for slot in self._slots.values():
            slot.close()

    def batches(self, scans: Sequence[Scan], batch: int, stop: threading.Event) -> Iterator[list[Decoded]]:
        """Yield lists of `batch` decoded scans; a list is valid until the next one is asked for.

        Raises:
            FeatrayError: No helper comes up.
        """
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

    def one(self, scan: Scan) -> Decoded:
        """Return one decoded scan; valid until the next one is asked for. Raises as `batches`."""
        self._submit(_Attempt(scan, self._free[0]))
        while not (settled := self._collect()):
            pass
        return settled[0][0]

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
        return replace(decoded, tensor=self._slots[attempt.slot].tensor(decoded.parked))


def _park(decoded: Decoded, slot: mmap.mmap | None) -> Decoded:
    """Move the tensor into the slot if it fits; what remains says its shape and weighs nothing."""
    tensor = decoded.tensor
    if slot is None or tensor.size == 0 or tensor.nbytes > len(slot):
        return decoded
    np.copyto(np.ndarray(tensor.shape, np.float32, slot), tensor)
    return replace(decoded, tensor=NO_TENSOR, parked=tensor.shape)


def _slot_bytes(decode: Decoder) -> int:
    """Return the size of a whole-volume input where it is known."""
    size, fit = decode.preprocess.size, decode.preprocess.fit
    return SLOT_BYTES if size is None or fit == "patches" else min(SLOT_BYTES, 4 * int(np.prod(size)))
