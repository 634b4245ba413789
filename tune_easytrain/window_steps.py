"""`WindowSteps`: an optimizer step per window, with everything that has or changes weights in a training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune_easytrain.accumulate import AccumulationRecord, accumulate_gradients
from tune_easytrain.batch_coupling import coupling_of
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.built_options import apply_changes, built_options
from tune_easytrain.compiled_model import CompiledModel
from tune_easytrain.errors import NonFiniteLossError, NothingToLearnError, OutOfMemoryInTrainingError
from tune_easytrain.exactness import check_exactness
from tune_easytrain.learning_rate import rate_factor, scale_rates, scaled_rates, warmup_factor
from tune_easytrain.length_batches import measure_lengths
from tune_easytrain.loader import EpochWindows
from tune_easytrain.loss_scale import LossScale
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line
from tune_easytrain.noise_scale import NoiseScale, SpreadMeter
from tune_easytrain.optimizer_shards import OptimizerShards, shard_optimizer
from tune_easytrain.plan_timing import PlanTiming
from tune_easytrain.precision import autocast
from tune_easytrain.protocol import PlanChanged
from tune_easytrain.sharded_model import (
    EqualPasses,
    is_sharded,
    place_model,
    split_model_state,
    split_optimizer_state,
    whole_tensors,
)
from tune_easytrain.task import Batch, Task
from tune_easytrain.trial_context import TrialContext

logger = logging.getLogger(__name__)


class WindowSteps:
    """Trains window after window: gradients in micro-batches, over all workers, then the optimizer's step.

    Attributes:
        model: on the device, with the weights of rank 0; with `memory.sharding: full` this rank's part.
        coupling: what makes the samples of a batch depend on one another, None where nothing does.
        passes: what lets all ranks pass as often as each other; None where they need not.
        rescue: computes windows again where memory runs out; its `plan` is the one in use.
        num_steps: optimizer steps taken.
        num_padded_tokens: tokens of this worker's micro-batches so far, padding included.
    """

    def __init__(self, task: Task, plan: BatchPlan, trial: TrialContext, spare: Callable[[], Batch]) -> None:
        """`spare` reads a small batch with a finite loss, for passes that are made to wait for others."""
        self._task, self._trial = task, trial
        self._settings, self._device, self._ranks = trial.settings, trial.device, trial.ranks
        self.num_steps = self.num_padded_tokens = 0
        self.model = place_model(task.model(), self._device, self._ranks, self._settings.sharding)
        self.passes = EqualPasses(self.model, self._ranks, spare) if is_sharded(self.model) else None
        self._spread = SpreadMeter(self.model, task.weight) if self._settings.noise_scale else None
        self._noise_scale = NoiseScale()
        self._loss_scale = LossScale(self._settings.precision, self._microbatch_weight(plan))
        self.coupling = coupling_of(task, self.model)
        self._compiled = CompiledModel(self.model) if self._settings.compile else None
        check_exactness(plan, self.coupling, self._settings.exact)
        self._optimizer: Optimizer = task.optimizer(self.model)
        settings = self._settings
        scale_rates(
            self._optimizer,
            rate_factor(settings.lr_scaling, plan.effective_batch_size, settings.base_batch_size),
        )
        self._scheduler: LRScheduler | None = (
            None if task.scheduler is None else task.scheduler(self._optimizer)
        )
        self._options = built_options(self._optimizer, self._scheduler)
        self._shards = self._shard_optimizer()
        self.rescue = trial.rescue(self.model)
        self.rescue.is_alone = self.passes is None
        self.rescue.termination = trial.termination
        self._timing = PlanTiming(plan, 0)

    @property
    def learning_rate(self) -> float:
        """Of the first parameter group, as the next step will use it."""
        return float(self._optimizer.param_groups[0]["lr"]) * self._warmup_factor()

    def metrics(self) -> dict[str, float]:
        """Return the numbers that only some trainings have: of a loss scale, and of the noise scale."""
        metrics: dict[str, float] = {}
        if self._loss_scale.is_on:
            metrics["num_skipped_steps"] = self._loss_scale.num_skipped_steps
        if self._noise_scale.value is not None:
            metrics["gradient_noise_scale"] = self._noise_scale.value
        return metrics

    def time_plans(self, num_windows: int) -> None:
        """Choose the fastest plan in the first of so many full windows that are left; 0: keep this one."""
        if self._settings.probe == "off" or self._compiled is not None:  # sizes are given, or compiled for
            num_windows = 0
        # One micro-batch is exact whatever the model; that is not given up for speed.
        is_near_edge = self._trial.is_near_edge and self.coupling is None
        if self.passes is not None:  # all ranks choose the same plan: they pass together
            is_near_edge = self._ranks.largest([float(is_near_edge)])[0] > 0
        self._timing = PlanTiming(self.rescue.plan, num_windows, is_near_edge=is_near_edge)

    def train(self, windows: EpochWindows, index: int) -> AccumulationRecord:
        """Take one optimizer step; the time it took may count in the choice of the plan.

        Raises NonFiniteLossError when the loss is NaN or infinite, OutOfMemoryInTrainingError when not even
        one sample fits any more or memory runs out inside the optimizer's step.
        """
        plan = self.rescue.plan
        is_full = windows.num_samples(index) == plan.effective_batch_size
        is_timed = not self._timing.is_done and is_full and index > 0  # the first waits for the loader
        start = self._synchronized_time() if is_timed else 0.0
        own = self.rescue.run(lambda plan: self._gradients(windows, index, plan), windows.num_samples(index))
        seconds = self._synchronized_time() - start if is_timed else 0.0
        if is_timed and self.passes is not None:
            seconds = self._ranks.largest([seconds])[0]
        self.num_padded_tokens += windows.samples.num_padded_tokens(index, self.rescue.plan)
        record = self._over_all_ranks(own)
        require_finite("training loss", record.loss, self.num_steps)
        if self._can_step():
            self._add_noise()
            self._step()
            self.num_steps += 1
        if self.rescue.plan is not plan:  # rescued: the sizes that were timed are of no use any more
            self._timing = PlanTiming(self.rescue.plan, 0)
            if self._compiled is not None:
                self._compiled.compile_again()
            self._check_exactness_after(plan)
        elif is_timed:
            self._timing.add(seconds / (windows.samples.num_tokens(index) or 1))  # windows differ in tokens
            self._use_timed_plan()
        return record

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs; all ranks call it, and rank 0 gets what is whole."""
        return {
            "model": whole_tensors(self.model.state_dict(), self._ranks),
            "optimizer": whole_tensors(self._shards.state_dict(self._ranks), self._ranks),
            "scheduler": None if self._scheduler is None else self._scheduler.state_dict(),
            "options": self._options,
            "num_steps": self.num_steps,
            "microbatch_limit": self.rescue.plan.microbatch_limit,
            "accumulation_steps": self.rescue.plan.accumulation_steps if self._timing.is_done else None,
            "noise_scale": self._noise_scale.state(),
            "loss_scale": self._loss_scale.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, whatever the number of workers or the sharding it was written with.

        The number of micro-batches is what was chosen, or more where this device has less memory. Where none
        had been chosen, `time_plans` is to be called.
        """
        self.model.load_state_dict(split_model_state(state["model"], self.model))
        self._shards.load_state_dict(split_optimizer_state(state["optimizer"], self._shards.parameters))
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["scheduler"])
        apply_changes(self._optimizer, self._scheduler, state["options"], self._options)
        self.num_steps = state["num_steps"]
        self._noise_scale.restore(state["noise_scale"])
        self._loss_scale.restore(state["loss_scale"])
        if state["accumulation_steps"] is not None:
            plan = self.rescue.plan
            num_microbatches = max(state["accumulation_steps"], plan.accumulation_steps)
            self._timing = PlanTiming(plan.with_steps(num_microbatches), 0)
            self._use_timed_plan()

    def _microbatch_weight(self, plan: BatchPlan) -> int:
        """Return what the loss of a micro-batch is multiplied by, at most, as far as that is known."""
        lengths = None
        if self._settings.precision == "fp16" and self._task.weight is not None:
            lengths = measure_lengths(self._task, self._task.train_data())
        return plan.microbatch_size * (1 if lengths is None else lengths.longest)

    def _shard_optimizer(self) -> OptimizerShards:
        shards = shard_optimizer(
            self._optimizer, self._settings.sharding, self._ranks.rank, self._ranks.num_workers
        )
        shards.require_agreement(self.model, self._ranks)
        return shards

    def _gradients(self, windows: EpochWindows, index: int, plan: BatchPlan) -> AccumulationRecord | None:
        """Return what this rank's share of a window was; None where it has no sample of it."""
        weight: Callable[[Batch], int] | None = self._task.weight
        backward: Callable[[Tensor], object] = self._loss_scale.backward
        if self._spread is not None:
            self._spread.begin()
            weight, backward = self._spread.weigh, self._spread.backward
        if self.passes is not None:
            return self.passes.accumulate(
                self._loss,
                windows.read(index, plan),
                len(windows.samples.microbatches(index, plan)),
                weight=weight,
                backward=backward,
            )
        num_samples = plan.for_window(windows.num_samples(index)).num_samples
        if num_samples == 0:
            return None
        microbatches = windows.read(index, plan)
        if self._trial.termination is not None:
            microbatches = self._trial.termination.watch(microbatches)
        try:
            record = accumulate_gradients(
                self.model, self._loss, microbatches, weight=weight, backward=backward
            )
        except NothingToLearnError:
            if self._ranks.num_workers == 1:
                raise
            return AccumulationRecord(0.0, num_samples, 0.0, ())
        if not self._clips_later:
            self._clip()
        return record

    @property
    def _clips_later(self) -> bool:
        """Whether gradients are not yet what is clipped when this worker's own passes are done."""
        return self._ranks.num_workers > 1 or self._loss_scale.is_on

    def _over_all_ranks(self, record: AccumulationRecord | None) -> AccumulationRecord:
        """Return what the whole window was, and leave its gradient on every rank."""
        if self.passes is not None and record is not None:
            return record  # of the whole window already
        return self._ranks.average_gradients(self.model.parameters(), record)

    def _can_step(self) -> bool:
        """Clip the gradient where that is still to be done; return whether to step with it."""
        if self._loss_scale.is_on and not self._loss_scale.unscale(self.model.parameters()):
            return False
        if self._clips_later:
            self._clip()
        return True

    def _clip(self) -> None:
        if self._spread is not None:
            self._spread.measure_mean()
        if self._settings.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.clip_norm)

    def _add_noise(self) -> None:
        """Take the micro-batches of a window, on all ranks, into account for the noise scale."""
        if self._spread is not None:
            self._noise_scale.add(self._spread.spread.over_all(self._ranks.sum), self._spread.mean_square)

    def _check_exactness_after(self, plan: BatchPlan) -> None:
        """Say that a rescue has made an exact trial inexact; raise InexactBatchError where it may not be."""
        warning = check_exactness(self.rescue.plan, self.coupling, self._settings.exact)
        if warning and self.coupling is not None and self.coupling.is_exact(plan):
            logger.warning("since memory ran out, %s", warning)

    def _warmup_factor(self) -> float:
        return warmup_factor(self.num_steps, self._settings.warmup_steps)

    def _step(self) -> None:
        try:
            with scaled_rates(self._optimizer, self._warmup_factor()):
                self._optimizer.step()
            self._shards.share_parameters(self._ranks.broadcast)
        except Exception as error:
            if classify_error(error) is not ErrorKind.MEMORY:
                raise
            raise OutOfMemoryInTrainingError(
                f"memory ran out inside the optimizer's step, which cannot be done again once it has begun: "
                f"{first_line(error)}. Raise batch.memory_budget or batch.memory_fraction, or use an "
                "optimizer with less state"
            ) from error
        if self._scheduler is not None:
            self._scheduler.step()

    def _synchronized_time(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _use_timed_plan(self) -> None:
        self.rescue.plan = self._timing.plan
        if self._timing.is_done and self._timing.plan != self._trial.batch_plan and self._ranks.is_first:
            self._trial.send(PlanChanged.to(self._timing.plan))

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with autocast(self._device, self._settings.precision):
            return self._task.loss(model, batch)


def require_finite(what: str, value: float, num_steps: int) -> None:
    """Raise NonFiniteLossError where a loss is NaN or infinite; `num_steps` have been taken before."""
    if not math.isfinite(value):
        raise NonFiniteLossError(
            f"{what} is {value} after {num_steps} optimizer steps; lower the learning rate, set "
            "train.clip_norm, or look for bad samples"
        )
