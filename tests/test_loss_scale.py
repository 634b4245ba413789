from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from tune_easytrain.errors import NonFiniteLossError
from tune_easytrain.loss_scale import LossScale


def weight_with(*gradient: float) -> nn.Parameter:
    weight = nn.Parameter(torch.zeros(len(gradient)))
    weight.grad = torch.tensor(gradient)
    return weight


@pytest.mark.parametrize(("microbatch_weight", "scale"), [(1, 2**16), (2, 2**15), (3, 2**14), (256, 2**8)])
def test_the_first_scale_leaves_room_for_the_weight_of_a_micro_batch(
    microbatch_weight: int, scale: float
) -> None:
    assert LossScale("fp16", microbatch_weight).scale == scale


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_have_no_scale(precision: Literal["fp32", "bf16"]) -> None:
    loss_scale = LossScale(precision, 64)
    weight = nn.Parameter(torch.tensor([3.0]))
    loss_scale.backward((weight * 2).sum())
    assert weight.grad is not None
    assert (loss_scale.is_on, loss_scale.scale, weight.grad.item()) == (False, 1.0, 2.0)


def test_gradients_below_the_range_of_fp16_come_out_right() -> None:
    def gradient(loss_scale: LossScale | None) -> float:
        weight = nn.Parameter(torch.tensor([1.0]))
        loss = weight.half().float().sum() * 1e-9  # what comes back through the cast is in fp16
        if loss_scale is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            loss_scale.backward(loss)
            assert loss_scale.unscale([weight])
        assert weight.grad is not None
        return weight.grad.item()

    assert gradient(None) == 0.0
    assert gradient(LossScale("fp16", 1)) == pytest.approx(1e-9, rel=1e-3)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_halves_the_scale_and_skips_the_step(bad: float) -> None:
    loss_scale = LossScale("fp16", 1)
    assert not loss_scale.unscale([weight_with(1.0), weight_with(1.0, bad)])
    assert (loss_scale.scale, loss_scale.num_skipped_steps) == (2**15, 1)
    assert loss_scale.unscale([weight_with(1.0)])
    assert (loss_scale.scale, loss_scale.num_skipped_steps) == (2**15, 1)


def test_large_gradients_of_many_parameters_are_finite_each() -> None:
    assert LossScale("fp16", 2**16).unscale([weight_with(3e38)] * 2)


def test_the_scale_grows_after_steps_without_overflow_also_after_a_resume() -> None:
    loss_scale = LossScale("fp16", 1)
    for _ in range(1999):
        assert loss_scale.unscale([weight_with(1.0)])
    assert loss_scale.scale == 2**16
    resumed = LossScale("fp16", 1)
    resumed.restore(loss_scale.state())
    for each in (loss_scale, resumed):
        assert each.unscale([weight_with(1.0)])
        assert each.scale == 2**17


def test_what_is_never_finite_ends_training() -> None:
    loss_scale = LossScale("fp16", 1)
    for _ in range(40):
        assert not loss_scale.unscale([weight_with(float("nan"))])
    with pytest.raises(NonFiniteLossError, match=r"loss scale of 5\.96046e-08 either; use train\.precision"):
        loss_scale.unscale([weight_with(float("nan"))])


def test_a_parameter_without_a_gradient_is_passed_over() -> None:
    assert LossScale("fp16", 1).unscale([nn.Parameter(torch.zeros(1)), weight_with(1.0)])
