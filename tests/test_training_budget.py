from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.training_budget import TrainingBudget, num_full_windows

sizes = st.integers(1, 60)
budgets = st.builds(TrainingBudget, st.sampled_from(["epochs", "samples", "steps"]), st.integers(1, 200))


def train(budget: TrainingBudget, num_train_samples: int, effective: int) -> list[list[int]]:
    """Train as the loop does; return the samples of every window, epoch by epoch."""
    epochs: list[list[int]] = []
    while True:
        windows = [size for epoch in epochs for size in epoch]
        left = budget.samples_left(
            num_train_samples, effective, epoch=len(epochs), num_samples=sum(windows), num_steps=len(windows)
        )
        if left == 0:
            return epochs
        samples = min(left, num_train_samples)
        epochs.append([min(effective, samples - start) for start in range(0, samples, effective)])


@given(budgets, sizes, sizes)
def test_training_ends_exactly_at_the_budget(
    budget: TrainingBudget, num_train_samples: int, effective: int
) -> None:
    epochs = train(budget, num_train_samples, effective)
    windows = [size for epoch in epochs for size in epoch]
    done = {"epochs": len(epochs), "samples": sum(windows), "steps": len(windows)}
    assert done[budget.unit] == budget.amount
    assert all(sum(epoch) == num_train_samples for epoch in epochs[:-1])
    if budget.unit == "epochs":
        assert sum(epochs[-1]) == num_train_samples
    if budget.unit == "steps":  # a step is short only at the end of the training set
        assert all(size == effective for size in epochs[-1]) or sum(epochs[-1]) == num_train_samples


@given(budgets, sizes, sizes)
def test_full_windows_are_counted_as_they_are_trained(
    budget: TrainingBudget, num_train_samples: int, effective: int
) -> None:
    epochs = train(budget, num_train_samples, effective)
    for done in range(len(epochs) + 1):
        before = [size for epoch in epochs[:done] for size in epoch]
        left = budget.samples_left(
            num_train_samples, effective, epoch=done, num_samples=sum(before), num_steps=len(before)
        )
        expected = sum(size == effective for epoch in epochs[done:] for size in epoch[1:])
        assert num_full_windows(left, num_train_samples, effective) == expected


def test_a_budget_that_is_overdrawn_leaves_nothing() -> None:
    """A resumed trial may have been given less than it had used."""
    for unit in ("epochs", "samples", "steps"):
        budget = TrainingBudget(unit, 2)
        assert budget.samples_left(10, 5, epoch=3, num_samples=30, num_steps=6) == 0


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        (TrainingBudget("epochs", 2), "all 2 epochs done"),
        (TrainingBudget("samples", 100), "all 100 samples seen"),
        (TrainingBudget("steps", 500), "all 500 optimizer steps done"),
    ],
)
def test_the_end_says_which_budget_it_was(budget: TrainingBudget, reason: str) -> None:
    assert budget.describe_end() == reason


def test_exactly_one_budget_is_needed() -> None:
    assert TrainingBudget.choose(epochs=None, num_samples=7, num_steps=None) == TrainingBudget("samples", 7)
    with pytest.raises(ValueError, match="epochs=None, num_samples=None, num_steps=None"):
        TrainingBudget.choose(epochs=None, num_samples=None, num_steps=None)
    with pytest.raises(ValueError, match="epochs=1, num_samples=None, num_steps=2"):
        TrainingBudget.choose(epochs=1, num_samples=None, num_steps=2)
