"""Optimizer shards: each worker of a trial keeps the optimizer's state of a part of the parameters.

This is stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054). torch's `ZeroRedundancyOptimizer` builds
the optimizer itself, from a class, while a task returns one that is built; and its checkpoints are those of
one number of workers. Here any optimizer that a task builds keeps only the parameters that this worker owns,
and a checkpoint is the one that a single worker would write.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from tune_easytrain.errors import TaskError
from tune_easytrain.rank_group import RankGroup, buckets, exchange_as_one
from tune_easytrain.settings import Sharding

_NAMES = "param_names"
"""The key of a parameter group with a name for each parameter, where the optimizer was given names."""


def assign_owners(num_bytes: Sequence[int], num_workers: int) -> tuple[int, ...]:
    """Return for each parameter the rank that owns it.

    The largest come first, each to the rank that owns the fewest bytes so far (Graham 1969), so that no rank
    owns more than an even share and one more parameter. The same on every rank.

    >>> assign_owners([10, 70, 40, 30], 2)
    (0, 0, 1, 1)
    """
    loads = [0] * num_workers
    owners = [0] * len(num_bytes)
    for index in sorted(range(len(num_bytes)), key=lambda index: -num_bytes[index]):
        owner = loads.index(min(loads))
        owners[index] = owner
        loads[owner] += num_bytes[index]
    return tuple(owners)


class OptimizerShards:
    """An optimizer that one rank of several steps for the parameters it owns, and their exchange.

    Making it takes what other ranks own out of the optimizer's groups, and its state. The groups themselves
    stay, perhaps empty: schedulers and learning rates go on as they are. With one worker nothing changes.
    Every rank has to have the gradients of all parameters.

    Attributes:
        parameters: those of all ranks, in the optimizer's order.
    """

    def __init__(self, optimizer: Optimizer, *, rank: int, num_workers: int) -> None:
        """`rank` is this worker's number among `num_workers`.

        Raises TaskError for an optimizer that cannot step for some of its parameters alone.
        """
        if num_workers > 1 and isinstance(optimizer, LBFGS):
            raise TaskError(
                "LBFGS computes with all parameters at once; remove memory.sharding, or use another optimizer"
            )
        self._optimizer = optimizer
        self._rank, self._num_workers = rank, num_workers
        self.parameters: list[nn.Parameter] = [p for g in optimizer.param_groups for p in g["params"]]
        self._owners = owners_of(optimizer, num_workers)
        self._group_sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._group_names = [group.get(_NAMES) for group in optimizer.param_groups]
        if num_workers > 1:
            self._leave_own()

    @property
    def _own(self) -> list[int]:
        """The numbers of the parameters this rank owns, in the optimizer's order."""
        return [number for number, owner in enumerate(self._owners) if owner == self._rank]

    def _numbers(self) -> list[range]:
        """Return each group's numbers of parameters."""
        ends = [sum(self._group_sizes[: index + 1]) for index in range(len(self._group_sizes))]
        return [range(end - size, end) for end, size in zip(ends, self._group_sizes, strict=True)]

    def _leave_own(self) -> None:
        for numbers, group in zip(self._numbers(), self._optimizer.param_groups, strict=True):
            own = [number for number in numbers if self._owners[number] == self._rank]
            group["params"] = [self.parameters[number] for number in own]
            if group.get(_NAMES) is not None:
                group[_NAMES] = [group[_NAMES][number - numbers.start] for number in own]
        for parameter, owner in zip(self.parameters, self._owners, strict=True):
            if owner != self._rank:
                self._optimizer.state.pop(parameter, None)  # some make all state when they are built

    def require_agreement(self, model: nn.Module, ranks: RankGroup) -> None:
        """Raise TaskError unless the optimizer has the same parameters in the same order on every rank."""
        if self._num_workers == 1:
            return
        places = {id(parameter): place for place, parameter in enumerate(model.parameters())}
        order = [(places.get(id(p)), tuple(p.shape), str(p.dtype)) for p in self.parameters]
        code = float(zlib.crc32(repr((order, self._owners)).encode()))
        highest, lowest = ranks.largest([code, -code])
        if highest != -lowest:
            raise TaskError(
                "the task's optimizer lists other parameters, or in another order, on each worker, which "
                "memory.sharding: optimizer cannot split; build its groups from lists, not from sets"
            )

    @torch.no_grad()
    def share_parameters(self, broadcast: Callable[[Tensor, int], object]) -> None:
        """Give every rank the parameters as their owners have stepped them.

        `broadcast` is called with a tensor and the rank that all others get its values from.
        """
        if self._num_workers == 1:
            return
        for owner in range(self._num_workers):
            stepped = [
                parameter.detach()
                for parameter, its_owner in zip(self.parameters, self._owners, strict=True)
                if its_owner == owner and parameter.requires_grad
            ]
            for bucket in buckets(stepped):
                exchange_as_one(bucket, lambda tensor, owner=owner: broadcast(tensor, owner))  # type: ignore[misc]

    def state_dict(self, ranks: RankGroup) -> dict[str, Any]:
        """Return on rank 0 the state of the optimizer as if it had all parameters; every rank calls it.

        What comes from other ranks is on the CPU. On the others it is incomplete.
        """
        if self._num_workers == 1:
            return self._optimizer.state_dict()
        own = self._optimizer.state_dict()
        numbers_of_own = self._own
        states = {numbers_of_own[index]: state for index, state in own["state"].items()}
        for owner in range(1, self._num_workers):
            states |= ranks.bring_to_first(states, owner) or {}
        groups = []
        parts = zip(own["param_groups"], self._numbers(), self._group_names, strict=True)
        for group, numbers, names in parts:
            whole = {**group, "params": list(numbers)}
            groups.append(whole if names is None else {**whole, _NAMES: names})
        return {"state": dict(sorted(states.items())), "param_groups": groups}

    def load_state_dict(self, whole: Mapping[str, Any]) -> None:
        """Take of a state of all parameters what this rank owns."""
        if self._num_workers == 1:
            self._optimizer.load_state_dict(dict(whole))
            return
        sizes = [len(group["params"]) for group in whole["param_groups"]]
        if sizes != self._group_sizes:
            raise ValueError(f"the checkpoint's optimizer has groups of {sizes}, not {self._group_sizes}")
        own = {number: index for index, number in enumerate(self._own)}
        groups = []
        for group, numbers in zip(whole["param_groups"], self._numbers(), strict=True):
            kept = [number for number in numbers if self._owners[number] == self._rank]
            part = {**group, "params": [own[number] for number in kept]}
            if group.get(_NAMES) is not None:
                part[_NAMES] = [group[_NAMES][number - numbers.start] for number in kept]
            groups.append(part)
        states = {own[number]: state for number, state in whole["state"].items() if number in own}
        self._optimizer.load_state_dict({**whole, "state": states, "param_groups": groups})


def shard_optimizer(optimizer: Optimizer, sharding: Sharding, rank: int, num_workers: int) -> OptimizerShards:
    """Return a rank's part of an optimizer: all of it, unless `sharding` has the ranks share it out."""
    if sharding != "optimizer":
        rank, num_workers = 0, 1
    return OptimizerShards(optimizer, rank=rank, num_workers=num_workers)


def owners_of(optimizer: Optimizer, num_workers: int) -> tuple[int, ...]:
    """Return the owner of each of an optimizer's parameters, in its order; frozen ones count as empty."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return assign_owners([_state_bytes(parameter) for parameter in parameters], num_workers)


def heaviest_rank(optimizer: Optimizer, num_workers: int) -> int:
    """Return the rank whose parameters take the most bytes: the one that needs the most memory."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    loads = [0] * num_workers
    for parameter, owner in zip(parameters, owners_of(optimizer, num_workers), strict=True):
        loads[owner] += _state_bytes(parameter)
    return loads.index(max(loads))


def _state_bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size() if parameter.requires_grad else 0
