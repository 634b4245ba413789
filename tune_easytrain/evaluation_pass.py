"""The training function of `train.function: none`: the model is evaluated once, and nothing is trained."""

from __future__ import annotations

import time
from typing import Any

from tune_easytrain.errors import TaskError
from tune_easytrain.evaluation import Evaluation
from tune_easytrain.length_batches import measure_lengths
from tune_easytrain.loader import EpochLoader
from tune_easytrain.random_state import seed_everything
from tune_easytrain.sharded_model import EqualPasses, is_sharded, place_model
from tune_easytrain.task import Batch
from tune_easytrain.trial_context import TrialContext


def evaluate(config: dict[str, Any], trial: TrialContext) -> None:
    """Evaluate a task's model on its validation set, and report the loss and the metrics.

    Where memory runs out it goes on with smaller micro-batches. A trial that is told to end has nothing to
    store: it begins anew. Raises whatever the task raises.
    """
    task, plan = trial.task, trial.batch_plan
    if task is None or plan is None:
        raise TaskError("train.function: none evaluates a task, and there is none")
    settings = trial.settings
    seed_everything(settings.seed)
    model = place_model(task.model(), trial.device, trial.ranks, settings.sharding)
    data: Any = task.train_data()  # of a task that is only evaluated, its validation set
    lengths = measure_lengths(task, data, max_tokens=settings.max_tokens)
    loader = EpochLoader(
        task,
        data,
        trial.device,
        seed=settings.seed,
        num_workers=settings.loader_workers,
        lengths=lengths,
        group_by_length=settings.group_by_length,
    )

    def spare() -> Batch:
        return next(iter(loader.in_order(1)))

    passes = EqualPasses(model, trial.ranks, spare) if is_sharded(model) else None
    start = time.perf_counter()
    metrics = Evaluation(task, trial, model, loader, plan.microbatch_limit, passes, trial.send).run()
    seconds = time.perf_counter() - start
    trial.report(
        {
            **metrics,
            "num_samples": loader.num_samples,
            "samples_per_second": loader.num_samples / seconds,
            "epoch_seconds": seconds,
        },
        is_final=True,
        reason="evaluated, nothing is trained (train.function: none)",
    )
