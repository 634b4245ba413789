"""Sharded models: each worker of a trial keeps a part of every parameter, its gradient and optimizer state.

This is stage 3 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), by torch's `fully_shard` (FSDP2, after
Zhao et al. 2023, arXiv:2304.11277). A block of the model is put together when it computes, and taken apart
again. So workers wait for each other inside a window, and all of them make the same number of passes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils._pytree import tree_map

from tune_easytrain.accumulate import AccumulationRecord, single_number, sum_gradients
from tune_easytrain.checkpointing import find_blocks
from tune_easytrain.errors import NothingToLearnError, TaskError
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.rescue import StateSnapshot
from tune_easytrain.settings import Sharding
from tune_easytrain.task import Batch

_CALL_THE_MODEL = (
    "with memory.sharding: full a parameter is whole only while the model itself is called; have the loss "
    "call model(...), not its parts or its parameters"
)


def place_model(model: nn.Module, device: torch.device, ranks: RankGroup, sharding: Sharding) -> nn.Module:
    """Return the model on the device, with the values that rank 0 has; sharded where `sharding` is `full`.

    A model to be sharded goes to the device block by block, so that no device ever holds all of it.

    Raises TaskError for parameters that cannot be sharded.
    """
    if sharding != "full" or ranks.num_workers == 1:
        model = model.to(device)
        ranks.share_state(model)
        return model
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise TaskError(
                f"memory.sharding: full cannot split the parameter {name}, which has no dimension; give it "
                "the shape (1,), or use sharding: optimizer"
            )
        parameter.data = parameter.data.contiguous()
    ranks.share_state(model)
    assert dist.group.WORLD is not None
    mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # guarded against
    for module in [*shardable_blocks(model), model]:
        module.register_forward_hook(_guard_views)
        try:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        except (ValueError, AssertionError, NotImplementedError) as error:
            raise TaskError(f"memory.sharding: full cannot split the model: {error}") from error
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are summed, and divided by their weight later; gloo has no sum with a factor.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return model.to(device)


def _guard_views(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Have autograd refuse to change a view in place that a block returns: FSDP2 would not see it.

    It would leave the block's parameters apart in the backward pass, and the gradients wrong, in silence.
    """
    if not torch.is_grad_enabled():
        return output

    def guarded(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.requires_grad and leaf._is_view():
            return _AsItIs.apply(leaf)
        return leaf

    return tree_map(guarded, output)


class _AsItIs(torch.autograd.Function):
    """Returns a tensor as it is; autograd allows no change in place to what such a function returns."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def shardable_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks that can be put together one at a time: those that share no parameter with others."""
    blocks = find_blocks(model)
    owners: dict[int, set[int]] = {}
    inside = {id(part): number for number, block in enumerate(blocks) for part in block.modules()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(inside.get(id(module), -1))
    return [
        block for block in blocks if all(len(owners[id(parameter)]) == 1 for parameter in block.parameters())
    ]


def is_sharded(model: nn.Module) -> bool:
    """Return whether a model's parameters are split over the workers."""
    return isinstance(model, FSDPModule)


def whole_tensors(tree: Any, ranks: RankGroup) -> Any:
    """Return nested dicts and lists with whole tensors in place of sharded ones; every rank calls it.

    Those are on the CPU of rank 0, which alone keeps them. Without any the tree is returned as it is.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        tensor = leaf.full_tensor()
        return tensor.cpu() if ranks.is_first else None

    return tree_map(whole, tree)


def split_model_state(whole: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return of a model's whole state what this rank holds of it, for `load_state_dict`."""
    if not is_sharded(model):
        return dict(whole)
    own = model.state_dict()
    return {name: _split_as(value, own.get(name)) for name, value in whole.items()}


def split_optimizer_state(whole: Mapping[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Return of an optimizer's whole state what this rank holds of it, for `load_state_dict`.

    `parameters` are the optimizer's, in its order.
    """
    state = {
        number: tree_map(lambda value, number=number: _split_as(value, parameters[number]), values)
        for number, values in whole["state"].items()
    }
    return {**whole, "state": state}


def _split_as(value: Any, like: Any) -> Any:
    """Split a tensor of the shape of a sharded one as that is split; what has another shape stays whole."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
        return value
    placements = like.placements
    if value.shape != like.shape:
        placements = tuple(Replicate() for _ in placements)
    on_device = value.to(like.device)
    return distribute_tensor(on_device, like.device_mesh, placements, src_data_rank=None)


class EqualPasses:
    """Has every rank make the same number of passes, though some have fewer micro-batches or none.

    The passes that a rank lacks are made on a spare batch, and leave no trace: their loss counts for nothing,
    and random state and buffers are put back.
    """

    def __init__(self, model: nn.Module, ranks: RankGroup, spare: Callable[[], Batch]) -> None:
        """`spare` reads a small batch with a finite loss, on the device."""
        self._model, self._ranks, self._spare = model, ranks, spare
        self._start = StateSnapshot(model)

    def accumulate(
        self,
        loss: Callable[[nn.Module, Batch], Tensor],
        microbatches: Iterable[Batch],
        num_microbatches: int,
        *,
        weight: Callable[[Batch], int] | None,
        backward: Callable[[Tensor], object],
    ) -> AccumulationRecord:
        """Leave in every `.grad` this rank's part of the gradient of the mean loss over the whole window.

        As `accumulate_gradients` followed by `RankGroup.average_gradients`.

        Args:
            loss: scalar loss of one micro-batch, a mean over what `weight` counts.
            microbatches: this rank's own, of `num_microbatches`.
            num_microbatches: how many there are at most; ranks may have different numbers.
            weight, backward: as for `accumulate_gradients`.

        Returns the record of the whole window. Raises NothingToLearnError where no rank has a sample.
        """
        num_passes = round(self._ranks.largest([num_microbatches])[0])
        with _told_to_call_the_model():
            own = sum_gradients(self._model, loss, microbatches, weight=weight, backward=backward)
            self.make_up(
                num_passes - own.num_passes,
                lambda batch: backward(single_number(loss(self._model, batch)) * 0.0),
            )
        sizes = own.microbatch_sizes
        own_loss = 0.0 if own.loss is None else float(own.loss)
        loss_sum, total_weight, num_samples = self._ranks.sum([own_loss, own.weight, sum(sizes)])
        if not total_weight:
            raise NothingToLearnError("a window without a single sample has no gradient")
        gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
        if gradients:
            torch._foreach_div_(gradients, total_weight)
        return AccumulationRecord(loss_sum / total_weight, round(num_samples), total_weight, sizes)

    def make_up(self, num_passes: int, run: Callable[[Batch], object]) -> None:
        """Run so many passes on the spare batch, without a trace of them but what `run` adds up."""
        if num_passes <= 0:
            return
        self._start.take()
        try:
            batch = self._spare()
            for _ in range(num_passes):
                run(batch)
        finally:
            self._start.restore()

    def in_step(self, batches: Iterable[Batch], run_spare: Callable[[Batch], object]) -> Iterator[Batch]:
        """Yield a rank's batches, and have it run spare ones while other ranks still have theirs."""
        own = iter(batches)
        while True:
            batch = next(own, None)
            is_left = self._ranks.largest([0.0 if batch is None else 1.0])[0] > 0
            if not is_left:
                return
            if batch is None:
                self.make_up(1, run_spare)
            else:
                yield batch
                del batch


@contextmanager
def _told_to_call_the_model() -> Iterator[None]:
    """Add what to do to the error of a loss that uses a sharded model's parts."""
    try:
        yield
    except Exception as error:
        if "DTensor" in str(error) or "FSDP" in str(error):
            error.add_note(_CALL_THE_MODEL)
        raise
