from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import cloudpickle
import listeners
import pytest
import torch
from gloo_workers import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from listeners import Listener, listeners_of
from torch import Tensor, nn

from tune_easytrain.accumulate import AccumulationRecord, accumulate_gradients
from tune_easytrain.protocol import WorkerPlace
from tune_easytrain.rank_group import RankGroup, _open_store, buckets, exchange_as_one


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()


def make_samples(num_samples: int) -> Tensor:
    return torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(1)).double()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def test_workers_of_one_machine_listen_on_loopback_alone() -> None:
    def work(group: RankGroup) -> list[Listener]:
        group.sum([1.0])  # the connections are made
        listeners = listeners_of(os.getpid())
        group.sum([1.0])
        return listeners

    cloudpickle.register_pickle_by_value(listeners)
    try:
        first, second = on_ranks(work)
    finally:
        cloudpickle.unregister_pickle_by_value(listeners)
    assert len(first) > len(second) > 0  # the first has the store too
    assert [each for each in (*first, *second) if not each.is_loopback] == []


def test_the_store_listens_on_its_own_address_alone() -> None:
    place = WorkerPlace(0, 1, "127.0.0.2")  # any address of this machine
    before = {each.port for each in listeners_of(os.getpid())}
    store = _open_store(place)
    opened = [each for each in listeners_of(os.getpid()) if each.port not in before]
    assert [(each.address, each.port) for each in opened] == [("127.0.0.2", store.port)]
    assert _open_store(replace(place, port=store.port)).num_keys() == store.num_keys()


def test_gradients_of_ragged_shares_are_those_of_the_whole_window() -> None:
    shares: list[tuple[int, ...]] = [(4, 3), (2,), ()]

    def work(group: RankGroup) -> tuple[list[Tensor], AccumulationRecord]:
        model = make_net()
        model[0].bias.requires_grad_(False)
        start = sum(sum(share) for share in shares[: group.rank])
        samples = make_samples(9)[start : start + sum(shares[group.rank])]
        record = None
        if len(samples):
            record = accumulate_gradients(model, loss, samples.split(list(shares[group.rank])))
        record = group.average_gradients(model.parameters(), record)
        return [p.grad for p in model.parameters() if p.grad is not None], record

    model = make_net()
    loss(model, make_samples(9)).backward()
    expected = [p.grad for name, p in model.named_parameters() if name != "0.bias"]
    for gradients, record in on_ranks(work, 3):
        assert len(gradients) == len(expected)
        for gradient, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, own, rtol=1e-12, atol=1e-14)
        assert (record.num_samples, record.weight) == (9, 9.0)
        assert record.loss == pytest.approx(float(loss(model, make_samples(9)).detach()), rel=1e-12)


def test_a_parameter_that_one_rank_uses_gets_its_share_and_an_unused_one_nothing() -> None:
    def work(group: RankGroup) -> list[Any]:
        model = nn.ModuleList([nn.Linear(1, 1, bias=False).double() for _ in range(3)])
        record = accumulate_gradients(
            model, lambda net, x: net[group.rank](x).mean(), [torch.ones(2, 1).double()]
        )
        group.average_gradients(model.parameters(), record)
        return [None if p.grad is None else float(p.grad) for p in model.parameters()]

    assert on_ranks(work) == [[0.5, 0.5, None]] * 2


def test_a_window_without_a_sample_on_any_rank_is_refused() -> None:
    def work(group: RankGroup) -> str:
        with pytest.raises(ValueError, match="has no gradient") as caught:
            group.average_gradients(make_net().parameters(), None)
        return str(caught.value)

    assert len(on_ranks(work)) == 2


def test_state_is_the_first_ranks_and_sums_are_of_all() -> None:
    def work(group: RankGroup) -> tuple[float, float, float, list[float]]:
        model = nn.BatchNorm1d(3)
        nn.init.constant_(model.weight, group.rank + 1.0)
        assert model.running_mean is not None
        model.running_mean.fill_(group.rank + 5.0)
        group.share_buffers(model)
        before = float(model.weight[0])
        group.share_state(model)
        return before, float(model.weight[0]), float(model.running_mean[0]), group.sum([1.0, group.rank])

    assert on_ranks(work) == [(1.0, 1.0, 5.0, [2.0, 1.0]), (2.0, 1.0, 5.0, [2.0, 1.0])]


def test_the_largest_number_and_a_broadcast_are_the_same_on_every_rank() -> None:
    def work(group: RankGroup) -> tuple[list[float], list[float]]:
        tensor = torch.full((2,), float(group.rank))
        group.broadcast(tensor, 1)
        return group.largest([group.rank, -group.rank]), tensor.tolist()

    assert on_ranks(work) == [([1.0, 0.0], [1.0, 1.0])] * 2


def test_what_a_rank_has_comes_to_the_first_one_whole() -> None:
    def tree(rank: int) -> dict[Any, Any]:
        large = torch.arange(200, dtype=torch.float64).view(20, 10) + rank
        return {
            3: {"step": torch.tensor(float(rank)), "half": large.to(torch.bfloat16), "turned": large.t()},
            "view": large[0, :2],
            "other": [None, "text", (large > 100,), {"flag": True}],
        }

    def work(group: RankGroup) -> Any:
        return group.bring_to_first(tree(group.rank), 2)

    found, *others = on_ranks(work, 3)
    assert others == [None, None]
    expected = tree(2)
    for key in ("step", "half", "turned"):
        assert found[3][key].dtype == expected[3][key].dtype
        assert found[3][key].equal(expected[3][key])
    assert found["view"].equal(expected["view"])
    assert found["other"][2][0].equal(expected["other"][2][0])
    assert (found["other"][:2], found["other"][3]) == ([None, "text"], {"flag": True})


def test_one_worker_exchanges_nothing() -> None:
    group, model = RankGroup(), make_net()
    record = accumulate_gradients(model, loss, [make_samples(4)])
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert group.average_gradients(model.parameters(), record) is record
    for parameter, gradient in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.equal(gradient)
    group.share_state(model)
    assert group.sum([3.0]) == [3.0]
    assert group.largest([3.0]) == [3.0]
    group.broadcast(model[0].weight, 0)
    assert group.is_first
    group.leave()


@given(
    sizes=st.lists(st.integers(1, 40), max_size=30),
    kinds=st.lists(st.sampled_from([torch.float32, torch.float64]), min_size=30, max_size=30),
    most_bytes=st.integers(1, 400),
)
def test_buckets_hold_every_tensor_once_and_no_more_than_they_may(
    sizes: list[int], kinds: list[torch.dtype], most_bytes: int
) -> None:
    tensors = [torch.empty(size, dtype=kind) for size, kind in zip(sizes, kinds, strict=False)]
    found = list(buckets(tensors, most_bytes))
    assert sorted(id(t) for bucket in found for t in bucket) == sorted(map(id, tensors))
    for bucket in found:
        assert len({t.dtype for t in bucket}) == 1
        assert len(bucket) == 1 or sum(t.numel() * t.element_size() for t in bucket) <= most_bytes


@pytest.mark.parametrize("turned", [False, True])
def test_tensors_exchanged_as_one_hold_what_was_left_in_it(turned: bool) -> None:
    tensors = [torch.ones(3, 4), torch.full((2,), 2.0)]
    if turned:
        tensors = [torch.ones(4, 3).t()]
    exchange_as_one(tensors, lambda flat: flat.mul_(3))
    for tensor, value in zip(tensors, (3.0, 6.0), strict=False):
        assert (tensor == value).all()
