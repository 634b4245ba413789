"""The default training function: epochs of exact windows, evaluation, checkpoints, early stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune_easytrain.accumulate import AccumulationRecord, accumulate_gradients
from tune_easytrain.batch import count_samples
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import NonFiniteLossError, OutOfMemoryInTrainingError, TaskError
from tune_easytrain.loader import EpochLoader, EpochWindows
from tune_easytrain.memory import ErrorKind, classify_error, first_line
from tune_easytrain.plan_timing import PlanTiming
from tune_easytrain.precision import autocast
from tune_easytrain.protocol import PlanChanged
from tune_easytrain.random_state import get_random_state, seed_everything, set_random_state
from tune_easytrain.rescue import Rescue
from tune_easytrain.task import Batch, Task
from tune_easytrain.trial_context import TrialContext

if TYPE_CHECKING:
    from torchmetrics import Metric


@dataclass
class Progress:
    """Where training stands. `epoch` counts finished epochs, `num_samples` samples trained on."""

    epoch: int = 0
    optimizer_steps: int = 0
    num_samples: int = 0
    best_value: float | None = None
    best_epoch: int = 0


@dataclass(frozen=True)
class EpochResult:
    """One pass over the training set: its mean loss and how long it took, in seconds."""

    train_loss: float
    num_samples: int
    train_seconds: float


def metric_names(task: Task) -> list[str]:
    """Return the names of the metrics this loop reports for a task."""
    if task.val_data is None:
        return ["train_loss"]
    return ["train_loss", "val_loss", *(f"val_{name}" for name in task.metrics)]


def checkpoint_microbatch_limit(checkpoint: Mapping[str, Any]) -> int:
    """Return the micro-batch limit that the checkpoint's trial trained with."""
    limit: int = checkpoint["microbatch_limit"]
    return limit


def train(config: dict[str, Any], trial: TrialContext) -> None:
    """Train a task to its last epoch, or until its metric has not improved for `patience` epochs.

    Every optimizer step sees exactly the effective batch size (the last of an epoch what is left). Where
    memory runs out in a window, it is computed again with smaller micro-batches. In a long training the
    first windows show which number of micro-batches is fastest. A checkpoint is reported with every epoch.

    Raises NonFiniteLossError when a loss is NaN or infinite, OutOfMemoryInTrainingError when not even one
    sample fits any more or memory runs out inside the optimizer's step, and whatever the task raises.
    """
    task, plan = trial.task, trial.batch_plan
    if task is None or plan is None:
        raise TaskError("the default training function needs a task and a batch size")
    run = _Run(task, plan, trial)
    checkpoint = trial.load_checkpoint()
    reason = ""
    if checkpoint is not None:
        run.restore(checkpoint)
        reason = run.reason_to_end()
        if reason:  # the last epoch was saved, but its report may not have arrived
            trial.report(checkpoint["metrics"], is_final=True, reason=reason)
    while not reason:
        reason = run.one_epoch()


