"""Batches on their way from loader processes, in shared memory that is used again and again.

Torch makes new shared memory for every batch. The kernel clears each of its pages when it is first written to
and frees them when the batch is gone, which for clips of video takes a fifth of the time of decoding them.
"""

from __future__ import annotations

import itertools
import os
import struct
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import collate, collate_tensor_fn, default_collate_fn_map

from tune_easytrain.batch import iterate_tensors, map_tensors
from tune_easytrain.task import Batch

_SMALLEST_BYTES = 2**16
"""What is smaller takes longer to account for than to clear."""

_NUMBER = struct.Struct("I")
_keys = itertools.count()


class SharedBatches:
    """A collate function for the processes of one `DataLoader`, which are forked from where it is made.

    A batch's memory comes back when nothing in the training process refers to it any more, however long
    that takes; until then other memory is used for the batches that follow.
    """

    def __init__(self, collate_samples: Callable[[list[Any]], Batch] | None, num_processes: int) -> None:
        """`collate_samples` makes a batch of samples; None: torch's own way."""
        self._collate = collate_samples
        self._returns = [_Returns() for _ in range(num_processes)]
        self._pool: _Pool | None = None

    def __call__(self, samples: list[Any]) -> Any:
        """Return a batch of samples, in a loader process."""
        if self._pool is None:
            process = get_worker_info()
            assert process is not None, "batches are shared by loader processes"
            self._pool = _Pool(self._returns[process.id])
        if self._collate is None:
            table: Any = {**default_collate_fn_map, Tensor: self._stack}
            batch = collate(samples, collate_fn_map=table)
        else:
            batch = map_tensors(self._collate(samples), self._pool.copy)
        return _Lent(batch, self._pool.key, self._pool.numbers_of(batch))

    def _stack(self, tensors: Sequence[Tensor], *, collate_fn_map: Any = None) -> Any:
        assert self._pool is not None
        first = tensors[0]
        if not _can_share(first, len(tensors)) or any(tensor.shape != first.shape for tensor in tensors):
            return collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)
        return torch.stack(list(tensors), out=self._pool.tensor((len(tensors), *first.shape), first.dtype))


class _Returns:
    """The way back from the training process to one loader process: numbers of buffers, in a pipe.

    Whoever frees a tensor writes to it, wherever that happens, so it may not wait for a lock.
    """

    known: ClassVar[weakref.WeakValueDictionary[int, _Returns]] = weakref.WeakValueDictionary()

    def __init__(self) -> None:
        self.key = next(_keys)
        self.known[self.key] = self
        self._read_end, self._write_end = os.pipe()
        for end in (self._read_end, self._write_end):
            os.set_blocking(end, False)

    def give(self, number: int) -> None:
        """Give a buffer back; where the pipe is full or broken, its process goes on without it."""
        with suppress(OSError):
            os.write(self._write_end, _NUMBER.pack(number))

    def take(self) -> list[int]:
        """Return the numbers of the buffers that have come back."""
        numbers: list[int] = []
        with suppress(BlockingIOError):
            while content := os.read(self._read_end, 1024 * _NUMBER.size):
                numbers += [number for (number,) in _NUMBER.iter_unpack(content)]
        return numbers

    def __del__(self) -> None:
        os.close(self._read_end)
        os.close(self._write_end)


class _Pool:
    """The buffers of one loader process."""

    def __init__(self, returns: _Returns) -> None:
        self._returns = returns
        self.key = returns.key
        self._buffers: dict[int, torch.UntypedStorage] = {}
        self._free: set[int] = set()
        self._numbers = itertools.count()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor in a free buffer, or in a new one."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._free.update(self._buffers.keys() & self._returns.take())
        fitting = [number for number in self._free if self._buffers[number].nbytes() >= num_bytes]
        if fitting:
            number = min(fitting, key=lambda number: self._buffers[number].nbytes())
        else:
            for number in self._free:  # too small, as for all that is to come: sizes differ by little
                del self._buffers[number]
            self._free.clear()
            number = next(self._numbers)
            new_shared: Any = torch.UntypedStorage._new_shared
            self._buffers[number] = new_shared(num_bytes)
        self._free.discard(number)
        empty: Any = torch.empty(0, dtype=dtype)
        tensor: Tensor = empty.set_(self._buffers[number], 0, tuple(shape))
        return tensor

    def copy(self, tensor: Tensor) -> Tensor:
        """Return the tensor in a buffer; small ones, and such as cannot be there, as they are."""
        if not _can_share(tensor):
            return tensor
        return self.tensor(tensor.shape, tensor.dtype).copy_(tensor)

    def numbers_of(self, batch: Batch) -> list[int | None]:
        """Return the buffer of each tensor of a batch, None for those in none."""
        places = {storage.data_ptr(): number for number, storage in self._buffers.items()}
        return [places.get(tensor.untyped_storage().data_ptr()) for tensor in iterate_tensors(batch)]


class _Lent:
    """A batch that is pickled with the numbers of its buffers, and unpickled as nothing but the batch."""

    def __init__(self, batch: Batch, key: int, numbers: Sequence[int | None]) -> None:
        self._content = batch, key, numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, self._content


def _received(batch: Batch, key: int, numbers: Sequence[int | None]) -> Batch:
    """Return the batch, whose buffers go back when they are not referred to any more."""
    returns = _Returns.known.get(key)
    if returns is not None:
        for tensor, number in zip(iterate_tensors(batch), numbers, strict=True):
            if number is not None:
                weakref.finalize(tensor.untyped_storage(), returns.give, number)
    return batch


def _can_share(tensor: Tensor, num_tensors: int = 1) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.requires_grad
        and not tensor.is_shared()  # type: ignore[no-untyped-call]
        and tensor.nbytes * num_tensors >= _SMALLEST_BYTES
    )
