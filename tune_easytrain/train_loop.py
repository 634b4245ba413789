"""The default training function: epochs of exact windows, evaluation, checkpoints, early stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import TaskError
from tune_easytrain.evaluation import Evaluation
from tune_easytrain.gpu_utilization import GpuUtilization
from tune_easytrain.length_batches import measure_lengths
from tune_easytrain.loader import EpochLoader
from tune_easytrain.random_state import get_random_state, sample_seed, seed_everything, set_random_state
from tune_easytrain.task import Batch, Task
from tune_easytrain.termination import EndRequested
from tune_easytrain.training_budget import num_full_windows
from tune_easytrain.trial_context import TrialContext
from tune_easytrain.window_steps import WindowSteps, require_finite


@dataclass
class Progress:
    """Where training stands. `epoch` counts finished epochs, `num_samples` samples trained on."""

    epoch: int = 0
    num_samples: int = 0
    best_value: float | None = None
    best_epoch: int = 0
    num_rescues: int = 0


@dataclass
class EpochPart:
    """One pass over the training set, as far as it has come.

    `num_windows` counts those trained on, `samples_left` the samples of the budget when the epoch began.
    `num_tokens` counts all workers' tokens without padding, `num_padded_tokens` this worker's with it; both
    are 0 where the task knows no lengths.
    """

    samples_left: int
    num_windows: int = 0
    loss_sum: float = 0.0
    weight_sum: float = 0.0
    num_samples: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    num_tokens: int = 0
    num_padded_tokens: int = 0


def checkpoint_microbatch_limit(checkpoint: Mapping[str, Any]) -> int:
    """Return the micro-batch limit that the checkpoint's trial trained with."""
    limit: int = checkpoint["microbatch_limit"]
    return limit


