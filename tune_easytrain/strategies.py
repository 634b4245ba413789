"""Memory strategies that change no result: the layout of tensors, and what is computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tune_easytrain.batch import map_tensors
from tune_easytrain.checkpointing import apply_checkpointing
from tune_easytrain.task import Batch, Task

_MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def with_strategies(
    task: Task, *, checkpointing: str | float | Sequence[str] = "none", channels_last: bool = False
) -> Task:
    """Return the task with a model that is laid out and checkpointed as asked for.

    Everything that builds the model gets it so: the estimate, the probe, and training. `checkpointing` is
    what `memory.checkpointing` may be, save `auto`. Building the model raises UnknownNameError
    where it has no such blocks.
    """
    if checkpointing == "none" and not channels_last:
        return task

    def model() -> nn.Module:
        built = task.model()
        if channels_last:
            for parameter in built.parameters():
                parameter.data = _channels_last(parameter.data)
        if checkpointing != "none":
            apply_checkpointing(built, checkpointing)
        return built

    if not channels_last:
        return replace(task, model=model)
    return replace(
        task,
        model=model,
        loss=_on_channels_last(task.loss),
        predict=None if task.predict is None else _on_channels_last(task.predict),
        generate=None if task.generate is None else _on_channels_last(task.generate),
    )


def _channels_last(tensor: Tensor) -> Tensor:
    memory_format = _MEMORY_FORMATS.get(tensor.dim())
    if memory_format is None or not tensor.is_floating_point():
        return tensor
    return tensor.contiguous(memory_format=memory_format)


def _on_channels_last(function: Callable[[nn.Module, Batch], Any]) -> Callable[[nn.Module, Batch], Any]:
    @functools.wraps(function)
    def call(model: nn.Module, batch: Batch) -> Any:
        return function(model, map_tensors(batch, _channels_last))

    return call
