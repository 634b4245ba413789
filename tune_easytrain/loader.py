"""Micro-batches of an epoch, read from a data set in an order and with randomness that can be repeated."""

from __future__ import annotations

import random
import resource
import sys
from collections.abc import Iterator, Sequence
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
    """Reads the windows of an epoch micro-batch by micro-batch.

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

    def windows(self, plan: BatchPlan, epoch: int) -> Iterator[tuple[BatchPlan, Iterator[Batch]]]:
        """Yield, for each window of a shuffled epoch, its plan and its micro-batches on the device.

        Every sample comes exactly once over all workers. A window's micro-batches must be consumed before
        the next window is asked for.
        """
        order = epoch_order(self.num_samples, self._seed, epoch)
        plans = list(plan.windows(self.num_samples))
        microbatches: list[list[SampleKey]] = []
        start = 0
        for window in plans:
            position = start + window.window_offset()
            for size in filter(None, window.microbatch_sizes):
                microbatches.append([(epoch, index) for index in order[position : position + size]])
                position += size
            start += window.effective_batch_size
        batches = self._load(microbatches)
        for window in plans:
            yield window, islice(batches, sum(1 for size in window.microbatch_sizes if size))

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
