"""A trial's training function on its device, under its memory cap. No torch on a CPU, unless it is there.

This is all there is of a trial without a task: its function may not need torch, which takes seconds to
import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.byte_size import format_bytes
from tune_easytrain.errors import LoaderLostError, OutOfMemoryInTrainingError
from tune_easytrain.host_memory import CpuMemory
from tune_easytrain.loader_errors import is_lost_loader
from tune_easytrain.memory_budget import BudgetRequest
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line
from tune_easytrain.protocol import AttemptReply, Opened, Opening, PlanChanged, Report, WorkerPlace
from tune_easytrain.termination import Termination
from tune_easytrain.trial_context import TrialContext

if TYPE_CHECKING:
    from tune_easytrain.memory import DeviceMemory
    from tune_easytrain.rank_group import RankGroup
    from tune_easytrain.task import Task


class FunctionSession:
    """The device, the memory cap and the training function of one trial.

    Raises TaskError where torch does not see the GPU that the trial was given.
    """

    _task: Task | None = None
    _is_near_edge = False

    def __init__(self, opening: Opening) -> None:
        self._opening = opening
        self._settings = settings = opening.settings
        self.memory: DeviceMemory
        torch = sys.modules.get("torch") if opening.device == "cpu" else importlib.import_module("torch")
        if torch is not None:
            torch.set_num_threads(opening.num_threads)
        if opening.device == "cpu":
            self._device, self._device_name = "cpu", "cpu"
            self.memory = CpuMemory()
        else:
            from tune_easytrain.devices import choose_device, device_name
            from tune_easytrain.memory import device_memory

            device = choose_device(opening.device)
            self._device, self._device_name = str(device), device_name(device)
            self.memory = device_memory(device)
        self.budget_bytes = opening.budget_bytes or self.memory.budget_bytes(
            BudgetRequest(
                memory_fraction=settings.memory_fraction,
                device_share=opening.device_share,
                memory_budget_bytes=settings.memory_budget_bytes,
            )
        )

    def opened(self) -> Opened:
        """Describe the device and the budget."""
        return Opened(
            device_name=self._device_name,
            budget_bytes=self.budget_bytes,
            num_train_samples=self._num_train_samples,
            metric_names=None,
            resumed_microbatch_limit=None,
        )

    def attempt(self, microbatch_size: int, ranks: RankGroup | None = None) -> AttemptReply:
        """Try one micro-batch size; only a trial with a task can."""
        raise NotImplementedError("a trial without a task has nothing to try")

    def join(self, place: WorkerPlace, tell_port: Callable[[int], None]) -> RankGroup:
        """Meet the workers that train together with this one."""
        from tune_easytrain.devices import choose_device
        from tune_easytrain.rank_group import RankGroup

        return RankGroup.join(place, choose_device(self._device), tell_port)

    def train(
        self,
        microbatch_limit: int | None,
        send: Callable[[Report | PlanChanged], None],
        ranks: RankGroup | None = None,
        termination: Termination | None = None,
    ) -> None:
        """Run the training function to its end; `send` takes each report, and each new batch plan.

        `ranks` are the workers that train together with this one (None: there are no others), `termination`
        is who knows whether this process was told to end.

        Raises OutOfMemoryInTrainingError, with what to change, when memory runs out, LoaderLostError when
        loader processes are killed.
        """
        function = self._training_function()
        checkpoint = self._opening.checkpoint_path
        self.memory.release()
        self.memory.cap(self.budget_bytes)
        self.memory.reset_peak()
        context = TrialContext(
            task=self._task,
            device_name=self._device,
            batch_plan=self._plan(microbatch_limit, ranks),
            settings=self._settings,
            memory=self.memory,
            scratch_dir=Path(self._opening.scratch_dir),
            checkpoint_path=None if checkpoint is None else Path(checkpoint),
            send=send,
            is_near_edge=self._is_near_edge,
            workers=ranks,
            termination=termination,
            store=self._opening.store,
        )
        try:
            function(self._opening.config, context)
        except Exception as error:
            if is_lost_loader(error):
                raise LoaderLostError(f"loader processes were killed: {error}") from error
            if classify_error(error) is not ErrorKind.MEMORY:
                raise
            size = "" if microbatch_limit is None else f" with micro-batches of {microbatch_limit} samples"
            raise OutOfMemoryInTrainingError(
                f"memory ran out in training{size}: {first_line(error)}. {self._memory_advice()}"
            ) from error

    def _memory_advice(self) -> str:
        return (
            f"The trial may use {format_bytes(self.budget_bytes)}; have its function use less, or raise "
            "batch.memory_budget or batch.memory_fraction"
        )

    def _training_function(self) -> Callable[[dict[str, Any], TrialContext], None]:
        assert self._opening.function_payload is not None, "a trial without a task has a function"
        function: Callable[[dict[str, Any], TrialContext], None] = cloudpickle.loads(
            self._opening.function_payload
        )
        return function

    @property
    def _num_train_samples(self) -> int | None:
        return None

    def _plan(self, microbatch_limit: int | None, ranks: RankGroup | None) -> BatchPlan | None:
        effective = self._settings.window_size(self._num_train_samples)
        if effective is None or microbatch_limit is None:
            return None
        if self._num_train_samples is not None:
            effective = min(effective, self._num_train_samples)
        rank, num_workers = (0, 1) if ranks is None else (ranks.rank, ranks.num_workers)
        return BatchPlan.build(
            effective,
            min(microbatch_limit, effective),
            num_workers=num_workers,
            rank=rank,
            group_size=1 if self._task is None else self._task.group_size,
        )
