"""How much of a GPU each trial of a sweep gets, so that several train on one. Pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from tune_easytrain.memory_plan import MemoryPlan, TrialMemory
from tune_easytrain.trial_request import TrialRequest

FitsSharedOut = Callable[[TrialMemory, int], bool]
"""Whether one sample of a trial fits where so many workers, on a GPU each, share out its model."""


def request_gpus(
    trials: Sequence[TrialMemory],
    asked: TrialRequest,
    num_gpus: int,
    fits_shared_out: FitsSharedOut = lambda trial, num_workers: False,
) -> list[TrialRequest]:
    """Return what each trial asks for: a share of a GPU, a whole one, or several.

    A trial of which not even one sample fits gets as many GPUs, by doubling, as let one fit with the model
    shared out, if there are so many; otherwise one, where it will say so itself.

    Args:
        trials: as the plan for these GPUs has them, `gpu` being the share that each needs.
        asked: what the sweep asks for otherwise.
        num_gpus: how many GPUs there are, or can be.
    """
    return [_request(trial, asked, num_gpus, fits_shared_out) for trial in trials]


def _request(
    trial: TrialMemory, asked: TrialRequest, num_gpus: int, fits_shared_out: FitsSharedOut
) -> TrialRequest:
    if asked.num_workers == 1 and trial.fits is False and trial.settings.probe != "off":
        num_workers = 2
        while num_workers <= num_gpus:
            if fits_shared_out(trial, num_workers):
                return asked.with_gpus(1.0, num_workers=num_workers)
            num_workers *= 2
    return asked.with_gpus(trial.gpu)


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
