"""Learning rates for the effective batch size: scaled once, and warmed up over the first steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch.optim import Optimizer

from tune_easytrain.errors import TaskError

RateScaling = Literal["none", "linear", "sqrt"]


def rate_factor(scaling: RateScaling, effective_batch_size: int, base_batch_size: int | None) -> float:
    """Return what a learning rate chosen for `base_batch_size` is multiplied by for another batch size.

    `linear` is the rule of Goyal et al. 2017 (arXiv:1706.02677) for SGD; `sqrt`, which keeps the noise of
    a step the same, is the one of Krizhevsky 2014 (arXiv:1404.5997) and of Malladi et al. 2022
    (arXiv:2205.10287) for Adam.

    >>> rate_factor("linear", 256, 64), rate_factor("sqrt", 256, 64)
    (4.0, 2.0)

    Raises ValueError for a scaling without a base.
    """
    if scaling == "none":
        return 1.0
    if base_batch_size is None:
        raise ValueError(f"{scaling} scaling needs the batch size that the learning rate was chosen for")
    ratio = effective_batch_size / base_batch_size
    return ratio if scaling == "linear" else math.sqrt(ratio)


def warmup_factor(num_steps: int, warmup_steps: int) -> float:
    """Return the share of its learning rate that the step after `num_steps` steps gets.

    It grows linearly from 0, which no step gets, to 1 at step `warmup_steps`.

    >>> [warmup_factor(done, 4) for done in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    return 1.0 if num_steps >= warmup_steps else (num_steps + 1) / warmup_steps


def scale_rates(optimizer: Optimizer, factor: float) -> None:
    """Multiply the learning rate of every parameter group; a scheduler built later starts from there.

    Raises TaskError where a group has no learning rate.
    """
    if factor == 1.0:
        return
    for number, group in enumerate(optimizer.param_groups):
        if group.get("lr") is None:
            raise TaskError(
                f"parameter group {number} of {type(optimizer).__name__} has no learning rate `lr` to "
                "scale or to warm up; remove train.lr_scaling and train.warmup_steps"
            )
        group["lr"] = group["lr"] * factor  # a rate may be a tensor that others hold, too


@contextmanager
def scaled_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Scale every learning rate within the context and put back exactly what was there.

    A scheduler that computes the next rate from the one before therefore never sees the factor.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    scale_rates(optimizer, factor)
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate
