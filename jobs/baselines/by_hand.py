"""The fastest script for this one purpose: one decode process per core, shared memory, one tf.function.

python jobs/benchmark.py --baselines by_hand

The benchmark passes one JSON document on stdin, and compares speed and features with those of featray. The
script prints nothing.

The script has no engine, no checks and no error handling, because these cost time.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import common
import numpy as np

SLOTS_PER_BATCH = 3
"""Number of shared-memory slots for each scan of a batch."""
DECODE_TIMEOUT_S = 120
"""If no scan is decoded within this time, a decode process has died."""


def main() -> None:
    """Start the decode processes, import TensorFlow, run the model on decoded scans, and save in order."""
    document = common.read_document()
    context = multiprocessing.get_context("fork")  # starts fast; no thread runs yet
    shape = (SLOTS_PER_BATCH * document["batch_size"], *document["size"], 1)
    memory = SharedMemory(create=True, size=4 * int(np.prod(shape)))
    slots: Any = np.ndarray(shape, np.float32, memory.buf)
    todo, free, ready = context.Queue(), context.Queue(), context.Queue()
    for item in [*enumerate(document["files"]), *[None] * len(os.sched_getaffinity(0))]:
        todo.put(item)
    for slot in range(len(slots)):
        free.put(slot)
    workers = [
        context.Process(target=_decode, args=(document, slots, todo, free, ready), daemon=True)
        for _ in os.sched_getaffinity(0)
    ]
    for worker in workers:
        worker.start()
    common.save(_extract(document, slots, free, ready), document)
    for worker in workers:
        worker.join()
    del slots
    memory.close()
    memory.unlink()


def _decode(
    document: common.Document, slots: Any, todo: Queue[Any], free: Queue[Any], ready: Queue[Any]
) -> None:
    """Decode files into free slots until `todo` yields None."""
    import cv2

    from featray.ct.malloc import keep_large_blocks

    cv2.setNumThreads(1)
    keep_large_blocks()
    while (item := todo.get()) is not None:
        index, path = item
        volume = common.decode_fast(path, document)
        slot = free.get()
        slots[slot] = volume
        ready.put((index, slot))


def _extract(
    document: common.Document, slots: Any, free: Queue[Any], ready: Queue[Any]
) -> list[dict[str, Any]]:
    """Return one row of values per file, in the order of the files."""
    import tensorflow as tf

    run = tf.function(common.load_model(document), reduce_retracing=True)
    rows: dict[int, dict[str, Any]] = {}
    for batch in _collect_batches(document, ready):
        used = [slot for _, slot in batch]
        values = run(tf.constant(slots[used]))
        for slot in used:
            free.put(slot)
        for row, (index, _) in enumerate(batch):
            rows[index] = {name: np.asarray(value[row : row + 1]) for name, value in values.items()}
    return [rows[index] for index in range(len(rows))]


def _collect_batches(document: common.Document, ready: Queue[Any]) -> Iterator[list[tuple[int, int]]]:
    """Yield file index and slot of decoded scans, batch by batch, in the order in which they are ready."""
    remaining = len(document["files"])
    while remaining:
        count = min(remaining, document["batch_size"])
        yield [ready.get(timeout=DECODE_TIMEOUT_S) for _ in range(count)]
        remaining -= count


if __name__ == "__main__":
    main()
