from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo_workers import on_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.errors import TaskError
from tune_easytrain.optimizer_shards import OptimizerShards, assign_owners, heaviest_rank
from tune_easytrain.rank_group import RankGroup

SIZES = st.lists(st.integers(0, 1000), max_size=40)


@given(SIZES, st.integers(1, 8))
def test_every_parameter_has_one_owner_and_no_rank_much_more_than_its_share(
    sizes: list[int], num_workers: int
) -> None:
    owners = assign_owners(sizes, num_workers)
    assert len(owners) == len(sizes)
    assert set(owners) <= set(range(num_workers))
    loads = [sum(s for s, o in zip(sizes, owners, strict=True) if o == rank) for rank in range(num_workers)]
    assert max(loads) <= sum(sizes) / num_workers + max(sizes, default=0) * (1 - 1 / num_workers) + 1e-9
    assert owners == assign_owners(sizes, num_workers)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 9), nn.LayerNorm(9), nn.Linear(9, 3)
        self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.last(self.norm(self.first(x)).tanh()))
        return out


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


Build = Callable[[nn.Module], torch.optim.Optimizer]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [model.norm.weight], "lr": 0.02},
        {"params": [p for name, p in model.named_parameters() if name != "norm.weight"], "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=0.05)


def named_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)


def adagrad(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(model.parameters(), lr=0.1)


OPTIMIZERS: dict[str, Build] = {"adam": adam, "named_sgd": named_sgd, "adagrad": adagrad}


def batch(step: int, part: slice = slice(None)) -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).double()[part]


def loss(model: nn.Module, samples: Tensor) -> Tensor:
    out: Tensor = model(samples).square().mean()
    return out


def clone(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: clone(item) for key, item in value.items()}
    return value.clone() if isinstance(value, Tensor) else value


