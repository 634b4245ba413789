"""The default training function: epochs of exact windows, evaluation, checkpoints, early stop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune_easytrain.accumulate import AccumulationRecord, accumulate_gradients
from tune_easytrain.batch_coupling import coupling_of
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.built_options import apply_changes, built_options
from tune_easytrain.errors import NonFiniteLossError, OutOfMemoryInTrainingError, TaskError
from tune_easytrain.evaluation import Evaluation
from tune_easytrain.exactness import check_exactness
from tune_easytrain.learning_rate import rate_factor, scale_rates, scaled_rates, warmup_factor
from tune_easytrain.loader import EpochLoader, EpochWindows
from tune_easytrain.memory import ErrorKind, classify_error, first_line
from tune_easytrain.noise_scale import NoiseScale, SpreadMeter
from tune_easytrain.plan_timing import PlanTiming
from tune_easytrain.precision import autocast
from tune_easytrain.protocol import PlanChanged
from tune_easytrain.random_state import get_random_state, sample_seed, seed_everything, set_random_state
from tune_easytrain.task import Batch, Task
from tune_easytrain.training_budget import num_full_windows
from tune_easytrain.trial_context import TrialContext

logger = logging.getLogger(__name__)


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
    """One pass over the training set: its mean loss, how long it took, and how long it waited for data."""

    train_loss: float
    num_samples: int
    train_seconds: float
    wait_seconds: float


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
    """Train a task to the end of its budget, or until its metric has not improved for `patience` epochs.

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
        self.settings, self.device, self.ranks = trial.settings, trial.device, trial.ranks
        self.budget = self.settings.budget
        seed_everything(self.settings.seed)
        self.model: nn.Module = task.model().to(self.device)
        self.ranks.share_state(self.model)
        self.spread = SpreadMeter(self.model, task.weight) if self.settings.noise_scale else None
        self.noise_scale = NoiseScale()
        self.coupling = coupling_of(task, self.model)
        check_exactness(plan, self.coupling, self.settings.exact)
        self.optimizer: Optimizer = task.optimizer(self.model)
        scale_rates(self.optimizer, self._rate_factor(plan.effective_batch_size))
        self.scheduler: LRScheduler | None = (
            None if task.scheduler is None else task.scheduler(self.optimizer)
        )
        self.options = built_options(self.optimizer, self.scheduler)
        self.train_loader = self._loader(task.train_data())
        self.evaluation = self._evaluation(plan.microbatch_limit)
        self.progress = Progress()
        self._draw_apart()
        self.training = trial.rescue(self.model)
        self.num_rescues = 0
        self.timing = self._plan_timing()

    def _draw_apart(self) -> None:
        """Have ranks drop out other units than the first one, which draws as a single worker would."""
        if not self.ranks.is_first:
            seed_everything(sample_seed(self.settings.seed, self.progress.epoch, -1 - self.ranks.rank))

    def _rate_factor(self, effective_batch_size: int) -> float:
        return rate_factor(self.settings.lr_scaling, effective_batch_size, self.settings.base_batch_size)

    def _loader(self, data: Any) -> EpochLoader:
        return EpochLoader(
            self.task, data, self.device, seed=self.settings.seed, num_workers=self.settings.loader_workers
        )

    def _evaluation(self, microbatch_limit: int) -> Evaluation | None:
        if self.task.val_data is None:
            return None
        loader = self._loader(self.task.val_data())
        return Evaluation(self.task, self.trial, self.model, loader, microbatch_limit)

    def _plan_timing(self) -> PlanTiming:
        plan = self.training.plan
        num_windows = num_full_windows(
            self._samples_left(), self.train_loader.num_samples, plan.effective_batch_size
        )
        if self.settings.probe == "off":  # the given size is used as it is
            num_windows = 0
        # One micro-batch is exact whatever the model; that is not given up for speed.
        is_near_edge = self.trial.is_near_edge and self.coupling is None
        return PlanTiming(plan, num_windows, is_near_edge=is_near_edge)

    def _samples_left(self) -> int:
        """Return how many samples are to be trained on from this epoch's beginning to the end."""
        return self.budget.samples_left(
            self.train_loader.num_samples,
            self.training.plan.effective_batch_size,
            epoch=self.progress.epoch,
            num_samples=self.progress.num_samples,
            num_steps=self.progress.optimizer_steps,
        )

    def one_epoch(self) -> str:
        """Train, evaluate and report one epoch; return why it was the last, or an empty string.

        The last one may end inside the training set, where the budget does.
        """
        start = time.perf_counter()
        result = self._train_epoch()
        metrics = {"train_loss": result.train_loss}
        if self.evaluation is not None:
            metrics |= self.evaluation.run()
            self._require_finite("validation loss", metrics["val_loss"])
        self.num_rescues = round(self.ranks.sum([self.training.num_rescues])[0])
        self.progress.epoch += 1
        value = metrics[self.settings.metric]
        if self.settings.is_better(value, self.progress.best_value):
            self.progress.best_value, self.progress.best_epoch = value, self.progress.epoch
        reason = self.reason_to_end()
        metrics |= {
            "epoch": self.progress.epoch,
            "optimizer_steps": self.progress.optimizer_steps,
            "num_samples": self.progress.num_samples,
            "num_rescues": self.num_rescues,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]) * self._warmup_factor(),
            "samples_per_second": result.num_samples / result.train_seconds,
            "data_wait_share": result.wait_seconds / result.train_seconds,
            "epoch_seconds": time.perf_counter() - start,
        }
        if self.noise_scale.value is not None:
            metrics["gradient_noise_scale"] = self.noise_scale.value
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
        if self._samples_left() == 0:
            return self.budget.describe_end()
        if patience is not None and progress.epoch - progress.best_epoch >= patience:
            metric, best_epoch = self.settings.metric, progress.best_epoch
            return f"{metric} no better for {patience} epochs (best in epoch {best_epoch})"
        return ""

    def _train_epoch(self) -> EpochResult:
        self.model.train()
        start = time.perf_counter()
        loss_sum = weight_sum = 0.0
        num_samples = 0
        windows = self.train_loader.windows(
            self.training.plan.effective_batch_size, self.progress.epoch, self._samples_left()
        )
        for index in range(len(windows)):
            record = self._train_window(windows, index)
            num_samples += record.num_samples
            loss_sum += record.loss * record.weight
            weight_sum += record.weight
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - start
        return EpochResult(loss_sum / weight_sum, num_samples, seconds, windows.wait_seconds)

    def _train_window(self, windows: EpochWindows, index: int) -> AccumulationRecord:
        """Take one optimizer step; the time it took may count in the choice of the plan."""
        plan = self.training.plan
        is_full = windows.num_samples(index) == plan.effective_batch_size
        is_timed = not self.timing.is_done and is_full and index > 0  # the first waits for the loader
        start = self._synchronized_time() if is_timed else 0.0
        own = self.training.run(
            lambda plan: self._gradients(windows, index, plan), windows.num_samples(index)
        )
        seconds = self._synchronized_time() - start if is_timed else 0.0
        record = self._over_all_ranks(own)
        self._add_noise()
        self._require_finite("training loss", record.loss)
        self._step()
        self.progress.optimizer_steps += 1
        self.progress.num_samples += record.num_samples
        if self.training.plan is not plan:  # rescued: the sizes that were timed are of no use any more
            self.timing = PlanTiming(self.training.plan, 0)
            self._check_exactness_after(plan)
        elif is_timed:
            self.timing.add(seconds)
            self._use_timed_plan()
        return record

    def _gradients(self, windows: EpochWindows, index: int, plan: BatchPlan) -> AccumulationRecord | None:
        """Return what this rank's share of a window was; None where it has no sample of it."""
        weight: Callable[[Batch], int] | None = self.task.weight
        backward: Callable[[Tensor], object] = Tensor.backward
        if self.spread is not None:
            self.spread.begin()
            weight, backward = self.spread.weigh, self.spread.backward
        if plan.for_window(windows.num_samples(index)).num_samples == 0:
            return None
        microbatches = windows.read(index, plan)
        record = accumulate_gradients(self.model, self._loss, microbatches, weight=weight, backward=backward)
        if self.ranks.num_workers == 1:
            self._clip()
        return record

    def _over_all_ranks(self, record: AccumulationRecord | None) -> AccumulationRecord:
        """Return what the whole window was, and leave its clipped gradient on every rank.

        A single worker has clipped it already, where a lack of memory can be made up for.
        """
        whole = self.ranks.average_gradients(self.model.parameters(), record)
        if self.ranks.num_workers > 1:
            self._clip()
        return whole

    def _clip(self) -> None:
        if self.spread is not None:
            self.spread.measure_mean()
        if self.settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)

    def _add_noise(self) -> None:
        """Take the micro-batches of a window, on all ranks, into account for the noise scale."""
        if self.spread is not None:
            self.noise_scale.add(self.spread.spread.over_all(self.ranks.sum), self.spread.mean_square)

    def _check_exactness_after(self, plan: BatchPlan) -> None:
        """Say that a rescue has made an exact trial inexact; raise InexactBatchError where it may not be."""
        warning = check_exactness(self.training.plan, self.coupling, self.settings.exact)
        if warning and self.coupling is not None and self.coupling.is_exact(plan):
            logger.warning("since memory ran out, %s", warning)

    def _warmup_factor(self) -> float:
        return warmup_factor(self.progress.optimizer_steps, self.settings.warmup_steps)

    def _step(self) -> None:
        try:
            with scaled_rates(self.optimizer, self._warmup_factor()):
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
        if self.timing.is_done and self.timing.plan != self.trial.batch_plan and self.ranks.is_first:
            self.trial.send(PlanChanged.to(self.timing.plan))

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with autocast(self.device, self.settings.precision):
            return self.task.loss(model, batch)

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
            "options": self.options,
            "random_state": get_random_state(),
            "progress": asdict(self.progress),
            "microbatch_limit": self.training.plan.microbatch_limit,
            "accumulation_steps": self.training.plan.accumulation_steps if self.timing.is_done else None,
            "evaluation_microbatch_limit": self.evaluation and self.evaluation.microbatch_limit,
            "noise_scale": self.noise_scale.state(),
            "num_rescues": self.num_rescues,
        }

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from where the checkpoint was written."""
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(checkpoint["scheduler"])
        apply_changes(self.optimizer, self.scheduler, checkpoint["options"], self.options)
        set_random_state(checkpoint["random_state"])
        self.progress = Progress(**checkpoint["progress"])
        self._draw_apart()
        self.noise_scale.restore(checkpoint["noise_scale"])
        self.num_rescues = checkpoint["num_rescues"]
        self.training.num_rescues = self.num_rescues if self.ranks.is_first else 0
        if self.evaluation is not None:
            self.evaluation.limit_microbatch(checkpoint["evaluation_microbatch_limit"])
        self._restore_plan(checkpoint["accumulation_steps"])

    def _restore_plan(self, accumulation_steps: int | None) -> None:
        """Go on with the number of steps that was chosen, or more where this device has less memory."""
        if accumulation_steps is None:
            self.timing = self._plan_timing()
            return
        plan = self.training.plan
        self.timing = PlanTiming(plan.with_steps(max(accumulation_steps, plan.accumulation_steps)), 0)
        self._use_timed_plan()
