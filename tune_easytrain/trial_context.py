"""`TrialContext`: what a training function sees of its trial. torch is imported when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.checkpoint_store import CHECKPOINT_NAME, CheckpointStore
from tune_easytrain.errors import TaskError
from tune_easytrain.protocol import PlanChanged, Report
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task import Task
from tune_easytrain.termination import EndRequested, Termination
from tune_easytrain.whole_file import whole_file

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
        termination: whether this process was told to end; None: nobody tells it.
        store: where a checkpoint goes then.
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
    termination: Termination | None = None
    store: CheckpointStore | None = None

    @property
    def is_ending(self) -> bool:
        """Whether the trial was told to end: its machine is taken back, or the sweep was interrupted.

        It then has `trial.grace` seconds. The next `report` with a checkpoint, or `end`, stores that and does
        not return. Of several workers none is told: they go on from the last checkpoint reported.
        """
        return self.termination is not None and self.termination.is_due

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
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        path, lost = (None, "") if checkpoint is None else self._save(checkpoint)
        if path is not None and self.is_ending:
            lost = self._store(path)
        self.send(
            Report(
                numbers, self.memory.peak_bytes(), None if path is None else str(path), is_final, reason, lost
            )
        )
        if checkpoint is not None and self.is_ending:
            raise EndRequested(lost)

    def end(self, checkpoint: Mapping[str, Any]) -> NoReturn:
        """Store a checkpoint that no metrics belong to yet, and end; for a trial that `is_ending`."""
        path, lost = self._save(checkpoint)
        raise EndRequested(lost if path is None else self._store(path))

    def _save(self, checkpoint: Mapping[str, Any]) -> tuple[Path | None, str]:
        """Return the file of a checkpoint, or None and why there is none: training goes on without."""
        path = self.scratch_dir / CHECKPOINT_NAME
        try:
            save_checkpoint(checkpoint, path)
        except OSError as error:
            return None, f"cannot write {path}: {error.strerror or error}"
        return path, ""

    def _store(self, path: Path) -> str:
        """Store a checkpoint from here; return why that did not work, if so."""
        if self.store is None:
            return "there is no storage"
        try:
            self.store.save(path)
        except OSError as error:
            return f"cannot write to {self.store.folder}: {error.strerror or error}"
        return ""

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
    """Write a checkpoint whole or not at all: to a file beside it, synced, then renamed.

    Raises OSError where it cannot be written, on a full disk too.
    """
    import torch

    try:
        with whole_file(path) as file:
            torch.save(dict(state), file)
    except Exception as error:
        if isinstance(error.__context__, OSError):  # torch makes a RuntimeError of it
            raise error.__context__ from error
        raise


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
