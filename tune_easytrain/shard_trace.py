"""A sharded model in a trace: one worker's share of it, and the buffers that `fully_shard` takes, on `meta`.

Between passes every parameter and gradient is this worker's part. In a pass the blocks are put together and
taken apart as FSDP2 does it: while a block computes its parameters are there as a whole, and beside them what
was gathered for them; in the backward pass those of the next block are gathered ahead, and one buffer of
whole gradients stays until the next block's are reduced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

from tune_easytrain.sharded_model import shardable_blocks
from tune_easytrain.timeline import MemoryRecorder


class ShardTrace:
    """Has a model on `meta` keep one worker's part of each parameter, and put them together in passes."""

    def __init__(self, model: nn.Module, num_workers: int, recorder: MemoryRecorder) -> None:
        """The whole parameters are not counted by `recorder` any more; what each pass takes of them is."""
        self._num_workers = num_workers
        self._whole = {parameter: parameter.data for parameter in model.parameters()}
        self._parts: dict[nn.Parameter, Tensor] = {}
        for parameter, whole in self._whole.items():
            recorder.forget(whole)
            rows = -(-whole.shape[0] // num_workers) if whole.dim() else 1
            self._parts[parameter] = torch.empty_like(whole[:1].expand(rows, *whole.shape[1:]))
            parameter.data = self._parts[parameter]
        self._groups: list[_Group] = []
        rest = dict.fromkeys(model.parameters())
        for module in [*shardable_blocks(model), model]:
            own = [parameter for parameter in module.parameters() if parameter in rest]
            for parameter in own:
                del rest[parameter]
            self._groups.append(_Group(module, own, self))
        self.order: list[_Group] = []
        self.gathered: Tensor | None = None
        """What was gathered for the block before, which FSDP2 keeps until the next block's is copied."""
        self.reduced: Tensor | None = None
        """The gradients that the block before has sent off to be reduced."""

    def num_bytes(self, parameters: list[nn.Parameter]) -> int:
        """Return the bytes of whole parameters, each padded to a multiple of the workers."""
        return self._num_workers * sum(
            self._parts[parameter].numel() * parameter.element_size() for parameter in parameters
        )

    def take(self, num_bytes: int) -> Tensor:
        """Take a buffer, until nobody holds it."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def reduce(self, gradients: list[Tensor], num_bytes: int) -> None:
        """Take what reducing whole gradients takes; they are freed once they are copied."""
        self.reduced = None
        self.reduced = self.take(num_bytes)
        gradients.clear()
        self.take(num_bytes // self._num_workers)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Let parameters have their whole shapes, for passes through the model."""
        gradients = {parameter: parameter.grad for parameter in self._whole}
        for parameter, whole in self._whole.items():
            parameter.grad, parameter.data = None, whole
        try:
            yield
        finally:
            for parameter, part in self._parts.items():
                parameter.grad, parameter.data = None, part
                parameter.grad = gradients[parameter]
            self.end_pass()

    def end_backward(self) -> None:
        """Reduce what is left: of blocks whose inputs have no gradient."""
        for group in self._groups:
            group.after_backward()
        self.end_pass()

    def end_pass(self) -> None:
        """Give back what is kept between blocks."""
        self.gathered = self.reduced = None
        self.order.clear()
        for group in self._groups:
            group.end_pass()


class _Group:
    """The parameters that are put together at a time: a block's, or those outside of blocks."""

    def __init__(self, module: nn.Module, parameters: list[nn.Parameter], trace: ShardTrace) -> None:
        self._parameters, self._trace = parameters, trace
        self._num_bytes = trace.num_bytes(parameters)
        self._gathered: Tensor | None = None
        self._whole: Tensor | None = None
        self._is_in_backward = False
        module.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True)
        module.register_forward_hook(self._after_forward)

    def gather(self) -> None:
        """Begin to put the parameters together."""
        if self._gathered is None and self._whole is None and self._num_bytes:
            self._gathered = self._trace.take(self._num_bytes)

    def _copy_gathered(self, *, in_forward: bool) -> None:
        if self._gathered is None:
            return
        if in_forward:
            self._trace.gathered = None
        self._whole = self._trace.take(self._num_bytes)
        if in_forward:
            self._trace.gathered = self._gathered
        self._gathered = None

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.gather()
        self._copy_gathered(in_forward=True)
        if not torch.is_grad_enabled():
            return args, kwargs
        leaves, spec = tree_flatten((args, kwargs))
        places = [
            place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if places:
            passed = _CallAfterBackward.apply(self.after_backward, *(leaves[place] for place in places))
            for place, tensor in zip(places, passed, strict=True):
                leaves[place] = tensor
        return tree_unflatten(leaves, spec)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._whole = None
        if self is self._trace_root:
            self._trace.gathered = None
        if torch.is_grad_enabled():
            self._trace.order.append(self)
            for tensor in tree_iter(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._before_backward())  # type: ignore[no-untyped-call]

    @property
    def _trace_root(self) -> _Group:
        return self._trace._groups[-1]

    def _before_backward(self) -> None:
        if self._is_in_backward:
            return
        self._is_in_backward = True
        self.gather()
        self._copy_gathered(in_forward=False)
        place = self._trace.order.index(self) if self in self._trace.order else 0
        if place:
            self._trace.order[place - 1].gather()

    def after_backward(self) -> None:
        """Send the gradients off to be reduced, and take the parameters apart."""
        self._is_in_backward = False
        reached = [parameter for parameter in self._parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in reached if parameter.grad is not None]
        for parameter in reached:
            parameter.grad = None
        self._whole = None
        if reached:
            self._trace.reduce(gradients, self._trace.num_bytes(reached))

    def end_pass(self) -> None:
        """Give back what a pass that was not followed by a backward pass has left."""
        self._gathered = self._whole = None
        self._is_in_backward = False


class _CallAfterBackward(torch.autograd.Function):
    """Passes tensors on, and calls a function when all of their gradients are there."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors as they are."""
        ctx.call = call
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Call the function, and return the gradients as they are."""
        ctx.call()
        return None, *gradients
