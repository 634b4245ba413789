from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers

from tune_easytrain.built_options import apply_changes, built_options
from tune_easytrain.trial_context import load_checkpoint, save_checkpoint

NUM_STEPS = 12


class Ramp:
    """A schedule with a state of its own, which LambdaLR saves."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.length)


SCHEDULES: dict[str, Callable[[Optimizer], Any] | None] = {
    "none": None,
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "from zero": lambda optimizer: schedulers.LambdaLR(optimizer, Ramp(4)),
    "exponential": lambda optimizer: schedulers.ExponentialLR(optimizer, 0.9),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, NUM_STEPS),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(
        optimizer, max_lr=[10 * group["lr"] for group in optimizer.param_groups], total_steps=NUM_STEPS + 1
    ),
    "sequence": lambda optimizer: schedulers.SequentialLR(
        optimizer,
        [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.ExponentialLR(optimizer, 0.8)],
        milestones=[3],
    ),
}


class Built:
    """An optimizer of two groups with its scheduler, and a training in which only they matter."""

    def __init__(self, schedule: str, rate: float, **options: Any) -> None:
        first, second = nn.Linear(2, 2), nn.Linear(2, 2)
        groups = [
            {"params": list(first.parameters())},
            {"params": list(second.parameters()), "lr": 3 * rate},
        ]
        self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, **options)
        build = SCHEDULES[schedule]
        self.scheduler = None if build is None else build(self.optimizer)
        self.options = built_options(self.optimizer, self.scheduler)

    def train(self, num_steps: int) -> list[list[float]]:
        """Return each step's rates, one per group."""
        rates = []
        for _ in range(num_steps):
            rates.append([float(group["lr"]) for group in self.optimizer.param_groups])
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
        return rates

    def save(self, path: Path) -> None:
        state = None if self.scheduler is None else self.scheduler.state_dict()
        save_checkpoint(
            {"optimizer": self.optimizer.state_dict(), "scheduler": state, "options": self.options}, path
        )

    def restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(checkpoint["scheduler"])
        apply_changes(self.optimizer, self.scheduler, checkpoint["options"], self.options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=25)
@given(factor=st.floats(0.01, 100), num_steps=st.integers(0, NUM_STEPS))
def test_a_rate_goes_on_where_it_would_be_had_it_been_built_so(
    schedule: str, factor: float, num_steps: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "checkpoint.pt"
    first = Built(schedule, 0.1)
    first.train(num_steps)
    first.save(path)
    second, alone = Built(schedule, 0.1 * factor), Built(schedule, 0.1 * factor)
    second.restore(path)
    expected = alone.train(NUM_STEPS)[num_steps:]
    for rates, wanted in zip(second.train(NUM_STEPS - num_steps), expected, strict=True):
        assert rates == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_changes_where_it_is_built_as_it_was(schedule: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    first, second = Built(schedule, 0.1), Built(schedule, 0.1)
    first.train(5)
    first.save(path)
    second.restore(path)
    assert second.optimizer.state_dict() == first.optimizer.state_dict()
    if first.scheduler is not None:
        assert second.scheduler.state_dict() == first.scheduler.state_dict()
    assert second.train(6) == first.train(6)


def test_other_options_change_and_what_is_not_set_otherwise_stays(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    first, second = Built("none", 0.1, weight_decay=1e-2), Built("none", 0.1, weight_decay=1e-4)
    for group in first.optimizer.param_groups:
        group["momentum"] = 0.5  # as a training function of one's own may
    first.save(path)
    second.restore(path)
    assert [group["weight_decay"] for group in second.optimizer.param_groups] == [1e-4, 1e-4]
    assert [group["momentum"] for group in second.optimizer.param_groups] == [0.5, 0.5]
    assert [group["lr"] for group in second.optimizer.param_groups] == [0.1, 0.1 * 3]


def test_the_options_are_a_copy() -> None:
    built = Built("cosine", 0.1)
    before = copy.deepcopy(built.options)
    built.train(3)
    assert built.options == before
