from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from toys import make_settings

from tune_easytrain.accumulate import AccumulationRecord, accumulate_gradients
from tune_easytrain.batch import split_batch
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import LoaderLostError, MicrobatchTooLargeError, OutOfMemoryInTrainingError
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.loader import EpochLoader
from tune_easytrain.protocol import PlanChanged
from tune_easytrain.rescue import Rescue, StateSnapshot
from tune_easytrain.task import Task
from tune_easytrain.termination import EndRequested, Termination

OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")


def make_rescue(model: nn.Module, plan: BatchPlan, told: list[PlanChanged] | None = None) -> Rescue:
    return Rescue(model, plan, CpuMemory(), (told if told is not None else []).append)


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def make_window(num_samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (num_samples, 3)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


@given(st.integers(2, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_what_does_not_fit_at_once_gives_the_same_gradient(
    num_samples: int, limit: int, fits: int, more_steps: int
) -> None:
    """`fits` samples fit at a time; a larger micro-batch fails after those before it have run."""
    batch = make_window(num_samples)
    model, whole = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    whole.load_state_dict(model.state_dict())
    accumulate_gradients(whole, loss, [batch])
    plan = BatchPlan.build(num_samples, limit)
    plan = plan.with_steps(plan.accumulation_steps + more_steps)
    sizes_failed: list[int] = []

    def window(plan: BatchPlan) -> AccumulationRecord:
        def hungry(model: nn.Module, part: Any) -> Tensor:
            if len(part[0]) > fits:
                sizes_failed.append(plan.microbatch_size)
                raise OOM
            return loss(model, part)

        return accumulate_gradients(model, hungry, split_batch(batch, plan.microbatch_sizes))

    told: list[PlanChanged] = []
    rescue = make_rescue(model, plan, told)
    record = rescue.run(window)
    assert record.num_samples == num_samples
    torch.testing.assert_close(model.weight.grad, whole.weight.grad, rtol=1e-12, atol=1e-14)
    assert rescue.plan.microbatch_size <= max(fits, 1)
    assert rescue.num_rescues == len(told) == len(sizes_failed)
    assert [change.failed_microbatch_size for change in told] == sizes_failed
    assert all(later <= earlier // 2 for earlier, later in pairwise(sizes_failed))
    if told:
        assert told[-1].microbatch_limit == rescue.plan.microbatch_limit
        assert told[-1].accumulation_steps == rescue.plan.accumulation_steps
        assert told[-1].message == "CUDA out of memory. Tried to allocate 2.00 GiB"
    else:
        assert rescue.plan is plan


def fail_times(count: int, error: Exception = OOM) -> Any:
    """A window that fails so many times before it comes to its end; returns the plan it ended with."""
    plans: list[BatchPlan] = []

    def window(plan: BatchPlan) -> list[BatchPlan]:
        plans.append(plan)
        if len(plans) <= count:
            raise error
        return plans

    return window


def test_the_smaller_plan_stays_for_later_windows() -> None:
    rescue = make_rescue(nn.Linear(1, 1), BatchPlan.build(16, 16))
    plans = rescue.run(fail_times(2))
    assert [plan.microbatch_size for plan in plans] == [16, 8, 4]
    (later,) = rescue.run(fail_times(0))
    assert (later.effective_batch_size, later.microbatch_size, later.accumulation_steps) == (16, 4, 4)


def test_a_short_window_that_fails_lowers_the_limit_below_its_own_size() -> None:
    rescue = make_rescue(nn.Linear(1, 1), BatchPlan.build(16, 8))
    rescue.run(fail_times(1), num_samples=6)
    assert rescue.plan.microbatch_limit == 3
    assert rescue.plan.effective_batch_size == 16


def test_where_others_wait_inside_a_window_nothing_is_computed_again() -> None:
    told: list[PlanChanged] = []
    rescue = make_rescue(nn.Linear(3, 3), BatchPlan.build(12, 4), told)
    rescue.is_alone = False
    sizes: list[int] = []

    def window(plan: BatchPlan) -> None:
        sizes.append(plan.microbatch_size)
        raise OOM

    with pytest.raises(MicrobatchTooLargeError, match=r"micro-batch of 4: CUDA out of memory") as caught:
        rescue.run(window)
    assert (caught.value.microbatch_size, sizes, told, rescue.num_rescues) == (4, [4], [], 0)


def test_when_one_sample_does_not_fit_that_is_the_end() -> None:
    told: list[PlanChanged] = []
    rescue = make_rescue(nn.Linear(1, 1), BatchPlan.build(8, 4), told)
    with pytest.raises(OutOfMemoryInTrainingError, match=r"not even a single sample .*: CUDA out of memory"):
        rescue.run(fail_times(9))
    assert [change.failed_microbatch_size for change in told] == [4, 2]


@pytest.mark.parametrize(
    "error", [KeyError("label"), RuntimeError("shapes differ"), ValueError("out of memory")]
)
def test_a_bug_is_raised_as_it_is(error: Exception) -> None:
    rescue = make_rescue(nn.Linear(1, 1), BatchPlan.build(8, 4))
    with pytest.raises(type(error)) as caught:
        rescue.run(fail_times(1, error))
    assert caught.value is error
    assert rescue.num_rescues == 0


def test_a_bug_that_only_the_smaller_size_has_names_the_size_before() -> None:
    def window(plan: BatchPlan) -> None:
        if plan.microbatch_size > 1:
            raise OOM
        nn.BatchNorm1d(3)(torch.zeros(1, 3))

    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        make_rescue(nn.Linear(1, 1), BatchPlan.build(2, 2)).run(window)
    assert caught.value.__notes__ == ["in place of a micro-batch of 2, which ran out of memory"]


def test_a_size_limit_is_rescued_too() -> None:
    rescue = make_rescue(nn.Linear(1, 1), BatchPlan.build(8, 8))
    assert len(rescue.run(fail_times(1, RuntimeError("integer out of range")))) == 2


def test_nothing_of_the_failed_window_is_alive_when_memory_is_given_back() -> None:
    model = nn.Linear(3, 3)
    activations: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watching(CpuMemory):
        def release(self) -> None:
            alive.append(sum(ref() is not None for ref in activations))
            alive.append(sum(parameter.grad is not None for parameter in model.parameters()))

    def window(plan: BatchPlan) -> None:
        for _ in range(plan.accumulation_steps):
            hidden = model(torch.ones(2, 3))
            activations.append(weakref.ref(hidden))
            hidden.sum().backward()
            if plan.accumulation_steps == 1:
                raise torch.OutOfMemoryError("one that nobody keeps")

    Rescue(model, BatchPlan.build(2, 2), Watching(), lambda change: None).run(window)
    assert alive == [0, 0]
    assert len(activations) == 3


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.random())


class Counting(nn.Module):
    """Buffers that a forward pass changes in every way there is: in place, replaced, by an operator that
    counts no version, and one that is nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("constant", torch.arange(4).expand(5, 4))
        self.register_buffer("cache", None)
        with torch.inference_mode():
            self.register_buffer("table", torch.arange(3))

    def forward(self, batch: Tensor) -> Tensor:
        self.calls += 1
        self.last = batch[-1].detach()
        nn.functional.batch_norm(batch, self.mean, torch.ones(3), training=True)
        self.cache = batch.detach()
        return self.norm(batch)


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_buffers_and_random_state_are_put_back_window_after_window() -> None:
    model = Counting()
    snapshot = StateSnapshot(model)
    for _ in range(3):
        snapshot.take()
        before = buffers_of(model)
        expected = draw()
        for _ in range(2):
            model(torch.randn(4, 3))
        assert not buffers_of(model)["mean"].equal(before["mean"])
        snapshot.restore()
        after = buffers_of(model)
        assert after.keys() == before.keys()
        for name, buffer in before.items():
            assert after[name].equal(buffer), name
        assert draw() == expected
        model(torch.randn(4, 3))  # this one counts
        model.cache = None
    assert int(model.calls) == int(model.norm.num_batches_tracked) == 3


def test_a_model_without_buffers_has_nothing_but_random_state_to_keep() -> None:
    snapshot = StateSnapshot(nn.Linear(1, 1))
    for _ in range(2):
        snapshot.take()
        expected = draw()
        snapshot.restore()
        assert draw() == expected


def lose_loaders(others: set[Any]) -> None:
    """Kill the loader processes of this one, as the kernel does for memory, but for `others`; torch tells."""
    for process in set(multiprocessing.active_children()) - others:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)


class Loaded:
    """Windows of twelve samples of a real loader with two processes, in micro-batches of four.

    While it computes its n-th micro-batches, counted from 1, its loader processes are killed.
    """

    def __init__(self, *lost_at: int) -> None:
        torch.manual_seed(0)
        self._lost_at = lost_at
        self._others = set(multiprocessing.active_children())
        self.num_microbatches = 0
        self.model = nn.Sequential(
            nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)
        ).double()
        plan, self.told = BatchPlan.build(12, 4), list[PlanChanged]()
        self.rescue = make_rescue(self.model, plan, self.told)
        task = Task(
            model=lambda: self.model,
            loss=self.loss,
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            train_data=lambda: TensorDataset(*make_window(36)),
        )
        data: Any = task.train_data()
        loader = EpochLoader(task, data, torch.device("cpu"), seed=make_settings().seed, num_workers=2)
        self._windows = loader.windows(12, 0)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        self.num_microbatches += 1
        value = loss(model, batch)
        if self.num_microbatches in self._lost_at:
            lose_loaders(self._others)
        return value

    def window(self, index: int) -> tuple[AccumulationRecord, dict[str, Tensor]]:
        """Return what a window was, with its gradients and the model's buffers."""
        record = self.rescue.run(
            lambda plan: accumulate_gradients(self.model, self.loss, self._windows.read(index, plan))
        )
        gradients = {name: each.grad.clone() for name, each in self.model.named_parameters()}
        return record, gradients | buffers_of(self.model)


def test_a_window_whose_loader_processes_are_killed_is_computed_again_and_gives_the_same() -> None:
    undisturbed = Loaded()
    expected = [undisturbed.window(index) for index in range(3)]
    disturbed = Loaded(2, 5, 10)
    found = [disturbed.window(index) for index in range(3)]
    for (record, state), (expected_record, expected_state) in zip(found, expected, strict=True):
        assert (record.loss, record.num_samples) == (expected_record.loss, expected_record.num_samples)
        for name, value in expected_state.items():
            assert state[name].equal(value), name
    assert disturbed.num_microbatches == 9 + 2 + 3 + 2
    assert (disturbed.rescue.num_lost_loaders, disturbed.rescue.num_rescues) == (3, 0)
    assert disturbed.told == []
    assert disturbed.rescue.plan.microbatch_size == 4


def test_loader_processes_that_are_killed_again_and_again_end_the_trial() -> None:
    loaded = Loaded(1, 2, 3, 4)
    with pytest.raises(LoaderLostError, match="loader processes were killed: DataLoader worker"):
        loaded.window(0)
    assert loaded.num_microbatches == 4


def test_where_others_wait_inside_a_window_lost_loaders_end_it_at_once() -> None:
    loaded = Loaded(1)
    loaded.rescue.is_alone = False
    with pytest.raises(LoaderLostError):
        loaded.window(0)


def test_a_window_that_is_told_to_end_leaves_everything_as_it_was_before() -> None:
    model = Counting()
    rescue = make_rescue(model, BatchPlan.build(8, 4))
    termination = rescue.termination = Termination(30.0)
    before, state = buffers_of(model), torch.get_rng_state()

    def window(plan: BatchPlan) -> None:
        for batch in termination.watch([torch.randn(4, 3), torch.randn(4, 3)]):
            model(batch).sum().backward()
            termination.is_due = True

    with pytest.raises(EndRequested):
        rescue.run(window)
    assert torch.get_rng_state().equal(state)
    assert all(buffers_of(model)[name].equal(value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "error", [OOM, KeyError("label"), RuntimeError("DataLoader worker (pid 7) exited unexpectedly")]
)
def test_what_fails_when_the_machine_is_taken_back_is_no_failure(error: Exception) -> None:
    """Loader processes get the signal too."""
    told: list[PlanChanged] = []
    rescue = make_rescue(nn.Linear(1, 1), BatchPlan.build(8, 4), told)
    rescue.termination = Termination(30.0)
    rescue.termination.is_due = True
    with pytest.raises(EndRequested):
        rescue.run(fail_times(1, error))
    assert (told, rescue.num_rescues, rescue.num_lost_loaders) == ([], 0, 0)
