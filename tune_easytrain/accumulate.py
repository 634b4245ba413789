"""Gradients of one window, accumulated over micro-batches with exact weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tune_easytrain.batch import count_samples
from tune_easytrain.errors import NothingToLearnError
from tune_easytrain.task import Batch


@dataclass(frozen=True, slots=True)
class AccumulationRecord:
    """What one window was: its mean loss, samples, weight and micro-batches.

    `loss` is the mean over everything the loss averages (samples, or tokens where the task weighs by
    tokens), `weight` how many of those there were.
    """

    loss: float
    num_samples: int
    weight: float
    microbatch_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GradientSum:
    """What `sum_gradients` has added up: `loss` is the weighted sum, None where nothing had a weight."""

    loss: Tensor | None
    weight: float
    microbatch_sizes: tuple[int, ...]
    num_passes: int


def accumulate_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    microbatches: Iterable[Batch],
    *,
    weight: Callable[[Batch], int] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> AccumulationRecord:
    """Leave in every `.grad` the gradient of the mean loss over all the micro-batches together.

    Each micro-batch's loss is multiplied by its weight before backward, and the gradients are divided
    once by the weight of the whole window, as it really was: micro-batches of unequal size, a short last
    window and token-weighted losses come out as the full batch would, to rounding. Gradients present at
    entry are discarded. The iterable is read one micro-batch at a time.

    Args:
        model: the model; its parameters' gradients are the result.
        loss: scalar loss of one micro-batch, a mean over what `weight` counts.
        microbatches: batches already on the model's device; empty ones and such of weight 0 are passed over.
        weight: how many things the mean of a batch averages over; default: its samples.
        backward: called with each micro-batch's loss times its weight, in place of `Tensor.backward`: what a
            framework or a gradient scaler has for it. One that multiplies (a loss scale) must multiply all
            of a window alike; the gradients are then multiplied too.

    Raises:
        NothingToLearnError: the window holds nothing at all, or everything in it has weight 0.
        ValueError: the loss is not a single number.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> parts = [torch.ones(3, 2), torch.zeros(1, 2)]
        >>> accumulate_gradients(model, lambda m, x: m(x).mean(), parts).num_samples
        4
        >>> model.weight.grad
        tensor([[0.7500, 0.7500]])
    """
    total = sum_gradients(model, loss, microbatches, weight=weight, backward=backward)
    sizes = total.microbatch_sizes
    if total.loss is None:
        what = "everything in it has weight 0" if sum(sizes) else "it holds nothing"
        raise NothingToLearnError(f"a window of {sum(sizes)} samples has no gradient: {what}")
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, total.weight)
    return AccumulationRecord(float(total.loss) / total.weight, sum(sizes), total.weight, sizes)


def sum_gradients(
    model: nn.Module,
    loss: Callable[[nn.Module, Batch], Tensor],
    microbatches: Iterable[Batch],
    *,
    weight: Callable[[Batch], int] | None = None,
    backward: Callable[[Tensor], object] = Tensor.backward,
) -> GradientSum:
    """Leave in every `.grad` the sum of the micro-batches' gradients times their weights.

    As `accumulate_gradients`, which divides by the weight of all; a window may hold nothing here.
    """
    for parameter in model.parameters():
        parameter.grad = None
    total_loss: Tensor | None = None
    total_weight, num_passes = 0.0, 0
    sizes: list[int] = []
    for batch in microbatches:
        num_samples = count_samples(batch)
        share = float(num_samples if weight is None else weight(batch))
        sizes.append(num_samples)
        if share:
            weighted = single_number(loss(model, batch)) * share
            backward(weighted)
            # Sums stay on the device: reading each one would wait for the device after every micro-batch.
            total_loss = weighted.detach() if total_loss is None else total_loss + weighted.detach()
            total_weight += share
            num_passes += 1
        del batch  # before the next is read: two at once are more than the probe has tried
    return GradientSum(total_loss, total_weight, tuple(sizes), num_passes)


def single_number(loss: Tensor) -> Tensor:
    """Return a loss as it is; raises ValueError unless it is a tensor of one number."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        # Weights would take half precision out of its range, or out of its exact integers.
        return loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss
    found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
    raise ValueError(f"the loss has {found}; it must be a tensor of one number, the mean over the batch")
