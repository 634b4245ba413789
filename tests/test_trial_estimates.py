from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import WIDTHS, build_task

from tune_easytrain import Task, UnknownNameError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial_estimates import estimate_key, estimate_trials

TRAIN = {"precision": "fp32", "clip_norm": None, "seed": 0, "epochs": 1}
MEMORY = {"strategy": "none", "checkpointing": "none", "sharding": "none", "channels_last": False}


def make_config(model: str = "small", **changes: Any) -> dict[str, Any]:
    return {"model": {"type": model}, "batch": {}, "train": TRAIN, "memory": MEMORY, **changes}


def build_faulty_task(config: dict[str, Any]) -> Task:
    fault = config["model"]["type"]
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "bug":
        raise KeyError("a bug in the task")
    if fault == "odd exception":
        raise _NeedsTwoError("one", "two")
    return build_task(config)


class _NeedsTwoError(Exception):
    """Can be pickled and not loaded again, as many exceptions of libraries."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def estimate(build: Any, *configs: dict[str, Any]) -> list[MemoryEstimate | str]:
    return estimate_trials(pickle_function(build, "task"), configs)


def test_each_distinct_trial_is_estimated_once_in_the_order_given() -> None:
    models = ["small", "large", "small", "medium", "large"]
    configs = [make_config(model, hp={"learning_rate": 1 / (n + 1)}) for n, model in enumerate(models)]
    seen: list[tuple[int, int]] = []
    payload = pickle_function(build_task, "task")
    estimates = estimate_trials(payload, configs, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert estimates[0] is estimates[2]
    assert estimates[1] is estimates[4]
    peaks = {model: e.peak_bytes(8) for model, e in zip(models, estimates, strict=True)}  # type: ignore[union-attr]
    assert sorted(peaks, key=lambda model: peaks[model]) == sorted(WIDTHS, key=lambda model: WIDTHS[model])


def test_a_fault_of_one_trial_leaves_the_others_their_estimates() -> None:
    estimates = estimate(build_faulty_task, *(make_config(m) for m in ("bug", "small", "odd exception")))
    assert isinstance(estimates[1], MemoryEstimate)
    assert "a bug in the task" in str(estimates[0])
    assert "one and two" in str(estimates[2])


def test_what_the_task_calls_bad_input_is_that() -> None:
    with pytest.raises(UnknownNameError, match="unknown name 'lrge'; did you mean 'large'"):
        estimate(build_faulty_task, make_config("small"), make_config("lrge"))


def test_a_killed_process_is_told_and_not_waited_for() -> None:
    (reason,) = estimate(build_faulty_task, make_config("killed"))
    assert "was killed" in str(reason)


@pytest.mark.parametrize(
    "changes",
    [
        {"hp": {"learning_rate": 3.0}},
        {"hp": {"batch_size": 3}},
        {"optimizer": {"lr": 3.0}},
        {"batch": {"effective_batch_size": 3}},
        {"train": {**TRAIN, "seed": 3, "epochs": 3}},
        {"train": {**TRAIN, "num_steps": 3, "lr_scaling": "sqrt", "base_batch_size": 4, "noise_scale": True}},
    ],
)
def test_learning_rates_batch_sizes_and_seeds_make_no_other_estimate(changes: dict[str, Any]) -> None:
    base = {key: {} for key in changes if key in ("hp", "optimizer")}
    assert estimate_key(make_config(**changes)) == estimate_key(make_config(**base))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "large"}},
        {"optimizer": {"name": "sgd"}},
        {"hp": {"width": 3}},
        {"train": {**TRAIN, "precision": "bf16"}},
        {"memory": {**MEMORY, "checkpointing": 0.5}},
        {"memory": {**MEMORY, "channels_last": True}},
        {"train": {**TRAIN, "clip_norm": 1.0}},
    ],
)
def test_whatever_else_differs_may_make_another_estimate(changes: dict[str, Any]) -> None:
    assert estimate_key({**make_config(), **changes}) != estimate_key(make_config())


@given(st.floats(min_value=0.001, max_value=100))
def test_the_norm_that_is_clipped_to_makes_no_difference(norm: float) -> None:
    config = make_config(train={**TRAIN, "clip_norm": norm})
    assert estimate_key(config) == estimate_key(make_config(train={**TRAIN, "clip_norm": 1.0}))
