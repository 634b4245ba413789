"""Built options: what a config set an optimizer and its scheduler to, apart from what training made of it.

A checkpoint brings the options of the trial that wrote it. Where a trial goes on from another's checkpoint,
what its own config sets otherwise has to hold all the same, such as the learning rate that population based
training has perturbed (Jaderberg et al. 2017, arXiv:1711.09846).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_LAST_RATES = "_last_lr"
"""A scheduler's key for the rates of the last step, which is of training whoever built it."""


def built_options(optimizer: Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Return the options of an optimizer and a scheduler that have just been built, for a checkpoint."""
    groups = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    state = {} if scheduler is None else scheduler.state_dict()
    return copy.deepcopy({"groups": groups, "scheduler": state})


def apply_changes(
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    then: Mapping[str, Any],
    now: Mapping[str, Any],
) -> None:
    """Change a restored optimizer and scheduler where they are built otherwise now than they were then.

    A learning rate keeps its place in its schedule: it changes by the factor by which the initial one did.
    What is built as it was stays as training left it.

    Args:
        optimizer, scheduler: as a checkpoint has restored them.
        then: the `built_options` of the trial that wrote the checkpoint.
        now: those of the trial that goes on from it.
    """
    for group, old, new in zip(optimizer.param_groups, then["groups"], now["groups"], strict=True):
        rate = group.get("lr")
        group.update({name: value for name, value in new.items() if value != old.get(name)})
        if rate is not None:
            group["lr"] = _rescaled(rate, old, new)
    if scheduler is not None:
        restored = scheduler.state_dict()
        scheduler.load_state_dict(_with_changes(restored, then["scheduler"], now["scheduler"]))


def _rescaled(rate: Any, old: Mapping[str, Any], new: Mapping[str, Any]) -> Any:
    """Return a rate times what the initial one has changed by; without a schedule `lr` is the initial one."""
    before, after = old.get("initial_lr", old["lr"]), new.get("initial_lr", new["lr"])
    if before == after:
        return rate
    return rate * (after / before) if before else after


def _with_changes(value: Any, then: Any, now: Any) -> Any:
    """Return what a scheduler held, with what it is built with otherwise now; schedulers hold schedulers."""
    if then == now:
        return value
    if isinstance(value, dict):
        return {
            key: item if key == _LAST_RATES else _with_changes(item, then.get(key), now.get(key))
            for key, item in value.items()
        }
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [_with_changes(*items) for items in zip(value, then, now, strict=True)]
    return now
