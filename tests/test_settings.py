from __future__ import annotations

import math
from typing import Any

import pytest
from toys import make_settings

from tune_easytrain.config import load_config
from tune_easytrain.search_space import expand_trials
from tune_easytrain.settings import TrialSettings
from tune_easytrain.training_budget import TrainingBudget


def from_sweep(
    hp: dict[str, Any], batch: dict[str, Any], train: dict[str, Any] | None = None
) -> TrialSettings:
    config = load_config({"config": {"hp": hp}, "batch": batch, "train": train or {}})
    (trial,) = expand_trials(config)
    return TrialSettings.from_config(trial, metric="val_loss", mode="min")


@pytest.mark.parametrize(
    ("hp", "batch", "effective", "limit"),
    [
        ({"batch_size": 16}, {"effective_batch_size": 128}, 128, 16),
        ({"batch_size": 16}, {}, 16, None),
        ({"lr": 1}, {"effective_batch_size": 128}, 128, None),
    ],
)
def test_hp_batch_size_is_the_limit_beside_an_effective_size_and_that_size_without(
    hp: dict[str, Any], batch: dict[str, Any], effective: int, limit: int | None
) -> None:
    settings = from_sweep(hp, batch)
    assert (settings.effective_batch_size, settings.microbatch_limit) == (effective, limit)


def test_every_setting_of_the_sweep_arrives() -> None:
    batch = {
        "effective_batch_size": 8, "memory_fraction": 0.5, "memory_budget": "2GiB", "probe": "off",
        "search": "grow", "start": 3, "probe_timeout": 7.0, "exact": "required",
    }  # fmt: skip
    train = {
        "clip_norm": 1.5, "lr_scaling": "sqrt", "base_batch_size": 4, "warmup_steps": 9, "noise_scale": True,
    }  # fmt: skip
    settings = from_sweep({}, batch, train)
    assert settings == make_settings(
        effective_batch_size=8,
        memory_fraction=0.5,
        memory_budget_bytes=2 * 2**30,
        probe="off",
        search="grow",
        start=3,
        probe_timeout_seconds=7.0,
        exact="required",
        epochs=1,
        clip_norm=1.5,
        lr_scaling="sqrt",
        base_batch_size=4,
        warmup_steps=9,
        noise_scale=True,
        metric="val_loss",
    )


@pytest.mark.parametrize(
    ("train", "budget"),
    [
        ({}, TrainingBudget("epochs", 1)),
        ({"epochs": 3}, TrainingBudget("epochs", 3)),
        ({"num_samples": 3}, TrainingBudget("samples", 3)),
        ({"num_steps": 3}, TrainingBudget("steps", 3)),
    ],
)
def test_the_budget_is_the_one_that_is_given_and_else_one_epoch(
    train: dict[str, Any], budget: TrainingBudget
) -> None:
    settings = from_sweep({}, {"effective_batch_size": 8}, train)
    assert settings.budget == budget
    assert settings.epochs == (budget.amount if budget.unit == "epochs" else None)


@pytest.mark.parametrize(
    ("mode", "value", "best", "expected"),
    [
        ("min", 1.0, None, True),
        ("min", 1.0, 2.0, True),
        ("min", 2.0, 2.0, False),
        ("max", 3.0, 2.0, True),
        ("max", 1.0, 2.0, False),
        ("min", math.nan, None, False),  # or no number would ever be better again
        ("max", math.nan, 2.0, False),
    ],
)
def test_what_is_better(mode: str, value: float, best: float | None, expected: bool) -> None:
    assert make_settings(mode=mode).is_better(value, best) is expected
