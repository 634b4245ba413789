from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset

from tune_easytrain import BatchPlan, Task
from tune_easytrain.length_batches import SampleLengths
from tune_easytrain.loader import EpochLoader, EpochWindows, epoch_order

CPU = torch.device("cpu")


class Ids(Dataset[Tensor]):
    """Sample i is the number i; `read` lists what has been read."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return torch.tensor(index)


class Augmented(Dataset[Tensor]):
    """Sample i with one random number of each generator a data set may draw from."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Tensor:
        noise = [random.random(), float(torch.rand(())), float(np.random.random())]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class Processes(Dataset[Tensor]):
    """Sample i is (i, the process that read it); the sample `broken` cannot be read the first time."""

    def __init__(self, num_samples: int, broken: int = -1) -> None:
        self.num_samples = num_samples
        self.broken = torch.tensor(broken).share_memory_()
        self.num_read = multiprocessing.get_context("fork").Value("i", 0)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Tensor:
        if index == self.broken:
            self.broken.fill_(-1)
            raise OSError("the disk is away")
        with self.num_read.get_lock():
            self.num_read.value += 1
        return torch.tensor([index, os.getpid()])


def readers(windows: EpochWindows, plan: BatchPlan) -> set[int]:
    """Read the whole epoch; return the processes that did."""
    batches = [batch for index in range(len(windows)) for batch in windows.read(index, plan)]
    return set(torch.cat(batches)[:, 1].tolist())


def make_loader(
    data: Any,
    *,
    seed: int = 0,
    num_workers: int = 0,
    lengths: SampleLengths | None = None,
    group_by_length: bool = True,
    **changes: Any,
) -> EpochLoader:
    task = Task(
        model=lambda: nn.Linear(1, 1),
        loss=lambda model, batch: batch.sum(),
        optimizer=lambda model: torch.optim.SGD(model.parameters()),
        train_data=lambda: data,
        **changes,
    )
    return EpochLoader(
        task,
        data,
        CPU,
        seed=seed,
        num_workers=num_workers,
        lengths=lengths,
        group_by_length=group_by_length,
    )


def read_epoch(loader: EpochLoader, plan: BatchPlan, epoch: int = 0) -> list[list[Tensor]]:
    windows = loader.windows(plan.effective_batch_size, epoch)
    return [list(windows.read(index, plan)) for index in range(len(windows))]


sizes = st.integers(1, 60)


@given(
    num_samples=sizes, effective=sizes, limit=sizes, num_workers=st.integers(1, 4), epoch=st.integers(0, 3)
)
def test_every_sample_comes_exactly_once_over_all_workers(
    num_samples: int, effective: int, limit: int, num_workers: int, epoch: int
) -> None:
    ids: list[int] = []
    for rank in range(num_workers):
        plan = BatchPlan.build(effective, limit, num_workers=num_workers, rank=rank)
        for window in read_epoch(make_loader(Ids(num_samples)), plan, epoch):
            for batch in window:
                assert 1 <= len(batch) <= limit
                ids += batch.tolist()
    assert sorted(ids) == list(range(num_samples))


@given(num_samples=sizes, effective=sizes, limit=sizes, other=sizes, num_workers=st.integers(1, 4))
def test_a_window_holds_the_same_samples_however_it_is_split(
    num_samples: int, effective: int, limit: int, other: int, num_workers: int
) -> None:
    def windows(limit: int, num_workers: int) -> list[list[int]]:
        ranks = [
            read_epoch(
                make_loader(Ids(num_samples)),
                BatchPlan.build(effective, limit, num_workers=num_workers, rank=rank),
            )
            for rank in range(num_workers)
        ]
        return [
            [i for part in parts for batch in part for i in batch.tolist()]
            for parts in zip(*ranks, strict=True)
        ]

    assert windows(limit, num_workers) == windows(other, 1)


def test_the_last_window_is_what_is_left() -> None:
    windows = make_loader(Ids(27)).windows(10, 0)
    assert [windows.num_samples(index) for index in range(len(windows))] == [10, 10, 7]
    plan = BatchPlan.build(10, 4)
    assert [[len(batch) for batch in windows.read(index, plan)] for index in range(3)] == [
        [4, 3, 3],
        [4, 3, 3],
        [4, 3],
    ]