def train(config: dict[str, Any], trial: TrialContext) -> None:
    """Train a task to the end of its budget, or until its metric has not improved for `patience` epochs.

    Every optimizer step sees exactly the effective batch size (the last of an epoch what is left). Where
    memory runs out in a window, it is computed again with smaller micro-batches. In a long training the
    first windows show which number of micro-batches is fastest. A checkpoint is reported with every epoch,
    and one is stored in the middle of an epoch when the trial is told to end.

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
        reason = "" if run.is_in_epoch else run.reason_to_end()
        if reason:  # the last epoch was saved, but its report may not have arrived
            trial.report(checkpoint["metrics"], is_final=True, reason=reason)
    while not reason:
        reason = run.one_epoch()


class _Run:
    """One training run: its data, its progress, and what is reported of it."""

    def __init__(self, task: Task, plan: BatchPlan, trial: TrialContext) -> None:
        self._task, self._trial = task, trial
        self._settings, self._ranks = trial.settings, trial.ranks
        self._budget = self._settings.budget
        seed_everything(self._settings.seed)
        self._steps = WindowSteps(task, plan, trial, self._spare_batch)
        self._train_loader = self._loader(task.train_data())
        self._evaluation = self._validation(plan.microbatch_limit)
        self._utilization = GpuUtilization(trial.device)
        self._progress = Progress()
        self._part: EpochPart | None = None
        self._draw_apart()
        self._time_plans()

    def _draw_apart(self) -> None:
        """Have ranks drop out other units than the first one, which draws as a single worker would."""
        if not self._ranks.is_first:
            seed_everything(sample_seed(self._settings.seed, self._progress.epoch, -1 - self._ranks.rank))

    def _loader(self, data: Any, *, trained: EpochLoader | None = None) -> EpochLoader:
        """Return the loader of the training set, or of the validation set beside that of the `trained` one.

        Limits in samples are for the longest that is trained on. Samples that depend on one another are not
        grouped by length, nor are those whose micro-batches are to be random, for the noise scale.
        """
        settings = self._settings
        longest = None if trained is None or trained.lengths is None else trained.lengths.longest
        is_random = trained is None and settings.noise_scale
        return EpochLoader(
            self._task,
            data,
            self._trial.device,
            seed=settings.seed,
            num_workers=settings.loader_workers,
            lengths=measure_lengths(self._task, data, longest=longest, max_tokens=settings.max_tokens),
            group_by_length=settings.group_by_length and self._steps.coupling is None and not is_random,
        )

    def _spare_batch(self) -> Batch:
        """Read a small batch whose loss is a number."""
        data: Any = self._task.train_data()
        loader = EpochLoader(self._task, data, self._trial.device, seed=self._settings.seed, num_workers=0)
        batch = None
        for batch in loader.in_order(min(2, self._steps.rescue.plan.microbatch_limit)):
            if self._task.weight is None or self._task.weight(batch):
                break
        return batch

    def _validation(self, microbatch_limit: int) -> Evaluation | None:
        if self._task.val_data is None:
            return None
        loader = self._loader(self._task.val_data(), trained=self._train_loader)
        steps = self._steps
        return Evaluation(self._task, self._trial, steps.model, loader, microbatch_limit, steps.passes)

    def _time_plans(self) -> None:
        self._steps.time_plans(
            num_full_windows(self._samples_left(), self._train_loader.num_samples, self._effective_batch_size)
        )

    @property
    def _effective_batch_size(self) -> int:
        return self._steps.rescue.plan.effective_batch_size

    def _samples_left(self) -> int:
        """Return how many samples are to be trained on from this epoch's beginning to the end."""
        return self._budget.samples_left(
            self._train_loader.num_samples,
            self._effective_batch_size,
            epoch=self._progress.epoch,
            num_samples=self._progress.num_samples,
            num_steps=self._steps.num_steps,
        )

    def one_epoch(self) -> str:
        """Train, evaluate and report one epoch; return why it was the last, or an empty string.

        The last one may end inside the training set, where the budget does.
        """
        steps, progress = self._steps, self._progress
        part = self._part = self._part or EpochPart(self._samples_left())
        try:
            self._train_rest(part)
            start = time.perf_counter()
            metrics = {"train_loss": part.loss_sum / part.weight_sum}
            if self._evaluation is not None:
                metrics |= self._evaluation.run()
                require_finite("validation loss", metrics["val_loss"], steps.num_steps)
        except EndRequested:
            progress.num_rescues = steps.rescue.num_rescues
            self._trial.end(self.state())
        self._part = None
        progress.num_samples += part.num_samples
        sums = self._ranks.sum([steps.rescue.num_rescues, part.num_padded_tokens])
        progress.num_rescues, num_padded_tokens = map(round, sums)
        progress.epoch += 1
        value = metrics[self._settings.metric]
        if self._settings.is_better(value, progress.best_value):
            progress.best_value, progress.best_epoch = value, progress.epoch
        reason = self.reason_to_end()
        metrics |= {
            "epoch": progress.epoch,
            "optimizer_steps": steps.num_steps,
            "num_samples": progress.num_samples,
            "num_rescues": progress.num_rescues,
            "learning_rate": steps.learning_rate,
            "samples_per_second": part.num_samples / part.train_seconds,
            "data_wait_share": part.wait_seconds / part.train_seconds,
            "epoch_seconds": part.train_seconds + time.perf_counter() - start,
            **steps.metrics(),
        }
        if num_padded_tokens:
            metrics["tokens_per_second"] = part.num_tokens / part.train_seconds
            metrics["padding_share"] = 1 - part.num_tokens / num_padded_tokens
        if self._utilization.share is not None:
            metrics["gpu_utilization"] = self._utilization.share
        self._trial.report(
            metrics,
            checkpoint={**self.state(), "metrics": metrics},
            is_final=bool(reason),
            reason=reason,
        )
        return reason

    @property
    def is_in_epoch(self) -> bool:
        """Whether an epoch has begun and not ended."""
        return self._part is not None

    def reason_to_end(self) -> str:
        """Return why training ends here, or an empty string while it goes on."""
        progress, patience = self._progress, self._settings.patience
        if self._samples_left() == 0:
            return self._budget.describe_end()
        if patience is not None and progress.epoch - progress.best_epoch >= patience:
            metric, best_epoch = self._settings.metric, progress.best_epoch
            return f"{metric} no better for {patience} epochs (best in epoch {best_epoch})"
        return ""

    def _train_rest(self, part: EpochPart) -> None:
        """Train on the windows of an epoch that are still to come, and add them to `part`."""
        steps = self._steps
        steps.model.train()
        start, before = time.perf_counter(), part.train_seconds
        num_padded_before = steps.num_padded_tokens - part.num_padded_tokens
        windows = self._train_loader.windows(
            self._effective_batch_size, self._progress.epoch, part.samples_left
        )
        waited_before = part.wait_seconds
        with self._utilization:
            for index in range(part.num_windows, len(windows)):
                record = steps.train(windows, index)
                part.num_windows += 1
                part.num_samples += record.num_samples
                part.num_tokens += windows.samples.num_tokens(index) or 0
                part.loss_sum += record.loss * record.weight
                part.weight_sum += record.weight
                part.num_padded_tokens = steps.num_padded_tokens - num_padded_before
                part.wait_seconds = waited_before + windows.wait_seconds
                part.train_seconds = before + time.perf_counter() - start
        steps.model.zero_grad(set_to_none=True)  # the optimizer may not have all parameters

    def state(self) -> dict[str, Any]:
        """Return everything that `restore` needs to go on as if nothing had happened."""
        return {
            **self._steps.state(),
            "random_state": get_random_state(),
            "progress": asdict(self._progress),
            "part": None if self._part is None else asdict(self._part),
            "evaluation_microbatch_limit": self._evaluation and self._evaluation.microbatch_limit,
        }

    def restore(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from where the checkpoint was written."""
        self._steps.restore(checkpoint)
        set_random_state(checkpoint["random_state"])
        self._progress = Progress(**checkpoint["progress"])
        part = checkpoint.get("part")
        self._part = None if part is None else EpochPart(**part)
        self._draw_apart()
        self._steps.rescue.num_rescues = self._progress.num_rescues if self._ranks.is_first else 0
        if self._evaluation is not None:
            self._evaluation.limit_microbatch(checkpoint["evaluation_microbatch_limit"])
        if checkpoint["accumulation_steps"] is None:
            self._time_plans()
