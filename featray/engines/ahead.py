"""An iterator in, the same items out, made ready by a thread while the caller is busy with earlier ones."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_S = 5.0


@dataclass(frozen=True)
class _End:
    """Nothing more comes: all is done, or `error` was raised."""

    error: BaseException | None = None


def ahead(items: Iterator[T], count: int = 1) -> Generator[T]:
    """Yield the items, of which up to `count` wait ready; what making them raises is raised here.

    Closed early, it makes no further ones, and waits a few seconds at most for the one that is being made.
    """
    ready: queue.Queue[T | _End] = queue.Queue(count)
    closed = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, closed), name="featray-ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        while not ready.empty():
            ready.get()  # makes room for the one that is being made
        thread.join(_PATIENCE_S)


def _fill(items: Iterator[T], ready: queue.Queue[T | _End], closed: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            ready.put(item)
            if closed.is_set():
                return
    except BaseException as error:  # raised again where the items are used
        end = _End(error)
    ready.put(end)
