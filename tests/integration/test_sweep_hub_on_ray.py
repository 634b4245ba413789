"""Events on their way from trials to the driver, on a real Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray

import tune_easytrain as te
from tune_easytrain.events import TrainingEnded
from tune_easytrain.sweep_hub import EventSender, start_sweep_hub

TASKS = Path(__file__).parent / "integration_tasks.py"
pytestmark = pytest.mark.usefixtures("local_ray")


def test_settled_events_are_there_in_order_whether_they_went_alone_or_together() -> None:
    hub = start_sweep_hub([])
    sender = EventSender(hub)
    told: list[str] = []
    for number in range(2000):  # for long enough that the sender's thread takes some, and settle others
        sender.send("trial_0000", TrainingEnded(reason=str(number)))
        told.append(str(number))
        if number % 97 == 0:
            sender.settle()
            fetched = ray.get(hub.fetch.remote())
            assert [event.reason for _, event in fetched] == told
            told = []
    sender.settle()
    assert [event.reason for _, event in ray.get(hub.fetch.remote())] == told
    ray.kill(hub)


def test_a_trial_that_fails_leaves_its_actor_to_the_next_one(toy_sweep: dict[str, Any]) -> None:
    del toy_sweep["task"]
    toy_sweep["config"] = {}
    toy_sweep["grid_search"] = {"grid": {"fails": [False, True, False]}}
    toy_sweep["batch"] = {"probe": "off"}
    toy_sweep["train"] = {"function": f"{TASKS}:report_the_forkserver"}
    toy_sweep["run"] |= {"metric": "pid", "mode": "min", "max_concurrent": 1}
    frame = te.run(toy_sweep, quiet=True).frame()
    assert list(frame["state"]) == ["finished", "failed", "finished"]
    assert frame["error"][1] == "KeyError: 'label'"
    assert frame["pid_last"][0] == frame["pid_last"][2]
