"""Real children of one trial that are told to end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import build_task, make_opening

from tune_easytrain import Task
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.errors import ChildDiedError, TerminatedError, TrialHungError
from tune_easytrain.probe import Outcome
from tune_easytrain.trial_children import TrialChildren

Begin = Callable[..., TrialChildren]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    begun: list[TrialChildren] = []

    def begin(build: Any = build_task, **options: Any) -> TrialChildren:
        begun.append(TrialChildren(make_opening(build, tmp_path, **options), modules_to_preload()))
        return begun[-1]

    yield begin
    for children in begun:
        children.kill()


def build_that_hangs(config: dict[str, Any]) -> Task:
    time.sleep(3600)
    raise AssertionError


def build_slow(config: dict[str, Any]) -> Task:
    """The small classifier, which says in a file that it computes, and does not come to an end."""
    task = build_task(config)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        Path(config["computes"]).touch()
        time.sleep(3600)
        raise AssertionError

    return replace(task, loss=loss)


def test_what_hangs_before_anything_is_tried_is_told_with_its_place(begin: Begin) -> None:
    with pytest.raises(TrialHungError, match=r"building the task .* more than 2 s") as caught:
        begin(build_that_hangs, probe_timeout_seconds=2.0).open()
    assert "build_that_hangs" in str(caught.value)
    assert isinstance(caught.value, ChildDiedError)  # so it is tried again


def test_a_trial_that_was_told_to_end_starts_no_further_child(begin: Begin) -> None:
    children = begin()
    children.terminate()
    for start in (children.open, children.estimate, lambda: children.attempt(2, 60.0)):
        with pytest.raises(TerminatedError, match="the trial was told to end"):
            start()


def test_an_attempt_that_is_ended_from_outside_says_nothing_of_the_size(begin: Begin, tmp_path: Path) -> None:
    computes = tmp_path / "computes"
    children = begin(build_slow, config={"model": {"type": "small"}, "hp": {}, "computes": str(computes)})
    children.open()

    def end_it() -> None:
        deadline = time.monotonic() + 60
        while not computes.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        children.terminate()

    thread = threading.Thread(target=end_it)
    thread.start()
    with pytest.raises(TerminatedError):
        children.attempt(2, 120.0)
    thread.join()


def test_an_attempt_that_dies_by_itself_is_one_that_did_not_fit(begin: Begin) -> None:
    children = begin(config={"model": {"type": "small"}, "hp": {}, "toy": {"fault": "kill"}})
    children.open()
    assert children.attempt(2, 60.0).outcome is Outcome.DIED
