from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tune_easytrain.autocast_rules import Autocast
from tune_easytrain.cuda_kernels import cuda_kernels
from tune_easytrain.kernel_scratch import Scratch, cuda_scratch
from tune_easytrain.timeline import MemoryRecorder

MIB = 2**20
aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def taken(operation: Any, *args: Any) -> int:
    scratch = cuda_scratch(operation, args, operation(*args))
    return 0 if scratch is None else scratch.num_bytes


IMAGES = meta(2, 4, 16, 16)
NORMED = (meta(2, 8), [8], meta(8), meta(8), 1e-5)


@pytest.mark.parametrize(
    ("operation", "args", "expected"),
    [
        pytest.param(aten.mm.default, (meta(8, 8), meta(8, 8)), 0, id="none for most"),
        pytest.param(
            aten.convolution.default,
            (IMAGES, meta(8, 4, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
            4 * (2 * 4 * 256 + 8 * 4 * 9 + 2 * 8 * 256),
            id="convolution: copies of input, weight and output",
        ),
        pytest.param(aten.sum.dim_IntList, (meta(100, 8), [0]), 2 * 4 * 800, id="sum over leading"),
        pytest.param(aten.sum.dim_IntList, (meta(100, 8), [1]), 0, id="sum over the last"),
        pytest.param(aten.sum.dim_IntList, (meta(100, 8), [-1]), 0, id="sum over the last from behind"),
        pytest.param(aten.sum.dim_IntList, (meta(), []), 0, id="sum of one number"),
        pytest.param(aten.native_layer_norm.default, NORMED, 0, id="norm of what is contiguous"),
        pytest.param(
            aten.native_layer_norm.default,
            (meta(8, 2).t(), *NORMED[1:]),
            64,
            id="norm of what is copied first",
        ),
        pytest.param(aten.roll.default, (meta(16, 16), [1], [0]), 0, id="roll of one dimension"),
        pytest.param(aten.roll.default, (meta(16, 16), [1, 1], [0, 1]), 1024, id="roll of two"),
        pytest.param(aten.roll.default, (meta(4, 4, 4, 4), [1] * 4, [0, 1, 2, 3]), 2048, id="roll of four"),
        pytest.param(
            aten.embedding_dense_backward.default,
            (meta(4, 10, 8), meta(4, 10, dtype=torch.long), 100, -1, False),
            4 * 8 * 40,
            id="embedding: sorted indices",
        ),
        pytest.param(
            aten.index_put.default,
            (meta(100, 8), [meta(10, dtype=torch.long)], meta(10, 8), True),
            4 * 8 * 10 + 4 * 80,
            id="accumulating writes: sorted indices and the values",
        ),
        pytest.param(
            aten.index_put.default,
            (meta(100, 8), [meta(10, dtype=torch.long)], meta(10, 8)),
            0,
            id="plain writes",
        ),
    ],
)
def test_what_a_kernel_takes(operation: Any, args: Any, expected: int) -> None:
    assert taken(operation, *args) == expected


def test_only_the_staging_of_a_sum_is_bounded() -> None:
    tensor = meta(10**9)
    scratch = cuda_scratch(aten.sum.dim_IntList, (tensor.view(-1, 10), [0]), meta(10))
    assert scratch == Scratch(8 * 10**9, 132 * MIB)
    scratch = cuda_scratch(aten.roll.default, (tensor.view(-1, 10), [1, 1], [0, 1]), tensor)
    assert scratch == Scratch(4 * 10**9, math.inf)


def scratches(run: Any) -> list[int]:
    """What the kernels of a forward and backward pass take, on the way."""
    with (
        MemoryRecorder(cuda_scratch) as recorder,
        cuda_kernels(Autocast()),
        recorder.recording() as timeline,
    ):
        run().sum().backward()
    return [change.num_bytes for change in timeline.changes if isinstance(change, Scratch)]


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 1), (torch.float32, 2)], ids=["flash", "memory-efficient"]
)
def test_the_backward_of_attention_sums_gradients_in_fp32(dtype: torch.dtype, factor: int) -> None:
    query = meta(2, 4, 128, 32).to(dtype).requires_grad_()
    rows = 2 * 4 * 128
    found = scratches(lambda: functional.scaled_dot_product_attention(query, query, query))
    assert found == [factor * (4 * rows * 32 + 4 * rows)]


def test_the_backward_of_a_convolution_takes_copies_and_partial_sums_of_the_weight() -> None:
    images, weight = meta(2, 4, 16, 16).requires_grad_(), meta(8, 4, 3, 3).requires_grad_()
    output = 2 * 8 * 256
    forward, backward = scratches(lambda: functional.conv2d(images, weight, padding=1))
    assert forward == 4 * (images.numel() + weight.numel() + output)
    assert backward == 4 * (images.numel() + 4 * weight.numel() + output)


def test_the_backward_of_softmax_takes_its_result_again() -> None:
    # And the gradient, which comes expanded from the sum and is made contiguous first.
    inputs = meta(64, 128).requires_grad_()
    assert scratches(lambda: inputs.softmax(-1)) == [4 * 64 * 128 * 2]
