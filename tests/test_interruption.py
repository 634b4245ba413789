"""Signals to this process; `tests/integration` has the rest on a real Ray."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tune_easytrain.interruption import Interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def handlers() -> Iterator[list[Any]]:
    """The handlers of this process, which are put back at the end."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield before
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def now() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


def make_interruption() -> Interruption:
    return Interruption(None, 30.0, lambda: 0, lambda line: None)


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_first_signal_is_taken_note_of_and_the_second_stops_now(
    handlers: list[Any], first: int, second: int
) -> None:
    interruption = make_interruption()
    with interruption.watched():
        interruption.look()  # as Ray Tune's loop begins
        assert not interruption.is_due
        os.kill(os.getpid(), first)
        assert interruption.is_due
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)
    assert now() == handlers


def test_what_ray_tune_sets_is_there_until_its_loop_begins(handlers: list[Any]) -> None:
    interruption = make_interruption()
    with interruption.watched():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        interruption.look()
        interruption.look()
        assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    assert now() == handlers


def test_in_another_thread_no_signal_is_taken(handlers: list[Any]) -> None:
    """A server may run sweeps in threads of its own."""
    seen: list[list[Any]] = []

    def sweep() -> None:
        interruption = make_interruption()
        with interruption.watched():
            interruption.look()
            seen.append(now())

    thread = threading.Thread(target=sweep)
    thread.start()
    thread.join()
    assert seen == [handlers]
