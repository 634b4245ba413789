"""What CUDA runs where other devices run something else, followed on `meta` tensors without any CUDA.

Attention keeps a logsumexp instead of a matrix, cuDNN's recurrent nets keep a reserve instead of every
cell's intermediate values, dropout keeps a mask of bytes. Autocast is CUDA's too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from tune_easytrain.autocast_rules import (
    FULL_PRECISION,
    FULL_PRECISION_RESULT,
    LOWER_PRECISION,
    WIDEST,
    Autocast,
    overload,
)

_KEY = "AutocastIPU"
"""A dispatch key above autograd that no build of torch uses any more; ours while a task is traced."""

_LARGEST_FLASH_HEAD = 256
_LSTM_GATES = 4
_RESERVE_PER_UNIT = {1: 2, 3: 6, _LSTM_GATES: 5}
_RECURRENT_SCRATCH_BYTES = 16 * 2**20


@contextmanager
def cuda_kernels(autocast: Autocast, *, fused_dropout: bool = True) -> Iterator[None]:
    """Run operations on `meta` tensors as CUDA would, with `autocast`'s rules, inside the block.

    Without `fused_dropout` dropout keeps what it multiplies by, as on a CPU.
    """
    kernels = _kernels(autocast)
    if not fused_dropout:
        del kernels["dropout"]
    key: Any = torch._C._parse_dispatch_key(_KEY)
    key_set = torch._C.DispatchKeySet(key)
    new_library: Any = torch.library.Library
    library, fallback = new_library("aten", "IMPL"), new_library("_", "IMPL")
    fallback.fallback(torch.library.fallthrough_kernel, _KEY)
    names = {*LOWER_PRECISION, *FULL_PRECISION, *FULL_PRECISION_RESULT, *WIDEST, *kernels}

    def register(name: str) -> None:
        operation = overload(name)
        kernel = kernels.get(name, operation)

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(key_set):
                if not _is_on_device((args, kwargs)):
                    return operation(*args, **kwargs)
                args, kwargs = autocast.apply(name, args, kwargs)
                return kernel(*args, **kwargs)

        library.impl(name, run, _KEY)

    try:
        for name in names:
            register(name)
        was_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        try:
            with torch._C._IncludeDispatchKeyGuard(key):
                yield
        finally:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, was_excluded)
    finally:
        library._destroy()
        fallback._destroy()


def _is_on_device(arguments: Any) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "meta" for value in tree_iter(arguments))


def _dropout(inputs: Tensor, p: float, train: bool) -> Tensor:
    """Keep a mask of bytes, as the fused kernel does."""
    if not train or p in (0, 1):
        unchanged: Tensor = torch.ops.aten.dropout.default(inputs, p, train)
        return unchanged
    dropped: Tensor = torch.ops.aten.native_dropout.default(inputs, p, train)[0]
    return dropped


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Choose as sdp_utils.cpp does from Ampere on: flash, memory-efficient, else the plain formula."""
    tensors, backends = (query, key, value), torch.backends.cuda
    is_dense = all(tensor.dim() == 4 for tensor in tensors)
    same_heads = query.shape[1] == key.shape[1] == value.shape[1] if is_dense else False
    head = query.shape[-1]
    if (
        is_dense
        and attn_mask is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and head == key.shape[-1] == value.shape[-1] <= _LARGEST_FLASH_HEAD
        and (same_heads or enable_gqa)
        and backends.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    ):
        padded = tuple(_pad_head(tensor, 8) for tensor in tensors)
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.default(
            *padded, dropout_p, is_causal, False, scale=scale or head**-0.5
        )[0]
        return output[..., :head]
    if is_dense and same_heads and backends.mem_efficient_sdp_enabled():  # type: ignore[no-untyped-call]
        mask = None if attn_mask is None else _aligned_mask(attn_mask, query, key)
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention.default(
            *tensors, mask, needs_gradient, dropout_p, is_causal, scale=scale
        )[0]
        return result
    plain: Tensor = torch.ops.aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]
    return plain


