"""A task of exact arithmetic in which something goes wrong once, at a known place."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tune_easytrain import Task

NUM_SAMPLES = 24


def build_task(config: dict[str, Any]) -> Task:
    """A net in float64, with dropout, on numbered samples.

    `fault.what` happens in `fault.where` (`data`, `read`, `forward`, `backward`, `step`, `evaluate`,
    `metric`, `checkpoint`), the `fault.visit`th time that one comes there in training (default: the ninth,
    in the third epoch of four windows), and once only where `fault.once` is not false. `pace` is how many
    seconds a loss takes.
    """
    faults = _Faults(config)

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.3), _Watched(faults), nn.Linear(16, 1)
        ).double()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            time.sleep(config.get("pace", 0.0))
        value = model(batch[0]).square().mean()
        return value * faults.nan if model.training else value

    def data() -> Dataset[Any]:
        faults.come_to("data")
        return _Numbered(NUM_SAMPLES, faults)

    return Task(
        model=model,
        loss=loss,
        optimizer=lambda model: _Adam(model.parameters(), faults),
        train_data=data,
        val_data=lambda: _Numbered(7, None),
        worst_case=lambda m: (torch.zeros(m, 5).double(), torch.full((m,), -1)),
        predict=lambda model, batch: (model(batch[0]), batch[1]),
        metrics={"mean": lambda: _Mean(faults)},
    )


class _Faults:
    """Counts how often training comes to a place, over all processes of a trial, and breaks it there."""

    def __init__(self, config: dict[str, Any]) -> None:
        fault = config.get("fault") or {}
        self._what, self._where = fault.get("what"), fault.get("where")
        self._visit, self._is_once = fault.get("visit", 9), fault.get("once", True)
        self._folder = Path(config["folder"]) / f"{self._what}_{self._where}_{self._is_once}"
        self.nan = 1.0

    def come_to(self, where: str) -> None:
        if self._what is None or where != self._where:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / f"{time.monotonic_ns()}").touch()
        visits = len(list(self._folder.iterdir()))
        if visits == self._visit or (visits > self._visit and not self._is_once):
            self._break()

    def _break(self) -> None:
        match self._what:
            case "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "sigsegv":
                ctypes.string_at(0)
            case "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            case "ray_worker":
                os.kill(ray_worker(), signal.SIGKILL)
                time.sleep(60)
            case "loader":
                for child in multiprocessing.active_children():
                    assert child.pid is not None
                    os.kill(child.pid, signal.SIGKILL)
            case "hang":
                ctypes.CDLL(None).sleep(3600)
            case "raise":
                raise KeyError("a bug in the task")
            case "memory":
                raise torch.OutOfMemoryError("out of memory, as the test wants it")
            case "nan":
                self.nan = float("nan")
            case unknown:
                raise AssertionError(unknown)


def ray_worker() -> int:
    """Return the pid of the Ray worker that this process is a trial's child of."""
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))


class _Watched(nn.Module):
    """Tells when training comes by, forward and backward."""

    def __init__(self, faults: _Faults) -> None:
        super().__init__()
        self._faults = [faults]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self._faults[0].come_to("evaluate")
            return batch
        self._faults[0].come_to("forward")
        if batch.requires_grad:
            batch.register_hook(self._come_back)
        return batch

    def _come_back(self, gradient: torch.Tensor) -> None:
        self._faults[0].come_to("backward")


class _Adam(torch.optim.Adam):
    def __init__(self, parameters: Any, faults: _Faults) -> None:
        super().__init__(parameters, lr=0.05)
        self._faults = faults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self._faults.come_to("step")
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        self._faults.come_to("checkpoint")
        return super().state_dict()


class _Mean(nn.Module):
    sync_on_compute = False

    def __init__(self, faults: _Faults) -> None:
        super().__init__()
        self._faults = [faults]
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        self._faults[0].come_to("metric")
        self.sums += torch.tensor([prediction.sum().item(), len(target)], dtype=torch.float64)

    def compute(self) -> torch.Tensor:
        return self.sums[0] / self.sums[1]


class _Numbered(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self, num_samples: int, faults: _Faults | None) -> None:
        self._features = torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(3)).double()
        self._faults = faults

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._faults is not None:
            self._faults.come_to("read")
        return self._features[index], torch.tensor(index)
