"""Items made ready by a thread: in order, no more than asked for, with their errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator

import pytest

from featray.engines.prefetch import SPARE, ahead, mapped


def numbers(count: int) -> Generator[int]:
    yield from range(count)


def test_all_items_come_in_order() -> None:
    assert list(ahead(numbers(100))) == list(range(100))


def test_they_are_made_while_the_caller_is_busy_but_only_so_many() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Generator[int]:
        for number in range(10):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    found = ahead(items(), count=1)
    assert next(found) == 0
    assert third.wait(10), "nothing is made ahead"
    assert made == [0, 1, 2]  # one is being used, one waits, one is made and finds no room
    found.close()
    assert len(made) <= 4


def test_an_error_comes_after_what_was_made_before_it() -> None:
    def items() -> Generator[int]:
        yield 1
        raise OSError("gone")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_no_thread_is_left_when_it_is_closed_early() -> None:
    found = ahead(numbers(100))
    next(found)
    found.close()
    assert "featray-ahead" not in {thread.name for thread in threading.enumerate()}


def test_closed_early_it_closes_what_makes_the_items() -> None:
    closed = threading.Event()

    def items() -> Generator[int]:
        try:
            yield from range(100)
        finally:
            closed.set()

    found = ahead(ahead(items()))
    next(found)
    found.close()
    assert closed.wait(10)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_what_is_worked_on_at_once_comes_in_order(at_once: int) -> None:
    assert list(mapped(str, numbers(10), at_once)) == [str(number) for number in range(10)]


def test_as_many_are_worked_on_at_once_as_asked_and_few_more_are_taken() -> None:
    together = threading.Barrier(2, timeout=10)
    taken: list[int] = []

    def items() -> Generator[int]:
        for number in range(4):
            taken.append(number)
            yield number

    def work(number: int) -> int:
        together.wait()  # of no use to one alone
        return number

    found = mapped(work, items(), 2)
    assert next(found) == 0
    assert len(taken) in (2, 2 + SPARE)  # another one if the second was done first
    assert list(found) == [1, 2, 3]


def test_an_error_of_the_work_comes_where_its_result_would() -> None:
    found = mapped(lambda number: 6 // number, (3, 0, 1), 2)
    assert next(found) == 2
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_while_one_takes_long_the_next_ones_are_worked_on_and_as_many_held_as_promised() -> None:
    slow_may_end = threading.Event()
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 0:
            assert slow_may_end.wait(10)
        return number

    found: list[int] = []
    reader = threading.Thread(target=lambda: found.extend(mapped(work, numbers(6), 2)))
    reader.start()
    until = time.monotonic() + 10
    while len(begun) < 2 + SPARE and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(begun) == [0, 1, 2]
    slow_may_end.set()
    reader.join(10)
    assert found == [0, 1, 2, 3, 4, 5]
