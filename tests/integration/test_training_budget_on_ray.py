"""Trials of different effective batch sizes at the same cost, or with the same number of updates."""

from __future__ import annotations

import pytest

from tune_easytrain import run

pytestmark = pytest.mark.usefixtures("local_ray")


def test_trials_that_differ_in_batch_size_see_the_same_samples_also_under_a_scheduler(toy_sweep):
    toy_sweep["grid_search"]["grid"] = {"model.type": "small", "batch.effective_batch_size": [5, 10, 40]}
    toy_sweep["config"]["hp"] = {"learning_rate": 0.01, "batch_size": 3}
    del toy_sweep["batch"]["effective_batch_size"]
    toy_sweep["train"] = {
        "num_samples": 100,
        "lr_scaling": "sqrt",
        "base_batch_size": 10,
        "warmup_steps": 2,
        "noise_scale": True,
    }
    # It may stop no one before the third epoch, in which the budget ends.
    toy_sweep["run"]["scheduler"] = {"name": "asha", "grace_period": 4}
    frame = run(toy_sweep).frame()
    assert list(frame["state"]) == ["finished"] * 3, list(frame["error"])
    assert list(frame["num_samples"]) == [100] * 3
    assert list(frame["epochs"]) == [3] * 3  # of 37 samples, the last one ends inside
    assert list(frame["optimizer_steps"]) == [8 + 8 + 6, 4 + 4 + 3, 1 + 1 + 1]
    # The training set has 37 samples, so that is what the third trial's steps are of.
    rates = [0.01 * (size / 10) ** 0.5 for size in (5, 10, 37)]
    assert list(frame["learning_rate"]) == pytest.approx(rates)
    assert (frame["gradient_noise_scale"] > 0).any()
    assert list(frame["train.num_samples"]) == [100] * 3
    assert frame["train.epochs"].isna().all()


def test_a_budget_of_steps_may_be_a_grid_key(toy_sweep):
    toy_sweep["grid_search"]["grid"] |= {"train.num_steps": [3, 9]}
    del toy_sweep["train"]["epochs"]
    frame = run(toy_sweep).frame()
    assert list(frame["optimizer_steps"]) == [3, 9, 3, 9], list(frame["error"])
    assert list(frame["num_samples"]) == [30, 37 * 2 + 10] * 2
