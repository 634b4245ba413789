"""`RankGroup`: the workers that train one trial together, seen from one of them.

Gradients are summed locally over a window and then reduced once, so that a rank may have other micro-batches
than the others, none at all, or a window that it had to compute again, and nobody waits inside a window.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.utils._pytree import tree_map

from tune_easytrain.accumulate import AccumulationRecord
from tune_easytrain.errors import NothingToLearnError
from tune_easytrain.protocol import WorkerPlace

BUCKET_BYTES = 64 * 2**20
"""Gradients are copied together up to this size, so that one reduction carries many of them."""

LOOPBACK = "127.0.0.1"

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

_LARGEST_PICKLED = 64  # numbers; a tensor of more travels as a tensor

_TIMEOUT = timedelta(hours=24)  # a rank that is gone ends the others; one that is slow must not


class RankGroup:
    """This worker's rank, how many there are, and what they exchange.

    With one worker nothing is exchanged and no process group exists.

    Attributes:
        rank: this worker's number, from 0.
        num_workers: how many there are.
    """

    def __init__(self, rank: int = 0, num_workers: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.num_workers = rank, num_workers
        self._device = torch.device("cpu") if device is None else device

    @classmethod
    def join(cls, place: WorkerPlace, device: torch.device, tell_port: Callable[[int], None]) -> RankGroup:
        """Meet the other workers; NCCL carries what is on GPUs, gloo what is on CPUs.

        Rank 0 opens the store, on a port that the system chooses, and gives it to `tell_port`. It listens on
        its own address alone, and where that is loopback the workers' other connections stay there too.
        """
        if place.host == LOOPBACK:
            for name in _INTERFACE_VARIABLES:
                os.environ.setdefault(name, "lo")
        store = _open_store(place)
        if place.port is None:
            tell_port(store.port)
        if device.index is not None:  # without, it is the only GPU that this process sees
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.num_workers,
            timeout=_TIMEOUT,
        )
        return cls(place.rank, place.num_workers, device)

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that reports and saves."""
        return self.rank == 0

    def leave(self) -> None:
        """End the process group, if there is one."""
        if self.num_workers > 1:
            dist.destroy_process_group()

    def share_state(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers that rank 0 has."""
        self._broadcast([*module.parameters(), *module.buffers()])

    def share_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers (running statistics) that rank 0 has."""
        self._broadcast(list(module.buffers()))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return each number summed over all ranks."""
        if self.num_workers == 1:
            return list(values)
        totals = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(totals)
        summed: list[float] = totals.tolist()
        return summed

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return of each number the largest that a rank has."""
        if self.num_workers == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        found: list[float] = most.tolist()
        return found

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Give every rank the values that rank `source` has in a contiguous tensor."""
        if self.num_workers > 1:
            dist.broadcast(tensor, src=source)

    def bring_to_first(self, tree: Any, source: int) -> Any:
        """Return on rank 0 what `tree` is on rank `source`; on the others None.

        Every rank calls it. Tensors cross one at a time and come to the CPU at once, so that no device holds
        more of them than the largest.

        Args:
            tree: dicts, lists and tuples of tensors and picklable values; looked at on rank `source` alone.
            source: the rank that has it.
        """
        large: list[Tensor] = []

        def described(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            if leaf.device.type != self._device.type or leaf.numel() <= _LARGEST_PICKLED:
                return leaf.detach().cpu().clone()  # a view would be pickled with all it is a view of
            large.append(leaf)
            return _Described(leaf.shape, leaf.dtype)

        def received(leaf: Any) -> Any:
            if not isinstance(leaf, _Described):
                return leaf
            if self.rank == source:
                tensor = large.pop(0).detach().contiguous()
            else:
                tensor = torch.empty(leaf.shape, dtype=leaf.dtype, device=self._device)
            dist.broadcast(tensor.view(-1).view(torch.uint8), src=source)
            return tensor.cpu() if self.is_first else None

        outline = [tree_map(described, tree) if self.rank == source else None]
        dist.broadcast_object_list(outline, src=source, device=self._device)
        found = tree_map(received, outline[0])
        return found if self.is_first else None

    def average_gradients(
        self, parameters: Iterable[nn.Parameter], record: AccumulationRecord | None
    ) -> AccumulationRecord:
        """Leave in every `.grad` the gradient of the mean loss over the whole window, on every rank.

        Args:
            parameters: the model's, with the gradient of this rank's own mean loss.
            record: what this rank's share of the window was; None where it had no sample.

        Returns the record of the whole window. A parameter that no rank has a gradient of keeps none.
        """
        if self.num_workers == 1:
            assert record is not None
            return record
        every = [parameter for parameter in parameters if parameter.requires_grad]
        has_gradient = [0.0 if record is None or p.grad is None else 1.0 for p in every]
        own = (0.0, 0.0, 0.0) if record is None else (record.loss, record.weight, float(record.num_samples))
        loss_sum, weight, num_samples, *counts = self.sum([own[0] * own[1], own[1], own[2], *has_gradient])
        if not weight:
            raise NothingToLearnError("a window in which no sample counts has no gradient")
        share = own[1] / weight
        gradients = []
        for parameter, own_count, count in zip(every, has_gradient, counts, strict=True):
            if not count:
                parameter.grad = None
                continue
            if not own_count or parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if gradients:
            torch._foreach_mul_(gradients, share)
        for bucket in buckets(gradients):
            exchange_as_one(bucket, dist.all_reduce)
        record = record or AccumulationRecord(0.0, 0, 0.0, ())
        return replace(record, loss=loss_sum / weight, weight=weight, num_samples=round(num_samples))

    def _broadcast(self, tensors: list[Tensor]) -> None:
        if self.num_workers == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                if tensor.device.type == self._device.type:
                    dist.broadcast(tensor.data, src=0)
                    continue
                sent = tensor.to(self._device)  # NCCL reads no host memory
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)


def _open_store(place: WorkerPlace) -> TCPStore:
    """Return the store of a trial's workers; rank 0 opens it."""
    if place.port is not None:
        return TCPStore(place.host, place.port, place.num_workers, is_master=False, timeout=_TIMEOUT)
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    # Left to itself the store would listen on all addresses, and whoever reaches it can lead the workers on.
    listening = socket.create_server((place.host, 0), family=family)
    return TCPStore(
        place.host,
        listening.getsockname()[1],
        place.num_workers,
        is_master=True,
        wait_for_workers=False,
        timeout=_TIMEOUT,
        master_listen_fd=listening.detach(),
    )


def buckets(tensors: Sequence[Tensor], most_bytes: int = BUCKET_BYTES) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of one format, each of at most `most_bytes` or of a single tensor."""
    open_buckets: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        bucket, filled = open_buckets.get(tensor.dtype, ([], 0))
        if bucket and filled + num_bytes > most_bytes:
            yield bucket
            bucket, filled = [], 0
        bucket.append(tensor)
        open_buckets[tensor.dtype] = (bucket, filled + num_bytes)
    for bucket, _ in open_buckets.values():
        yield bucket


def exchange_as_one(tensors: list[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Call `exchange` with one contiguous tensor of all the values, and put what it leaves there back."""
    if len(tensors) == 1 and tensors[0].is_contiguous():
        exchange(tensors[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    exchange(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def take_buffers(tensors: Sequence[Tensor]) -> None:
    """Take the memory that exchanging tensors with other ranks takes, and give it back; nothing is sent."""
    for bucket in buckets(tensors):
        exchange_as_one(bucket, lambda tensor: None)


@dataclass(frozen=True, slots=True)
class _Described:
    """Stands for a tensor that travels by itself."""

    shape: torch.Size
    dtype: torch.dtype
