"""Decoding apart from the process that asks: each scan in a helper, tried again when its helper dies.

Scans in, decoded scans out, in order of completion. What kills its helper every time ends as
`worker_crash`, what takes too long as `timeout`. Tensors come back through shared memory. Tiny scans go to
a helper many at a time, and one by one when that did not end well. Both engines decode this way: `inline` in
the driver's helpers, `ray` in helpers of each worker.
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

from featray.config import LimitsConfig
from featray.engines.decoding.process_pool import Helpers, Outcome
from featray.engines.decoding.shared_memory import attach, make_slots
from featray.errors import Reason
from featray.schema import NO_TENSOR, Decoded, Scan
from featray.stages.decode import Decoder

SLOT_BYTES = 64 * 2**20
"""Largest tensor that travels through shared memory; a larger one is sent through the pipe."""
TINY_BYTES = 64 * 2**10
"""Scans of at most so many bytes as listed share a message: asking and answering costs more than decoding."""
TINY_SCANS = 32


@dataclass(frozen=True)
class _Attempt:
    """One try to decode one scan into a slot of shared memory (None: through the pipe), or several tiny ones.

    Attributes:
        scans: One; or several, whose tensors all go through the pipe.
        slot: Where the tensor of a single one is put.
        number: From 1.
        has_place: Whether it takes up one of the places between the list and the model.
    """

    scans: tuple[Scan, ...]
    slot: str | None
    number: int = 1
    has_place: bool = True


_Settled = tuple[Decoded, _Attempt]


@dataclass(frozen=True)
class _Work:
    """What a helper does with an attempt."""

    decode: Decoder
    attached: dict[str, mmap.mmap | None] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the helper ready before the first attempt."""
        self.decode.prepare()

    def __call__(self, attempt: _Attempt) -> list[Decoded]:
        found = [self.decode(scan) for scan in attempt.scans]
        for decoded in found:
            decoded.record.attempts = attempt.number
        if attempt.slot is None or len(found) > 1:
            return found
        return [_park(found[0], self._slot(attempt.slot))]

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
        size: Scans, or messages of tiny ones, in flight or waiting for the model.
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
        self._begun: set[str] = set()
        self._running = 0
        helpers.use(dumps(_Work(decode)))

    def close(self) -> None:
        """Give the shared memory back."""
        for slot in self._slots.values():
            slot.close()

    def begin(self, scans: Sequence[Scan]) -> None:
        """Start on as many scans as there is room for; the next `batches` goes on from there."""
        waiting = deque(scans)
        while waiting and self._free:
            self._begun |= {scan.scan_id for scan in self._submit_next(waiting)}

    def batches(
        self,
        scans: Sequence[Scan],
        batch: int,
        stop: threading.Event,
        decode: Decoder | None = None,
        kept: int = 1,
    ) -> Generator[list[Decoded]]:
        """Yield lists of `batch` decoded scans, each of them valid until `kept` later ones are asked for.

        Args:
            scans: To decode. What was begun and is not among them is left out.
            batch: Scans per list; the last one may have fewer.
            stop: Once set, only what is under way is still yielded.
            decode: Whose run and recipe the records are to name, if it was not known to begin with.
            kept: Lists in use at once. The last ones stay valid, and keep their places, until the end.

        Raises:
            FeatrayError: No helper comes up.
        """
        self._decode = decode or self._decode
        begun, self._begun = self._begun, set()
        waiting = deque(scan for scan in scans if scan.scan_id not in begun)
        unwanted = begun - {scan.scan_id for scan in scans} if begun else begun
        ready: list[_Settled] = []
        in_use: deque[list[_Settled]] = deque()
        while waiting or self._running or ready:
            if stop.is_set():
                waiting.clear()
            while waiting and self._free:
                self._submit_next(waiting)
            if self._running and len(ready) < batch:
                ready += self._collect(unwanted)
            while len(ready) >= batch or (ready and not self._running and not waiting):
                taken, ready = ready[:batch], ready[batch:]
                yield [decoded for decoded, _ in taken]
                in_use.append(taken)
                for decoded, attempt in in_use.popleft() if len(in_use) == kept else ():
                    decoded.tensor = NO_TENSOR  # lets go of the slot
                    self._release(attempt)

    def _submit_next(self, waiting: deque[Scan]) -> tuple[Scan, ...]:
        """Give a helper the next scan, or all of the next tiny ones; return them."""
        scans = [waiting.popleft()]
        while waiting and len(scans) < TINY_SCANS and _is_tiny(scans[-1]) and _is_tiny(waiting[0]):
            scans.append(waiting.popleft())
        self._submit(_Attempt(tuple(scans), self._free.pop()))
        return tuple(scans)

    def _submit(self, attempt: _Attempt) -> None:
        self._helpers.submit(attempt)
        self._running += 1

    def _release(self, attempt: _Attempt) -> None:
        if attempt.has_place:
            self._free.append(attempt.slot)

    def _collect(self, unwanted: set[str]) -> list[_Settled]:
        """Wait for outcomes; return the scans that are settled, and try the others again."""
        wanted = []
        for outcome in self._helpers.wait():
            self._running -= 1
            for decoded, attempt in self._settled(outcome):
                if decoded.record.scan_id in unwanted:
                    self._release(attempt)
                else:
                    wanted.append((decoded, attempt))
        return wanted

    def _settled(self, outcome: Outcome) -> list[_Settled]:
        attempt: _Attempt = outcome.task
        if len(attempt.scans) > 1:
            self._release(attempt)
            attempt = replace(attempt, slot=None, has_place=False)
        if outcome.error and len(attempt.scans) > 1:  # one of them is to blame: each is tried alone
            number = min(attempt.number + 1, self._limits.attempts)
            for scan in attempt.scans:
                self._submit(replace(attempt, scans=(scan,), number=number))
            return []
        if outcome.error == "crash" and attempt.number < self._limits.attempts:
            self._submit(replace(attempt, number=attempt.number + 1))
            return []
        found = [self._given_up(outcome)] if outcome.error else outcome.result
        return [(self._completed(decoded, attempt), attempt) for decoded in found]

    def _given_up(self, outcome: Outcome) -> Decoded:
        attempt: _Attempt = outcome.task
        (scan,) = attempt.scans
        if outcome.error == "timeout":
            return self._decode.late(scan, attempt.number)
        message = f"its process died in each of {attempt.number} attempts (exit code {outcome.exit_code})"
        return self._decode.failed(scan, Reason.WORKER_CRASH, message, attempt.number)

    def _completed(self, decoded: Decoded, attempt: _Attempt) -> Decoded:
        """Return a scan with its tensor out of shared memory, in the name of this run."""
        decoded.record.recipe, decoded.record.run_id = self._decode.recipe, self._decode.run_id
        if attempt.slot is None or decoded.parked is None:
            return decoded
        return replace(decoded, tensor=self._slots[attempt.slot].tensor(decoded.parked))


def _is_tiny(scan: Scan) -> bool:
    return 0 < scan.size <= TINY_BYTES  # 0: nobody knows


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
