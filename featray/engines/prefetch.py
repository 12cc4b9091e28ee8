"""Iterators and threads: items made ready while earlier ones are in use, or several worked on at once."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")

SPARE = 1
"""Results that `mapped` may hold because an earlier one takes longer."""
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class _End:
    """Nothing more comes: all is done, or `error` was raised."""

    error: BaseException | None = None


def ahead(items: Generator[T], count: int = 1) -> Generator[T]:
    """Yield the items, of which up to `count` wait ready; what making them raises is raised here.

    While one is in use, `count` are ready and the next one is being made, or waits to be taken. Closed early,
    it closes `items`, and waits a few seconds at most for the one that is being made.
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


def mapped(work: Callable[[T], U], items: Iterable[T], at_once: int) -> Generator[U]:
    """Yield `work(item)` of each item in order, up to `at_once` of them under way in threads.

    An item is asked for when there is a thread for it; with those whose results are held, up to
    `at_once + SPARE` items are in use. Closed early, it waits a few seconds at most for what is under way.
    """
    if at_once == 1:
        yield from map(work, items)
        return
    running: deque[Future[U]] = deque()
    try:
        for item in items:
            running.append(begun(work, item))
            while len(busy := _unfinished(running)) == at_once or len(running) == at_once + SPARE:
                wait(busy if len(busy) == at_once else [running[0]], return_when=FIRST_COMPLETED)
                yield from _taken_while_done(running)
            yield from _taken_while_done(running)
        while running:
            yield running.popleft().result()
    finally:
        wait(running, _PATIENCE_S)


def _taken_while_done(futures: deque[Future[U]]) -> Iterator[U]:
    while futures and futures[0].done():
        yield futures.popleft().result()


def _unfinished(futures: Iterable[Future[U]]) -> list[Future[U]]:
    return [future for future in futures if not future.done()]


def begun(work: Callable[[T], U], item: T) -> Future[U]:
    """Return what `work(item)` will be; its thread is no reason for this process to live on."""
    future: Future[U] = Future()

    def run() -> None:
        try:
            future.set_result(work(item))
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="featray-mapped", daemon=True).start()
    return future


def _fill(items: Generator[T], ready: queue.Queue[T | _End], closed: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            ready.put(item)
            if closed.is_set():
                items.close()
                return
    except BaseException as error:  # raised again where the items are used
        end = _End(error)
    ready.put(end)
