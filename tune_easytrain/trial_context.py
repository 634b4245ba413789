"""`TrialContext`: what a training function sees of its trial. torch is imported when it is first needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import TaskError
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task import Task

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tune_easytrain.memory import DeviceMemory
    from tune_easytrain.rank_group import RankGroup
    from tune_easytrain.rescue import Rescue


@dataclass(kw_only=True)
class TrialContext:
    """One trial, as `train(config, trial)` gets it.

    Attributes:
        task: what `build_task(config)` returned; None for a sweep without a task.
        device_name: the device to train on, as torch writes it.
        batch_plan: the effective batch size as micro-batches that the probe found to fit; None where the
            sweep gives no batch size. What is in use after a rescue is the plan of `rescue(model)`.
        settings: the trial's `batch` and `train` keys.
        is_near_edge: whether the allocator had to flush its cache when the probe tried this plan's limit.
        workers: those that train this trial together, None for one alone; see `ranks`.
    """

    task: Task | None
    device_name: str
    batch_plan: BatchPlan | None
    settings: TrialSettings
    memory: DeviceMemory
    scratch_dir: Path
    checkpoint_path: Path | None
    send: Callable[[Report | PlanChanged], None]
    is_near_edge: bool = False
    workers: RankGroup | None = None

    @cached_property
    def device(self) -> torch.device:
        """The device to train on."""
        import torch

        return torch.device(self.device_name)

    @cached_property
    def ranks(self) -> RankGroup:
        """The workers that train this trial together; `ranks.rank` is this one's number.

        Each of them calls the training function, with its own share of the batch plan.
        """
        from tune_easytrain.rank_group import RankGroup

        return RankGroup() if self.workers is None else self.workers

    def report(
        self,
        metrics: Mapping[str, float],
        *,
        checkpoint: Mapping[str, Any] | None = None,
        is_final: bool = False,
        reason: str = "",
    ) -> None:
        """Report metrics, usually once an epoch; returns when they have been taken.

        Of several workers the first one's are taken, and the others' calls do nothing.

        Args:
            metrics: numbers by name; must hold the sweep's metric. `epoch` is counted where it is missing.
            checkpoint: tensors and plain values from which `load_checkpoint` lets the trial go on; written
                whole or not at all.
            is_final: nothing will be reported after this.
            reason: with `is_final`, why training ends here.

        Raises TaskError for a value that is not a number.
        """
        if self.workers is not None and not self.workers.is_first:
            return
        path = None
        if checkpoint is not None:
            path = self.scratch_dir / "checkpoint.pt"
            save_checkpoint(checkpoint, path)
        self.send(
            Report(
                {name: _number(name, value) for name, value in metrics.items()},
                self.memory.peak_bytes(),
                None if path is None else str(path),
                is_final,
                reason,
            )
        )

    def rescue(self, model: nn.Module) -> Rescue:
        """Return what computes windows of `model`, again and smaller where memory runs out.

        It begins with `batch_plan`; every later plan is made known to the sweep. Raises TaskError where
        there is no batch plan.
        """
        from tune_easytrain.rescue import Rescue

        if self.batch_plan is None:
            raise TaskError("without a batch size there are no smaller micro-batches to go on with")
        return Rescue(model, self.batch_plan, self.memory, self.send)

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return the last checkpoint reported, with tensors on the CPU; None where the trial starts anew."""
        return None if self.checkpoint_path is None else load_checkpoint(self.checkpoint_path)


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all: to a file beside it, synced, then renamed."""
    import torch

    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are loaded, never code."""
    import torch

    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(f"metric {name!r} is not a single number but {value!r}") from error