class _Run:
    """The state of one training run: model, optimizer, scheduler, data and progress."""

    def __init__(self, task: Task, plan: BatchPlan, trial: TrialContext) -> None:
        self.task, self.trial = task, trial
        self.settings, self.device = trial.settings, trial.device
        seed_everything(self.settings.seed)
        self.model: nn.Module = task.model().to(self.device)
        self.optimizer: Optimizer = task.optimizer(self.model)
        self.scheduler: LRScheduler | None = (
            None if task.scheduler is None else task.scheduler(self.optimizer)
        )
        self.train_loader = self._loader(task.train_data())
        self.val_loader = None if task.val_data is None else self._loader(task.val_data())
        self.progress = Progress()
        self.training = trial.rescue(self.model)
        self.timing = self._plan_timing()
        # The whole evaluation counts as one window. Its micro-batches are halved for its own sake alone.
        num_val_samples = 1 if self.val_loader is None else max(1, self.val_loader.num_samples)
        evaluation_plan = BatchPlan.build(num_val_samples, plan.microbatch_limit)
        self.evaluation = Rescue(self.model, evaluation_plan, trial.memory, tell=lambda change: None)

    def _loader(self, data: Any) -> EpochLoader:
        return EpochLoader(
            self.task, data, self.device, seed=self.settings.seed, num_workers=self.settings.loader_workers
        )

    def _plan_timing(self) -> PlanTiming:
        plan = self.training.plan
        num_full_windows = self.train_loader.num_samples // plan.effective_batch_size
        num_epochs = self.settings.epochs - self.progress.epoch
        if self.settings.probe == "off":  # the given size is used as it is
            num_epochs = 0
        num_windows = num_epochs * max(0, num_full_windows - 1)
        return PlanTiming(plan, num_windows, is_near_edge=self.trial.is_near_edge)

    def one_epoch(self) -> str:
        """Train, evaluate and report one epoch; return why it was the last, or an empty string."""
        start = time.perf_counter()
        result = self._train_epoch()
        metrics = {"train_loss": result.train_loss, **self._evaluate()}
        self.progress.epoch += 1
        value = metrics[self.settings.metric]
        if self.settings.is_better(value, self.progress.best_value):
            self.progress.best_value, self.progress.best_epoch = value, self.progress.epoch
        reason = self.reason_to_end()
        metrics |= {
            "epoch": self.progress.epoch,
            "optimizer_steps": self.progress.optimizer_steps,
            "num_samples": self.progress.num_samples,
            "num_rescues": self.training.num_rescues,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "samples_per_second": result.num_samples / result.train_seconds,
            "epoch_seconds": time.perf_counter() - start,
        }
        self.trial.report(
            metrics,
            checkpoint={**self.state(), "metrics": metrics},
            is_final=bool(reason),
            reason=reason,
        )
        return reason

    def reason_to_end(self) -> str:
        """Return why training ends here, or an empty string while it goes on."""
        progress, patience = self.progress, self.settings.patience
        if progress.epoch >= self.settings.epochs:
            return f"all {self.settings.epochs} epochs done"
        if patience is not None and progress.epoch - progress.best_epoch >= patience:
            metric, best_epoch = self.settings.metric, progress.best_epoch
            return f"{metric} no better for {patience} epochs (best in epoch {best_epoch})"
        return ""

    def _train_epoch(self) -> EpochResult:
        self.model.train()
        start = time.perf_counter()
        loss_sum = weight_sum = 0.0
        num_samples = 0
        windows = self.train_loader.windows(self.training.plan.effective_batch_size, self.progress.epoch)
        for index in range(len(windows)):
            record = self._train_window(windows, index)
            num_samples += record.num_samples
            loss_sum += record.loss * record.weight
            weight_sum += record.weight
        self.optimizer.zero_grad(set_to_none=True)
        return EpochResult(loss_sum / weight_sum, num_samples, time.perf_counter() - start)

    def _train_window(self, windows: EpochWindows, index: int) -> AccumulationRecord:
        """Take one optimizer step; the time it took may count in the choice of the plan."""
        plan = self.training.plan
        is_full = windows.num_samples(index) == plan.effective_batch_size
        is_timed = not self.timing.is_done and is_full and index > 0  # the first waits for the loader
        start = self._synchronized_time() if is_timed else 0.0
        record = self.training.run(
            lambda plan: self._gradients(windows.read(index, plan)), windows.num_samples(index)
        )
        self._require_finite("training loss", record.loss)
        self._step()
        self.progress.optimizer_steps += 1
        self.progress.num_samples += record.num_samples
        if self.training.plan is not plan:  # rescued: the sizes that were timed are of no use any more
            self.timing = PlanTiming(self.training.plan, 0)
        elif is_timed:
            self.timing.add(self._synchronized_time() - start)
            self._use_timed_plan()
        return record

    def _gradients(self, microbatches: Iterable[Batch]) -> AccumulationRecord:
        record = accumulate_gradients(self.model, self._loss, microbatches, weight=self.task.weight)
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        return record

    def _step(self) -> None:
        try:
            self.optimizer.step()
        except Exception as error:
            if classify_error(error) is not ErrorKind.MEMORY:
                raise
            raise OutOfMemoryInTrainingError(
                f"memory ran out inside the optimizer's step, which cannot be done again once it has begun: "
                f"{first_line(error)}. Raise batch.memory_budget or batch.memory_fraction, or use an "
                "optimizer with less state"
            ) from error
        if self.scheduler is not None:
            self.scheduler.step()

    def _synchronized_time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _use_timed_plan(self) -> None:
        self.training.plan = self.timing.plan
        if self.timing.is_done and self.timing.plan != self.trial.batch_plan:
            self.trial.send(PlanChanged.to(self.timing.plan))

    def _evaluate(self) -> dict[str, float]:
        """Return the validation loss and metrics; empty without a validation set."""
        if self.val_loader is None:
            return {}
        self.model.eval()
        return self.evaluation.run(self._evaluate_all)

    def _evaluate_all(self, plan: BatchPlan) -> dict[str, float]:
        assert self.val_loader is not None
        metrics = {name: build().to(self.device) for name, build in self.task.metrics.items()}
        loss_sum: Tensor = torch.zeros((), device=self.device, dtype=torch.float64)
        weight_sum = 0.0
        with torch.no_grad():
            for batch in self.val_loader.in_order(plan.microbatch_size):
                loss, weight = self._evaluate_batch(batch, metrics.values())
                del batch  # or it would be held while the next one is loaded
                loss_sum += loss.double() * weight
                weight_sum += weight
        mean_loss = float(loss_sum) / weight_sum if weight_sum else math.nan
        self._require_finite("validation loss", mean_loss)
        return {
            "val_loss": mean_loss,
            **{f"val_{name}": _scalar(name, m.compute()) for name, m in metrics.items()},
        }

    def _evaluate_batch(self, batch: Batch, metrics: Iterable[Metric]) -> tuple[Tensor, float]:
        """Update the metrics; return the batch's mean loss and what that is a mean over."""
        weight = float(count_samples(batch) if self.task.weight is None else self.task.weight(batch))
        loss = self._loss(self.model, batch)
        if self.task.metrics:
            prediction, target = self._predict(batch)
            for metric in metrics:
                metric.update(prediction, target)
        return loss, weight

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with autocast(self.device, self.settings.precision):
            return self.task.loss(model, batch)

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.task.predict is None:
            raise TaskError("the task has metrics but no `predict` to give them predictions and targets")
        with autocast(self.device, self.settings.precision):
            return self.task.predict(self.model, batch)

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"{what} is {value} in epoch {self.progress.epoch + 1}, after "
                f"{self.progress.optimizer_steps} optimizer steps; lower the learning rate, set "
                "train.clip_norm, or look for bad samples"
            )

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to go on as if nothing had happened."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "random_state": get_random_state(),
            "progress": asdict(self.progress),
            "microbatch_limit": self.training.plan.microbatch_limit,
            "accumulation_steps": self.training.plan.accumulation_steps if self.timing.is_done else None,
            "evaluation_microbatch_limit": self.evaluation.plan.microbatch_limit,
            "num_rescues": self.training.num_rescues,
        }

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from where the checkpoint was written."""
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(checkpoint["scheduler"])
        set_random_state(checkpoint["random_state"])
        self.progress = Progress(**checkpoint["progress"])
        self.training.num_rescues = checkpoint["num_rescues"]
        self.evaluation.plan = self.evaluation.plan.with_limit(
            min(self.evaluation.plan.microbatch_limit, checkpoint["evaluation_microbatch_limit"])
        )
        self._restore_plan(checkpoint["accumulation_steps"])

    def _restore_plan(self, accumulation_steps: int | None) -> None:
        """Go on with the number of steps that was chosen, or more where this device has less memory."""
        if accumulation_steps is None:
            self.timing = self._plan_timing()
            return
        plan = self.training.plan
        self.timing = PlanTiming(plan.with_steps(max(accumulation_steps, plan.accumulation_steps)), 0)
        self._use_timed_plan()


def _scalar(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TaskError(f"metric {name!r} computed {tuple(value.shape)} values; it must compute one number")
    return float(value)
