"""Micro-batches of an epoch, read from a data set in an order and with randomness that can be repeated."""

from __future__ import annotations

import ctypes
import random
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from tune_easytrain.batch import move_batch
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.data_wait import DataWait
from tune_easytrain.length_batches import EpochSamples, SampleLengths
from tune_easytrain.orphans import end_with_parent
from tune_easytrain.random_state import sample_seed
from tune_easytrain.shared_batches import SharedBatches
from tune_easytrain.task import Batch, Task

_ORDER = -1
"""The index whose seed gives an epoch's order of samples."""

_MICROBATCHES_AHEAD = 2
"""How many micro-batches each loader process holds ready or has in hand."""

# Of malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD_BYTES = 2**25
_KEPT_FREE_BYTES = 2**28

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
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Any]:
        """Return the samples of a micro-batch, which a `DataLoader` asks for at once.

        Random state is put back once for all of them: that takes ten times as long as a seed.
        """
        with _kept_state_of_cpu():
            return [self._read(*key) for key in keys]

    def _read(self, epoch: int, index: int) -> Any:
        _seed_on_cpu(sample_seed(self._seed, epoch, index))
        return self._data[index]

    def __len__(self) -> int:
        return len(self._data)


class EpochLoader:
    """Reads a data set micro-batch by micro-batch.

    Without loader processes each micro-batch is read by the training process, when it is asked for: a
    thread that read ahead would seed the generators from which the model draws meanwhile. Loader
    processes read ahead while the device computes, at most two micro-batches each, and stay for the
    epochs that follow, since what a sample is depends on its key alone. So host memory holds the
    micro-batch at hand and those two for each process, whatever the effective batch size, and is used again
    for those that follow.

    For CUDA the batches lie in pinned memory, and are copied when they are asked for, without waiting for
    the copy. None is copied ahead: the device never holds two of them, which the probe has not tried.

    Attributes:
        lengths: how long the samples are, None where that is not known.
    """

    def __init__(
        self,
        task: Task,
        data: Any,
        device: torch.device,
        *,
        seed: int,
        num_workers: int,
        lengths: SampleLengths | None = None,
        group_by_length: bool = False,
    ) -> None:
        """With `group_by_length` samples of like length share a micro-batch, where `lengths` are known."""
        self.lengths = lengths
        self._groups = lengths if group_by_length else None
        self._samples = SeededSamples(data, seed)
        self._task = task
        self._device = device
        self._seed = seed
        self._num_workers = num_workers
        self._idle: DataLoader[Any] | None = None

    @property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return len(self._samples)

    def windows(self, effective_batch_size: int, epoch: int, num_samples: int | None = None) -> EpochWindows:
        """Return the windows of one shuffled epoch, of `effective_batch_size` samples over all workers.

        The epoch ends after `num_samples` samples where that is given and less than the data set.
        """
        order = epoch_order(self.num_samples, self._seed, epoch)[:num_samples]
        wait = DataWait(self._device)
        read = partial(_Reading, self, epoch, wait=wait)
        samples = EpochSamples(order, effective_batch_size, self.lengths, is_grouped=self._groups is not None)
        return EpochWindows(read, samples, wait)

    def in_order(self, microbatch_size: int, samples: Sequence[int] | None = None) -> Iterator[Batch]:
        """Yield the data set, or these samples of it, in the order given; augmentation is that of epoch 0.

        Grouped by length they come in that order, the longest first.
        """
        order = range(self.num_samples) if samples is None else samples
        parts: Iterable[Sequence[int]]
        if self._groups is not None:
            parts = self._groups.cut(order, microbatch_size)
        else:
            starts = range(0, len(order), microbatch_size)
            parts = (order[start : start + microbatch_size] for start in starts)
        return _Reading(self, 0, parts, wait=DataWait(self._device))

    def share(self, num_workers: int, rank: int) -> Sequence[int]:
        """Return which samples one worker evaluates, of a whole data set; lengths are spread evenly."""
        order: Sequence[int] = range(self.num_samples)
        if self._groups is not None and num_workers > 1:
            order = self._groups.by_length(order)
        return order[rank::num_workers]

    def _take_loader(self) -> DataLoader[Any]:
        loader, self._idle = self._idle, None
        return self._new_loader() if loader is None else loader

    def _new_loader(self) -> DataLoader[Any]:
        has_workers, collate = self._num_workers > 0, self._task.collate
        return DataLoader(
            self._samples,
            batch_sampler=_KeysToRead(),
            num_workers=self._num_workers,
            prefetch_factor=_MICROBATCHES_AHEAD if has_workers else None,
            persistent_workers=has_workers,
            # What a task is made of need not be picklable, as other ways to start a process demand.
            multiprocessing_context="fork" if has_workers else None,
            collate_fn=SharedBatches(collate, self._num_workers) if has_workers else collate,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=prepare_loader_process if has_workers else None,
            generator=torch.Generator(),  # of its own: the global one is the model's
        )


