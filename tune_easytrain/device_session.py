"""A trial's torch code on its device: opened once, asked for attempts, then for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from tune_easytrain import evaluation_pass, train_loop
from tune_easytrain.batch_coupling import find_coupling
from tune_easytrain.compiled_model import load_compiler
from tune_easytrain.devices import choose_device, device_type
from tune_easytrain.errors import EstimateError, TaskError
from tune_easytrain.estimate import estimate_task
from tune_easytrain.function_session import FunctionSession
from tune_easytrain.length_batches import measure_lengths, require_lengths
from tune_easytrain.memory_budget import headroom_bytes, probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.probe_attempt import run_attempt
from tune_easytrain.protocol import AttemptReply, Opened, Opening
from tune_easytrain.random_state import kept_random_state, seed_everything
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.settings import TrialSettings
from tune_easytrain.signature import task_signature
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Task
from tune_easytrain.trial_context import TrialContext, load_checkpoint
from tune_easytrain.worst_case import with_known_worst_case

_CLEAN_TOLERANCE = 0.5
"""Share of the headroom that libraries may keep after an attempt (workspaces, handles, caches of kernels) in
a child that goes on to train."""


class DeviceSession(FunctionSession):
    """The device side of one trial with a task: what it trains on, and the attempts before.

    Raises TaskError for a task that cannot be trained, before anything is tried.
    """

    _task: Task

    def __init__(self, opening: Opening) -> None:
        settings = opening.settings
        torch.set_num_threads(opening.num_threads)
        device = choose_device(opening.device)
        task = _build_task(opening)
        probed_task, task = _open_data(task, settings, device)
        # What building the model imports is not to count against a cap on the CPU: signing builds it before.
        signature = _sign(probed_task, opening, device)
        if settings.compile:
            load_compiler(device)
        is_first = opening.budget_bytes is None
        self._coupling = find_coupling(task) if is_first and task.is_trained else None
        self._task, self._probed_task, self._signature = task, probed_task, signature
        super().__init__(opening)

    def opened(self) -> Opened:
        """Describe the device, the budget and the data."""
        return replace(
            super().opened(),
            metric_names=self._metric_names(),
            resumed_microbatch_limit=self._resumed_limit(),
            signature=self._signature,
            coupling=self._coupling,
            longest_tokens=self._longest_tokens(),
        )

    def attempt(self, microbatch_size: int, ranks: RankGroup | None = None) -> AttemptReply:
        """Try one micro-batch size; bugs in the task are raised as they are.

        `ranks` are the workers that try together with this one (None: it tries by itself).
        """
        self.memory.cap(probed_bytes(self.budget_bytes))
        used_before = self.memory.used_bytes()
        attempt = self._attempt(microbatch_size, ranks)
        if self._settings.compile and attempt.ran:  # sizes that do not fit anyway are not worth compiling for
            attempt = self._attempt(microbatch_size, ranks, is_compiled=True)
        self._is_near_edge = attempt.outcome is Outcome.ALLOCATOR_RETRIED
        most_bytes = _CLEAN_TOLERANCE * headroom_bytes(self.budget_bytes)
        kept_bytes = self.memory.used_bytes() - used_before
        return AttemptReply(attempt, is_clean=attempt.ran and kept_bytes <= most_bytes)

    def _attempt(
        self, microbatch_size: int, ranks: RankGroup | None, *, is_compiled: bool = False
    ) -> Attempt:
        return run_attempt(
            self._probed_task,
            microbatch_size,
            device=torch.device(self._device),
            memory=self.memory,
            precision=self._settings.precision,
            clip_norm=self._settings.clip_norm,
            sharding=self._settings.sharding,
            rank=self._opening.rank,
            num_workers=self._settings.num_workers,
            is_compiled=is_compiled,
            ranks=ranks,
        )

    def _training_function(self) -> Callable[[dict[str, Any], TrialContext], None]:
        if self._settings.evaluates_only:
            return evaluation_pass.evaluate
        return train_loop.train if self._opening.function_payload is None else super()._training_function()

    def _memory_advice(self) -> str:
        return "Lower hp.batch_size or batch.memory_fraction, or set batch.probe: auto where it is off"

    @property
    def _num_train_samples(self) -> int:
        data: Any = self._task.train_data()  # open already
        return len(data)

    def _longest_tokens(self) -> int | None:
        """Return the length of the longest training sample, where micro-batches are limited by tokens."""
        if self._settings.max_tokens is None:
            return None
        require_lengths(self._task)
        lengths = measure_lengths(self._task, self._task.train_data())
        return None if lengths is None else lengths.longest

    def _metric_names(self) -> tuple[str, ...] | None:
        if self._opening.function_payload is not None:
            return None
        return self._task.metric_names

    def _resumed_limit(self) -> int | None:
        is_built_in = self._opening.function_payload is None and not self._settings.evaluates_only
        if self._opening.checkpoint_path is None or not is_built_in:
            return None
        return train_loop.checkpoint_microbatch_limit(load_checkpoint(Path(self._opening.checkpoint_path)))


def estimate(opening: Opening) -> MemoryEstimate | EstimateError:
    """Return the estimate of a trial's memory, or why there is none; no device is touched."""
    if opening.task_payload is None:
        return EstimateError("the trial has no task")
    torch.set_num_threads(opening.num_threads)
    try:
        task = _build_task(opening)
        settings = opening.settings
        return estimate_task(
            task,
            precision=settings.precision,
            device="cpu" if device_type(opening.device) == "cpu" else "cuda",
            clip_norm=settings.clip_norm,
            sharding=settings.sharding,
            num_workers=settings.num_workers,
        )
    except EstimateError as error:
        return error


