"""How much of a GPU each trial of a sweep gets, so that several train on one. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from tune_easytrain.errors import EstimateError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.memory_plan import MemoryPlan, TrialMemory
from tune_easytrain.settings import with_strategies_of
from tune_easytrain.trial_request import TrialRequest

EstimateWorker = Callable[[dict[str, Any], int], MemoryEstimate | EstimateError]
"""A trial's nested config, and how many workers train it, to the estimate of the one that needs the most."""


def request_gpus(
    trials: Sequence[TrialMemory],
    asked: TrialRequest,
    num_gpus: int,
    estimate_worker: EstimateWorker,
) -> list[TrialRequest]:
    """Return what each trial asks for: a share of a GPU, a whole one, or several.

    A trial of which not even one sample fits gets as many GPUs, by doubling, as let one fit with the model
    shared out, if there are so many; otherwise one, where it will say so itself.

    Args:
        trials: as the plan for these GPUs has them, `gpu` being the share that each needs.
        asked: what the sweep asks for otherwise.
        num_gpus: how many GPUs there are, or can be.
        estimate_worker: asked for trials that do not fit, with `memory.sharding: full`.
    """
    return [_request(trial, asked, num_gpus, estimate_worker) for trial in trials]


def _request(
    trial: TrialMemory, asked: TrialRequest, num_gpus: int, estimate_worker: EstimateWorker
) -> TrialRequest:
    if asked.num_workers == 1 and trial.fits is False and trial.settings.probe != "off":
        num_workers = 2
        while num_workers <= num_gpus:
            if _fits_shared_out(trial, num_workers, estimate_worker):
                return asked.with_gpus(1.0, num_workers=num_workers)
            num_workers *= 2
    return asked.with_gpus(trial.gpu)


def _fits_shared_out(trial: TrialMemory, num_workers: int, estimate_worker: EstimateWorker) -> bool:
    config = with_strategies_of(trial.config, replace(trial.settings, sharding="full"))
    estimate = estimate_worker(config, num_workers)
    return isinstance(estimate, MemoryEstimate) and estimate.peak_bytes(1) <= trial.usable_bytes


def describe_packing(requests: Iterable[TrialRequest], plan: MemoryPlan) -> list[str]:
    """Return what people should know of it, in a line or two."""
    counts = Counter((request.gpu, request.num_workers, request.shares_model) for request in requests)
    parts = [f"{count} × {_gpus(*gpus)}" for gpus, count in sorted(counts.items())]
    lines = [f"GPUs by the estimate ({plan.accelerator.name}): {', '.join(parts)}"]
    num_unknown = sum(trial.estimate is None for trial in plan.trials)
    if num_unknown:
        lines.append(f"  {num_unknown} of them could not be estimated and get a whole GPU")
    return lines


def _gpus(gpu: float, num_workers: int, shares_model: bool) -> str:
    if num_workers > 1:
        return f"{num_workers} GPUs{' with the model shared out' if shares_model else ''}"
    return "a whole GPU" if gpu == 1 else f"{gpu:g} of a GPU"