class _KeysToRead:
    """The batch sampler of a `DataLoader` that outlives an epoch: what it is to read next."""

    def __init__(self) -> None:
        self.microbatches: Iterable[list[SampleKey]] = ()

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.microbatches)


class _Pass:
    """What a pass is to read, part by part, and how far the loader is ahead of those who read.

    It knows nothing of the pass: a pass that is given up is to end its loader at once, not when cycles are
    collected.
    """

    def __init__(self, epoch: int, parts: Iterable[Sequence[int]]) -> None:
        self._epoch = epoch
        self._parts = iter(parts)
        self._following = next(self._parts, None)
        self.num_ahead = 0
        """Micro-batches that the loader has asked for and not given yet."""

    @property
    def is_over(self) -> bool:
        """Whether everything has been read."""
        return self._following is None and not self.num_ahead

    def __iter__(self) -> Iterator[list[SampleKey]]:
        while self._following is not None:
            part, self._following = self._following, next(self._parts, None)
            self.num_ahead += 1
            yield [(self._epoch, index) for index in part]


class _Reading(Iterator[Batch]):
    """The micro-batches of one pass, on the device; `parts` are the samples of each.

    A pass takes the loader, and gives it back when it has read everything. With a pass that is given up
    its loader processes end, and what they have read ahead is gone with them.
    """

    def __init__(
        self, owner: EpochLoader, epoch: int, parts: Iterable[Sequence[int]], *, wait: DataWait
    ) -> None:
        self._owner = owner
        self._pass = _Pass(epoch, parts)
        self._wait = wait
        self._loader: DataLoader[Any] | None = None
        self._batches: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        if self._pass.is_over:
            raise StopIteration
        with self._wait:
            if self._loader is None:
                self._start()
            batch = next(self._batches)
        self._pass.num_ahead -= 1
        if self._pass.is_over:
            self._owner._idle, self._loader = self._loader, None
            self._batches = iter(())
        return move_batch(batch, self._owner._device)

    def _start(self) -> None:
        self._loader = self._owner._take_loader()
        assert isinstance(self._loader.batch_sampler, _KeysToRead)
        self._loader.batch_sampler.microbatches = self._pass
        self._batches = iter(self._loader)


class EpochWindows:
    """The windows of one epoch; each is read in the micro-batches of the plan that is given when it is read.

    Loader processes read ahead in the sizes of that plan. Where another plan follows, or a window is read
    again, they are started anew from that window on, so that no micro-batch comes in a size of before.

    Attributes:
        samples: which samples the windows and their micro-batches hold.
    """

    def __init__(
        self,
        read: Callable[[Iterable[Sequence[int]]], Iterator[Batch]],
        samples: EpochSamples,
        wait: DataWait,
    ) -> None:
        self._read = read
        self.samples = samples
        self._wait = wait
        self._ahead: Iterator[Batch] = iter(())
        self._next: tuple[BatchPlan, int] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def wait_seconds(self) -> float:
        """How long training has waited for the micro-batches that were read so far; see `DataWait`."""
        return self._wait.seconds

    def num_samples(self, index: int) -> int:
        """Return the samples of a window over all workers: fewer than the others have only in the last."""
        return self.samples.num_samples(index)

    def read(self, index: int, plan: BatchPlan) -> Iterator[Batch]:
        """Yield this worker's micro-batches of a window, on the device; `plan` is that of a whole window.

        Every sample comes exactly once in an epoch over all workers. A window's micro-batches must be
        consumed before the next window is read.
        """
        if self._next != (plan, index):
            self._ahead = iter(())  # ends the loader processes of before
            self._ahead = self._read(self.samples.microbatches_from(index, plan))
        self._next = (plan, index + 1)
        return islice(self._ahead, len(self.samples.microbatches(index, plan)))


def epoch_order(num_samples: int, seed: int, epoch: int) -> list[int]:
    """Return the order in which an epoch reads the samples: a permutation, the same on every worker."""
    generator = torch.Generator().manual_seed(sample_seed(seed, epoch, _ORDER))
    order: list[int] = torch.randperm(num_samples, generator=generator).tolist()
    return order


def prepare_loader_process(worker_id: int) -> None:
    """Undo in a loader process what stands for the device's memory in the trial's: its cap, and its malloc.

    The cap counts what the device holds, and malloc gives freed memory back at once for the cap's sake. Here
    that would cost page faults for every picture decoded: clips came half as fast.

    It ends when the training process does. By itself it would notice after up to five seconds, and until then
    the files of the driver that it has inherited keep all that the training process had on the GPU.
    """
    end_with_parent()
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE_BYTES)


def _seed_on_cpu(seed: int) -> None:
    """Seed what data sets draw from."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def _kept_state_of_cpu() -> Iterator[None]:
    """Put back what data sets draw from: dropout draws from the same generator."""
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