def _open_data(task: Task, settings: TrialSettings, device: torch.device) -> tuple[Task, Task]:
    """Open the data before the memory that it takes on a CPU could count against the cap.

    Return the task to probe, which keeps one sample of it, and the task to train, which opens no data
    set a second time. No sample is read of those it trains on: loader processes are to open files
    of their own.
    """
    probed = task = replace(task, train_data=_opened_checked(task))
    with kept_random_state():
        if settings.probe != "off":
            probed = with_known_worst_case(task)
        train_data = _opened_once(task.train_data, settings.seed)
        val_data = None if task.val_data is None else _opened_once(task.val_data, settings.seed)
        task = replace(task, train_data=train_data, val_data=val_data if task.is_trained else train_data)
        task.train_data()
        if device.type == "cpu" and task.val_data is not None:
            task.val_data()
            for build_metric in task.metrics.values():  # what metrics import is not to count either
                build_metric()
    return probed, task


def _sign(task: Task, opening: Opening, device: torch.device) -> str:
    is_first = opening.budget_bytes is None
    is_needed = (opening.is_shared and is_first) or device.type == "cpu"
    if opening.settings.probe == "off" or not is_needed:
        return ""
    return task_signature(task, opening, device)


def _opened_once(open_data: Callable[[], Any], seed: int) -> Callable[[], Any]:
    """Return a function that opens a data set when it is first called, with the random state of `seed`."""

    @functools.cache
    def data() -> Any:
        with kept_random_state():
            seed_everything(seed)
            return open_data()

    return data


def _opened_checked(task: Task) -> Callable[[], Any]:
    """Return a function that opens the data the task is tried with, and refuses what is of no use."""
    name = "train_data" if task.is_trained else "val_data"

    def data() -> Any:
        data = task.train_data()
        if not hasattr(data, "__len__"):
            raise TaskError(
                f"{name}() returned a {type(data).__name__} without a length; give a map-style Dataset"
            )
        if len(data) == 0:
            raise TaskError(f"{name}() returned a data set without a single sample")
        return data

    return data


def _build_task(opening: Opening) -> Task:
    """Build the trial's task, with its memory strategies; raises TaskError where that is no Task."""
    assert opening.task_payload is not None
    task = cloudpickle.loads(opening.task_payload)(opening.config)
    if not isinstance(task, Task):
        raise TaskError(f"the task function returned a {type(task).__name__}, not a tune_easytrain.Task")
    settings = opening.settings
    if not task.is_trained and opening.function_payload is not None and settings.probe == "auto":
        raise TaskError("the task has no optimizer, so the probe cannot try what train.function will do")
    if settings.evaluates_only or not task.is_trained:
        task = task.only_evaluated()
    return with_strategies(task, checkpointing=settings.checkpointing, channels_last=settings.channels_last)
