"""Whether a task's samples depend on one another within a batch, as with BatchNorm or a contrastive loss."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tune_easytrain.exactness import BatchCoupling
from tune_easytrain.random_state import kept_random_state
from tune_easytrain.task import Task


def find_coupling(task: Task) -> BatchCoupling | None:
    """Return what couples the samples of a batch when a task is trained, None where nothing is known to.

    The model is built without storage where that is possible, and random state is left as it was. Seen are
    BatchNorm layers of any kind, and what the task says of itself (`Task.couples_samples`).
    """
    with kept_random_state():
        return coupling_of(task, _build(task))


def coupling_of(task: Task, model: nn.Module) -> BatchCoupling | None:
    """Return what `find_coupling` does for the task's `model`, which is set to training mode.

    A BatchNorm that stays in evaluation mode all the same (frozen) couples nothing. Layers of the user's own
    with statistics of a batch are not known: for them, too, there is `Task.couples_samples`.
    """
    if task.couples_samples is True:
        return BatchCoupling("loss", "the loss, which compares samples,")
    model.train()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
    ]
    group_size = task.group_size if task.group_size > 1 else None
    if not found and group_size is not None:
        return BatchCoupling("loss", f"the loss, which compares groups of {group_size} samples,", group_size)
    if not found:
        return None
    name, first = found[0]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    is_synchronized = all(isinstance(module, nn.SyncBatchNorm) for _, module in found)
    return BatchCoupling(
        "sync_batch_norm" if is_synchronized else "batch_norm",
        f"{type(first).__name__} ({name or 'the model itself'}{more})",
        group_size,
    )


def _build(task: Task) -> nn.Module:
    try:
        with torch.device("meta"):
            return task.model()
    except Exception:  # noqa: BLE001 -- whatever a model's code raises on tensors without values
        return task.model()
