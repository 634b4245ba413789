"""A timeline of allocations and frees: recorded from `meta` tensors, and two of them joined into lines."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from tune_easytrain.kernel_scratch import Scratch
from tune_easytrain.known_values import KnownValues
from tune_easytrain.memory_estimate import BoundedMoment, Line, PhaseEstimate
from tune_easytrain.meta_operations import MetaOperations

_BLOCK_BYTES = 512
"""CUDA's caching allocator rounds every allocation up to a multiple of this."""

_aten = torch.ops.aten


class UnknownValueError(Exception):
    """A task went on according to numbers that only the device will know."""


@dataclass(slots=True)
class Timeline:
    """What happened to memory while one phase ran, in order.

    Attributes:
        start_bytes: in use when the phase began.
        changes: bytes of each allocation, negative for each free, or what a kernel takes while it runs.
        num_flops: floating-point operations of matrix products, convolutions and attention.
    """

    start_bytes: int
    changes: list[int | Scratch] = field(default_factory=list)
    num_flops: int = 0


class MemoryRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of all `meta` tensors made while it is active, and notes when each comes and goes.

    A storage is counted once, whatever views of it there are, and ends with its last tensor. Numbers are read
    off tensors where they are known (see `KnownValues`).
    """

    def __init__(self, kernel_scratch: Callable[[Any, Sequence[Any], Any], Scratch | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernel_scratch = kernel_scratch
        self._known = KnownValues()
        self._operations = MetaOperations()
        self._live: dict[int, int] = {}
        self._live_bytes = 0
        self._timeline: Timeline | None = None
        self._assumed: float | None = None

    @contextmanager
    def recording(self) -> Iterator[Timeline]:
        """Record one phase."""
        self._timeline = timeline = Timeline(self._live_bytes)
        try:
            yield timeline
        finally:
            self._timeline = None

    @contextmanager
    def assuming(self, number: float) -> Iterator[None]:
        """Take `number` for whatever is read off a tensor that is not known, inside the block."""
        self._assumed = number
        try:
            yield
        finally:
            self._assumed = None

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is counted already or lives on the host."""
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        num_bytes = storage.nbytes()
        self._live[key] = num_bytes
        self._change(num_bytes)
        weakref.finalize(storage, self._freed, key)

    def forget(self, tensor: Tensor) -> None:
        """Count the storage of a tensor no more, nor any view of it."""
        key = tensor.untyped_storage()._cdata
        self._change(-self._live.get(key, 0))
        self._live[key] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        kwargs = kwargs or {}
        if func in (_aten._local_scalar_dense.default, _aten.equal.default):
            return self._read(func, args)
        if func is _aten._to_copy.default and _leaves_the_device(args, kwargs):
            return self._to_host(args[0], kwargs)
        try:
            result = self._operations.run(func, args, kwargs)
        except NotImplementedError as error:  # the shape of the result depends on values, or there is none
            result = self._by_values(func, args, kwargs)
            if result is None and func._schema.returns:
                raise UnknownValueError(f"torch cannot tell what {func} gives without its values") from error
        else:
            self._known.follow(func, args, kwargs, result)
        if isinstance(result, Tensor):
            self.track(result)
        else:
            for tensor in tree_iter(result):
                if isinstance(tensor, Tensor):
                    self.track(tensor)
        if self._timeline is not None:
            self._timeline.num_flops += count_flops(func, args, kwargs, result)
            scratch = self._kernel_scratch(func, args, result)
            if scratch is not None and scratch.num_bytes:
                self._timeline.changes.append(scratch)
        return result

    def _by_values(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        values = self._known.compute(func, args, kwargs)
        if values is not None:
            result = tree_map(lambda value: value.to("meta") if isinstance(value, Tensor) else value, values)
            for tensor, value in zip(tree_iter(result), tree_iter(values), strict=True):
                self._known.learn(tensor, value)
            return result
        positions = self._known.with_positions(args) if func is _aten.index.Tensor else None
        return None if positions is None else func(*positions)

    def _read(self, func: Any, args: Sequence[Any]) -> Any:
        value = self._known.compute(func, args, {})
        if value is not None:
            return value
        if self._assumed is not None:
            return self._assumed
        raise UnknownValueError("what it does next hangs on a number that only the device will know")

    def _to_host(self, tensor: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        values = self._known.of(tensor)
        source = tensor if values is None else values
        dtype = kwargs.get("dtype")
        return source.clone() if dtype is None else source.to(dtype, copy=True)

    def _freed(self, key: int) -> None:
        self._change(-self._live.pop(key))

    def _change(self, num_bytes: int) -> None:
        self._live_bytes += num_bytes
        if self._timeline is not None and num_bytes:
            self._timeline.changes.append(num_bytes)


def _leaves_the_device(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu" and args[0].device.type == "meta"


def join_timelines(
    name: str, small: Timeline, large: Timeline, sizes: tuple[int, int], fixed_bytes: int
) -> PhaseEstimate | None:
    """Return a phase's peak as lines in the micro-batch size, from its timelines at two sizes.

    Every change is linear in the size, so that the peak at any size is the maximum over time of lines. The
    peak itself is not linear: two peaks would under-predict a third. None where the two timelines are not of
    the same operations. `fixed_bytes` is in use all the time and belongs to no tensor.
    """
    if len(small.changes) != len(large.changes):
        return None
    start = _line(small.start_bytes, large.start_bytes, sizes)
    fixed, slope = start.fixed_bytes, start.bytes_per_sample
    lines, bounded = [start], []
    for at_small, at_large in zip(small.changes, large.changes, strict=True):
        if isinstance(at_small, Scratch) and isinstance(at_large, Scratch):
            scratch = _line(at_small.num_bytes, at_large.num_bytes, sizes)
            live = Line(fixed + fixed_bytes, slope)
            bounded.append(BoundedMoment(live, scratch, at_small.most_bytes))
        elif isinstance(at_small, int) and isinstance(at_large, int) and (at_small < 0) == (at_large < 0):
            change = _line(at_small, at_large, sizes)
            fixed += change.fixed_bytes
            slope += change.bytes_per_sample
            if at_small > 0:
                lines.append(Line(fixed, slope))
        else:
            return None
    return PhaseEstimate.build(name, lines, bounded, fixed_bytes)


def join_peaks(
    name: str, small: Timeline, large: Timeline, sizes: tuple[int, int], fixed_bytes: int
) -> PhaseEstimate:
    """Return a phase's peak as a straight line between two sizes, where their operations differ."""
    (tensors_small, total_small), (tensors_large, total_large) = _peaks(small), _peaks(large)
    live = _line(total_small, total_large, sizes)
    moment = BoundedMoment(Line(live.fixed_bytes + fixed_bytes, live.bytes_per_sample), Line(0, 0), 0)
    return PhaseEstimate.build(name, [_line(tensors_small, tensors_large, sizes)], [moment], fixed_bytes)


def _peaks(timeline: Timeline) -> tuple[int, int]:
    """Return a timeline's peak of tensors alone, and with what kernels take, in bytes."""
    live = tensors = total = timeline.start_bytes
    for change in timeline.changes:
        if isinstance(change, Scratch):
            total = max(total, live + int(min(change.num_bytes, change.most_bytes)))
        else:
            live += change
            tensors = max(tensors, live)
    return tensors, max(tensors, total)


def _line(at_small: int, at_large: int, sizes: tuple[int, int]) -> Line:
    """Return the line through two sizes' bytes; what is no whole number of blocks may end in one more."""
    small, large = sizes
    slope = (at_large - at_small) / (large - small)
    fixed = at_small - slope * small
    if at_small % _BLOCK_BYTES or at_large % _BLOCK_BYTES:
        fixed += _BLOCK_BYTES if at_small > 0 else -_BLOCK_BYTES
    return Line(fixed, slope)


def count_flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the floating-point operations of an operation that torch counts them of, 0 of any other."""
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        return 0
    if "scaled_dot_product" in str(func):
        args = _with_heads_of_query(args)
    num_flops: int = count(*args, **kwargs, out_val=result)
    return num_flops


def _with_heads_of_query(args: Sequence[Any]) -> list[Any]:
    """Return the arguments of an attention with as many heads of keys and values as the query has.

    Each computes with all of them, but torch 2.11 does not count where heads share keys.
    """
    shaped = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 4]
    num_heads = max((tensor.shape[1] for tensor in shaped), default=0)
    return [
        arg[:, :1].expand(-1, num_heads, -1, -1) if any(arg is tensor for tensor in shaped) else arg
        for arg in args
    ]
