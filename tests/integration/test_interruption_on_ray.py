"""An interruption and the sweep's actor, on a real Ray; a handler of SIGINT stands where Ray Tune's is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import ray

from tune_easytrain.interruption import Interruption
from tune_easytrain.sweep_hub import start_sweep_hub

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def ends() -> Iterator[list[int]]:
    """How often Ray Tune's loop was told to end."""
    numbers: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, lambda number, frame: numbers.append(number))
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def is_done(waiting: ray.ObjectRef[None], seconds: float) -> bool:
    return bool(ray.wait([waiting], timeout=seconds)[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_trials_are_told_first_and_ray_tune_when_they_have_stored_what_they_have(
    ends: list[int], number: int
) -> None:
    hub = start_sweep_hub([])
    running, said = ["a", "b"], list[str]()
    interruption = Interruption(hub, 30.0, lambda: len(running), said.append)
    told, over = hub.interruption.remote(), hub.end.remote()
    with interruption.watched():
        interruption.look()
        assert not is_done(told, 0.5)
        os.kill(os.getpid(), number)
        assert ends == []
        interruption.look()
        assert is_done(told, 30)
        assert said == [
            "Interrupted: 2 running trials store a checkpoint, for at most 30 s each; Ctrl-C again stops now"
        ]
        for _ in range(2):
            interruption.look()
            running.pop()
        assert not is_done(over, 0.5)
        assert ends == []
        interruption.look()
        assert is_done(over, 30)
        assert ends == [signal.SIGINT]
        assert len(said) == 1
    ray.kill(hub)


def test_trials_that_take_longer_than_they_may_are_not_waited_for(ends: list[int]) -> None:
    hub = start_sweep_hub([])
    interruption = Interruption(hub, float("-inf"), lambda: 1, lambda line: None)
    with interruption.watched():
        interruption.look()
        os.kill(os.getpid(), signal.SIGINT)
        interruption.look()
        assert ends == []
        interruption.look()
        assert ends == [signal.SIGINT]
    ray.kill(hub)
