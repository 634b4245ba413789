"""Whether accumulated gradients equal those of the whole batch, and what is said where not. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import InexactBatchError


@dataclass(frozen=True, slots=True)
class BatchCoupling:
    """What lets the samples of a forward pass depend on one another, so that parts are not as the whole.

    `kind` is `sync_batch_norm` where it looks at the micro-batches of all workers together; `cause` names it
    in words. With a `group_size` the loss compares no more than so many consecutive samples.
    """

    kind: Literal["batch_norm", "sync_batch_norm", "loss"]
    cause: str
    group_size: int | None = None

    def is_exact(self, plan: BatchPlan) -> bool:
        """Return whether it sees the whole window of a plan at once, or each of its groups."""
        if self.kind == "loss" and plan.group_size == self.group_size and plan.keeps_groups:
            return True
        return plan.accumulation_steps == 1 and (plan.num_workers == 1 or self.kind == "sync_batch_norm")

    def describe(self, plan: BatchPlan) -> str:
        """Return in one line why a plan is not exact, and what would be."""
        workers = " of one worker" if plan.num_workers > 1 and self.kind != "sync_batch_norm" else ""
        return (
            f"not equal to one batch of {plan.effective_batch_size}: {self.cause} sees at most "
            f"{plan.microbatch_size} samples{workers} at a time; exact: {self._remedy(plan)} (on a larger "
            "device, or with a smaller effective batch size)"
        )

    def _remedy(self, plan: BatchPlan) -> str:
        if self.kind == "loss" and self.group_size is not None:
            return f"micro-batches of at least {self.group_size} samples"
        one = "one micro-batch per worker" if plan.num_workers > 1 else "one micro-batch"
        if self.kind == "loss":
            return f"{one}, one worker" if plan.num_workers > 1 else one
        sync = "SyncBatchNorm with " if plan.num_workers > 1 and self.kind == "batch_norm" else ""
        return f"GroupNorm, or {sync}{one}"


def check_exactness(
    plan: BatchPlan | None, coupling: BatchCoupling | None, exact: Literal["warn", "required"]
) -> str:
    """Return the warning that a trial deserves, an empty string for one that is exact.

    Raises InexactBatchError in place of a warning where `exact` is `required`.
    """
    if plan is None or coupling is None or coupling.is_exact(plan):
        return ""
    if exact == "required":
        raise InexactBatchError(f"batch.exact: required, but gradients are {coupling.describe(plan)}")
    return f"gradients are {coupling.describe(plan)}"
