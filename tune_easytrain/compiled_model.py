"""A model compiled by torch.compile for training, at no more than two shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_leaves

from tune_easytrain.errors import TaskError
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line

MOST_SHAPES = 2
"""Sizes of a full window's micro-batches differ by at most one, so that two graphs serve all of them."""


class CompiledModel:
    """Lets a model's training passes run compiled, in place; names of its state stay what they are.

    The first two shapes of inputs are compiled, each once. Other shapes, as in a short last window, and
    evaluation run as they would without: a graph for each would take longer than it saves.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._plain = model, model.forward
        self._compiled: Any = torch.compile(model.forward, dynamic=False)
        self._shapes: set[Any] = set()
        model.forward = self._forward

    def compile_again(self) -> None:
        """Take the next two shapes in place of those so far, after micro-batches have changed."""
        self._shapes.clear()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self._model.training and torch.is_grad_enabled()):
            return self._plain(*args, **kwargs)
        inputs = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        shapes = tuple((value.shape, value.dtype) for value in inputs)
        if shapes not in self._shapes:
            if len(self._shapes) == MOST_SHAPES:
                return self._plain(*args, **kwargs)
            self._shapes.add(shapes)
        try:
            return self._compiled(*args, **kwargs)
        except TorchDynamoException as error:
            if classify_error(error) is ErrorKind.MEMORY:
                raise
            raise TaskError(
                f"train.compile: torch.compile cannot compile {type(self._model).__name__}: "
                f"{first_line(error)}. Write compile: false, or mend what it names"
            ) from error


def load_compiler(device: torch.device) -> None:
    """Compile a single operation, so that what the compiler loads does not count as a model's memory."""
    torch.compile(torch.neg)(torch.zeros(1, device=device))
