"""What CUDA kernels take besides their inputs and outputs while they run, by operation.

Measured operation by operation on an H100 (torch 2.11, cuDNN 9). Where a kernel's choice cannot be known,
the larger one is assumed, so that the estimate errs on the high side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIXED_BYTES = 66 * 2**20
"""Workspaces of cuBLAS, one for the forward and one for the backward thread, kept as long as the process."""

_REDUCTION_BYTES = 132 * 2**20
"""The most that a sum over leading dimensions stages: 1 MiB for each of an H100's 132 processors."""

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Scratch:
    """What a kernel takes while it runs: `num_bytes`, which grows with its inputs up to `most_bytes`."""

    num_bytes: int
    most_bytes: float = math.inf


def cuda_scratch(operation: Any, args: Sequence[Any], result: Any) -> Scratch | None:
    """Return what an operation's kernel takes while it runs; None for most."""
    rule = _RULES.get(operation)
    if rule is None:
        return None
    return Scratch(rule(args, result), _REDUCTION_BYTES if rule is _sum else math.inf)


def _bytes(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())


def _copied(*tensors: Any) -> int:
    """Return the bytes of the tensors that a kernel has to make contiguous first."""
    return sum(_bytes(t) for t in tensors if isinstance(t, Tensor) and not t.is_contiguous())


def _convolution(args: Sequence[Any], result: Any) -> int:
    """Return the copies in the layout that tensor cores want: of input, output and weight."""
    return _bytes(args[0]) + _bytes(args[1]) + _bytes(result)


def _convolution_backward(args: Sequence[Any], result: Any) -> int:
    return _bytes(args[0]) + _bytes(args[1]) + 4 * _bytes(args[2])


def _softmax_backward(args: Sequence[Any], result: Any) -> int:
    return _bytes(result) + _copied(args[0])


def _sum(args: Sequence[Any], result: Any) -> int:
    tensor, dims = args[0], args[1]
    if tensor.dim() == 0 or not dims or any(dim % tensor.dim() == tensor.dim() - 1 for dim in dims):
        return 0
    return 2 * 4 * int(tensor.numel())


def _roll(args: Sequence[Any], result: Any) -> int:
    return min(2, len(args[1]) - 1) * _bytes(result)


def _contiguous_inputs(args: Sequence[Any], result: Any) -> int:
    return _copied(*args[:2])


def _flash_backward(args: Sequence[Any], result: Any) -> int:
    """Return the gradient of the queries summed in fp32, and a number per row."""
    query: Tensor = args[1]
    return 4 * query.numel() + 4 * query.numel() // query.shape[-1]


def _efficient_backward(args: Sequence[Any], result: Any) -> int:
    query: Tensor = args[1]
    return 2 * (4 * query.numel() + 4 * query.numel() // query.shape[-1])


def _index_put(args: Sequence[Any], result: Any) -> int:
    if len(args) < 4 or not args[3]:
        return 0
    num_indices = sum(index.numel() for index in args[1] if index is not None)
    return _sorted_indices(num_indices) + _bytes(args[2])


def _embedding_backward(args: Sequence[Any], result: Any) -> int:
    return _copied(args[0]) + _sorted_indices(args[1].numel())


def _sorted_indices(num_indices: int) -> int:
    """Return what sorting indices takes: keys and values, each twice."""
    return 4 * 8 * num_indices


_RULES: dict[Any, Callable[[Sequence[Any], Any], int]] = {
    _aten.convolution.default: _convolution,
    _aten.convolution_backward.default: _convolution_backward,
    _aten._softmax_backward_data.default: _softmax_backward,
    _aten.sum.dim_IntList: _sum,
    _aten.roll.default: _roll,
    _aten.native_layer_norm.default: _contiguous_inputs,
    _aten.native_layer_norm_backward.default: _contiguous_inputs,
    _aten.native_group_norm.default: _contiguous_inputs,
    _aten.native_group_norm_backward.default: _contiguous_inputs,
    _aten.native_batch_norm.default: _contiguous_inputs,
    _aten.native_batch_norm_backward.default: _contiguous_inputs,
    _aten.max_pool3d_with_indices_backward.default: _contiguous_inputs,
    _aten.max_pool2d_with_indices_backward.default: _contiguous_inputs,
    _aten.upsample_bilinear2d_backward.default: _contiguous_inputs,
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    _aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward,
    _aten.index_put.default: _index_put,
    _aten.embedding_dense_backward.default: _embedding_backward,
}
