from __future__ import annotations

import random
import resource
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from toys import build_task, make_config, make_opening

from tune_easytrain import Task
from tune_easytrain.signature import task_signature

CPU = torch.device("cpu")


def sign(build: Callable[[dict[str, Any]], Task] = build_task, **changes: Any) -> str:
    opening = make_opening(build, "unused", **changes)
    return task_signature(build(opening.config), opening, CPU)


def is_on(config: dict[str, Any], name: str) -> bool:
    """A switch that the config itself does not show: it tells only zero from other numbers."""
    return config[name] > 1.0


class Block(nn.Module):
    """A layer with what a task may vary."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32 if is_on(config, "wide") else 16)
        self.linear.weight.requires_grad = not is_on(config, "frozen")
        self.activation = nn.GELU() if is_on(config, "gelu") else nn.ReLU()
        self.dropout = nn.Dropout(0.0 if is_on(config, "no_dropout") else config["dropout"])
        self.gradient_checkpointing = is_on(config, "checkpointing")
        if is_on(config, "buffer"):
            self.register_buffer("seen", torch.zeros(4))
        if is_on(config, "half"):
            self.half()


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).mean()


def other_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


SWITCHES = (
    "wide", "frozen", "gelu", "no_dropout", "checkpointing", "buffer", "half", "adam", "amsgrad", "momentum",
    "two_groups", "other_loss", "long_samples", "predicts",
)  # fmt: skip


def build_block(config: dict[str, Any]) -> Task:
    """A task whose switches show in nothing but what it builds."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        groups: list[Any] = list(model.parameters())
        if is_on(config, "two_groups"):
            groups = [{"params": groups[:1]}, {"params": groups[1:]}]
        if is_on(config, "adam"):
            return torch.optim.Adam(groups, lr=config["rate"], amsgrad=is_on(config, "amsgrad"))
        return torch.optim.SGD(groups, lr=config["rate"], momentum=float(is_on(config, "momentum")))

    length = 24 if is_on(config, "long_samples") else 16
    return Task(
        model=lambda: Block(config),
        loss=other_loss if is_on(config, "other_loss") else loss,
        optimizer=optimizer,
        train_data=lambda: [torch.zeros(length)] * 4,  # type: ignore[arg-type,return-value]
        predict=partial(predict, 1) if is_on(config, "predicts") else None,
    )


def predict(dim: int, model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model(batch).mean(dim), batch


def sign_block(**config: float) -> str:
    return sign(build_block, config={**dict.fromkeys(SWITCHES, 1.0), "rate": 0.1, "dropout": 0.1, **config})


def test_learning_rate_batch_sizes_seed_and_epochs_make_no_difference() -> None:
    signature = sign(config=make_config(hp={"learning_rate": 0.1, "batch_size": 4}))
    assert signature == sign(config=make_config(hp={"learning_rate": 1, "batch_size": 8}))
    assert signature == sign(config=make_config(hp={"seed": 3}, batch={"effective_batch_size": 9}))
    assert signature == sign(effective_batch_size=1000, microbatch_limit=3, seed=1, epochs=9, patience=2)
    assert signature == sign(memory_budget_bytes=1, metric="val_loss", probe_timeout_seconds=1.0)
    assert signature == sign(lr_scaling="sqrt", base_batch_size=4, warmup_steps=5, exact="required")
    assert signature == sign(epochs=None, num_samples=9, noise_scale=True)


@pytest.mark.parametrize(
    "other",
    [
        {"config": make_config(model={"type": "large"})},
        {"config": make_config(checkpointing=True)},
        {"config": make_config(every=3)},
        {"precision": "bf16"},
        {"clip_norm": 1.0},
        {"start": 4},
        {"search": "grow"},
        {"function_payload": b"another training loop"},
    ],
    ids=repr,
)
def test_what_a_trial_was_asked_for_makes_a_difference(other: dict[str, Any]) -> None:
    assert sign() != sign(**other)


@pytest.mark.parametrize("switch", [name for name in SWITCHES if name != "amsgrad"])
def test_what_the_task_builds_makes_a_difference(switch: str) -> None:
    assert sign_block() != sign_block(**{switch: 2.0})


def test_an_option_of_the_optimizer_makes_a_difference() -> None:
    assert sign_block(adam=2.0) != sign_block(adam=2.0, amsgrad=2.0)


def test_how_large_a_number_is_makes_no_difference() -> None:
    assert sign_block() == sign_block(rate=0.2) == sign_block(dropout=0.5)


def test_the_device_makes_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sign()
    monkeypatch.setattr("tune_easytrain.signature.host_memory_bytes", lambda: 2**30)
    assert sign() != before


class Counting(nn.Linear):
    """Cannot be built without data: it reads a value of its own weight."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.first = float(self.weight[0, 0].item())


def build_counting(config: dict[str, Any]) -> Task:
    return replace(build_task(make_config()), model=Counting)


def test_a_model_that_cannot_be_built_on_meta_goes_by_all_of_its_config_and_its_code() -> None:
    one = {"hp": {"learning_rate": 0.1, "batch_size": 3}, "dropout": 0.1}
    assert sign(build_counting, config=one) == sign(build_counting, config={"dropout": 0.1, "hp": {}})
    assert sign(build_counting, config=one) != sign(build_counting, config={"dropout": 0.2, "hp": {}})
    opening = make_opening(build_counting, "unused", config=one)
    task, changed = build_counting(one), replace(opening, task_payload=b"another")
    assert task_signature(task, opening, CPU) != task_signature(task, changed, CPU)


class Giant(nn.Module):
    """64 GiB of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2**16, 2**16, bias=False) for _ in range(4))


def build_giant(config: dict[str, Any]) -> Task:
    return replace(build_task(make_config()), model=Giant)


def test_nothing_of_the_models_size_is_allocated_and_random_state_is_kept() -> None:
    before, state = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, torch.get_rng_state()
    python_state = random.getstate()
    assert sign(build_giant) != sign()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 * 2**10  # KiB
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
