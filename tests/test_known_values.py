from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tune_easytrain.known_values import KnownValues
from tune_easytrain.timeline import MemoryRecorder, UnknownValueError

META = torch.device("meta")


def recorder() -> MemoryRecorder:
    return MemoryRecorder(lambda *_: None)


def unknown(*shape: int) -> Tensor:
    return torch.empty(shape, device=META)


def mask_of(lengths: list[int], device: torch.device) -> Tensor:
    """A padding mask as models make it."""
    return torch.arange(max(lengths), device=device) < torch.tensor(lengths).to(device)[:, None]


def bias_of(device: torch.device) -> Tensor:
    """A causal mask of numbers, made in place."""
    bias = torch.full((4, 4), float("-inf"), device=device)
    return torch.triu(bias, 1).masked_fill_(torch.eye(4, device=device, dtype=torch.bool), 0)


def written_through_a_view(device: torch.device) -> Tensor:
    numbers = torch.zeros(3, 4, dtype=torch.long, device=device)
    numbers[1].fill_(7)
    numbers[:, 2] += torch.arange(3, device=device)
    return numbers


COMPUTATIONS: list[Callable[[torch.device], Tensor]] = [
    lambda device: torch.arange(7, device=device).sum(),
    lambda device: torch.tensor([3, 1, 2]).to(device).argsort(descending=True),
    lambda device: torch.ones(2, 5, dtype=torch.long, device=device).cumsum(-1)[:, -1].max(),
    lambda device: mask_of([2, 5, 1], device).all(),
    lambda device: mask_of([2, 5, 1], device).nonzero(),
    lambda device: torch.unique(torch.tensor([4, 4, 2]).to(device)),
    lambda device: torch.arange(10, device=device)[torch.arange(10, device=device) > 6],
    lambda device: torch.linspace(0, 1, 5, device=device).to(torch.float64),
    bias_of,
    written_through_a_view,
]


@pytest.mark.parametrize("compute", COMPUTATIONS)
def test_what_follows_from_constants_is_what_the_cpu_computes(
    compute: Callable[[torch.device], Tensor],
) -> None:
    expected = compute(torch.device("cpu"))
    with recorder():
        result = compute(META)
        assert result.device == META
        assert result.shape == expected.shape
        values = result.cpu()
    assert values.device.type == "cpu"
    assert values.equal(expected)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8))
def test_comparisons_decide_as_on_the_cpu(numbers: list[int]) -> None:
    with recorder():
        tensor = torch.tensor(numbers).to(META)
        assert bool((tensor > 0).any()) == any(number > 0 for number in numbers)
        assert int(tensor.max()) == max(numbers)
        assert torch.equal(tensor, tensor.clone())
        assert tensor[tensor != 0].shape == (sum(number != 0 for number in numbers),)


@pytest.mark.parametrize(
    "read",
    [
        lambda: unknown(3).sum().item(),
        lambda: bool(unknown(3).isnan().any()),
        lambda: (torch.ones(3, device=META) * unknown(3))[0].item(),
        lambda: torch.zeros(3, device=META).add_(unknown(3))[0].item(),
        lambda: torch.empty(3, device=META).zero_().new_empty(2)[0].item(),
        lambda: torch.equal(unknown(3), unknown(3)),
    ],
)
def test_what_follows_from_activations_is_not_known(read: Callable[[], object]) -> None:
    with recorder(), pytest.raises(UnknownValueError):
        read()


def test_writing_what_is_not_known_makes_all_views_unknown() -> None:
    with recorder():
        numbers = torch.zeros(2, 3, device=META)
        row, other = numbers[0], torch.zeros(2, 3, device=META)
        assert row[1].item() == 0
        numbers[1].copy_(unknown(3))
        for tensor in (numbers, row, numbers.t()):
            with pytest.raises(UnknownValueError):
                tensor[0].sum().item()
        assert other.sum().item() == 0


def test_what_came_before_does_not_make_later_values_unknown() -> None:
    """Storages are told apart although the allocator gives out the same addresses again."""
    with recorder():
        for _ in range(200):
            spoilt = torch.zeros(3, device=META)
            spoilt.copy_(unknown(3))
            del spoilt
            assert torch.ones(3, device=META).sum().item() == 3


def test_large_tensors_are_not_computed_beside() -> None:
    known = KnownValues()
    integers, numbers = torch.empty(2**16, dtype=torch.long, device=META), torch.empty(4096, device=META)
    for tensor in (integers, numbers):
        values = torch.zeros(tensor.shape, dtype=tensor.dtype)
        known.learn(tensor, values)
        assert known.of(tensor) is values
    for tensor in (integers.new_empty(2**16 + 1), numbers.new_empty(4097)):
        known.learn(tensor, torch.zeros(tensor.shape))
        assert known.of(tensor) is None


def test_a_host_tensor_is_its_own_values() -> None:
    tensor = torch.ones(3)
    assert KnownValues().of(tensor) is tensor
    assert KnownValues().of(unknown(3)) is None
