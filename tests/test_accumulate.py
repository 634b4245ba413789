from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch import split_batch
from tune_easytrain.batch_plan import BatchPlan

TOLERANCE = 1e-12


class Net(nn.Module):
    """Three layers in float64, the last of them in no graph."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(5, 7).double(), nn.Linear(7, 3).double()
        self.unused = nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make_batch(num_samples: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64)
    return features, torch.randint(0, 3, (num_samples,), generator=generator)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(model: Net, expected: Net) -> None:
    other = gradients(expected)
    for name, gradient in gradients(model).items():
        if name.startswith("unused"):
            assert gradient is None
            continue
        assert gradient is not None
        assert other[name] is not None
        assert (gradient - other[name]).norm() <= TOLERANCE * other[name].norm(), name


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_any_split_gives_the_full_batchs_gradient(sizes: list[int], seed: int) -> None:
    model, whole = Net(seed), Net(seed)
    batch = make_batch(sum(sizes), seed)
    full = loss(whole, batch)
    full.backward()
    record = accumulate_gradients(model, loss, split_batch(batch, sizes))
    assert_same_gradients(model, whole)
    assert record.loss == pytest.approx(full.item(), rel=TOLERANCE)
    assert (record.num_samples, record.weight) == (sum(sizes), sum(sizes))
    assert record.microbatch_sizes == tuple(sizes)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 30))
def test_every_window_of_an_epoch_is_right_the_short_last_one_too(
    effective: int, limit: int, num_samples: int
) -> None:
    features, labels = make_batch(num_samples)
    start = 0
    for plan in BatchPlan.build(effective, limit).windows(num_samples):
        window = (features[start : start + plan.num_samples], labels[start : start + plan.num_samples])
        start += plan.num_samples
        model, whole = Net(), Net()
        loss(whole, window).backward()
        accumulate_gradients(model, loss, split_batch(window, plan.microbatch_sizes))
        assert_same_gradients(model, whole)


def token_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean over the tokens that the mask keeps, as language models have it."""
    features, labels, mask = batch
    each = nn.functional.cross_entropy(model(features).flatten(0, 1), labels.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


def num_tokens(batch: Any) -> int:
    return int(batch[2].sum())


@given(st.lists(st.integers(0, 6), min_size=2, max_size=7).filter(any), st.integers(1, 4))
def test_token_weights_give_the_mean_over_all_tokens(lengths: list[int], size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(lengths), 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (len(lengths), 6), generator=generator)
    mask = (torch.arange(6) < torch.tensor(lengths)[:, None]).double()
    batch = (features, labels, mask)
    model, whole = Net(), Net()
    full = token_loss(whole, batch)
    full.backward()
    parts = [tuple(tensor[i : i + size] for tensor in batch) for i in range(0, len(lengths), size)]
    record = accumulate_gradients(model, token_loss, parts, weight=num_tokens)
    assert_same_gradients(model, whole)  # parts without a token would be NaN: they were passed over
    assert record.loss == pytest.approx(full.item(), rel=TOLERANCE)
    assert (record.num_samples, record.weight) == (len(lengths), sum(lengths))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 20))
def test_a_scaled_backward_leaves_the_full_batchs_gradient_times_the_scale(
    sizes: list[int], exponent: int
) -> None:
    model, whole = Net(), Net()
    batch = make_batch(sum(sizes))
    full = loss(whole, batch)
    full.backward()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
    record = accumulate_gradients(
        model, loss, split_batch(batch, sizes), backward=lambda weighted: scaler.scale(weighted).backward()
    )
    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
        if parameter.grad is not None and expected.grad is not None:
            difference = parameter.grad - 2.0**exponent * expected.grad
            assert difference.norm() <= TOLERANCE * parameter.grad.norm()
    scaler.unscale_(torch.optim.SGD(model.parameters()))
    assert_same_gradients(model, whole)
    assert record.loss == pytest.approx(full.item(), rel=TOLERANCE)  # the loss itself is not scaled


def test_backward_gets_each_loss_times_its_weight() -> None:
    given_losses: list[float] = []

    def backward(weighted: Tensor) -> None:
        given_losses.append(weighted.item())
        weighted.backward()

    model, parts = Net(), [make_batch(3, 1), make_batch(0), make_batch(5, 2)]
    expected = [3 * loss(model, parts[0]).item(), 5 * loss(model, parts[2]).item()]
    accumulate_gradients(model, loss, parts, backward=backward)
    assert given_losses == pytest.approx(expected, rel=TOLERANCE)


def test_a_microbatch_of_weight_zero_is_never_run() -> None:
    seen: list[int] = []

    def counting(model: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return loss(model, batch)

    accumulate_gradients(Net(), counting, [make_batch(0), make_batch(3), make_batch(0)])
    assert seen == [3]


def test_gradients_from_before_are_discarded() -> None:
    model, whole = Net(), Net()
    batch = make_batch(6)
    loss(whole, batch).backward()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    accumulate_gradients(model, loss, split_batch(batch, [4, 2]))
    assert_same_gradients(model, whole)


def test_frozen_parameters_get_no_gradient() -> None:
    model = Net()
    model.first.requires_grad_(requires_grad=False)
    accumulate_gradients(model, loss, [make_batch(2)])
    assert model.first.weight.grad is None
    assert model.second.weight.grad is not None


def test_at_most_one_microbatch_is_alive_at_a_time() -> None:
    earlier: list[weakref.ref[Tensor]] = []

    def reading() -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(4):
            assert [ref() for ref in earlier if ref() is not None] == []
            features, labels = make_batch(3, seed)
            earlier.append(weakref.ref(features))
            pair = [(features, labels)]
            del features, labels
            yield pair.pop()

    record = accumulate_gradients(Net(), loss, reading())
    assert record.microbatch_sizes == (3, 3, 3, 3)


@pytest.mark.parametrize("microbatches", [[], [make_batch(0)]])
def test_a_window_without_a_sample_is_refused(microbatches: list[Any]) -> None:
    with pytest.raises(ValueError, match="has no gradient"):
        accumulate_gradients(Net(), loss, microbatches)
