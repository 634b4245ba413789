"""Training on clips that are on the device already, so that nothing but the training loop is timed.

The data set of `resident_task` holds numbers; the loss looks up which clips of a pool on the device they
stand for. The loop under test and what it is compared with read these numbers through loaders as they are.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

import tune_easytrain as te
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.memory import device_memory
from tune_easytrain.protocol import Report
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.settings import TrialSettings
from tune_easytrain.train_loop import train

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import ucf101

POOL_CLIPS = 64
SMALL_CLIPS = {"frames": 4, "size": 32}
"""For a smoke run on a CPU."""


@dataclass(frozen=True, slots=True)
class Case:
    """One training: which model, in which precision, with which micro-batches and how many loader processes.

    `optimizer` is adam, or sgd without momentum. `is_small` stands for clips that a CPU can train on.
    """

    model: str
    precision: str
    microbatch_size: int
    accumulation_steps: int
    loader_workers: int = 0
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    is_small: bool = False

    @property
    def effective_batch_size(self) -> int:
        """Samples of one optimizer step."""
        return self.microbatch_size * self.accumulation_steps


class Numbers(Dataset[int]):
    """Sample i is the number i."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> int:
        return index


class StepClock:
    """Notes when each optimizer step has been given to the device.

    Both loops wait for the device once in every step, so that the time between two notes is that of a whole
    step, wherever in it they wait.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def watch(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer, watched from now on."""
        optimizer.register_step_post_hook(lambda *_: self.times.append(time.perf_counter()))
        return optimizer

    def seconds_per_step(self, num_warmup_steps: int) -> float:
        """Return the mean time of a step after the first ones."""
        times = self.times[num_warmup_steps - 1 :]
        return (times[-1] - times[0]) / (len(times) - 1)


def trial_config(case: Case) -> dict[str, Any]:
    """Return the trial's config as a sweep file would give it."""
    sweep = {
        "name": "resident_clips",
        "config": {
            "optimizer": {"name": case.optimizer},
            "data": SMALL_CLIPS if case.is_small else {},
            "hp": {"learning_rate": case.learning_rate, "batch_size": case.microbatch_size},
        },
        "grid_search": {"grid": {"model.type": [case.model]}},
        "batch": {"effective_batch_size": case.effective_batch_size, "probe": "off"},
        "train": {"precision": case.precision, "loader_workers": case.loader_workers},
        "run": {"metric": "train_loss", "mode": "min"},
    }
    return te.expand_trials(te.load_config(sweep))[0]


def video_task(case: Case) -> te.Task:
    """Return the example's task."""
    config = {name: value for name, value in trial_config(case).items() if name in ucf101.SECTIONS}
    return ucf101.build_task(config)


def resident_task(case: Case, num_samples: int, device: torch.device, clock: StepClock) -> te.Task:
    """Return the example's task with a training set of numbers and a pool of random clips on the device."""
    task = video_task(case)
    pool = _pool(task.worst_case, device)
    build_optimizer, loss = task.optimizer, task.loss

    def resident_loss(model: nn.Module, numbers: Tensor) -> Tensor:
        clips, labels = pool
        rows = numbers % len(labels)
        return loss(model, (clips.index_select(0, rows), labels.index_select(0, rows)))

    task.loss = resident_loss
    task.optimizer = lambda model: clock.watch(build_optimizer(model))
    task.train_data = lambda: Numbers(num_samples)
    task.val_data = None
    return task


def _pool(make_clips: Callable[[int], Any] | None, device: torch.device) -> tuple[Tensor, Tensor]:
    assert make_clips is not None
    clips, _ = make_clips(1)
    num_clips = POOL_CLIPS if device.type == "cuda" else 8
    generator = torch.Generator(device).manual_seed(0)
    shape = (num_clips, *clips.shape[1:])
    return torch.randn(shape, device=device, generator=generator), torch.arange(num_clips, device=device)


def run_loop(
    case: Case,
    num_steps: int,
    device: torch.device,
    ranks: RankGroup | None = None,
    *,
    keeps_weights: bool = False,
) -> tuple[StepClock, dict[str, Tensor]]:
    """Train with the package's own loop; return when its steps were, and the first worker's weights."""
    ranks = RankGroup() if ranks is None else ranks
    clock, config = StepClock(), trial_config(case)
    settings = TrialSettings.from_config(
        config, metric="train_loss", mode="min", num_workers=ranks.num_workers
    )
    weights: dict[str, Tensor] = {}

    def take(message: Any) -> None:
        if keeps_weights and isinstance(message, Report):
            weights.update(
                torch.load(message.checkpoint_path, weights_only=True, map_location="cpu")["model"]
            )

    with tempfile.TemporaryDirectory() as folder:
        context = te.TrialContext(
            task=resident_task(case, num_steps * case.effective_batch_size, device, clock),
            device_name=str(device),
            batch_plan=BatchPlan.build(
                case.effective_batch_size,
                case.microbatch_size,
                num_workers=ranks.num_workers,
                rank=ranks.rank,
            ),
            settings=settings,
            memory=device_memory(device),
            scratch_dir=Path(folder),
            checkpoint_path=None,
            send=take,
            workers=ranks,
        )
        train(config, context)
    return clock, weights
