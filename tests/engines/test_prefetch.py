"""Prefetching and parallel map: the order of items, the number in use, errors, and early ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from featray.engines.prefetch import EXTRA_RESULTS, parallel_map, prefetch


def yield_numbers(count: int) -> Generator[int]:
    yield from range(count)


def test_prefetched_items_come_in_order() -> None:
    assert list(prefetch(yield_numbers(100))) == list(range(100))


def test_items_are_made_while_the_caller_is_busy_up_to_the_limit() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Generator[int]:
        for number in range(10):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    prefetched = prefetch(items(), count=1)
    assert next(prefetched) == 0
    assert third.wait(10), "no item is made before it is asked for"
    assert made == [0, 1, 2]  # one item is in use, one waits, one is made and cannot be stored
    prefetched.close()
    assert len(made) <= 4


def test_an_error_is_raised_after_the_items_made_before_it() -> None:
    def items() -> Generator[int]:
        yield 1
        raise OSError("gone")

    prefetched = prefetch(items())
    assert next(prefetched) == 1
    with pytest.raises(OSError, match="gone"):
        next(prefetched)


def test_closing_early_leaves_no_thread() -> None:
    prefetched = prefetch(yield_numbers(100))
    next(prefetched)
    prefetched.close()
    assert "featray-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_closing_early_closes_the_source_of_the_items() -> None:
    closed = threading.Event()

    def items() -> Generator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    prefetched = prefetch(prefetch(items()))
    next(prefetched)
    prefetched.close()
    assert closed.wait(10)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_of_parallel_calls_come_in_order(threads: int) -> None:
    assert list(parallel_map(str, yield_numbers(10), threads)) == [str(number) for number in range(10)]


def test_no_more_items_are_taken_than_one_per_thread_and_one_extra() -> None:
    both_calls = threading.Barrier(2, timeout=10)
    taken: list[int] = []

    def items() -> Generator[int]:
        for number in range(4):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        both_calls.wait()  # a call that runs alone fails here
        return number

    results = parallel_map(work, items(), 2)
    assert next(results) == 0
    assert len(taken) in (2, 2 + EXTRA_RESULTS)  # one more if the second call ended first
    assert list(results) == [1, 2, 3]


def test_an_error_of_a_call_is_raised_in_place_of_its_result() -> None:
    results = parallel_map(lambda number: 6 // number, (3, 0, 1), 2)
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_while_one_call_takes_long_the_next_calls_run_and_their_results_wait() -> None:
    may_end = threading.Event()
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        if number == 0:
            assert may_end.wait(10)
        return number

    results: list[int] = []
    reader = threading.Thread(target=lambda: results.extend(parallel_map(work, yield_numbers(6), 2)))
    reader.start()
    deadline = time.monotonic() + 10
    while len(started) < 2 + EXTRA_RESULTS and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # for a fourth call, which must not start
    assert sorted(started) == [0, 1, 2]
    may_end.set()
    reader.join(10)
    assert results == [0, 1, 2, 3, 4, 5]


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


def test_in_the_time_after_a_stop_items_are_still_waited_for() -> None:
    stop, never = threading.Event(), threading.Event()

    def items() -> Generator[int]:
        yield 0
        time.sleep(0.3)
        yield 1
        never.wait(60)

    prefetched = prefetch(items(), stop=stop, grace_s=1.0)
    assert next(prefetched) == 0
    stop.set()
    assert list(prefetched) == [1]
    never.set()
