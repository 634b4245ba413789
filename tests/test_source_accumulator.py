"""A gradient accumulator as it is often written, and what it has to do: the same as the whole batch.

Steps of a linear classifier over 32 samples as 32 x 1, 8 x 4 or 4 x 8; AdamW, gradients clipped at 1 once
they are accumulated, in float64. Of ten batches in steps of 4 or 8, two are left for the last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from test_train_loop import drive
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tune_easytrain as te

E = 32
MAX_NORM = 1.0
NUM_FEATURES, NUM_CLASSES = 100, 10
SPLITS = [(32, 1), (8, 4), (4, 8)]


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(NUM_FEATURES, NUM_CLASSES).double()


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def make_data(num_samples: int) -> TensorDataset:
    """Samples large enough for every step to be clipped."""
    generator = torch.Generator().manual_seed(1)
    features = 3 * torch.randn(num_samples, NUM_FEATURES, generator=generator, dtype=torch.float64)
    return TensorDataset(features, torch.randint(0, NUM_CLASSES, (num_samples,), generator=generator))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def build_task(num_samples: int) -> te.Task:
    return te.Task(
        model=build_model, loss=loss, optimizer=build_optimizer, train_data=lambda: make_data(num_samples)
    )


@dataclass
class Trained:
    """The weights after each step, the mean loss of each, and the norm of its gradient before clipping."""

    weights: list[Tensor]
    losses: list[float]
    norms: list[float]


def train_whole(num_samples: int) -> Trained:
    """Every step on its samples in one batch, with torch alone; the last one on those left."""
    model, trained = build_model(), Trained([], [], [])
    optimizer = build_optimizer(model)
    for batch in zip(*(part.split(E) for part in make_data(num_samples).tensors), strict=True):
        optimizer.zero_grad()
        value = loss(model, batch)
        value.backward()
        step(model, optimizer, value.item(), trained)
    return trained


def train_in_parts(num_samples: int, limit: int) -> tuple[Trained, list[tuple[int, ...]]]:
    """The same with the package's accumulation; also the micro-batches of every step."""
    model, trained, sizes = build_model(), Trained([], [], []), []
    optimizer = build_optimizer(model)
    features, labels = make_data(num_samples).tensors
    start = 0
    for plan in te.BatchPlan.build(E, limit).windows(num_samples):
        window = slice(start, start + plan.num_samples)
        start += plan.num_samples
        parts = te.split_batch((features[window], labels[window]), plan.microbatch_sizes)
        record = te.accumulate_gradients(model, loss, parts)
        step(model, optimizer, record.loss, trained)
        sizes.append(record.microbatch_sizes)
    return trained, sizes


def step(model: nn.Module, optimizer: torch.optim.Optimizer, value: float, trained: Trained) -> None:
    norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    optimizer.step()
    trained.norms.append(norm.item())
    trained.losses.append(value)
    trained.weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("limit", "steps"), SPLITS)
@pytest.mark.parametrize("num_samples", [6 * E, 6 * E + 16, 6 * E + 5, 3])
def test_all_ways_to_part_the_steps_give_equal_weights(limit: int, steps: int, num_samples: int) -> None:
    """After each step, not only at the end; the last one has the samples that are left."""
    whole = train_whole(num_samples)
    parted, sizes = train_in_parts(num_samples, limit)
    assert all(parts == (limit,) * steps for parts in sizes[: num_samples // E])
    assert len(parted.weights) == len(whole.weights) == -(-num_samples // E)
    for found, expected in zip(parted.weights, whole.weights, strict=True):
        assert_same(found, expected)
    assert parted.losses == pytest.approx(whole.losses, rel=1e-10)


@pytest.mark.parametrize(("limit", "steps"), SPLITS)
def test_the_gradient_is_clipped_once_it_is_accumulated(limit: int, steps: int) -> None:
    """The norm that is clipped is the whole batch's; parts that are clipped each would give another."""
    whole = train_whole(6 * E)
    parted, _ = train_in_parts(6 * E, limit)
    assert min(whole.norms) > MAX_NORM
    assert parted.norms == pytest.approx(whole.norms, rel=1e-10)


@pytest.mark.parametrize(("limit", "steps", "num_steps"), [(8, 4, 3), (4, 8, 2)])
def test_two_batches_left_of_ten_count_for_what_they_are(limit: int, steps: int, num_steps: int) -> None:
    """The last step's gradient and loss are the mean over two micro-batches, not two parts of `steps`."""
    num_samples = 10 * limit
    parted, sizes = train_in_parts(num_samples, limit)
    assert sizes == [*[(limit,) * steps] * (num_steps - 1), (limit, limit)]
    whole = train_whole(num_samples)
    assert parted.norms[-1] == pytest.approx(whole.norms[-1], rel=1e-10)
    assert parted.losses[-1] == pytest.approx(whole.losses[-1], rel=1e-10)
    assert_same(parted.weights[-1], whole.weights[-1])


@pytest.mark.parametrize(("limit", "steps"), SPLITS)
@pytest.mark.parametrize("num_samples", [3 * E, 10 * 8, 10 * 4])
def test_the_training_loop_does_the_same(tmp_path: Path, limit: int, steps: int, num_samples: int) -> None:
    """Its own order of samples, three epochs; the mean loss of an epoch is that over its samples."""
    options = {"effective_batch_size": E, "epochs": 3, "clip_norm": MAX_NORM}
    whole = drive(build_task(num_samples), tmp_path / "whole", limit=E, **options)
    parted = drive(build_task(num_samples), tmp_path / "parted", limit=limit, **options)
    assert parted.last["optimizer_steps"] == 3 * -(-num_samples // E)
    assert parted.last["train_loss"] == pytest.approx(whole.last["train_loss"], rel=1e-10)
    for name, weight in parted.weights.items():
        assert_same(weight, whole.weights[name])


def test_where_the_last_step_is_divided_by_all_steps_weights_differ() -> None:
    """What these tests would catch: two micro-batches left, and divided by four."""
    model, whole = build_model(), train_whole(16)
    features, labels = make_data(16).tensors
    for first in (0, 8):
        (loss(model, (features[first : first + 8], labels[first : first + 8])) / 4).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert norm == pytest.approx(whole.norms[0] / 2, rel=1e-10)
