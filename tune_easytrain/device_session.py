"""A trial's torch code on its device: opened once, asked for attempts, then for training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from tune_easytrain import train_loop
from tune_easytrain.batch_coupling import find_coupling
from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.compiled_model import load_compiler
from tune_easytrain.errors import EstimateError, OutOfMemoryInTrainingError, TaskError
from tune_easytrain.estimate import estimate_task
from tune_easytrain.length_batches import measure_lengths, require_lengths
from tune_easytrain.memory import ErrorKind, classify_error, device_memory, first_line
from tune_easytrain.memory_budget import BudgetRequest, headroom_bytes, probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.probe_attempt import run_attempt
from tune_easytrain.protocol import (
    AttemptReply,
    AttemptRequest,
    CheckRequest,
    Continue,
    EstimateRequest,
    Finished,
    Opened,
    Opening,
    PlanChanged,
    Report,
    StoreOpened,
    TrainRequest,
    WorkerPlace,
)
from tune_easytrain.random_state import kept_random_state, seed_everything
from tune_easytrain.rank_group import RankGroup
from tune_easytrain.signature import task_signature
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Task
from tune_easytrain.task_check import check_task
from tune_easytrain.trial_context import TrialContext, load_checkpoint
from tune_easytrain.worst_case import with_known_worst_case

_CLEAN_TOLERANCE = 0.5
"""Share of the headroom that libraries may keep after an attempt (workspaces, handles, caches of kernels) in
a child that goes on to train."""


class DeviceSession:
    """The device side of one trial: its task, its device, its memory cap.

    Raises TaskError for a task that cannot be trained, before anything is tried.
    """

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._settings = opening.settings
        torch.set_num_threads(opening.num_threads)
        self._device = _choose_device(opening.device)
        self._task = self._probed_task = _build_task(opening)
        if self._task is not None:
            self._probed_task, self._task = self._open_data(self._task)
        # What building the model imports is not to count against a cap on the CPU: signing builds it before.
        self._signature = self._sign()
        if self._settings.compile:
            load_compiler(self._device)
        is_first = opening.budget_bytes is None
        self._coupling = find_coupling(self._task) if self._task is not None and is_first else None
        self._is_near_edge = False
        self.memory = device_memory(self._device)
        self.budget_bytes = opening.budget_bytes or self.memory.budget_bytes(
            BudgetRequest(
                memory_fraction=self._settings.memory_fraction,
                device_share=opening.device_share,
                memory_budget_bytes=self._settings.memory_budget_bytes,
            )
        )

    def opened(self) -> Opened:
        """Describe the device, the budget and the data."""
        return Opened(
            device_name=device_name(self._device),
            budget_bytes=self.budget_bytes,
            num_train_samples=self._num_train_samples,
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
        assert self._probed_task is not None, "an attempt needs a task"
        return run_attempt(
            self._probed_task,
            microbatch_size,
            device=self._device,
            memory=self.memory,
            precision=self._settings.precision,
            clip_norm=self._settings.clip_norm,
            sharding=self._settings.sharding,
            rank=self._opening.rank,
            num_workers=self._settings.num_workers,
            is_compiled=is_compiled,
            ranks=ranks,
        )

    def train(
        self,
        microbatch_limit: int | None,
        send: Callable[[Report | PlanChanged], None],
        ranks: RankGroup | None = None,
    ) -> None:
        """Run the training function to its end; `send` takes each report, and each new batch plan.

        `ranks` are the workers that train together with this one (None: there are no others).

        Raises OutOfMemoryInTrainingError, with what to change, when memory runs out.
        """
        function = train_loop.train
        if self._opening.function_payload is not None:
            function = cloudpickle.loads(self._opening.function_payload)
        checkpoint = self._opening.checkpoint_path
        ranks = RankGroup() if ranks is None else ranks
        self.memory.release()
        self.memory.cap(self.budget_bytes)
        self.memory.reset_peak()
        context = TrialContext(
            task=self._task,
            device=self._device,
            batch_plan=self._plan(microbatch_limit, ranks),
            settings=self._settings,
            memory=self.memory,
            scratch_dir=Path(self._opening.scratch_dir),
            checkpoint_path=None if checkpoint is None else Path(checkpoint),
            send=send,
            is_near_edge=self._is_near_edge,
            ranks=ranks,
        )
        try:
            function(self._opening.config, context)
        except Exception as error:
            if classify_error(error) is not ErrorKind.MEMORY:
                raise
            raise OutOfMemoryInTrainingError(
                f"memory ran out in training with micro-batches of {microbatch_limit} samples: "
                f"{first_line(error)}. Lower hp.batch_size or batch.memory_fraction, or set "
                "batch.probe: auto where it is off"
            ) from error

    def join(self, place: WorkerPlace, tell_port: Callable[[int], None]) -> RankGroup:
        """Meet the workers that train together with this one."""
        return RankGroup.join(place, self._device, tell_port)

    def _plan(self, microbatch_limit: int | None, ranks: RankGroup) -> BatchPlan | None:
        effective = self._settings.effective_batch_size
        if effective is None or microbatch_limit is None:
            return None
        if self._num_train_samples is not None:
            effective = min(effective, self._num_train_samples)
        return BatchPlan.build(
            effective, min(microbatch_limit, effective), num_workers=ranks.num_workers, rank=ranks.rank
        )

    def _open_data(self, task: Task) -> tuple[Task, Task]:
        """Open the data before the memory that it takes on a CPU could count against the cap.

        Return the task to probe, which keeps one sample of it, and the task to train, which opens no data
        set a second time. No sample is read of those it trains on: loader processes are to open files
        of their own.
        """
        seed = self._settings.seed
        probed = task = replace(task, train_data=_opened_checked(task.train_data))
        with kept_random_state():
            if self._settings.probe != "off":
                probed = with_known_worst_case(task)
            task = replace(
                task,
                train_data=_opened_once(task.train_data, seed),
                val_data=None if task.val_data is None else _opened_once(task.val_data, seed),
            )
            task.train_data()
            if self._device.type == "cpu" and task.val_data is not None:
                task.val_data()
        return probed, task

    @property
    def _num_train_samples(self) -> int | None:
        if self._task is None:
            return None
        data: Any = self._task.train_data()  # open already
        return len(data)

    def _longest_tokens(self) -> int | None:
        """Return the length of the longest training sample, where micro-batches are limited by tokens."""
        if self._settings.max_tokens is None or self._task is None:
            return None
        require_lengths(self._task)
        lengths = measure_lengths(self._task, self._task.train_data())
        return None if lengths is None else lengths.longest

    def _sign(self) -> str:
        is_first = self._opening.budget_bytes is None
        is_needed = (self._opening.is_shared and is_first) or self._device.type == "cpu"
        if self._probed_task is None or self._settings.probe == "off" or not is_needed:
            return ""
        return task_signature(self._probed_task, self._opening, self._device)

    def _metric_names(self) -> tuple[str, ...] | None:
        if self._opening.function_payload is not None or self._task is None:
            return None
        return tuple(train_loop.metric_names(self._task))

    def _resumed_limit(self) -> int | None:
        if self._opening.checkpoint_path is None or self._opening.function_payload is not None:
            return None
        return train_loop.checkpoint_microbatch_limit(load_checkpoint(Path(self._opening.checkpoint_path)))


def serve(connection: Connection, opening: Opening | EstimateRequest | CheckRequest) -> None:
    """Answer a trial's requests until training has ended; errors are the caller's to send."""
    if isinstance(opening, CheckRequest):
        connection.send(check_task(opening))
        return
    if isinstance(opening, EstimateRequest):
        connection.send(estimate(opening.opening))
        return
    session = DeviceSession(opening)
    connection.send(session.opened())

    def send(message: Report | PlanChanged) -> None:
        connection.send(message)
        if isinstance(message, Report):
            reply = connection.recv()
            assert isinstance(reply, Continue)

    while True:
        request = connection.recv()
        ranks = None
        if request.place is not None:
            ranks = session.join(request.place, lambda port: connection.send(StoreOpened(port)))
        if isinstance(request, AttemptRequest):
            reply = session.attempt(request.microbatch_size, ranks)
            connection.send(reply)
            if ranks is not None and reply.attempt.ran:  # else others may still wait for this one
                ranks.leave()
        elif isinstance(request, TrainRequest):
            session.train(request.microbatch_limit, send, ranks)
            if ranks is not None:
                ranks.leave()
            connection.send(Finished())
            return


def estimate(opening: Opening) -> MemoryEstimate | EstimateError:
    """Return the estimate of a trial's memory, or why there is none; no device is touched."""
    torch.set_num_threads(opening.num_threads)
    try:
        task = _build_task(opening)
        if task is None:
            return EstimateError("the trial has no task")
        settings = opening.settings
        return estimate_task(
            task,
            precision=settings.precision,
            device="cpu" if _device_type(opening.device) == "cpu" else "cuda",
            clip_norm=settings.clip_norm,
            sharding=settings.sharding,
            num_workers=settings.num_workers,
        )
    except EstimateError as error:
        return error


