from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import tune
from ray.tune.experiment import Trial

from tune_easytrain.config import SweepConfig, load_config
from tune_easytrain.search_algorithms import (
    _StayWithin,
    build_scheduler,
    build_searcher,
    most_epochs,
    num_checkpoints_kept,
)

RATE = {"hp.lr": {"loguniform": [1e-5, 1e-1]}}


def sweep(run: dict[str, Any], grid: dict[str, Any] | None = None, **train: Any) -> SweepConfig:
    return load_config(
        {
            "task": "module:task",
            "grid_search": {"grid": {**RATE, **(grid or {})}},
            "batch": {"effective_batch_size": 8},
            "train": {"epochs": 9, **train},
            "run": {"num_samples": 8, **run},
        }
    )


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("asha", tune.schedulers.ASHAScheduler),
        ("median", tune.schedulers.MedianStoppingRule),
        ("pbt", tune.schedulers.PopulationBasedTraining),
    ],
)
def test_each_name_is_rays_scheduler(name: str, kind: type) -> None:
    assert type(build_scheduler(sweep({"scheduler": name}))) is kind


@pytest.mark.parametrize(
    ("run", "kind"),
    [
        ({"scheduler": "hyperband"}, tune.schedulers.HyperBandScheduler),
        ({"scheduler": "bohb", "search": "bohb"}, tune.schedulers.HyperBandForBOHB),
    ],
)
def test_a_bracket_does_not_wait_for_trials_that_ended_before_the_sweep_was_resumed(
    run: dict[str, Any], kind: type
) -> None:
    scheduler = build_scheduler(sweep(run))
    assert isinstance(scheduler, kind)
    scheduler.set_search_properties("val_loss", "min")
    ended, waiting = Trial("ended", stub=True), Trial("waiting", stub=True)
    ended.set_status(Trial.TERMINATED)
    for trial in (ended, waiting):
        scheduler.on_trial_add(None, trial)
    assert scheduler._state["bracket"].current_trials() == [waiting]


def test_without_names_ray_draws_and_nothing_is_stopped() -> None:
    assert build_scheduler(sweep({})) is None
    assert build_searcher(sweep({})) is None


@pytest.mark.parametrize(
    ("train", "grid", "epochs"),
    [
        ({}, {}, 9),
        ({"epochs": None}, {}, 1),
        ({}, {"train.epochs": [3, 20, 5]}, 20),
        ({}, {"train.epochs": {"randint": [3, 21]}}, 20),
        ({"epochs": None, "num_steps": 50}, {}, None),
        ({"epochs": None, "function": "module:function"}, {}, None),
        ({"epochs": 3, "function": "module:function"}, {}, 3),
        ({"epochs": None}, {"train.num_samples": {"choice": [50, 60]}}, None),
    ],
)
def test_the_most_epochs_of_a_trial(train: dict[str, Any], grid: dict[str, Any], epochs: int | None) -> None:
    assert most_epochs(sweep({}, grid, **train)) == epochs


def test_a_population_keeps_checkpoints_for_two_intervals() -> None:
    assert num_checkpoints_kept(sweep({})) == num_checkpoints_kept(sweep({"scheduler": "asha"})) == 2
    scheduler = {"name": "pbt", "perturbation_interval": 3}
    assert num_checkpoints_kept(sweep({"scheduler": scheduler})) == 10


@given(st.floats(allow_nan=False), st.floats(0.1, 1))
def test_perturbed_values_stay_in_their_range(value: float, inside: float) -> None:
    stay = _StayWithin({"a": (0.1, 1.0)})
    assert 0.1 <= stay({"a": value, "point": 3})["a"] <= 1.0
    assert stay({"a": inside, "point": 3}) == {"a": inside, "point": 3}
