"""A task with a model as large as the config says. Sweep files name it as `tests/stacks.py:build_task`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tune_easytrain import Task


class Block(nn.Module):
    """Two layers of `width`² weights each, with a way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = inputs + self.layers(inputs)
        return outputs


def build_task(config: dict[str, Any]) -> Task:
    """Blocks trained with Adam, which keeps four numbers per weight: `model.num_blocks`, `model.width`.

    `hp.learning_rate`, `data.num_samples`; `toy.seconds_per_loss` makes each pass that long.
    """
    width, num_samples = config["model"]["width"], config.get("data", {}).get("num_samples", 16)
    seconds = config.get("toy", {}).get("seconds_per_loss", 0.0)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if seconds and batch[0].device.type != "meta":
            time.sleep(seconds)
        return model(batch[0]).square().mean()

    return Task(
        model=lambda: nn.Sequential(*(Block(width) for _ in range(config["model"]["num_blocks"]))),
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(
            model.parameters(), lr=config.get("hp", {}).get("learning_rate", 1e-3)
        ),
        train_data=lambda: TensorDataset(torch.ones(num_samples, width)),
        worst_case=lambda m: (torch.ones(m, width),),
    )