@given(
    num_samples=sizes,
    effective=sizes,
    limits=st.lists(sizes, min_size=1, max_size=60),
    num_workers=st.integers(1, 3),
    data=st.data(),
)
def test_windows_hold_their_samples_whatever_the_plan_and_however_often_they_are_read(
    num_samples: int, effective: int, limits: list[int], num_workers: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, num_workers - 1))
    plans = [BatchPlan.build(effective, m, num_workers=num_workers, rank=rank) for m in limits]
    expected = [
        [i for batch in window for i in batch.tolist()]
        for window in read_epoch(make_loader(Ids(num_samples)), plans[0])
    ]
    windows = make_loader(Ids(num_samples)).windows(effective, 0)
    for index in range(len(windows)):
        for plan in (plans[index % len(plans)], plans[-1], plans[-1]):
            if data.draw(st.booleans()):  # a failure: some micro-batches are read, then the window again
                next(windows.read(index, plan), None)
            batches = list(windows.read(index, plan))
            assert [i for batch in batches for i in batch.tolist()] == expected[index]
            assert [len(b) for b in batches] == [
                size for size in plan.for_window(windows.num_samples(index)).microbatch_sizes if size
            ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_window_read_again_in_other_sizes_has_the_same_augmentation(num_workers: int) -> None:
    whole = {
        int(s[0]): s.tolist()
        for window in read_epoch(make_loader(Augmented()), BatchPlan.build(4, 4))
        for s in torch.cat(window)
    }
    windows = make_loader(Augmented(), num_workers=num_workers).windows(4, 0)
    next(windows.read(0, BatchPlan.build(4, 4)))
    seen = []
    for index in range(len(windows)):
        batches = list(windows.read(index, BatchPlan.build(4, 1)))
        assert [len(batch) for batch in batches] == [1] * 4
        seen += [sample.tolist() for sample in torch.cat(batches)]
    assert {int(sample[0]): sample for sample in seen} == whole
    assert len(seen) == 12


def test_the_order_is_a_permutation_of_seed_and_epoch_alone() -> None:
    first = epoch_order(50, 3, 1)
    torch.rand(7)
    assert epoch_order(50, 3, 1) == first
    assert sorted(first) == list(range(50))
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def samples_by_id(loader: EpochLoader, limit: int = 4, epoch: int = 0) -> dict[int, list[float]]:
    batches = [batch for window in read_epoch(loader, BatchPlan.build(6, limit), epoch) for batch in window]
    return {int(sample[0]): sample[1:].tolist() for sample in torch.cat(batches)}


def test_augmentation_is_a_function_of_seed_epoch_and_sample() -> None:
    expected = samples_by_id(make_loader(Augmented()))
    assert samples_by_id(make_loader(Augmented())) == expected
    assert samples_by_id(make_loader(Augmented()), limit=1) == expected
    assert samples_by_id(make_loader(Augmented()), limit=5) == expected
    assert len({tuple(noise) for noise in expected.values()}) == 12
    for other in (
        samples_by_id(make_loader(Augmented()), epoch=1),
        samples_by_id(make_loader(Augmented(), seed=1)),
    ):
        assert all(
            mine != theirs for i in expected for mine, theirs in zip(expected[i], other[i], strict=True)
        )


def test_loader_processes_give_the_same_samples_in_the_same_order() -> None:
    plan = BatchPlan.build(5, 2)
    alone = read_epoch(make_loader(Augmented()), plan)
    helped = read_epoch(make_loader(Augmented(), num_workers=2), plan)
    assert [[b.tolist() for b in window] for window in helped] == [
        [b.tolist() for b in window] for window in alone
    ]


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.random())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_models_randomness_is_left_as_it_was(num_workers: int) -> None:
    def seed() -> None:
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)

    seed()
    expected = draw()
    seed()
    read_epoch(make_loader(Augmented(), num_workers=num_workers), BatchPlan.build(6, 4))
    assert draw() == expected


def test_microbatches_are_read_only_when_asked_for() -> None:
    data, plan = Ids(20), BatchPlan.build(10, 4)
    windows = make_loader(data).windows(10, 0)
    for index in range(len(windows)):
        before = len(data.read)
        for size, batch in zip(plan.microbatch_sizes, windows.read(index, plan), strict=True):
            before += size
            assert len(batch) == size
            assert len(data.read) == before


def test_the_loader_keeps_no_hold_of_a_microbatch() -> None:
    microbatches = make_loader(Ids(8)).windows(8, 0).read(0, BatchPlan.build(8, 2))
    first = weakref.ref(next(microbatches))
    assert first() is None


def test_validation_reads_everything_in_its_own_order_the_same_way_every_time() -> None:
    loader = make_loader(Augmented())
    first = list(loader.in_order(5))
    assert [len(batch) for batch in first] == [5, 5, 2]
    assert torch.cat(first)[:, 0].tolist() == list(range(12))
    assert torch.cat(list(loader.in_order(3))).equal(torch.cat(first))


