from __future__ import annotations

import random
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tune_easytrain import Task
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.memory import DeviceMemory
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.probe_attempt import run_attempt

CPU = torch.device("cpu")


class Recording:
    """A task that writes down what is done with it: what was called, with how many samples, and how."""

    def __init__(self, **changes: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.models: list[nn.Module] = []
        self.task = Task(
            **{
                "model": self.model,
                "loss": self.loss,
                "optimizer": self.optimizer,
                "train_data": lambda: [torch.zeros(4) for _ in range(20)],
                "predict": lambda model, batch: self.passed("predict", model, batch),
                "generate": lambda model, batch: self.passed("generate", model, batch),
                **changes,
            }
        )

    def model(self) -> nn.Module:
        self.models.append(nn.Linear(4, 1))
        return self.models[-1]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.passed("loss", model, batch)
        return model(batch).square().mean() + torch.rand(()) * 0

    def passed(self, name: str, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        resident = all(p.grad is not None for p in model.parameters())
        mode = "train" if model.training else "eval"
        self.calls.append((name, mode, len(batch), torch.is_grad_enabled(), resident))
        return batch, batch

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(model.parameters())
        optimizer.register_step_post_hook(lambda *_: self.calls.append(("step",)))
        return optimizer


def attempt(task: Task, size: int = 6, memory: DeviceMemory | None = None, **options: Any) -> Attempt:
    return run_attempt(task, size, device=CPU, memory=memory or CpuMemory(), **options)


def test_everything_that_training_will_do_is_done_once() -> None:
    recording = Recording()
    result = attempt(recording.task)
    assert recording.calls == [
        ("loss", "train", 2, True, False),
        ("step",),
        ("loss", "train", 2, True, False),
        ("loss", "train", 6, True, True),  # the full size, on top of resident gradients and optimizer state
        ("step",),
        ("loss", "eval", 6, False, False),
        ("predict", "eval", 6, False, False),
        ("generate", "eval", 6, False, False),
    ]
    assert (result.microbatch_size, result.outcome, result.message) == (6, Outcome.FITS, "")
    assert result.peak_bytes is not None


def test_a_single_sample_is_the_tiny_batch_too() -> None:
    recording = Recording(predict=None, generate=None)
    attempt(recording.task, 1)
    assert {call[2] for call in recording.calls if call[0] == "loss"} == {1}


def test_gradients_are_clipped_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda parameters, norm: norms.append(norm))
    attempt(Recording().task, clip_norm=0.5)
    assert norms == [0.5, 0.5]


def test_bf16_runs_the_passes_in_bf16() -> None:
    formats: list[torch.dtype] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch)
        formats.append(out.dtype)
        return out.mean()

    attempt(Recording(loss=loss, predict=None).task, precision="bf16")
    assert set(formats) == {torch.bfloat16}


def test_the_model_is_a_new_one_each_time_and_does_not_outlive_the_attempt() -> None:
    recording = Recording()
    attempt(recording.task)
    attempt(recording.task)
    first, second = (weakref.ref(model) for model in recording.models)
    assert first() is not second()
    recording.models.clear()
    assert (first(), second()) == (None, None)


def draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.random())


def seed() -> None:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory"), KeyError("bug")])
def test_random_state_is_left_as_it_was(error: Exception | None) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        draw()
        if error is not None:
            raise error
        return model(batch).mean()

    seed()
    expected = draw()
    seed()
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            attempt(Recording(loss=loss).task)
    else:
        attempt(Recording(loss=loss).task)
    assert draw() == expected


def test_a_memory_error_is_the_attempts_outcome() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore lines")
        return model(batch).mean()

    result = attempt(Recording(loss=loss).task)
    assert result.outcome is Outcome.OUT_OF_MEMORY
    assert result.message == "CUDA out of memory. Tried to allocate 9 GiB"
    assert not result.ran


AMBIGUOUS = "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmStridedBatchedEx(`"


def test_what_a_kernel_cannot_count_is_a_size_limit_and_no_lack_of_memory() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if len(batch) > 2:
            raise RuntimeError("input tensor must fit into 32-bit index math")
        return model(batch).mean()

    result = attempt(Recording(loss=loss).task)
    assert (result.outcome, result.ran) == (Outcome.SIZE_LIMIT, False)
    assert result.message == "input tensor must fit into 32-bit index math"


def test_an_ambiguous_error_counts_by_whether_a_smaller_size_has_run() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if len(batch) >= fails_from:
            raise RuntimeError(AMBIGUOUS)
        return model(batch).mean()

    fails_from = 3
    assert attempt(Recording(loss=loss).task).outcome is Outcome.SIZE_LIMIT
    fails_from = 2
    for size in (2, 6):
        with pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_SUPPORTED"):
            attempt(Recording(loss=loss).task, size)


