"""What Ray's workers run: rows of listed scans in, rows of features or of receipts out.

Rows between the stages: a listed scan as JSON → its record and features → one receipt per file's worth of
scans. Where actors have GPUs, decoding is apart from them, on any CPU of the cluster, and in between are rows
of a record, a tensor and its origins. Without GPUs an actor decodes for itself: nothing large travels.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from featray.config import LimitsConfig
from featray.engines.decoding.memory_limit import decode_memory
from featray.engines.decoding.process_pool import Helpers
from featray.engines.decoding.scan_pool import Attempts
from featray.schema import Decoded, Receipt, Scan, ScanRecord
from featray.stages.decode import Decoder
from featray.stages.extract import LayerExtractor, extract

_NEVER = threading.Event()
_HELPERS_FIRST_S = 5.0
"""How long an actor's model waits for its helpers to come up."""


@dataclass(frozen=True)
class Decoding:
    """How workers decode; travels to them.

    Attributes:
        decode: What to do with a scan.
        limits: As configured.
        memory: Bytes one scan may take; None for most of what the machine has.
        helpers: Processes of each worker.
        ahead: Scans decoded at most while the worker is busy with earlier ones.
    """

    decode: Decoder
    limits: LimitsConfig
    memory: int | None
    helpers: int
    ahead: int


class Decoders:
    """The helpers of one worker process."""

    def __init__(self, how: Decoding) -> None:
        from ray import cloudpickle  # what a decoder is made of may be known to the driver alone

        self._helpers = Helpers(how.helpers, how.limits.scan_timeout_s, decode_memory(how.memory))
        size = how.helpers + how.ahead
        self._attempts = Attempts(self._helpers, how.decode, how.limits, size, cloudpickle.dumps)

    def batches(self, scans: Sequence[Scan], batch: int) -> Iterator[list[Decoded]]:
        """Yield lists of `batch` decoded scans; a list is valid until the next one is asked for."""
        return self._attempts.batches(scans, batch, _NEVER)

    def are_up(self) -> bool:
        """Return whether the helpers can decode, as far as is known from the last batch."""
        return self._helpers.are_up()

    def close(self) -> None:
        """End the helpers at once."""
        self._helpers.close()
        self._attempts.close()


class DecodeBatch:
    """Rows of listed scans → rows of model inputs, made in a helper of this worker."""

    def __init__(self, how: Decoding) -> None:
        self._how, self._run = how, uuid.uuid4().hex

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield one row at a time: a block of tensors need not fit into memory as a whole."""
        with _ended_on_error(self._decoders()) as decoders:
            for (decoded,) in decoders.batches(_scans(batch), 1):
                yield {
                    "record": [decoded.record.to_json()],
                    # Flat, for Ray mixes no ranks in a column; a copy, for the next scan takes its place.
                    "tensor": decoded.tensor.reshape(1, -1).copy(),
                    "shape": np.array([decoded.tensor.shape]),
                    "origins": decoded.origins[None],
                }

    def _decoders(self) -> Decoders:
        """Return this worker's helpers; they start with the first scan, and end with the worker."""
        if self._run not in _workers:
            _end_workers()  # of an earlier run
            _workers[self._run] = Decoders(self._how)
        return _workers[self._run]


_workers: dict[str, Decoders] = {}
"""By run, the helpers of this worker process: Ray unpickles `DecodeBatch` anew for each task."""


def _end_workers() -> None:
    for decoders in _workers.values():
        decoders.close()
    _workers.clear()


@contextlib.contextmanager
def _ended_on_error(decoders: Decoders) -> Iterator[Decoders]:
    """End the helpers when work is broken off: what they are at must not answer for the next scan."""
    try:
        yield decoders
    except BaseException:  # such as a cancelled pass
        _end_workers()
        raise


class ExtractBatch:
    """Rows of model inputs → rows of features; holds the model."""

    def __init__(self, load_extractor: Callable[[], LayerExtractor]) -> None:
        self._extractor = load_extractor()

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Return one row for each."""
        decoded = [
            Decoded(ScanRecord.from_json(record), np.asarray(tensor).reshape(shape), np.asarray(origins))
            for record, tensor, shape, origins in zip(
                batch["record"], batch["tensor"], batch["shape"], batch["origins"], strict=True
            )
        ]
        return extract(self._extractor, decoded)


class DecodeAndExtractBatch:
    """Rows of listed scans → rows of features; holds the model, and helpers that decode ahead of it."""

    def __init__(self, load_extractor: Callable[[], LayerExtractor], how: Decoding, batch_scans: int) -> None:
        self._how, self._batch_scans = how, batch_scans
        self._decoders = Decoders(how)
        # In a thread, so that the first scans are decoded while TensorFlow is imported.
        self._extractor: Future[LayerExtractor] = ThreadPoolExecutor(1).submit(self._loaded, load_extractor)

    def _loaded(self, load_extractor: Callable[[], LayerExtractor]) -> LayerExtractor:
        """Load the model once decoding has begun: both import for seconds, and this one can wait."""
        until = time.monotonic() + _HELPERS_FIRST_S
        while not self._decoders.are_up() and time.monotonic() < until:
            time.sleep(0.02)
        return load_extractor()

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """Return one row for each."""
        try:
            return pa.concat_tables(
                extract(self._extractor.result(), decoded)
                for decoded in self._decoders.batches(_scans(batch), self._batch_scans)
            )
        except BaseException:  # what helpers are at must not answer for the scans of the next call
            self._decoders.close()
            self._decoders = Decoders(self._how)
            raise


class WriteBatch:
    """Rows of features → one receipt."""

    def __init__(self, write: Callable[[pa.Table], Receipt]) -> None:
        self._write = write

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one row."""
        return pa.table({"receipt": [self._write(table).to_json()]})


def _scans(batch: Mapping[str, Any]) -> list[Scan]:
    return [Scan.from_json(text) for text in batch["scan"]]