def device_name(device: torch.device) -> str:
    """Return the device's name as people know it, `cpu` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _device_type(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name).type


def _choose_device(name: str) -> torch.device:
    device = torch.device(_device_type(name) if name == "auto" else name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise TaskError(
            "the trial was given a GPU but torch sees none on this node; "
            "check the driver and that torch was built for CUDA"
        )
    return device


def _opened_once(open_data: Callable[[], Any], seed: int) -> Callable[[], Any]:
    """Return a function that opens a data set when it is first called, with the random state of `seed`."""

    @functools.cache
    def data() -> Any:
        with kept_random_state():
            seed_everything(seed)
            return open_data()

    return data


def _opened_checked(open_data: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that opens a training set, and refuses one that cannot be trained on."""

    def data() -> Any:
        data = open_data()
        if not hasattr(data, "__len__"):
            raise TaskError(
                f"train_data() returned a {type(data).__name__} without a length; give a map-style Dataset"
            )
        if len(data) == 0:
            raise TaskError("train_data() returned a data set without a single sample")
        return data

    return data


def _build_task(opening: Opening) -> Task | None:
    if opening.task_payload is None:
        return None
    task = cloudpickle.loads(opening.task_payload)(opening.config)
    if not isinstance(task, Task):
        raise TaskError(f"the task function returned a {type(task).__name__}, not a tune_easytrain.Task")
    settings = opening.settings
    return with_strategies(task, checkpointing=settings.checkpointing, channels_last=settings.channels_last)
