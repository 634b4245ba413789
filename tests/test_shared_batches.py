from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tune_easytrain.shared_batches import SharedBatches, _Pool, _Returns

SIZE = 20_000  # floats of a sample: a batch of one is larger than what is not worth a buffer


class Samples(Dataset[Any]):
    """Sample i is full of the number i, and has a name and two more tensors."""

    def __init__(self, num_samples: int, size: int = SIZE) -> None:
        self._num_samples, self._size = num_samples, size

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> Any:
        clip = torch.full((self._size,), float(index))
        return {
            "clip": clip,
            "more": (clip.to(torch.int16)[: self._size // 2], index),
            "name": f"sample {index}",
        }


def loader(
    num_samples: int, batch_size: int, collate: Callable[[list[Any]], Any] | None = None
) -> DataLoader[Any]:
    return DataLoader(
        Samples(num_samples),
        batch_size=batch_size,
        num_workers=2,
        prefetch_factor=2,
        persistent_workers=True,
        multiprocessing_context="fork",
        collate_fn=SharedBatches(collate, 2),
    )


def check(batch: Any, first: int, num_samples: int) -> None:
    numbers = torch.arange(first, first + num_samples)
    assert batch["clip"].equal(numbers.float()[:, None].expand(-1, SIZE))
    assert batch["more"][0].equal(numbers.to(torch.int16)[:, None].expand(-1, SIZE // 2))
    assert batch["more"][1].equal(numbers)
    assert batch["name"] == [f"sample {number}" for number in numbers.tolist()]


def file_of(tensor: Tensor) -> int:
    """The file that a tensor's shared memory is."""
    storage: Any = tensor.untyped_storage()
    descriptor, _ = storage._share_fd_cpu_()
    return os.fstat(descriptor).st_ino


def test_memory_is_used_again_once_a_batch_is_gone() -> None:
    files: list[int] = []
    batches = loader(160, 4)
    for _ in range(2):
        for number, batch in enumerate(batches):
            check(batch, 4 * number, 4)
            files.append(file_of(batch["clip"]))
            del batch
    # A process holds two batches ready, one in hand, and one is with the training process.
    assert len(files) == 80
    assert len(set(files)) <= 2 * 4


def test_what_is_kept_is_never_written_to_again() -> None:
    batches = loader(160, 4)
    kept = [(number, batch) for number, batch in enumerate(batches)]
    parts = [batch["clip"][1:, ::7] for batch in batches]  # views keep the memory too
    gc.collect()
    for batch in batches:
        del batch
    for number, batch in kept:
        check(batch, 4 * number, 4)
    for number, part in enumerate(parts):
        assert part[:, 0].tolist() == [4 * number + place for place in (1, 2, 3)]


def pad(samples: list[Any]) -> Any:
    return torch.nn.utils.rnn.pad_sequence(
        [sample["clip"][: 9000 + index] for index, sample in enumerate(samples)]
    )


def test_a_collate_function_of_ones_own_is_called_and_its_batch_shared() -> None:
    files = set()
    for number, batch in enumerate(loader(60, 3, pad)):
        assert batch.shape == (9002, 3)
        assert batch[0].tolist() == [3.0 * number, 3 * number + 1, 3 * number + 2]
        assert batch[-1].tolist() == [0, 0, 3 * number + 2]
        files.add(file_of(batch))
        del batch
    assert len(files) <= 2 * 4


def test_batches_of_other_sizes_are_right_too() -> None:
    data = DataLoader(
        Samples(50),
        batch_sampler=[[0], [1, 2, 3], [4], *([5 + k, 6 + k] for k in range(0, 40, 2)), [45, 46, 47, 48]],
        num_workers=2,
        multiprocessing_context="fork",
        collate_fn=SharedBatches(None, 2),
    )
    first = 0
    for batch in data:
        check(batch, first, len(batch["name"]))
        first += len(batch["name"])
    assert first == 49


def test_samples_of_unlike_shape_are_refused_as_without() -> None:
    class Unlike(Samples):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(SIZE + index)

    data = DataLoader(
        Unlike(8),
        batch_size=4,
        num_workers=1,
        multiprocessing_context="fork",
        collate_fn=SharedBatches(None, 1),
    )
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(data))


def test_ended_loaders_leave_no_open_files() -> None:
    def num_open() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = num_open()
    kept = []
    for _ in range(3):
        batches = loader(16, 4)
        kept.append(next(iter(batches)))
        del batches
    check(kept[0], 0, 4)
    kept.clear()
    assert num_open() <= before + 2  # of torch's own


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), lent=st.lists(st.booleans(), min_size=30))
def test_no_buffer_is_given_out_twice(sizes: list[int], lent: list[bool]) -> None:
    returns = _Returns()
    pool = _Pool(returns)
    out: dict[int, Tensor] = {}
    for size, stays in zip(sizes, lent, strict=False):
        tensor = pool.tensor((size, 3), torch.float32).fill_(size)
        (number,) = pool.numbers_of(tensor)
        assert number is not None
        assert number not in out
        out[number] = tensor
        if not stays:
            number = next(iter(out))
            del out[number]
            returns.give(number)
        for held in out.values():
            assert held.unique().tolist() == [held.shape[0]]


def test_a_full_pipe_makes_nobody_wait() -> None:
    returns = _Returns()
    for number in range(50_000):
        returns.give(number)
    numbers = returns.take()
    assert numbers[:3] == [0, 1, 2]
    assert 1000 < len(numbers) < 50_000
    assert returns.take() == []
