"""The callables that Ray's workers run: rows of listed scans in, rows of features or of receipts out.

Rows between the stages: a listed scan as JSON → its record and features → one receipt for a file of scans. If
actors have GPUs, decoding runs apart from them, on any CPU of the cluster; the rows in between hold a record,
a tensor and its origins. Without GPUs an actor decodes its own scans, and nothing large moves between
processes.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featray.engines.base import Decoding
from featray.engines.decoding.memory_limit import decode_memory
from featray.engines.decoding.process_pool import WorkerPool
from featray.engines.decoding.scan_pool import ScanDecodePool
from featray.engines.ray.actor_model import ActorModel, ModelLoading
from featray.schema import Decoded, Receipt, Scan, ScanRecord

_NEVER = threading.Event()
_POOL_START_S = 5.0
"""Seconds that an actor waits for its worker processes before it loads the model."""


@dataclass(frozen=True)
class WorkerDecoding:
    """How one Ray worker decodes; travels to the worker.

    Attributes:
        decoding: How scans are decoded.
        processes: Number of worker processes in each Ray worker.
        scans_ahead: Number of scans that are decoded while the Ray worker is busy with earlier ones.
    """

    decoding: Decoding
    processes: int
    scans_ahead: int


class WorkerScanPool:
    """The worker processes of one Ray worker, and the scans they decode."""

    def __init__(self, setup: WorkerDecoding) -> None:
        from ray import cloudpickle  # pickles a decoder whose class only the driver can import

        decoding = setup.decoding
        self._processes = WorkerPool(
            setup.processes, decoding.limits.scan_timeout_s, decode_memory(decoding.memory)
        )
        size = setup.processes + setup.scans_ahead
        self._pool = ScanDecodePool(self._processes, decoding, size, cloudpickle.dumps)

    def batches(self, scans: Sequence[Scan]) -> Iterator[list[Decoded]]:
        """Yield lists of decoded scans; a list is valid until the next one is asked for."""
        return self._pool.batches(scans, _NEVER)

    def has_started(self) -> bool:
        """Return whether the worker processes can decode, as of the last batch."""
        return self._processes.has_started()

    def close(self) -> None:
        """End the worker processes at once."""
        self._processes.close()
        self._pool.close()


class DecodeBatch:
    """Rows of listed scans → rows of model inputs, decoded in a worker process of this Ray worker."""

    def __init__(self, setup: WorkerDecoding) -> None:
        self._setup, self._id = setup, uuid.uuid4().hex

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield one row at a time, because all tensors of a block need not fit into memory."""
        with _close_pools_on_error():
            for batch_of_one in self._get_pool().batches(_parse_scans(batch)):
                (decoded,) = batch_of_one
                yield {
                    "record": [decoded.record.to_json()],
                    # Flat, because Ray accepts only one rank in a column; copied, because the next scan
                    # overwrites the buffer.
                    "tensor": decoded.tensor.reshape(1, -1).copy(),
                    "shape": np.array([decoded.tensor.shape]),
                    "origins": decoded.origins[None],
                }

    def _get_pool(self) -> WorkerScanPool:
        """Return this Ray worker's pool; it starts with the first scan and ends with the Ray worker."""
        if self._id not in _pools:
            _close_pools()  # of an earlier pass
            _pools[self._id] = WorkerScanPool(self._setup)
        return _pools[self._id]


_pools: dict[str, WorkerScanPool] = {}
"""The pool of this Ray worker, by pass. Ray unpickles a new `DecodeBatch` for each task, so a `DecodeBatch`
cannot hold the pool."""


def _close_pools() -> None:
    for pool in _pools.values():
        pool.close()
    _pools.clear()


@contextlib.contextmanager
def _close_pools_on_error() -> Iterator[None]:
    """Close the pool on an error; otherwise the next call would get the results of its running tasks."""
    try:
        yield
    except BaseException:  # a cancelled pass, for example
        _close_pools()
        raise


class ExtractBatch:
    """Rows of model inputs → rows of features; holds the model.

    Args:
        loading: How the actor gets the model.
        isolates_scans: Whether each batch is a task of its own.
    """

    def __init__(self, loading: ModelLoading, *, isolates_scans: bool) -> None:
        self._model, self._isolates_scans = ActorModel(loading), isolates_scans
        self._model.load()

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Return one row of features per row of model inputs."""
        import ray

        task = None if self._isolates_scans else ray.get_runtime_context().get_task_id()
        self._model.begin_batch(task)
        decoded = [
            Decoded(ScanRecord.from_json(record), np.asarray(tensor).reshape(shape), np.asarray(origins))
            for record, tensor, shape, origins in zip(
                batch["record"], batch["tensor"], batch["shape"], batch["origins"], strict=True
            )
        ]
        return self._model.extract(decoded, task)


class DecodeAndExtractBatch:
    """Rows of listed scans → rows of features; holds the model, and pools that decode ahead of it.

    Args:
        loading: How the actor gets the model.
        setup: How each of the pools decodes.
        calls: Number of calls of this object at once; each uses a pool of its own.
    """

    def __init__(self, loading: ModelLoading, setup: WorkerDecoding, calls: int) -> None:
        self._setup, self._model = setup, ActorModel(loading)
        self._first_pool = WorkerScanPool(setup)
        self._free_pools: queue.SimpleQueue[WorkerScanPool] = queue.SimpleQueue()
        for pool in [self._first_pool, *(WorkerScanPool(setup) for _ in range(calls - 1))]:
            self._free_pools.put(pool)
        # The model is loaded in a thread, so that the first scans are decoded while TensorFlow is imported.
        self._loaded: Future[None] = ThreadPoolExecutor(1).submit(self._load_after_pool)

    def _load_after_pool(self) -> None:
        """Load the model when the pool has started: both import for seconds, and the model can wait."""
        deadline = time.monotonic() + _POOL_START_S
        while not self._first_pool.has_started() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._model.load()

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Return one row of features per listed scan."""
        self._model.begin_batch(None)
        pool = self._free_pools.get()
        try:
            return pa.concat_tables(self._extract(decoded) for decoded in pool.batches(_parse_scans(batch)))
        except BaseException:  # the next call must not get the results of this call's running tasks
            pool.close()
            pool = WorkerScanPool(self._setup)
            raise
        finally:
            self._free_pools.put(pool)

    def _extract(self, decoded: Sequence[Decoded]) -> pa.Table:
        self._loaded.result()
        return self._model.extract(decoded)


class WriteBatch:
    """Rows of features → one row with a receipt."""

    def __init__(self, write: Callable[[pa.Table], Receipt]) -> None:
        self._write = write

    def __call__(self, table: pa.Table) -> pa.Table:
        """Write the features to files; return one row with the receipt."""
        return pa.table({"receipt": [self._write(table).to_json()]})


def _parse_scans(batch: Mapping[str, Any]) -> list[Scan]:
    return [Scan.from_json(text) for text in batch["scan"]]
