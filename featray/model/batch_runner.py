"""Run a traced function on any number of inputs, in calls whose sizes suit the device and its memory.

In: a function of a batch, and a batch. Out: float32 arrays with one row per input. If memory is too short for
a call, its size is halved for the rest of the process. Knows nothing of models and scans.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from featray.errors import DeviceError, InputMemoryError
from featray.model.device_errors import DeviceProblem, classify_error, make_fault_error
from featray.model.inputs import Batch, make_tensor

log = logging.getLogger(__name__)

MAX_MEMORY_FAILURES = 5
"""Inputs in a row that may need too much memory, before the device is to blame and the run stops."""
ADVICE = (
    "choose a smaller preprocess.size, preprocess.fit: patches, or fewer layers, or give the model more: "
    "a larger GPU, run.actors.num_gpus: 1 instead of a fraction, no other program on the GPU"
)

Function = Callable[[Any], Mapping[str, Any]]


class BatchRunner:
    """Runs functions in calls of at most `size` inputs; several threads may use it at the same time.

    Args:
        size: Largest number of inputs in a call.
        is_padded: Whether a smaller last call is filled up with copies of its last input. cuDNN chooses its
            algorithms, and XLA compiles, once per size of a call.
        is_uniform: Whether all inputs have one size, so that none fits into memory if one does not.

    Attributes:
        size: Largest number of inputs in a call; smaller than at first if memory was too short.
        is_reduced: Whether it is smaller.
    """

    def __init__(self, size: int, *, is_padded: bool, is_uniform: bool) -> None:
        self.size, self.is_reduced = size, False
        self._is_padded, self._is_uniform = is_padded, is_uniform
        self._lock, self._gate = threading.Lock(), _CallGate()
        self._largest_inputs: dict[int, int] = {}
        self._failures_in_a_row = 0

    def run(self, function: Function, batch: Batch, *, is_random: bool = False) -> dict[str, Batch]:
        """Return the outputs of a function for all inputs of a batch of at least one.

        Args:
            function: Takes a batch as a tensor.
            batch: float32 (n, …).
            is_random: Whether the function draws random numbers. The numbers depend on the size of a call
                and on earlier calls, so a call is not padded, and a call of one input is not repeated.

        Raises:
            DeviceError: The device has failed, or has less memory than it had.
            InputMemoryError: The memory is too short for one input of this size.
        """
        parts: list[Mapping[str, Batch]] = []
        first = 0
        while first < len(batch):
            size = self.size
            rows = batch[first : first + size]
            padded = _pad(rows, size) if self._is_padded and not is_random else rows
            outputs = self._try_call(function, padded, can_repeat=not is_random)
            if outputs is not None:
                parts.append({name: _cut(array, len(padded), len(rows)) for name, array in outputs.items()})
                first += len(rows)
        return concatenate(parts)

    def _try_call(self, function: Function, rows: Batch, *, can_repeat: bool) -> dict[str, Batch] | None:
        """Return the outputs of one call; None if the call must be repeated with fewer inputs or alone."""
        try:
            with self._gate.enter():
                outputs = {name: np.asarray(value) for name, value in function(make_tensor(rows)).items()}
        except Exception as error:
            problem = classify_error(error)
            if problem is DeviceProblem.FAULT:
                raise make_fault_error(error) from error
            if problem is None:
                raise
            if len(rows) > 1:
                self._reduce(len(rows))
            elif can_repeat and not self._gate.is_narrow:
                self._gate.narrow()
            else:
                raise self._make_memory_error(function, rows) from error
            return None
        self._note_success(function, rows)
        return outputs

    def _reduce(self, failed: int) -> None:
        """Halve the size after a call of `failed` inputs, unless another thread has done so."""
        with self._lock:
            size = max(1, failed // 2)
            if size >= self.size:
                return
            level = logging.INFO if self.is_reduced else logging.WARNING
            text = "memory is too short for %d inputs in a call of the model; this process now runs %d"
            log.log(level, text, failed, size)
            self.size, self.is_reduced = size, True

    def _note_success(self, function: Function, rows: Batch) -> None:
        key, values = id(function), math.prod(rows.shape[1:])
        with self._lock:
            self._failures_in_a_row = 0
            self._largest_inputs[key] = max(values, self._largest_inputs.get(key, 0))

    def _make_memory_error(self, function: Function, rows: Batch) -> DeviceError | InputMemoryError:
        """Return the error for an input that does not fit into memory in a call of its own."""
        shape = "x".join(map(str, rows.shape[1:]))
        with self._lock:
            self._failures_in_a_row += 1
            failures = self._failures_in_a_row
            fitted = math.prod(rows.shape[1:]) <= self._largest_inputs.get(id(function), 0)
        if fitted:
            return DeviceError(
                f"memory is too short for one model input of {shape}, although inputs of this size did fit: "
                "other programs have probably taken the memory. Committed scans are kept; free the memory "
                "(nvidia-smi lists programs on a GPU) and run the same command again"
            )
        if self._is_uniform or failures >= MAX_MEMORY_FAILURES:
            return DeviceError(
                f"memory is too short for the model with one input of {shape}, also in a call of its own. "
                f"Without a scan that comes through, the run stops; {ADVICE}"
            )
        return InputMemoryError(f"memory is too short for the model with one input of {shape}; {ADVICE}")


class _CallGate:
    """Lets any number of calls run at the same time, or one at a time after `narrow`."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._running = 0
        self.is_narrow = False

    @contextlib.contextmanager
    def enter(self) -> Iterator[None]:
        """Run the `with` block as one call."""
        with self._condition:
            self._condition.wait_for(lambda: not (self.is_narrow and self._running))
            self._running += 1
        try:
            yield
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def narrow(self) -> None:
        """Let later calls run one at a time, after those that run now."""
        with self._condition:
            self.is_narrow = True


def _pad(rows: Batch, size: int) -> Batch:
    """Return the rows and as many copies of the last one as fill the batch."""
    if len(rows) >= size:
        return rows
    # Not `np.concatenate`, whose result need not be contiguous if an array was broadcast.
    padded = np.empty((size, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)], padded[len(rows) :] = rows, rows[-1]
    return padded


def _cut(array: Batch, padded: int, rows: int) -> Batch:
    """Return the rows of an output that belong to inputs.

    An output that has not one row per input stays as it is, so that the extractor notices and refuses it.
    """
    return array[:rows] if len(array) == padded else array


def concatenate(parts: Sequence[Mapping[str, Batch]]) -> dict[str, Batch]:
    """Return the outputs of several calls, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