def _pad_head(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _aligned_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as the kernel wants it: numbers, its rows padded to 16 elements, expanded as a view."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    missing = -mask.shape[-1] % 16
    if missing:
        mask = torch.nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


class _RecurrentNet(torch.autograd.Function):
    """A recurrent net as cuDNN runs it: one operation that keeps a reserve for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, net: RecurrentNet, inputs: Tensor, hidden: Tensor, cell: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = inputs.numel() // inputs.shape[-1]
        output = inputs.new_empty((*inputs.shape[:-1], hidden.shape[-1] * net.num_directions))
        reserve = inputs.new_empty(net.reserve_elements(rows)) if net.train else inputs.new_empty(0)
        net.take_scratch(inputs, parameters)
        ctx.net = net
        ctx.save_for_backward(inputs, hidden, cell, output, reserve, *parameters)
        return output, torch.empty_like(hidden), None if cell is None else torch.empty_like(cell)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inputs, hidden, cell, _, _, *parameters = ctx.saved_tensors
        sizes = [parameter.numel() for parameter in parameters]
        gradient, parts = torch.empty_like(inputs), inputs.new_empty(sum(sizes)).split(sizes)
        ctx.net.take_scratch(inputs, parameters)
        return (
            None,
            gradient,
            torch.empty_like(hidden),
            None if cell is None else torch.empty_like(cell),
            *(part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class RecurrentNet:
    """What cuDNN's memory for a recurrent net depends on, besides its inputs."""

    num_gates: int
    hidden_size: int
    num_layers: int
    num_directions: int
    dropout: float
    train: bool

    def reserve_elements(self, rows: int) -> int:
        """Return what backward needs: gates and states of every step, dropped outputs between layers.

        `rows` counts time steps times samples. Measured with cuDNN 9: LSTM 5, GRU 6 numbers per hidden unit.
        """
        width = self.hidden_size * self.num_directions
        kept = _RESERVE_PER_UNIT[self.num_gates] * self.num_layers
        return rows * width * (kept + (self.num_layers - 1 if self.dropout else 0))

    def take_scratch(self, inputs: Tensor, parameters: Sequence[Tensor]) -> None:
        """Take and give back what a pass needs while it runs: all layers' gates, and the weights again."""
        rows = inputs.numel() // inputs.shape[-1]
        gates = 4 * rows * self.hidden_size * self.num_directions * self.num_layers
        fixed = _RECURRENT_SCRATCH_BYTES * self.num_directions // inputs.element_size()
        inputs.new_empty(gates + sum(parameter.numel() for parameter in parameters) + fixed)


def _recurrent(num_gates: int, autocast: Autocast, *args: Any) -> Any:
    """Run `lstm.input`, `gru.data` and their like; sequences come padded or packed."""
    is_packed = isinstance(args[1], Tensor) and not args[1].is_floating_point()
    inputs, (hx, parameters, _, num_layers, dropout, train, bidirectional) = (
        args[0],
        args[2:9] if is_packed else args[1:8],
    )
    hidden, cell = hx if num_gates == _LSTM_GATES else (hx, None)
    hidden_size = hidden.shape[-1] if cell is None else cell.shape[-1]  # an LSTM's outputs may be projected
    batch_first = not is_packed and args[8]
    if autocast.dtype is not None:  # cuDNN's own rule: always fp16
        inputs, hidden = inputs.to(torch.float16), hidden.to(torch.float16)
        cell = None if cell is None else cell.to(torch.float16)
        parameters = [parameter.to(torch.float16) for parameter in parameters]
    if batch_first:
        inputs = inputs.transpose(0, 1)
    net = RecurrentNet(
        num_gates=num_gates,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_directions=2 if bidirectional else 1,
        dropout=dropout,
        train=train and torch.is_grad_enabled(),
    )
    output, *last = _RecurrentNet.apply(net, inputs, hidden, cell, *parameters)
    if batch_first:
        output = output.transpose(0, 1)
    return (output, *last) if cell is not None else (output, last[0])


def _kernels(autocast: Autocast) -> dict[str, Callable[..., Any]]:
    """Return the operations that CUDA runs otherwise than `meta` does."""
    kernels: dict[str, Callable[..., Any]] = {
        "dropout": _dropout,
        "scaled_dot_product_attention": _attention,
    }
    for kind, num_gates in (("lstm", _LSTM_GATES), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        for form in ("input", "data"):
            kernels[f"{kind}.{form}"] = partial(_recurrent, num_gates, autocast)
    return kernels