def test_the_tasks_own_collate_is_used() -> None:
    loader = make_loader(Ids(3), collate=lambda samples: {"ids": torch.stack(samples)})
    assert [batch["ids"].tolist() for batch in loader.in_order(2)] == [[0, 1], [2]]


def test_an_epoch_and_a_validation_set_may_be_cut_short() -> None:
    loader, plan = make_loader(Ids(20)), BatchPlan.build(8, 3)
    for num_samples, expected in ((None, 20), (50, 20), (13, 13), (1, 1)):
        windows = loader.windows(8, 2, num_samples)
        ids = [i for k in range(len(windows)) for batch in windows.read(k, plan) for i in batch.tolist()]
        assert ids == epoch_order(20, 0, 2)[:expected]
    assert [batch.tolist() for batch in loader.in_order(2, [7, 1, 19])] == [[7, 1], [19]]


def test_loader_processes_stay_over_the_epochs() -> None:
    loader, plan = make_loader(Processes(12), num_workers=2), BatchPlan.build(4, 2)
    first = readers(loader.windows(4, 0), plan)
    assert len(first) == 2
    assert os.getpid() not in first
    assert readers(loader.windows(4, 1), plan) == first
    assert set(torch.cat(list(loader.in_order(5)))[:, 1].tolist()) <= first


def test_the_processes_of_a_pass_that_is_given_up_end_with_it() -> None:
    loader = make_loader(Processes(12), num_workers=2)
    windows = loader.windows(4, 0)
    first = int(next(windows.read(0, BatchPlan.build(4, 2)))[0, 1])
    others = readers(windows, BatchPlan.build(4, 1))
    assert first not in others
    assert {child.pid for child in multiprocessing.active_children()} & {first, *others} == others
    assert readers(loader.windows(4, 1), BatchPlan.build(4, 2)) == others


def test_two_passes_at_once_do_not_mix() -> None:
    loader, plan = make_loader(Ids(12), num_workers=1), BatchPlan.build(6, 2)
    one, two = loader.windows(6, 0), loader.windows(6, 1)
    mixed = [
        batch.tolist() for pair in zip(one.read(0, plan), two.read(0, plan), strict=True) for batch in pair
    ]
    assert [i for batch in mixed[::2] for i in batch] == epoch_order(12, 0, 0)[:6]
    assert [i for batch in mixed[1::2] for i in batch] == epoch_order(12, 0, 1)[:6]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_window_can_be_read_again_after_an_error(num_workers: int) -> None:
    data = Processes(12)
    windows, plan = make_loader(data, num_workers=num_workers).windows(6, 0), BatchPlan.build(6, 2)
    data.broken.fill_(epoch_order(12, 0, 0)[3])
    with pytest.raises(OSError, match="the disk is away"):
        list(windows.read(0, plan))
    again = [i for index in (0, 1) for batch in windows.read(index, plan) for i in batch[:, 0].tolist()]
    assert again == epoch_order(12, 0, 0)


def test_loader_processes_read_two_microbatches_each_ahead_and_no_more() -> None:
    data, plan = Processes(600), BatchPlan.build(300, 3)
    microbatches = make_loader(data, num_workers=2).windows(300, 0).read(0, plan)
    for num_taken in (1, 2):
        next(microbatches)
        most = (num_taken + 2 * 2) * 3
        deadline = time.monotonic() + 60
        while data.num_read.value < most and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)  # whoever reads more would have done so
        assert data.num_read.value == most


