"""Training functions that integration tests send to workers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import nn
from torch.utils.data import Dataset

from tune_easytrain import Task, TrialContext


def train_by_hand(config: dict[str, Any], trial: TrialContext) -> None:
    """Reports twice, with a checkpoint, what it was given and which of its ancestors have loaded torch.

    With `toy.is_silent` it reports nothing.
    """
    if config["toy"]["is_silent"]:
        return
    assert trial.batch_plan is not None
    forkserver, worker = os.getppid(), _ray_worker()
    for value in (0.125, 0.25 if config["model"]["type"] == "small" else 0.5):
        trial.report(
            {
                "val_accuracy": value,
                "accumulation_steps_seen": trial.batch_plan.accumulation_steps,
                "forkserver_has_torch": _has_torch(forkserver),
                "ray_worker_has_torch": _has_torch(worker),
            },
            checkpoint={"value": value},
        )


def build_task_with_a_file(config: dict[str, Any]) -> Task:
    """A task whose training data are in the file `data.file`; `toy.seconds_per_loss` makes it slow."""

    def train_data() -> Any:
        Path(config["data"]["file"]).read_text()
        return list(torch.ones(config["data"]["num_samples"], 1))

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(config.get("toy", {}).get("seconds_per_loss", 0))
        return model(batch).mean()

    return Task(
        model=lambda: nn.Linear(1, 1),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=train_data,
    )


def build_task_that_hangs_once(config: dict[str, Any]) -> Task:
    """Whichever trial computes a loss first writes its Ray worker's pid to the file `toy.pid`, and hangs."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        try:
            with Path(config["toy"]["pid"]).open("x") as file:
                file.write(f"{_ray_worker()}\n")
        except FileExistsError:
            return model(batch).mean()
        time.sleep(3600)
        raise AssertionError

    return Task(
        model=lambda: nn.Linear(1, 1),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=config["hp"]["learning_rate"]),
        train_data=lambda: list(torch.ones(8, 1)),  # type: ignore[arg-type,return-value]
    )


def _ray_worker() -> int:
    """Return the pid of the Ray worker that this process is a trial's child of."""
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


def _has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


class Numbered(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples of five numbers that know their own number."""

    def __init__(self, num_samples: int) -> None:
        self._features = torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(3)).double()

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._features[index], torch.tensor(index)


def build_exact_task(config: dict[str, Any]) -> Task:
    """A net in float64 without anything random; `toy` says what happens to the process that reads a sample.

    `toy.sample` is that sample's number; in training, once per file `toy.marker`, the process is killed, or
    its memory runs out, when it is read for the `toy.visit`th time (default: the first).
    """
    toy = config.get("toy", {})

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        features, numbers = batch
        if model.training and toy and toy["sample"] in numbers.tolist():
            _happen_once(toy)
        return model(features).square().mean()

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    return Task(
        model=model,
        loss=loss,
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
        train_data=lambda: Numbered(config["data"]["num_samples"]),
        val_data=lambda: Numbered(7),
        worst_case=lambda m: (torch.zeros(m, 5).double(), torch.full((m,), -1)),
        predict=lambda model, batch: ((model(batch[0]).squeeze(1) > 0).long(), batch[1] % 2),
        metrics={
            "accuracy": lambda: torchmetrics.classification.MulticlassAccuracy(num_classes=2, average="micro")
        },
    )


def _happen_once(toy: dict[str, Any]) -> None:
    visits = Path(f"{toy['marker']}_visits")
    with visits.open("a") as file:
        file.write("read\n")
    if len(visits.read_text().splitlines()) < toy.get("visit", 1):
        return
    try:
        Path(toy["marker"]).touch(exist_ok=False)
    except FileExistsError:
        return
    if toy["fault"] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise torch.OutOfMemoryError("out of memory, as the test wants it")
