"""Evaluation: the validation loss and metrics of a model, over all the workers of a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tune_easytrain.batch import count_samples
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import TaskError
from tune_easytrain.loader import EpochLoader
from tune_easytrain.precision import autocast
from tune_easytrain.protocol import PlanChanged
from tune_easytrain.rescue import Rescue
from tune_easytrain.sharded_model import EqualPasses
from tune_easytrain.task import Batch, Task
from tune_easytrain.trial_context import TrialContext

if TYPE_CHECKING:
    from torchmetrics import Metric


class Evaluation:
    """Evaluates a model on a validation set; where memory runs out, again with smaller micro-batches.

    Each worker evaluates a share of the samples. The whole evaluation counts as one window, and its
    micro-batches are halved for its own sake alone: training keeps its own.
    """

    def __init__(
        self,
        task: Task,
        trial: TrialContext,
        model: nn.Module,
        loader: EpochLoader,
        microbatch_limit: int,
        passes: EqualPasses | None = None,
        tell: Callable[[PlanChanged], None] = lambda change: None,
    ) -> None:
        """`passes` keeps the workers of a sharded model in step, `tell` takes smaller micro-batches."""
        self._task, self._trial, self._model, self._loader = task, trial, model, loader
        self._device, self._ranks = trial.device, trial.ranks
        plan = BatchPlan.build(max(1, loader.num_samples), microbatch_limit)
        self._rescue = Rescue(model, plan, trial.memory, tell=tell)
        self._rescue.is_alone = passes is None
        self._rescue.termination = trial.termination
        self._passes = passes

    @property
    def microbatch_limit(self) -> int:
        """The most samples evaluated at once."""
        return self._rescue.plan.microbatch_limit

    def limit_microbatch(self, microbatch_limit: int) -> None:
        """Evaluate at most this many samples at once from now on."""
        self._rescue.plan = self._rescue.plan.with_limit(min(self.microbatch_limit, microbatch_limit))

    def run(self) -> dict[str, float]:
        """Return `val_loss` and `val_<name>` of the task's metrics; the same numbers on every worker.

        Raises TaskError for metrics that cannot be computed.
        """
        self._model.eval()
        self._ranks.share_buffers(self._model)
        loss_sum, weight_sum, metrics = self._rescue.run(self._evaluate_share)
        if self._is_shared:
            loss_sum, weight_sum = self._ranks.sum([loss_sum, weight_sum])
        return {
            "val_loss": loss_sum / weight_sum if weight_sum else math.nan,
            **{f"val_{name}": _scalar(name, metric.compute()) for name, metric in metrics.items()},
        }

    @property
    def _is_shared(self) -> bool:
        """Whether each worker evaluates a share; with fewer samples than workers each evaluates them all."""
        return self._loader.num_samples >= self._ranks.num_workers

    def _evaluate_share(self, plan: BatchPlan) -> tuple[float, float, dict[str, Metric]]:
        """Return the sum of this worker's losses, what they are weighted by in all, and its metrics."""
        metrics = {name: build().to(self._device) for name, build in self._task.metrics.items()}
        for metric in metrics.values():
            metric.sync_on_compute = self._is_shared
        ranks = self._ranks
        samples = self._loader.share(ranks.num_workers, ranks.rank) if self._is_shared else None
        loss_sum: Tensor = torch.zeros((), device=self._device, dtype=torch.float64)
        weight_sum = 0.0
        with torch.no_grad():
            batches = self._loader.in_order(plan.microbatch_size, samples)
            if self._trial.termination is not None:
                batches = self._trial.termination.watch(batches)
            if self._passes is not None:
                batches = self._passes.in_step(batches, lambda spare: self._evaluate_batch(spare, ()))
            for batch in batches:
                loss, weight = self._evaluate_batch(batch, metrics.values())
                del batch  # or it would be held while the next one is loaded
                if weight:  # a mean over nothing is NaN: sequences without a token to predict
                    loss_sum += loss.double() * weight
                    weight_sum += weight
        return float(loss_sum), weight_sum, metrics

    def _evaluate_batch(self, batch: Batch, metrics: Iterable[Metric]) -> tuple[Tensor, float]:
        """Update the metrics; return the batch's mean loss and what that is a mean over."""
        weight = float(count_samples(batch) if self._task.weight is None else self._task.weight(batch))
        with autocast(self._device, self._trial.settings.precision):
            loss = self._task.loss(self._model, batch)
            if self._task.metrics:
                prediction, target = self._predict(batch)
        for metric in metrics:
            metric.update(prediction, target)
        return loss, weight

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self._task.predict is None:
            raise TaskError("the task has metrics but no `predict` to give them predictions and targets")
        return self._task.predict(self._model, batch)


def _scalar(name: str, value: Any) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise TaskError(f"metric {name!r} computed {tuple(value.shape)} values; it must compute one number")
    return float(value)