@pytest.mark.parametrize("limit", [2, 5])
def test_waiting_is_the_time_that_reading_takes(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    now = 0.0

    class Slow(Ids):
        def __getitem__(self, index: int) -> Tensor:
            nonlocal now
            now += 3
            return super().__getitem__(index)

    monkeypatch.setattr("tune_easytrain.data_wait.time.perf_counter", lambda: now)
    windows, plan = make_loader(Slow(13)).windows(5, 0), BatchPlan.build(5, limit)
    assert windows.wait_seconds == 0
    for index in range(len(windows)):
        for _ in windows.read(index, plan):
            now += 100  # the step
    assert windows.wait_seconds == 13 * 3


def lengths_for(num_samples: int) -> SampleLengths:
    """Lengths from 1 to 40, without an order."""
    return SampleLengths([1 + 17 * index % 40 for index in range(num_samples)])


@given(
    num_samples=sizes,
    effective=sizes,
    limit=st.integers(1, 20),
    num_workers=st.integers(1, 3),
    data=st.data(),
)
def test_windows_grouped_by_length_hold_the_samples_they_hold_without(
    num_samples: int, effective: int, limit: int, num_workers: int, data: st.DataObject
) -> None:
    lengths = lengths_for(num_samples)
    whole = read_epoch(
        make_loader(Ids(num_samples), lengths=lengths, group_by_length=False),
        BatchPlan.build(effective, effective),
    )
    read: list[list[int]] = [[] for _ in whole]
    for rank in range(num_workers):
        plan = BatchPlan.build(effective, limit, num_workers=num_workers, rank=rank)
        windows = make_loader(Ids(num_samples), lengths=lengths).windows(effective, 0)
        for index in range(len(windows)):
            if data.draw(st.booleans()):  # a failure: some micro-batches are read, then the window again
                next(windows.read(index, plan), None)
            batches = list(windows.read(index, plan))
            assert [b.tolist() for b in batches] == windows.samples.microbatches(index, plan)
            read[index] += [i for batch in batches for i in batch.tolist()]
    for index, (window,) in enumerate(whole):
        assert sorted(read[index]) == sorted(window.tolist())


def test_without_being_asked_to_group_lengths_change_nothing() -> None:
    plan = BatchPlan.build(8, 3)
    plain = read_epoch(make_loader(Ids(20)), plan)
    known = read_epoch(make_loader(Ids(20), lengths=lengths_for(20), group_by_length=False), plan)
    unknown = read_epoch(make_loader(Ids(20), group_by_length=True), plan)
    expected = [[batch.tolist() for batch in window] for window in plain]
    for epoch in (known, unknown):
        assert [[batch.tolist() for batch in window] for window in epoch] == expected


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_processes_read_grouped_windows_ahead_and_stay(num_workers: int) -> None:
    lengths, plan = lengths_for(50), BatchPlan.build(16, 2)
    loader = make_loader(Processes(50), num_workers=num_workers, lengths=lengths)
    alone = read_epoch(make_loader(Ids(50), lengths=lengths), plan)
    windows = loader.windows(16, 0)
    helped = [list(windows.read(index, plan)) for index in range(len(windows))]
    assert [[b[:, 0].tolist() for b in w] for w in helped] == [[b.tolist() for b in w] for w in alone]
    assert len({len(window) for window in alone}) > 1  # windows differ in their number of micro-batches
    first = set(torch.cat([b for w in helped for b in w])[:, 1].tolist())
    assert os.getpid() not in first
    assert readers(loader.windows(16, 1), plan) == first


def test_a_grouped_window_read_again_with_half_the_limit_has_half_the_tokens() -> None:
    lengths = lengths_for(32)
    windows = make_loader(Processes(32), num_workers=1, lengths=lengths).windows(32, 0)
    for limit in (8, 4):
        plan = BatchPlan.build(32, limit)
        parts = [batch[:, 0].tolist() for batch in windows.read(0, plan)]
        assert sorted(i for part in parts for i in part) == list(range(32))
        assert max(lengths.num_padded_tokens([part]) for part in parts) <= limit * 40
        assert parts == windows.samples.microbatches(0, plan)


def test_validation_is_grouped_by_length_over_all_of_it() -> None:
    lengths = SampleLengths([3, 9, 3, 9, 3], longest=9)
    loader = make_loader(Ids(5), lengths=lengths)
    assert [b.tolist() for b in loader.in_order(2)] == [[1, 3], [0, 2, 4]]
    assert [list(loader.share(2, rank)) for rank in range(2)] == [[1, 0, 4], [3, 2]]
    assert [b.tolist() for b in loader.in_order(2, loader.share(2, 0))] == [[1], [0, 4]]
    plain = make_loader(Ids(5), lengths=lengths, group_by_length=False)
    assert [list(plain.share(2, rank)) for rank in range(2)] == [[0, 2, 4], [1, 3]]
    assert [b.tolist() for b in plain.in_order(2)] == [[0, 1], [2, 3], [4]]


MALLOC_TEST = """
import resource, torch
from tune_easytrain.loader import prepare_loader_process

def count_page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(2**18)  # 256 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

resource.setrlimit(resource.RLIMIT_DATA, (2**33, resource.getrlimit(resource.RLIMIT_DATA)[1]))
torch.set_num_threads(1)
count_page_faults()
print(count_page_faults())
prepare_loader_process(0)
count_page_faults()
print(count_page_faults())
soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
assert soft == hard
"""


def test_a_loader_process_is_rid_of_the_trials_cap_and_malloc() -> None:
    as_in_a_trial = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MALLOC_TEST]
    done = subprocess.run(command, env={**os.environ, **as_in_a_trial}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert before >= 50 * 256
    assert after < 256
