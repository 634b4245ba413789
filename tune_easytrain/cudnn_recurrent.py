"""Recurrent nets as cuDNN runs them, followed on `meta` tensors: one operation, a reserve, scratch memory.

Sizes were measured shape by shape on an H100 (cuDNN 9, 576 shapes): of the peaks of both passes these are
between 0.92 and 1.22, above 1 for most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tune_easytrain.autocast_rules import Autocast

_FIXED_SCRATCH_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class _Kind:
    """What one kind of recurrent net takes, in numbers per hidden unit and row.

    Attributes:
        reserve: kept for the backward pass by each layer.
        scratch: taken by a pass, for each direction.
        small_scratch: taken by a pass of the kernels for small nets: at all, for each direction, and for
            each layer and direction.
        inputs: copies of the inputs that a pass takes.
        small_in_forward, small_in_backward: the largest hidden size at which those kernels are chosen.
    """

    reserve: int
    scratch: float
    small_scratch: tuple[float, float, float]
    inputs: int
    small_in_forward: int
    small_in_backward: int


KINDS = {
    "lstm": _Kind(5, 4.4, (10.8, 9.0, 1.6), 1, 192, 128),
    "gru": _Kind(6, 3.5, (10.4, 6.0, 2.0), 2, 192, 128),
    "rnn_tanh": _Kind(1, 3.1, (5.8, 6.4, 1.7), 2, 384, 256),
    "rnn_relu": _Kind(1, 3.1, (5.8, 6.4, 1.7), 2, 384, 256),
    "lstm_on_cpu": _Kind(5, 9.0, (0.0, 0.0, 0.0), 1, 0, 0),
}
"""By the names that torch's operations have; on a CPU an LSTM is oneDNN's, which keeps as much. Up to which
size torch asks for the kernels for small nets is the rule in its RNN.cpp."""


@dataclass(frozen=True, slots=True)
class RecurrentNet:
    """What cuDNN's memory for a recurrent net depends on, besides its inputs.

    `is_plain` says that sequences are padded and outputs not projected, as the kernels for small nets want.
    """

    kind: str
    hidden_size: int
    num_layers: int
    num_directions: int
    train: bool
    is_plain: bool

    def reserve_elements(self, rows: int) -> int:
        """Return what the backward pass needs: each layer's gates and states, outputs between layers.

        `rows` counts time steps times samples.
        """
        per_unit = KINDS[self.kind].reserve * self.num_layers + self.num_layers - 1
        return rows * self.hidden_size * self.num_directions * per_unit

    def scratch_elements(self, rows: int, input_size: int, num_weights: int, *, backward: bool) -> int:
        """Return what a pass takes while it runs, but for what it takes whatever the shape."""
        kind, directions = KINDS[self.kind], self.num_directions
        small_sizes = kind.small_in_backward if backward else kind.small_in_forward
        if self.is_plain and self.hidden_size <= small_sizes:
            whole, per_direction, per_layer = kind.small_scratch
            per_unit = whole + directions * (per_direction + per_layer * self.num_layers)
            return rows * math.ceil(self.hidden_size * per_unit + 2.75 * input_size) + num_weights
        per_unit = directions * (kind.scratch + self.num_layers) + 4 * (directions - 1)
        weights = math.ceil((2.7 if backward else 1.2) * num_weights)
        return rows * math.ceil(self.hidden_size * per_unit + kind.inputs * input_size) + weights

    def take_scratch(self, inputs: Tensor, parameters: Sequence[Tensor], *, backward: bool) -> None:
        """Take and give back what a pass needs while it runs."""
        rows, input_size = inputs.numel() // inputs.shape[-1], inputs.shape[-1]
        num_weights = sum(parameter.numel() for parameter in parameters)
        fixed = _FIXED_SCRATCH_BYTES // inputs.element_size()
        inputs.new_empty(self.scratch_elements(rows, input_size, num_weights, backward=backward) + fixed)


class _RecurrentPass(torch.autograd.Function):
    """One operation that keeps a reserve for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, net: RecurrentNet, inputs: Tensor, hidden: Tensor, cell: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = inputs.numel() // inputs.shape[-1]
        output = inputs.new_empty((*inputs.shape[:-1], hidden.shape[-1] * net.num_directions))
        reserve = inputs.new_empty(net.reserve_elements(rows)) if net.train else inputs.new_empty(0)
        net.take_scratch(inputs, parameters, backward=False)
        ctx.net = net
        ctx.save_for_backward(inputs, hidden, cell, output, reserve, *parameters)
        return output, torch.empty_like(hidden), None if cell is None else torch.empty_like(cell)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inputs, hidden, cell, _, _, *parameters = ctx.saved_tensors
        sizes = [parameter.numel() for parameter in parameters]
        gradient, parts = torch.empty_like(inputs), inputs.new_empty(sum(sizes)).split(sizes)
        ctx.net.take_scratch(inputs, parameters, backward=True)
        return (
            None,
            gradient,
            torch.empty_like(hidden),
            None if cell is None else torch.empty_like(cell),
            *(part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)),
        )


def run_recurrent(kind: str, autocast: Autocast, *args: Any) -> Any:
    """Run `lstm.input`, `gru.data` and their like; sequences come padded or packed."""
    is_packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    inputs, (hx, parameters, _, num_layers, _, train, bidirectional) = (
        args[0],
        args[2:9] if is_packed else args[1:8],
    )
    hidden, cell = hx if kind.startswith("lstm") else (hx, None)
    hidden_size = hidden.shape[-1] if cell is None else cell.shape[-1]  # an LSTM's outputs may be projected
    batch_first = not is_packed and args[8]
    if autocast.dtype is not None:  # cuDNN's own rule: always fp16
        inputs, hidden = inputs.to(torch.float16), hidden.to(torch.float16)
        cell = None if cell is None else cell.to(torch.float16)
        parameters = [parameter.to(torch.float16) for parameter in parameters]
    if batch_first:
        inputs = inputs.transpose(0, 1)
    net = RecurrentNet(
        kind=kind,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_directions=2 if bidirectional else 1,
        train=train and torch.is_grad_enabled(),
        is_plain=not is_packed and hidden.shape[-1] == hidden_size,
    )
    output, *last = _RecurrentPass.apply(net, inputs, hidden, cell, *parameters)
    if batch_first:
        output = output.transpose(0, 1)
    return (output, *last) if cell is not None else (output, last[0])
