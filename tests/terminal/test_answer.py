"""Signals stop a command, also if code of another package catches the exception that the first one raised."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import pytest

from featray.terminal.answer import interrupt_on_signal, stop_on_signal


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore the handlers of the signals, and forget that one came."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    interrupt_on_signal()
    yield
    interrupt_on_signal()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_whose_exception_was_lost_stops_the_command_before_its_work(number: signal.Signals) -> None:
    with contextlib.suppress(KeyboardInterrupt):  # as an import may do
        signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        pytest.fail("the command began its work")


def test_the_first_signal_during_the_work_sets_the_event_and_the_second_one_interrupts() -> None:
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
