"""Items made ready by a thread: in order, no more than asked for, with their errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from featray.engines.ahead import ahead


def test_all_items_come_in_order() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))


def test_they_are_made_while_the_caller_is_busy_but_only_so_many() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
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
    def items() -> Iterator[int]:
        yield 1
        raise OSError("gone")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="gone"):
        next(found)


def test_no_thread_is_left_when_it_is_closed_early() -> None:
    found = ahead(iter(range(100)))
    next(found)
    found.close()
    assert "featray-ahead" not in {thread.name for thread in threading.enumerate()}
