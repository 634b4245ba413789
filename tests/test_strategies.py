from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
import torchvision
from torch import Tensor, nn
from toys import DEEP_WIDTH, build_deep_task

from tune_easytrain import Task, UnknownNameError
from tune_easytrain.estimate import estimate_task
from tune_easytrain.strategies import with_strategies
from tune_easytrain.worst_case import with_known_worst_case


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def task_of(model: Any, *shape: int) -> Task:
    def batch(num_samples: int) -> tuple[Tensor, Tensor]:
        return torch.randn(num_samples, *shape), torch.zeros(num_samples, dtype=torch.long)

    return nets.make_task(model, batch, loss=classify, predict=lambda net, batch: (net(batch[0]), batch[1]))


def test_a_task_without_strategies_stays_as_it_is() -> None:
    task = task_of(nets.conv_net, 3, 16, 16)
    assert with_strategies(task) is task


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nets.conv_net, (3, 16, 16)),
        (lambda: torchvision.models.video.r3d_18(num_classes=10), (3, 4, 16, 16)),
    ],
)
def test_with_channels_last_tensors_are_laid_out_so_and_values_stay(
    model: Any, shape: tuple[int, ...]
) -> None:
    plain = task_of(model, *shape)
    task = with_strategies(plain, channels_last=True)
    torch.manual_seed(0)
    expected_net = plain.model().double().eval()
    torch.manual_seed(0)
    net = task.model().double().eval()
    memory_format: Any = torch.channels_last if len(shape) == 3 else torch.channels_last_3d
    kernels = [p for p in net.parameters() if p.dim() == len(shape) + 1]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=memory_format) for kernel in kernels)
    seen: list[bool] = []

    def look(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0].is_contiguous(memory_format=memory_format))

    next(m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))).register_forward_pre_hook(look)
    assert task.worst_case is not None
    inputs, labels = task.worst_case(2)
    batch = (inputs.double(), labels)
    torch.testing.assert_close(task.loss(net, batch), plain.loss(expected_net, batch))
    assert seen == [True]
    assert task.predict is not None
    torch.testing.assert_close(task.predict(net, batch)[0], expected_net(batch[0]))


def test_the_estimate_follows_checkpointing_and_counts_what_is_computed_twice() -> None:
    plain = estimate_task(with_known_worst_case(build_deep_task({})))
    half, full = (
        estimate_task(with_strategies(with_known_worst_case(build_deep_task({})), checkpointing=wish))
        for wish in (0.5, "blocks")
    )
    kept = [estimate.tensor_bytes(4096) / (4096 * 4 * DEEP_WIDTH) for estimate in (plain, half, full)]
    # A block keeps its input and what three layers give; checkpointed its input, and one at a time the rest.
    assert 7 * 3 <= kept[0] - kept[2] <= 8 * 3
    assert kept[1] == pytest.approx((kept[0] + kept[2]) / 2, abs=2)
    # Forward, and twice that backward, but for the first layer, whose input needs no gradient.
    forward = 8 * 3 * 2 * DEEP_WIDTH**2
    assert plain.flops_per_sample == pytest.approx(3 * forward, rel=0.02)
    assert full.flops_per_sample - plain.flops_per_sample == pytest.approx(forward, rel=0.05)
    assert half.flops_per_sample - plain.flops_per_sample == pytest.approx(forward / 2, rel=0.05)


def test_the_flops_of_a_perceptron() -> None:
    estimate = estimate_task(task_of(lambda: nets.perceptron(8, 16, 4), 8))
    forward, of_weights, of_inputs = 2 * (8 * 16 + 16 * 4), 2 * (8 * 16 + 16 * 4), 2 * 16 * 4
    assert estimate.flops_per_sample == forward + of_weights + of_inputs


def test_a_model_without_such_blocks_is_refused_when_it_is_built() -> None:
    task = with_strategies(task_of(nets.conv_net, 3, 16, 16), checkpointing=["Bottleneck"])
    with pytest.raises(UnknownNameError, match=r"memory\.checkpointing: unknown name 'Bottleneck'"):
        task.model()