def trained(
    build: Build,
    group: RankGroup,
    steps: range,
    state: dict[str, Any] | None = None,
    *,
    shards_it: bool = True,
) -> dict[str, Any]:
    """Train with shares of every window on each rank; return the model and the optimizer's whole state."""
    model = make_net()
    optimizer = build(model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    places = (group.rank, group.num_workers) if shards_it else (0, 1)
    shards = OptimizerShards(optimizer, rank=places[0], num_workers=places[1])
    shards.require_agreement(model, group)
    if state is not None:
        model.load_state_dict(state["model"])
        shards.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
    for step in steps:
        part = slice(group.rank, None, group.num_workers)
        record = accumulate_gradients(model, loss, [batch(step, part)])
        group.average_gradients(model.parameters(), record)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        shards.share_parameters(group.broadcast)
        scheduler.step()
    return {
        "model": clone(model.state_dict()),
        "optimizer": clone(shards.state_dict(group)),
        "scheduler": scheduler.state_dict(),
        "own": sum(len(group["params"]) for group in optimizer.param_groups),
        "kept": sum(v.numel() for s in optimizer.state.values() for v in s.values() if v.dim()),
    }


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["model"].keys() == expected["model"].keys()
    for name, value in expected["model"].items():
        torch.testing.assert_close(found["model"][name], value, rtol=1e-10, atol=1e-12)


def assert_same_format(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["optimizer"]["state"].keys() == expected["optimizer"]["state"].keys()
    for number, state in expected["optimizer"]["state"].items():
        assert found["optimizer"]["state"][number].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(
                found["optimizer"]["state"][number][name], value, rtol=1e-9, atol=1e-12
            )
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ranks_that_share_an_optimizer_train_as_one_worker_does(name: str) -> None:
    build = OPTIMIZERS[name]
    expected = trained(build, RankGroup(), range(6))
    answers = on_ranks(lambda group: trained(build, group, range(6)), 3)
    for answer in answers:
        assert_close(answer, expected)
        for key, value in answer["model"].items():
            assert value.equal(answers[0]["model"][key]), key
    assert_same_format(answers[0], expected)
    assert sum(answer["own"] for answer in answers) == expected["own"]
    assert sum(answer["kept"] for answer in answers) == expected["kept"]
    assert max(answer["kept"] for answer in answers) < 0.6 * expected["kept"]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
@pytest.mark.parametrize("name", ["adam", "named_sgd"])
def test_training_goes_on_with_another_number_of_workers(name: str, before: int, after: int) -> None:
    build = OPTIMIZERS[name]

    def run(num_workers: int, steps: range, state: dict[str, Any] | None = None) -> dict[str, Any]:
        if num_workers == 1:
            return trained(build, RankGroup(), steps, state)
        first: dict[str, Any] = on_ranks(lambda group: trained(build, group, steps, state), num_workers)[0]
        return first

    expected = trained(build, RankGroup(), range(6))
    found = run(after, range(3, 6), run(before, range(3)))
    assert_close(found, expected)
    assert_same_format(found, expected)


def test_training_goes_on_without_sharding() -> None:
    state = on_ranks(lambda group: trained(adam, group, range(3)))[0]
    found = on_ranks(lambda group: trained(adam, group, range(3, 6), state, shards_it=False))[0]
    assert_close(found, trained(adam, RankGroup(), range(6)))


@pytest.mark.parametrize(
    "name",
    [
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ],
)
def test_a_rank_that_owns_nothing_steps_and_tells_and_takes_its_state(name: str) -> None:
    model = nn.Linear(3, 1, bias=False)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    shards = OptimizerShards(optimizer, rank=1, num_workers=2)
    before = model.weight.detach().clone()
    model(torch.ones(2, 3)).mean().backward()
    optimizer.step()
    scheduler.step()
    assert model.weight.equal(before)
    assert (optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]) == ({}, 0.05)
    other = nn.Linear(3, 1, bias=False)
    whole = getattr(torch.optim, name)(other.parameters(), lr=0.3)
    other(torch.ones(2, 3)).mean().backward()
    whole.step()
    shards.load_state_dict(whole.state_dict())
    assert (optimizer.state_dict()["state"], optimizer.param_groups[0]["lr"]) == ({}, 0.3)


def test_one_worker_keeps_its_optimizer_as_it_is() -> None:
    model = make_net()
    optimizer = adam(model)
    before = [list(group["params"]) for group in optimizer.param_groups]
    shards = OptimizerShards(optimizer, rank=0, num_workers=1)
    assert [group["params"] for group in optimizer.param_groups] == before
    shards.share_parameters(lambda tensor, owner: pytest.fail("nothing is shared"))
    assert shards.state_dict(RankGroup()).keys() == optimizer.state_dict().keys()


def test_the_heaviest_rank_owns_the_most_bytes() -> None:
    model = make_net()
    optimizer = adam(model)
    rank = heaviest_rank(optimizer, 3)
    loads = []
    for number in range(3):
        mine = adam(model)
        OptimizerShards(mine, rank=number, num_workers=3)
        loads.append(sum(p.numel() for g in mine.param_groups for p in g["params"] if p.requires_grad))
    assert loads[rank] == max(loads)


def test_an_optimizer_over_all_parameters_at_once_is_refused() -> None:
    optimizer = torch.optim.LBFGS(make_net().parameters())
    with pytest.raises(TaskError, match=r"remove memory\.sharding"):
        OptimizerShards(optimizer, rank=0, num_workers=2)
    OptimizerShards(optimizer, rank=0, num_workers=1)


def test_other_groups_in_a_checkpoint_are_refused() -> None:
    optimizer = adam(make_net())
    shards = OptimizerShards(optimizer, rank=0, num_workers=2)
    with pytest.raises(ValueError, match=r"groups of \[10\], not \[1, 9\]"):
        shards.load_state_dict(named_sgd(make_net()).state_dict())


def test_another_order_of_parameters_on_one_rank_is_refused() -> None:
    def work(group: RankGroup) -> str:
        model = make_net()
        parameters = list(model.parameters())
        order = parameters if group.rank == 0 else parameters[::-1]
        shards = OptimizerShards(torch.optim.SGD(order), rank=group.rank, num_workers=2)
        with pytest.raises(TaskError, match="in another order, on each worker"):
            shards.require_agreement(model, group)
        return "refused"

    assert on_ranks(work) == ["refused"] * 2
