"""What results.ipynb trains: a small net that tells the two arms of a spiral apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from tune_easytrain import Task

WIDTHS = {"small": 8, "large": 64}


def make_spiral(num_samples: int, seed: int) -> TensorDataset:
    """Return points of shape (num_samples, 2) on two arms, and the arm of each, of shape (num_samples,)."""
    generator = torch.Generator().manual_seed(seed)
    arms = torch.arange(num_samples) % 2
    distances = torch.rand(num_samples, generator=generator).sqrt()
    angles = 5 * distances + torch.pi * arms + 0.2 * torch.randn(num_samples, generator=generator)
    points = torch.stack([distances * angles.cos(), distances * angles.sin()], dim=1)
    return TensorDataset(points, arms)


def build_task(config: dict[str, Any]) -> Task:
    """Return the task of one trial, with a net of the width that `model.type` names."""
    width = WIDTHS[config["model"]["type"]]
    return Task(
        model=lambda: nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        ),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=config["hp"]["learning_rate"]),
        train_data=lambda: make_spiral(512, seed=0),
        val_data=lambda: make_spiral(256, seed=1),
        predict=lambda model, batch: (model(batch[0]), batch[1]),
        metrics={"accuracy": lambda: MulticlassAccuracy(num_classes=2, average="micro")},
    )
