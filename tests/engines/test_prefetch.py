"""Prefetching and parallel map: items in order, no more in use than allowed, and errors where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from featray.engines.prefetch import EXTRA_RESULTS, parallel_map, prefetch


def numbers(count: int) -> Generator[int]:
    yield from range(count)


def test_prefetched_items_come_in_order() -> None:
    assert list(prefetch(numbers(100))) == list(range(100))


def test_items_are_made_while_the_caller_is_busy_up_to_the_limit() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Generator[int]:
        for number in range(10):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    found = prefetch(items(), count=1)
    assert next(found) == 0
    assert third.wait(10), "no item is made ahead"
    assert made == [0, 1, 2]  # one item is in use, one waits, and one is made and finds no room
    found.close()
    assert len(made) <= 4


def test_an_error_comes_after_the_items_made_before_it() -> None:
    def items() -> Generator[int]:
        yield 1
        raise OSError("gone")

    found = prefetch(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_closing_early_leaves_no_thread() -> None:
    found = prefetch(numbers(100))
    next(found)
    found.close()
    assert "featray-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_closing_early_closes_the_source_of_the_items() -> None:
    closed = threading.Event()

    def items() -> Generator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    found = prefetch(prefetch(items()))
    next(found)
    found.close()
    assert closed.wait(10)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_of_parallel_calls_come_in_order(threads: int) -> None:
    assert list(parallel_map(str, numbers(10), threads)) == [str(number) for number in range(10)]


def test_no_more_items_are_taken_than_threads_and_one_extra() -> None:
    together = threading.Barrier(2, timeout=10)
    taken: list[int] = []

    def items() -> Generator[int]:
        for number in range(4):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        together.wait()  # a single call would wait for ever
        return number

    found = parallel_map(work, items(), 2)
    assert next(found) == 0
    assert len(taken) in (2, 2 + EXTRA_RESULTS)  # one more if the second call ended first
    assert list(found) == [1, 2, 3]


def test_an_error_of_a_call_comes_in_place_of_its_result() -> None:
    found = parallel_map(lambda number: 6 // number, (3, 0, 1), 2)
    assert next(found) == 2
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_while_one_call_takes_long_the_next_ones_run_and_are_held() -> None:
    may_end = threading.Event()
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        if number == 0:
            assert may_end.wait(10)
        return number

    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(parallel_map(work, numbers(6), 2)))
    reader.start()
    until = time.monotonic() + 10
    while len(started) < 2 + EXTRA_RESULTS and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(started) == [0, 1, 2]
    may_end.set()
    reader.join(10)
    assert found == [0, 1, 2, 3, 4, 5]


def test_a_stop_yields_finished_items_and_does_not_wait_for_the_next_one() -> None:
    stop, never = threading.Event(), threading.Event()

    def items() -> Generator[int]:
        yield from (0, 1)
        never.wait(60)

    prefetched = prefetch(items(), count=0, stop=stop)
    assert next(prefetched) == 0
    time.sleep(0.1)  # until the second item is made
    stop.set()
    start = time.monotonic()
    assert list(prefetched) == [1]
    assert time.monotonic() - start < 4, "the iterator waited for the item that was being made"
    never.set()
