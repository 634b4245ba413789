from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tune_easytrain.meta_operations import MetaOperations

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


CALLS = [
    (aten.mm.default, (meta(3, 4), meta(4, 5)), {}),
    (
        aten.convolution.default,
        (meta(2, 3, 8, 8), meta(4, 3, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
        {},
    ),
    (aten.add.Tensor, (meta(3, 1), meta(4, dtype=torch.float64)), {"alpha": 2}),
    (aten.mul.Tensor, (meta(2, 3).t(), meta(3, 2)), {}),
    (aten.native_layer_norm.default, (meta(2, 8), [8], meta(8), meta(8), 1e-5), {}),
    (aten._to_copy.default, (meta(2, 3),), {"dtype": torch.bfloat16}),
    (aten.native_dropout.default, (meta(5), 0.5, True), {}),
    (aten.cat.default, ([meta(1, 2), meta(3, 2)],), {}),
]


@pytest.mark.parametrize(("operation", "args", "kwargs"), CALLS, ids=lambda value: str(value)[:30])
def test_an_operation_seen_before_gives_new_tensors_of_the_same_form(
    operation: Any, args: Any, kwargs: Any
) -> None:
    operations = MetaOperations()
    expected = outputs(operation(*args, **kwargs))
    first, second = (outputs(operations.run(operation, args, kwargs)) for _ in range(2))
    assert list(map(form, first)) == list(map(form, second)) == list(map(form, expected))
    storages = {tensor.untyped_storage()._cdata for tensor in (*first, *second)}
    assert len(storages) == len(first) + len(second)


@pytest.mark.parametrize(
    ("operation", "one", "other"),
    [
        (aten.mm.default, (meta(3, 4), meta(4, 5)), (meta(3, 4), meta(4, 6))),
        (aten.mul.Tensor, (meta(4, 4), meta(4, 4)), (meta(4, 4).t(), meta(4, 4).t())),
        (aten.mul.Tensor, (meta(4), meta(4)), (meta(4), meta(4, dtype=torch.float64))),
        (aten.sum.dim_IntList, (meta(2, 3), [0]), (meta(2, 3), [1])),
        (aten.sum.dim_IntList, (meta(2, 3), [0], False), (meta(2, 3), [0], True)),
        (aten.add.Scalar, (meta(3, dtype=torch.long), 1), (meta(3, dtype=torch.long), 1.0)),
    ],
    ids=str,
)
def test_other_arguments_are_another_operation(operation: Any, one: Any, other: Any) -> None:
    operations = MetaOperations()
    for args in (one, other, one, other):
        assert form(operations.run(operation, args, {})) == form(operation(*args))


def test_keywords_are_told_apart() -> None:
    operations = MetaOperations()
    for dtype in (torch.bfloat16, torch.float64, torch.bfloat16):
        assert operations.run(aten._to_copy.default, (meta(2),), {"dtype": dtype}).dtype == dtype


def test_views_and_writes_are_never_made_anew() -> None:
    operations, tensor = MetaOperations(), meta(4, 4)
    storage = tensor.untyped_storage()._cdata
    for _ in range(2):
        assert operations.run(aten.t.default, (tensor,), {}).untyped_storage()._cdata == storage
        assert operations.run(aten.add_.Tensor, (tensor, tensor), {}) is tensor
        # Says nothing of it in its schema, but gives its argument where that is contiguous already.
        assert (
            operations.run(aten._reshape_alias.default, (tensor, [16], [1]), {}).untyped_storage()._cdata
            == storage
        )


def test_tensors_of_the_host_are_computed_for_real() -> None:
    operations = MetaOperations()
    for number in (1.0, 2.0):
        result = operations.run(aten.add.Tensor, (torch.full((2,), number), torch.ones(2)), {})
        assert result.tolist() == [number + 1, number + 1]


def test_a_result_of_some_missing_tensors_is_left_alone() -> None:
    """The backward pass of a convolution whose input needs no gradient gives None in its place."""
    operations = MetaOperations()
    ones, zeros = [1, 1], [0, 0]
    convolved, inputs, weight = meta(2, 4, 8, 8), meta(2, 3, 8, 8), meta(4, 3, 3, 3)
    wanted = [False, True, True]
    args = (convolved, inputs, weight, [4], ones, ones, ones, False, zeros, 1, wanted)
    for _ in range(2):
        nothing, of_weight, of_bias = operations.run(aten.convolution_backward.default, args, {})
        assert nothing is None
        assert (of_weight.shape, of_bias.shape) == (weight.shape, (4,))
