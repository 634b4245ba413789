"""Batches in any nesting of tensors: counting, splitting and moving them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tune_easytrain.task import Batch


def count_samples(batch: Batch) -> int:
    """Return the number of samples: the length of dimension 0 of the batch's first tensor.

    Raises ValueError where the batch holds no tensor with a dimension.
    """
    for tensor in iterate_tensors(batch):
        if tensor.ndim:
            return int(tensor.shape[0])
    raise ValueError(
        f"cannot count the samples of a {type(batch).__name__} without tensors; give the task a `weight`"
    )


def iterate_tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield every tensor of the batch, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from iterate_tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from iterate_tensors(value)


def split_batch(batch: Batch, sizes: Sequence[int]) -> Iterator[Batch]:
    """Yield consecutive parts of `batch` with the given numbers of samples.

    Tensors with a dimension, and lists as long as the batch (of strings, say), are cut along dimension 0;
    everything else is repeated in every part. Raises ValueError where the sizes do not add up to the batch.
    """
    num_samples = count_samples(batch)
    if sum(sizes) != num_samples or any(size < 0 for size in sizes):
        raise ValueError(f"sizes {list(sizes)} do not add up to the batch's {num_samples} samples")
    start = 0
    for size in sizes:
        yield _cut(batch, start, start + size, num_samples)
        start += size


def _cut(value: Any, start: int, stop: int, num_samples: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim else value
    if isinstance(value, Mapping):
        return type(value)({key: _cut(item, start, stop, num_samples) for key, item in value.items()})  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        if not any(True for _ in iterate_tensors(value)) and len(value) == num_samples:
            return value[start:stop]
        return _rebuild(value, [_cut(item, start, stop, num_samples) for item in value])
    return value


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor on `device`; non-blocking from pinned memory."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with what the function makes of every tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return type(batch)({key: map_tensors(value, function) for key, value in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, (tuple, list)):
        return _rebuild(batch, [map_tensors(value, function) for value in batch])
    return batch


def _rebuild(like: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    if hasattr(like, "_fields"):  # a named tuple takes its fields one by one
        return type(like)(*items)
    return type(like)(items)
