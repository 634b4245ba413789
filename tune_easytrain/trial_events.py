"""What happens to a trial, as its events say it. No torch."""

from __future__ import annotations

import re
import time
from dataclasses import replace

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.events import Failed, Interrupted, Planned, Rescued
from tune_easytrain.exactness import check_exactness
from tune_easytrain.memory_ladder import StrategyChoice
from tune_easytrain.protocol import Opened, PlanChanged

_IN_LOADER = re.compile(
    r"Caught (\w+) in DataLoader worker process \d+\..*^(?:[\w.]+\.)?(\1: [^\n]*)", re.DOTALL | re.MULTILINE
)
"""What torch makes of an error in a loader process; the error's own first line is the second group."""


def describe_plan(choice: StrategyChoice, opened: Opened, limit: int | None) -> Planned:
    """Return the batch plan that training gets, as an event.

    Raises InexactBatchError where its gradients cannot equal the whole batch's though they are to.
    """
    settings = choice.settings
    effective, warnings = settings.effective_batch_size, list[str]()
    if (
        effective is not None
        and opened.num_train_samples is not None
        and opened.num_train_samples < effective
    ):
        warnings.append(
            f"the training set has only {opened.num_train_samples} samples, fewer than the effective batch "
            f"size {effective}: every optimizer step sees all of them"
        )
        effective = opened.num_train_samples
    plan = None
    if effective is not None and limit is not None:
        group = (opened.coupling and opened.coupling.group_size) or 1
        plan = BatchPlan.build(effective, limit, num_workers=settings.num_workers, group_size=group)
        warnings.append(check_exactness(plan, opened.coupling, settings.exact))
    size = limit if settings.evaluates_only else None
    return Planned(
        device=opened.device_name,
        budget_bytes=opened.budget_bytes,
        effective_batch_size=effective,
        microbatch_size=size if plan is None else plan.microbatch_size,
        accumulation_steps=None if plan is None else plan.accumulation_steps,
        num_workers=settings.num_workers,
        warning="; ".join(filter(None, warnings)),
        strategy=choice.description,
    )


def failed_event(error: BaseException) -> Failed:
    """Return the event of a trial that ended with `error`: one line, and everything there is to know."""
    text = f"{type(error).__name__}: {error}"
    in_loader = _IN_LOADER.search(text)
    line = text.splitlines()[0] if in_loader is None else in_loader[2]
    return Failed(error=line, details="\n".join([text, *getattr(error, "__notes__", [])]))


def interrupted_event(error: BaseException) -> Interrupted:
    """Return the event of a trial whose processes are gone, or lost, and which may go on in others."""
    failed = failed_event(error)
    return Interrupted(reason=failed.error, details=failed.details)


def describe_change(planned: Planned, change: PlanChanged) -> Planned | Rescued:
    """Return the event of a batch plan that took the place of the one planned."""
    if change.failed_microbatch_size is None:
        return replace(
            planned,
            time=time.time(),
            microbatch_size=change.microbatch_size,
            accumulation_steps=change.accumulation_steps,
            warning="",
        )
    return Rescued(
        failed_microbatch_size=change.failed_microbatch_size,
        microbatch_limit=change.microbatch_limit,
        microbatch_size=change.microbatch_size,
        accumulation_steps=change.accumulation_steps,
        message=change.message,
    )
