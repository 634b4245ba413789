"""What CUDA runs where other devices run something else, followed on `meta` tensors without any CUDA.

Attention keeps a logsumexp instead of a matrix, cuDNN's recurrent nets keep a reserve instead of every
cell's intermediate values, dropout keeps a mask of bytes, RMS norm a number per row. Autocast is CUDA's too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from tune_easytrain.cudnn_recurrent import run_recurrent

_KEY = "AutocastIPU"
"""A dispatch key above autograd that no build of torch uses any more; ours while a task is traced."""

_LARGEST_FLASH_HEAD = 256


@contextmanager
def cuda_kernels(autocast: Autocast, device_type: str = "cuda") -> Iterator[None]:
    """Run operations on `meta` tensors as CUDA would, with `autocast`'s rules, inside the block.

    With `device_type="cpu"` as a CPU would, in all but the rules of autocast.
    """
    kernels = _kernels(autocast) if device_type == "cuda" else _cpu_kernels(autocast)
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
    device_type: str,
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
    """Choose as sdp_utils.cpp does from Ampere on: flash, memory-efficient, else the plain formula.

    On a CPU what drops something is the plain formula; its fused kernel keeps as little as CUDA's.
    """
    tensors, backends = (query, key, value), torch.backends.cuda
    can_fuse = (
        (device_type == "cuda" or dropout_p == 0.0)
        and all(tensor.dim() == 4 and tensor.stride(-1) == 1 for tensor in tensors)
        and query.shape[0] == key.shape[0] == value.shape[0]
    )
    same_heads = can_fuse and query.shape[1] == key.shape[1] == value.shape[1]
    head = query.shape[-1]
    if (
        can_fuse
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
    has_rows = attn_mask is None or attn_mask.stride(-1) == 1  # not so where heads were its last dimension
    if same_heads and has_rows and backends.mem_efficient_sdp_enabled():  # type: ignore[no-untyped-call]
        mask = None if attn_mask is None else _aligned_mask(attn_mask, query, key)
        needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention.default(
            *tensors, mask, needs_gradient, dropout_p, is_causal, scale=scale
        )[0]
        return result
    dropout = _dropout if device_type == "cuda" else torch.ops.aten.dropout.default
    return _plain_attention(*tensors, attn_mask, partial(dropout, p=dropout_p, train=True), is_causal, scale)


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropped: Callable[[Tensor], Tensor],
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    """Keep the whole matrix, as `_scaled_dot_product_attention_math` does where no mode watches it.

    Under a mode such as the recorder's it adds the mask to a copy.
    """
    dtype, factor = query.dtype, (scale or query.shape[-1] ** -0.5) ** 0.5  # on queries and keys alike
    backends: Any = torch.backends.cuda
    if dtype in (torch.float16, torch.bfloat16) and not backends.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = query.float(), key.float(), value.float()
    if query.dim() == 4 and key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    if is_causal:
        attn_mask = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
    added = None if attn_mask is None else _as_numbers(attn_mask, query.dtype)
    scores = torch.matmul(query * factor, key.transpose(-2, -1) * factor)
    if added is not None:
        scores.add_(added)
    weights = dropped(torch.ops.aten._safe_softmax.default(scores, -1))
    del scores
    return torch.matmul(weights, value).to(dtype)


def _pad_head(tensor: Tensor, multiple: int) -> Tensor:
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _as_numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))


def _aligned_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return the mask as the kernel wants it: numbers, its rows padded to 16 elements, expanded as a view."""
    mask = _as_numbers(mask, query.dtype)
    missing = -mask.shape[-1] % 16
    if missing:
        mask = torch.nn.functional.pad(mask, (0, missing))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


class _FusedRmsNorm(torch.autograd.Function):
    """RMS norm in one kernel: for the backward pass it keeps its input and a number per row."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, num_dims: int, weight: Tensor | None) -> Tensor:
        rows = (*inputs.shape[:-num_dims], *[1] * num_dims)
        ctx.save_for_backward(inputs, weight, inputs.new_empty(rows, dtype=torch.float32))
        return torch.empty_like(inputs, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        inputs, weight, _ = ctx.saved_tensors
        return torch.empty_like(inputs), None, None if weight is None else torch.empty_like(weight)


def _rms_norm(
    inputs: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Run the fused kernel, which wants one format of numbers, or the plain formula."""
    if weight is None or weight.dtype == inputs.dtype:
        normed: Tensor = _FusedRmsNorm.apply(inputs, len(normalized_shape), weight)
        return normed
    plain: Tensor = torch.ops.aten.rms_norm.default(inputs, normalized_shape, weight, eps)
    return plain


def _cpu_kernels(autocast: Autocast) -> dict[str, Callable[..., Any]]:
    """Return the operations that a CPU runs otherwise than `meta` does."""
    recurrent = partial(run_recurrent, "lstm_on_cpu", autocast)
    return {
        "scaled_dot_product_attention": partial(_attention, "cpu"),
        "lstm.input": recurrent,
        "lstm.data": recurrent,
    }


def _kernels(autocast: Autocast) -> dict[str, Callable[..., Any]]:
    """Return the operations that CUDA runs otherwise than `meta` does."""
    kernels: dict[str, Callable[..., Any]] = {
        "dropout": _dropout,
        "rms_norm": _rms_norm,
        "scaled_dot_product_attention": partial(_attention, "cuda"),
    }
    for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        for form in ("input", "data"):
            kernels[f"{kind}.{form}"] = partial(run_recurrent, kind, autocast)
    return kernels
