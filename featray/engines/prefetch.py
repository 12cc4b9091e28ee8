"""Iterators and threads: prefetch items while earlier ones are in use, or process several items at once."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

EXTRA_RESULTS = 1
"""Finished results that `parallel_map` may hold while an earlier item takes longer."""
_POLL_S = 0.2
_JOIN_S = 5.0
"""Seconds to wait for a thread when an iterator is closed early."""


@dataclass(frozen=True)
class _End:
    """Marks the end of the items: all were made, or making one raised `error`."""

    error: BaseException | None = None


def prefetch(
    items: Generator[T], count: int = 1, stop: threading.Event | None = None, grace_s: float = 0.0
) -> Generator[T]:
    """Yield the items; a thread makes up to `count` of them ahead. An error in the thread is raised here.

    Closing the iterator early closes `items`, after waiting a few seconds at most for the item being made.

    Args:
        items: Iterated and closed in the thread.
        count: Finished items that may wait to be used; 0 for any number.
        stop: When it has been set for `grace_s` seconds, yield the finished items and end at once, also while
            an item is being made. The thread then ends by itself after that item.
        grace_s: Seconds after `stop` during which items are still waited for.
    """
    limit = _StopLimit(stop, grace_s)
    ready: queue.Queue[T | _End] = queue.Queue(count)
    closed = threading.Event()
    thread = threading.Thread(
        target=_make_items, args=(items, ready, closed), name="featray-prefetch", daemon=True
    )
    thread.start()
    try:
        while not isinstance(item := _wait_for_item(ready, limit), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        item = _End()  # a reference from this frame to its own error would keep both alive
        closed.set()
        while not ready.empty():
            ready.get()  # makes room for the item that is being made
        if not limit.is_reached():
            thread.join(_JOIN_S)


class _StopLimit:
    """Tells whether an event has been set for some seconds, counted from the first look at the set event."""

    def __init__(self, stop: threading.Event | None, grace_s: float) -> None:
        self.stop, self._grace_s = stop, grace_s
        self._since: float | None = None

    def is_reached(self) -> bool:
        """Return whether the time is over; never without an event."""
        if self.stop is None or not self.stop.is_set():
            return False
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        return now - self._since >= self._grace_s


def parallel_map(work: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U]:
    """Yield `work(item)` of each item in the order of the items, with up to `threads` calls at once.

    An item is taken from `items` only when a thread is free for it; up to `threads + EXTRA_RESULTS` items are
    in use. Closing the iterator early waits a few seconds at most for the calls that are running.
    """
    if threads == 1:
        yield from map(work, items)
        return
    running: deque[Future[U]] = deque()
    try:
        for item in items:
            running.append(run_in_thread(work, item))
            while len(busy := _unfinished(running)) == threads or len(running) == threads + EXTRA_RESULTS:
                wait(busy if len(busy) == threads else [running[0]], return_when=FIRST_COMPLETED)
                yield from _take_finished(running)
            yield from _take_finished(running)
        while running:
            yield running.popleft().result()
    finally:
        wait(running, _JOIN_S)


def run_in_thread(work: Callable[[T], U], item: T) -> Future[U]:
    """Start `work(item)` in a daemon thread, which does not keep the process alive; return its future."""
    future: Future[U] = Future()

    def run() -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:  # raised again by `future.result()`
            future.set_exception(error)

    threading.Thread(target=run, name="featray-work", daemon=True).start()
    return future


def _take_finished(futures: deque[Future[U]]) -> Iterator[U]:
    while futures and futures[0].done():
        yield futures.popleft().result()


def _unfinished(futures: Iterable[Future[U]]) -> list[Future[U]]:
    return [future for future in futures if not future.done()]


def _wait_for_item(ready: queue.Queue[T | _End], limit: _StopLimit) -> T | _End:
    if limit.stop is None:
        return ready.get()
    while not (limit.is_reached() and ready.empty()):
        try:
            return ready.get(timeout=_POLL_S)
        except queue.Empty:
            continue
    return _End()


def _make_items(items: Generator[T], ready: queue.Queue[T | _End], closed: threading.Event) -> None:
    try:
        for item in items:
            ready.put(item)
            if closed.is_set():
                items.close()
                return
    except BaseException as error:  # raised again where the items are used
        ready.put(_End(error))
        return
    ready.put(_End())
