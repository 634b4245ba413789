from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import ray

from tune_easytrain.cluster import ray_session
from tune_easytrain.errors import InsufficientResourcesError
from tune_easytrain.pending_watch import LOOK_SECONDS, PendingWatch
from tune_easytrain.trial_request import TrialRequest


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    with ray_session("local"):
        assert ray.is_initialized()
        yield


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def trials(*states: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(status=state) for state in states]


def look_for(watch: PendingWatch, clock: Clock, seconds: float, *states: str) -> None:
    end = clock.seconds + seconds
    while clock.seconds < end:
        clock.seconds += LOOK_SECONDS
        watch.look(trials(*states))


@pytest.mark.usefixtures("local_ray")
def test_it_gives_up_only_when_nothing_runs_and_nothing_can() -> None:
    clock = Clock()
    impossible = TrialRequest(custom={"video_card": 1})
    watch = PendingWatch([impossible], patience_seconds=60, clock=clock)
    look_for(watch, clock, 600, "RUNNING", "PENDING")
    look_for(watch, clock, 600, "TERMINATED", "ERROR")
    look_for(watch, clock, 60, "TERMINATED", "PENDING")
    watch.look(trials("RUNNING", "PENDING"))
    clock.seconds += LOOK_SECONDS
    watch.look(trials("RUNNING", "PENDING"))
    look_for(watch, clock, 60, "PENDING")  # it starts to count anew
    with pytest.raises(InsufficientResourcesError, match=r"nothing has run for 60 s.*1 video_card"):
        look_for(watch, clock, 60, "PENDING")


@pytest.mark.usefixtures("local_ray")
def test_it_waits_for_what_the_cluster_has() -> None:
    clock = Clock()
    watch = PendingWatch([TrialRequest(custom={"video_card": 1}), TrialRequest()], clock=clock)
    look_for(watch, clock, 3600, "PENDING")
    assert clock.seconds == 3600  # it has looked to the end
