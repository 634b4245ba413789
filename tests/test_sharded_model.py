from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_workers import CPU, on_ranks
from torch import Tensor, nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.errors import TaskError
from tune_easytrain.random_state import get_random_state
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.sharded_model import (
    EqualPasses,
    is_sharded,
    place_model,
    shardable_blocks,
    split_model_state,
    split_optimizer_state,
    whole_tensors,
)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 11), nn.Linear(11, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(self.inner(self.norm(x)).tanh())
        return out


class Net(nn.Module):
    """Blocks between a first and a last layer; sizes that two and three workers divide unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.blocks = nn.Sequential(*(Block(7) for _ in range(3)))
        self.last, self.frozen = nn.Linear(7, 1), nn.Linear(1, 1)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(self.last(self.blocks(self.first(x))))
        return out


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def samples(step: int, num_samples: int = 9) -> Tensor:
    return torch.randn(num_samples, 5, generator=torch.Generator().manual_seed(step)).double()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch).square().mean()
    return out


def spare() -> Tensor:
    return torch.full((2, 5), 0.5).double()


# What each rank has of a window of nine samples, as micro-batches; none of it is even.
SHARES: list[list[list[int]]] = [[[0, 1, 2], [3, 4], [5]], [[6], [7, 8]], []]


def trained(
    group: RankGroup, steps: range, state: dict[str, Any] | None = None, sharding: Any = "full"
) -> Any:
    """Train on the windows of `steps`, shared over the ranks; return what a checkpoint would hold."""
    model = place_model(make_net(), CPU, group, sharding)
    assert is_sharded(model) == (sharding == "full" and group.num_workers > 1)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.first.parameters()), "lr": 0.02},
            {"params": [*model.blocks.parameters(), *model.last.parameters()]},
        ],  # type: ignore[union-attr,arg-type]
        lr=0.05,
    )
    parameters = [parameter for part in optimizer.param_groups for parameter in part["params"]]
    if state is not None:
        model.load_state_dict(split_model_state(state["model"], model))
        optimizer.load_state_dict(split_optimizer_state(state["optimizer"], parameters))
    passes = EqualPasses(model, group, spare)
    losses = []
    for step in steps:
        window = samples(step)
        own = SHARES[group.rank]
        if group.num_workers == 1:
            record = accumulate_gradients(model, loss, [window])
        elif sharding == "full":
            record = passes.accumulate(
                loss, (window[part] for part in own), len(own), weight=None, backward=Tensor.backward
            )
        else:
            own_record = accumulate_gradients(model, loss, [window[part] for part in own]) if own else None
            record = group.average_gradients(model.parameters(), own_record)
        losses.append(record.loss)
        assert (record.num_samples, record.weight) == (9, 9.0)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        losses.append(float(norm.full_tensor()) if hasattr(norm, "full_tensor") else float(norm))
        optimizer.step()
    return {
        "model": whole_tensors(model.state_dict(), group),
        "optimizer": whole_tensors(optimizer.state_dict(), group),
        "losses": losses,
    }


def assert_close(found: Any, expected: Any) -> None:
    """Everything is alike: keys, kinds, shapes, and numbers to 1e-10."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, (list, tuple)):
        for own, value in zip(found, expected, strict=True):
            assert_close(own, value)
    elif isinstance(expected, (Tensor, float)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    else:
        assert found == expected


@pytest.mark.parametrize("num_workers", [3])
def test_workers_of_a_sharded_model_train_as_one_with_whole_batches_does(num_workers: int) -> None:
    expected = trained(RankGroup(), range(5))
    first, *others = on_ranks(lambda group: trained(group, range(5)), num_workers)
    assert_close(first, expected)
    for other in others:
        assert_close(other["losses"], expected["losses"])


@pytest.mark.parametrize(
    ("before", "after"), [("full", "alone"), ("alone", "full"), ("full", "none"), ("none", "full")]
)
def test_training_goes_on_with_other_workers_and_another_sharding(before: str, after: str) -> None:
    def run(kind: str, steps: range, state: Any = None) -> Any:
        if kind == "alone":
            return trained(RankGroup(), steps, state)
        return on_ranks(lambda group: trained(group, steps, state, kind), 3)[0]

    expected = trained(RankGroup(), range(5))
    state = run(before, range(3))
    found = run(after, range(3, 5), state)
    assert_close(found["model"], expected["model"])
    assert_close(found["optimizer"], expected["optimizer"])


def test_optimizers_step_and_restore_parts_as_they_do_the_whole() -> None:
    names = ["SGD", "RMSprop", "Adagrad", "Adam", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD"]

    def run(group: RankGroup, name: str) -> dict[str, Tensor]:
        state: dict[str, Any] | None = None
        for step in range(2):
            model = place_model(make_net(), CPU, group, "full")
            parameters = [p for p in model.parameters() if p.requires_grad]
            optimizer = getattr(torch.optim, name)(parameters, lr=0.05)
            if state is not None:
                model.load_state_dict(split_model_state(state["model"], model))
                optimizer.load_state_dict(split_optimizer_state(state["optimizer"], parameters))
            part = slice(group.rank, None, group.num_workers)
            if group.num_workers == 1:
                accumulate_gradients(model, loss, [samples(step)])
            else:
                EqualPasses(model, group, spare).accumulate(
                    loss, [samples(step)[part]], 1, weight=None, backward=Tensor.backward
                )
            optimizer.step()
            state = {
                "model": whole_tensors(model.state_dict(), group),
                "optimizer": whole_tensors(optimizer.state_dict(), group),
            }
            if group.num_workers > 1:
                told = [state]
                torch.distributed.broadcast_object_list(told, src=0)
                state = told[0]
        assert state is not None
        model_state: dict[str, Tensor] = state["model"]
        return model_state

    found = on_ranks(lambda group: {name: run(group, name) for name in names})[0]
    for name in names:
        assert_close(found[name], run(RankGroup(), name))


def test_each_rank_keeps_its_part_of_parameters_gradients_and_state() -> None:
    def work(group: RankGroup) -> tuple[int, int]:
        model = place_model(make_net(), CPU, group, "full")
        passes = EqualPasses(model, group, spare)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        passes.accumulate(loss, [samples(0)], 1, weight=None, backward=Tensor.backward)
        optimizer.step()
        states = [state["momentum_buffer"] for state in optimizer.state.values()]
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        held = [tensor.to_local().numel() for tensor in (*model.parameters(), *states, *gradients)]  # type: ignore[union-attr,operator]
        return sum(held), len(states)

    parameters = list(make_net().parameters())
    whole = sum(p.numel() * (3 if p.requires_grad else 1) for p in parameters)
    answers = on_ranks(work)
    assert [states for _, states in answers] == [len(parameters) - 2] * 2
    assert sum(held for held, _ in answers) == whole
    assert max(held for held, _ in answers) < 0.6 * whole


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(5, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.norm(self.first(x))))
        return out


def test_passes_that_are_made_up_leave_no_trace_in_statistics_and_random_state() -> None:
    def work(group: RankGroup) -> tuple[dict[str, Any], Any]:
        torch.manual_seed(0)
        model = place_model(Noisy().double(), CPU, group, "full")
        passes = EqualPasses(model, group, spare)
        own = [samples(0), samples(1)] if group.rank == 0 else []
        torch.manual_seed(3)
        passes.accumulate(loss, own, len(own), weight=None, backward=Tensor.backward)
        gradients = [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[union-attr,operator]
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return buffers, (get_random_state()["torch"], gradients)

    (_, (_, found)), (buffers, (state, _)) = on_ranks(work)
    torch.manual_seed(0)
    model = Noisy().double()
    torch.manual_seed(3)
    for name, buffer in model.named_buffers():
        assert buffers[name].equal(buffer), name
    assert state.equal(get_random_state()["torch"])
    accumulate_gradients(model, loss, [samples(0), samples(1)])
    for gradient, own in zip(found, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(gradient, own, rtol=1e-10, atol=1e-12)


def test_micro_batches_without_weight_count_for_nothing() -> None:
    """Their loss is NaN, as a mean over no tokens is; on the other rank the same passes count."""

    def mean_of_positive(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)[batch[:, 0] > 0].square().mean()
        return out

    def weight(batch: Tensor) -> int:
        return int((batch[:, 0] > 0).sum())

    positive, negative = samples(0).abs(), -samples(1).abs()

    def work(group: RankGroup) -> Any:
        model = place_model(make_net(), CPU, group, "full")
        own = [positive[:4], positive[4:]] if group.rank == 0 else [negative[:4], positive[:3]]
        EqualPasses(model, group, spare).accumulate(
            mean_of_positive, own, 2, weight=weight, backward=Tensor.backward
        )
        return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[union-attr,operator]

    model = make_net()
    accumulate_gradients(model, loss, [torch.cat([positive, positive[:3]])])
    for gradients in on_ranks(work):
        for gradient, parameter in zip(
            gradients, [p for p in model.parameters() if p.grad is not None], strict=True
        ):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)


def test_batches_are_evaluated_in_step() -> None:
    def work(group: RankGroup) -> tuple[float, int]:
        model = place_model(make_net(), CPU, group, "full").eval()
        passes, spares, total = EqualPasses(model, group, spare), 0, 0.0

        def run_spare(batch: Tensor) -> None:
            nonlocal spares
            spares += 1
            loss(model, batch)

        with torch.no_grad():
            own = [samples(0), samples(1), samples(2)] if group.rank else [samples(3)]
            for batch in passes.in_step(own, run_spare):
                total += float(loss(model, batch))
        return total, spares

    model = make_net()
    expected = [float(loss(model, samples(step)).detach()) for step in range(4)]
    (first, first_spares), (second, second_spares) = on_ranks(work)
    assert (first, second) == (pytest.approx(expected[3]), pytest.approx(sum(expected[:3])))
    assert (first_spares, second_spares) == (2, 0)


def test_a_window_without_a_single_sample_is_refused() -> None:
    def work(group: RankGroup) -> str:
        model = place_model(make_net(), CPU, group, "full")
        with pytest.raises(ValueError, match="has no gradient") as caught:
            EqualPasses(model, group, spare).accumulate(loss, [], 0, weight=None, backward=Tensor.backward)
        return type(caught.value).__name__

    assert on_ranks(work) == ["NothingToLearnError"] * 2


def test_a_loss_that_uses_a_part_of_the_model_is_told_to_call_the_model() -> None:
    def work(group: RankGroup) -> list[str]:
        model = place_model(make_net(), CPU, group, "full")

        def part(net: nn.Module, batch: Tensor) -> Tensor:
            out: Tensor = net.first(batch).mean()  # type: ignore[operator]
            return out

        with pytest.raises(RuntimeError) as caught:
            EqualPasses(model, group, spare).accumulate(
                part, [samples(0)], 1, weight=None, backward=Tensor.backward
            )
        return caught.value.__notes__

    for notes in on_ranks(work):
        assert any("have the loss call model(...)" in note for note in notes)


class Viewing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(-1)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_view_of_the_model_s_output_gives_right_gradients_or_an_error(in_place: bool) -> None:
    """FSDP2 loses sight of a view that is changed in place, and its gradients come out wrong."""

    def shifted(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        if in_place:
            output += 1.0
        out: Tensor = output.square().mean()
        return out

    def work(group: RankGroup) -> Any:
        torch.manual_seed(0)
        model = place_model(Viewing().double(), CPU, group, "full")
        EqualPasses(model, group, spare).accumulate(
            shifted, [samples(0)], 1, weight=None, backward=Tensor.backward
        )
        return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[union-attr,operator]

    if in_place:
        with pytest.raises(RuntimeError, match="is being modified inplace"):
            on_ranks(work)
        return
    torch.manual_seed(0)
    model = Viewing().double()
    accumulate_gradients(model, shifted, [samples(0)])
    own = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient, expected in zip(on_ranks(work)[0], own, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_a_parameter_without_a_dimension_is_refused() -> None:
    def work(group: RankGroup) -> str:
        model = make_net()
        model.scale = nn.Parameter(torch.ones(()))
        with pytest.raises(TaskError) as caught:
            place_model(model, CPU, group, "full")
        return str(caught.value)

    for text in on_ranks(work):
        assert "cannot split the parameter scale" in text
        assert "shape (1,)" in text


def test_blocks_that_share_a_parameter_with_others_stay_together() -> None:
    net = make_net()
    assert shardable_blocks(net) == list(net.blocks)
    net.blocks[0].inner.weight = net.blocks[2].inner.weight  # type: ignore[union-attr]
    assert shardable_blocks(net) == [net.blocks[1]]


def test_one_worker_has_nothing_to_shard() -> None:
    model = place_model(make_net(), CPU, RankGroup(), "full")
    assert not is_sharded(model)
    state = model.state_dict()
    assert whole_tensors(state, RankGroup()) == state
