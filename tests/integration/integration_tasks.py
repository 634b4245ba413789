"""Training functions that integration tests send to workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


def report_the_forkserver(config: dict[str, Any], trial: TrialContext) -> None:
    """Reports which forkserver its process comes from, which is as good as which Ray worker; or `fails`."""
    if config["fails"]:
        raise KeyError("label")
    trial.report({"pid": os.getppid()})


def report_four_times(config: dict[str, Any], trial: TrialContext) -> None:
    """Reports `value` four times; fails at once without one."""
    for _ in range(4):
        trial.report({"value": float(config["value"])})


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
