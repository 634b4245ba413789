"""Micro-batches of an epoch, read from a data set in an order and with randomness that can be repeated."""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tune_easytrain.batch import move_batch
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.random_state import sample_seed
from tune_easytrain.task import Batch, Task

_ORDER = -1
"""The index whose seed gives an epoch's order of samples."""

SampleKey = tuple[int, int]
"""(epoch, index of the sample in the data set)"""


class SeededSamples(Dataset[Any]):
    """A data set whose random augmentation depends only on (seed, epoch, sample index).

    Replay, resume and another number of workers therefore see the same samples. Indexed by `SampleKey`.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self._data = data
        self._seed = seed

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key
        with _seeded_on_cpu(sample_seed(self._seed, epoch, index)):
            return self._data[index]

    def __len__(self) -> int:
        return len(self._data)


class EpochLoader:
    """Reads a data set micro-batch by micro-batch.

    Host memory holds the micro-batch at hand, and those that loader processes have read ahead, whatever
    the effective batch size.
    """

    def __init__(self, task: Task, data: Any, device: torch.device, *, seed: int, num_workers: int) -> None:
        self._samples = SeededSamples(data, seed)
        self._task = task
        self._device = device
        self._seed = seed
        self._num_workers = num_workers

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return len(self._samples)

    def windows(self, effective_batch_size: int, epoch: int) -> EpochWindows:
        """Return the windows of one shuffled epoch, of `effective_batch_size` samples over all workers."""
        order = epoch_order(self.num_samples, self._seed, epoch)
        return EpochWindows(self._load, [(epoch, index) for index in order], effective_batch_size)

    def in_order(self, microbatch_size: int) -> Iterator[Batch]:
        """Yield the whole data set in its own order; augmentation, if any, is that of epoch 0."""
        indices = range(self.num_samples)
        return self._load(
            [
                [(0, index) for index in indices[start : start + microbatch_size]]
                for start in range(0, self.num_samples, microbatch_size)
            ]
        )

    def _load(self, microbatches: Sequence[list[SampleKey]]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self._samples,
            batch_sampler=microbatches,
            num_workers=self._num_workers,
            collate_fn=self._task.collate,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_lift_memory_cap if self._num_workers else None,
            generator=torch.Generator(),  # of its own: the global one is the model's
        )
        # A generator's loop would keep hold of a batch until it has the next one.
        return map(partial(move_batch, device=self._device), loader)


class EpochWindows:
    """The windows of one epoch; each is read in the micro-batches of the plan that is given when it is read.

    Loader processes read ahead in the sizes of that plan. Where another plan follows, or a window is read
    again, they are started anew from that window on, so that no micro-batch comes in a size of before.
    """

    def __init__(
        self,
        load: Callable[[Sequence[list[SampleKey]]], Iterator[Batch]],
        order: Sequence[SampleKey],
        effective_batch_size: int,
    ) -> None:
        self._load = load
        self._order = order
        self._effective_batch_size = effective_batch_size
        self._ahead: Iterator[Batch] = iter(())
        self._next: tuple[BatchPlan, int] | None = None

    def __len__(self) -> int:
        return -(-len(self._order) // self._effective_batch_size)

    def num_samples(self, index: int) -> int:
        """Return the samples of a window over all workers: fewer than the others have only in the last."""
        return min(self._effective_batch_size, len(self._order) - index * self._effective_batch_size)

    def read(self, index: int, plan: BatchPlan) -> Iterator[Batch]:
        """Yield this worker's micro-batches of a window, on the device; `plan` is that of a whole window.

        Every sample comes exactly once in an epoch over all workers. A window's micro-batches must be
        consumed before the next window is read.
        """
        if self._next != (plan, index):
            self._ahead = iter(())  # ends the loader processes of before
            self._ahead = self._load(self._microbatches(index, plan))
        self._next = (plan, index + 1)
        sizes = plan.for_window(self.num_samples(index)).microbatch_sizes
        return islice(self._ahead, sum(1 for size in sizes if size))

    def _microbatches(self, first: int, plan: BatchPlan) -> list[list[SampleKey]]:
        """Return the samples of this worker's micro-batches from window `first` to the epoch's end."""
        microbatches = []
        for index in range(first, len(self)):
            window = plan.for_window(self.num_samples(index))
            position = index * self._effective_batch_size + window.window_offset()
            for size in filter(None, window.microbatch_sizes):
                microbatches.append(list(self._order[position : position + size]))
                position += size
        return microbatches


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch reads the samples: a permutation, the same on every worker."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, _ORDER))
    order: list[int] = torch.randperm(num_samples, generator=generator).tolist()
    return order


def _lift_memory_cap(worker_id: int) -> None:
    # The cap stands for the device; what a loader process holds is host memory of its own.
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


@contextmanager
def _seeded_on_cpu(seed: int) -> Iterator[None]:
    """Seed what data sets draw from, and put it back: dropout draws from the same generator."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
