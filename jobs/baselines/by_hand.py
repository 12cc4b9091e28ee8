"""The best single-purpose script: a decode process per core, a ring of shared memory, one tf.function.

python jobs/benchmark.py --baselines by_hand      (reads its document from stdin)

No engine, no checks, no error handling: what is in the way of speed is left out.
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
LONG_S = 120
"""A scan that takes longer is one whose process has died."""


def main() -> None:
    """Start decoding, then import TensorFlow; run batches as they come, save them in order."""
    asked = common.given()
    context = multiprocessing.get_context("fork")  # before any thread: it starts at once
    shape = (SLOTS_PER_BATCH * asked["batch_size"], *asked["size"], 1)
    memory = SharedMemory(create=True, size=4 * int(np.prod(shape)))
    ring: Any = np.ndarray(shape, np.float32, memory.buf)
    todo, free, ready = context.Queue(), context.Queue(), context.Queue()
    for item in [*enumerate(asked["files"]), *[None] * len(os.sched_getaffinity(0))]:
        todo.put(item)
    for slot in range(len(ring)):
        free.put(slot)
    workers = [
        context.Process(target=_decode, args=(asked, ring, todo, free, ready), daemon=True)
        for _ in os.sched_getaffinity(0)
    ]
    for worker in workers:
        worker.start()
    common.save(_extracted(asked, ring, free, ready), asked)
    for worker in workers:
        worker.join()
    del ring
    memory.close()
    memory.unlink()


def _decode(asked: common.Given, ring: Any, todo: Queue[Any], free: Queue[Any], ready: Queue[Any]) -> None:
    import cv2

    from featray.ct.malloc import keep_large_blocks

    cv2.setNumThreads(1)
    keep_large_blocks()
    while (item := todo.get()) is not None:
        at, path = item
        volume = common.decode_fast(path, asked)
        slot = free.get()
        ring[slot] = volume
        ready.put((at, slot))


def _extracted(asked: common.Given, ring: Any, free: Queue[Any], ready: Queue[Any]) -> list[dict[str, Any]]:
    """Return the values of every file, one row each, in the order of the files."""
    import tensorflow as tf

    run = tf.function(common.load_model(asked), reduce_retracing=True)
    rows: dict[int, dict[str, Any]] = {}
    for batch in _batches(asked, ready):
        slots = [slot for _, slot in batch]
        values = run(tf.constant(ring[slots]))
        for slot in slots:
            free.put(slot)
        for row, (at, _) in enumerate(batch):
            rows[at] = {name: np.asarray(value[row : row + 1]) for name, value in values.items()}
    return [rows[at] for at in range(len(rows))]


def _batches(asked: common.Given, ready: Queue[Any]) -> Iterator[list[tuple[int, int]]]:
    left = len(asked["files"])
    while left:
        count = min(left, asked["batch_size"])
        yield [ready.get(timeout=LONG_S) for _ in range(count)]
        left -= count


if __name__ == "__main__":
    main()