def test_a_device_that_is_broken_after_the_failure_does_not_hide_it() -> None:
    class Broken(CpuMemory):
        is_broken = False

        def release(self) -> None:
            if self.is_broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    memory = Broken()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        if len(batch) > 2:
            memory.is_broken = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return model(batch).mean()

    assert attempt(Recording(loss=loss).task, memory=memory).outcome is Outcome.SIZE_LIMIT


def test_a_memory_error_without_words_is_named_by_its_type() -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        raise MemoryError

    assert attempt(Recording(loss=loss).task).message == "MemoryError"


@pytest.mark.parametrize(
    "error", [KeyError("label"), ValueError("out of memory"), RuntimeError("shapes differ")]
)
def test_a_bug_is_raised_as_it_is(error: Exception) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        attempt(Recording(loss=loss).task)
    assert caught.value is error


def test_nothing_of_a_failed_pass_is_alive_when_the_attempt_is_over() -> None:
    activations: list[weakref.ref[Tensor]] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        hidden = model(batch)
        activations.append(weakref.ref(hidden))
        raise RuntimeError("out of memory")

    assert attempt(Recording(loss=loss).task).outcome is Outcome.OUT_OF_MEMORY
    (activation,) = activations
    assert activation() is None


class Scripted(CpuMemory):
    """A meter that knows tensors to the byte: of training, of an eighth of the evaluation, and at the end."""

    measures_tensors = True

    def __init__(self, *peaks_bytes: int) -> None:
        super().__init__()
        self.peaks_bytes = list(peaks_bytes)

    def peak_bytes(self) -> int:
        return self.peaks_bytes.pop(0)

    def used_bytes(self) -> int:
        return 10


@pytest.mark.parametrize(
    ("peaks_bytes", "sizes_evaluated", "peak_bytes"),
    [
        pytest.param((100, 21, 21), {2}, 100, id="an eighth shows that all of it is less than training"),
        pytest.param((100, 22, 120), {2, 16}, 120, id="evaluation may need more than training"),
    ],
)
def test_evaluation_is_done_in_full_unless_an_eighth_settles_it(
    peaks_bytes: tuple[int, ...], sizes_evaluated: set[int], peak_bytes: int
) -> None:
    recording = Recording()
    result = attempt(recording.task, 16, memory=Scripted(*peaks_bytes))
    assert {call[2] for call in recording.calls if call[1:2] == ("eval",)} == sizes_evaluated
    assert result.peak_bytes == peak_bytes


@pytest.mark.parametrize("memory", [CpuMemory(), Scripted(100, 1, 1)])
def test_evaluation_of_a_few_samples_or_on_a_cpu_is_always_done_in_full(memory: CpuMemory) -> None:
    recording = Recording()
    attempt(recording.task, 3 if memory.measures_tensors else 16, memory=memory)
    (size,) = {call[2] for call in recording.calls if call[1:2] == ("eval",)}
    assert size == (3 if memory.measures_tensors else 16)


class Struggling(CpuMemory):
    """An allocator that flushes its cache whenever it is asked."""

    retries = 0

    def num_retries(self) -> int:
        self.retries += 1
        return self.retries


def test_an_allocator_that_had_to_flush_its_cache_is_told() -> None:
    result = attempt(Recording().task, memory=Struggling())
    assert (result.outcome, result.ran) == (Outcome.ALLOCATOR_RETRIED, True)


def test_the_tasks_own_worst_case_is_used_and_the_data_left_alone() -> None:
    def no_data() -> Any:
        raise AssertionError("the data set was opened")

    recording = Recording(worst_case=lambda num_samples: torch.ones(num_samples, 4), train_data=no_data)
    assert attempt(recording.task, 5).outcome is Outcome.FITS
    assert {call[2] for call in recording.calls if call[0] == "loss"} == {2, 5}


def test_a_rank_of_several_keeps_the_state_of_what_it_owns() -> None:
    seen: list[int] = []

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        built = torch.optim.Adam(model.parameters())
        built.register_step_post_hook(
            lambda *_: seen.append(sum(state["exp_avg"].numel() for state in built.state.values()))
        )
        return built

    task = Recording(optimizer=optimizer).task  # a weight of four numbers and a bias
    for rank in range(2):
        found = attempt(task, sharding="optimizer", rank=rank, num_workers=2)
        assert found.outcome is Outcome.FITS
    assert seen == [4, 4, 1, 1]
    attempt(task, rank=1, num_workers=2)
    assert seen[4:] == [5, 5]
