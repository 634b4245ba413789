"""One attempt of the probe: everything training will do with one micro-batch size, done once."""

from __future__ import annotations

import gc
import time
from contextlib import suppress

import torch
from torch import nn

from tune_easytrain.accumulate import accumulate_gradients
from tune_easytrain.batch import count_samples
from tune_easytrain.compiled_model import CompiledModel
from tune_easytrain.memory import DeviceMemory
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line
from tune_easytrain.optimizer_shards import shard_optimizer
from tune_easytrain.precision import autocast
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.random_state import kept_random_state
from tune_easytrain.rank_group import RankGroup, take_buffers
from tune_easytrain.rescue import StateSnapshot
from tune_easytrain.settings import Precision, Sharding
from tune_easytrain.sharded_model import is_sharded, place_model
from tune_easytrain.task import Batch, Task
from tune_easytrain.worst_case import worst_case_batch

_TINY_SIZE = 2  # BatchNorm refuses a single value per channel
_EVALUATED_PART = 8


def run_attempt(
    task: Task,
    microbatch_size: int,
    *,
    device: torch.device,
    memory: DeviceMemory,
    precision: Precision = "fp32",
    clip_norm: float | None = None,
    is_compiled: bool = False,
    sharding: Sharding = "none",
    rank: int = 0,
    num_workers: int = 1,
    ranks: RankGroup | None = None,
) -> Attempt:
    """Run training, evaluation and generation at one micro-batch size under the cap already set.

    The model is built anew and nothing of it outlives the attempt; random state is left as it was. Of
    several workers, each tries by itself what it will hold as `rank`; what they exchange is not sent. With
    `ranks` they try together, as the workers of a sharded model have to.
    Memory and size limits become the attempt's outcome. Every other error is raised as it is.
    """
    memory.release()
    memory.reset_peak()
    retries_before = memory.num_retries()
    start = time.perf_counter()
    failure, outcome = "", Outcome.FITS
    exercise = _Exercise(
        task,
        microbatch_size,
        device=device,
        memory=memory,
        precision=precision,
        clip_norm=clip_norm,
        is_compiled=is_compiled,
        sharding=sharding,
        rank=rank,
        num_workers=num_workers,
        ranks=RankGroup() if ranks is None else ranks,
    )
    try:
        with kept_random_state():
            exercise.run()
    except Exception as error:
        kind = classify_error(error, smaller_ran=any(size < microbatch_size for size in exercise.sizes_run))
        if kind is ErrorKind.BUG:
            raise
        outcome = Outcome.OUT_OF_MEMORY if kind is ErrorKind.MEMORY else Outcome.SIZE_LIMIT
        failure = first_line(error)
    # The traceback that held the failed pass's tensors is gone only here, behind the except block.
    peak_bytes = max(exercise.training_peak_bytes, memory.peak_bytes())
    if outcome is Outcome.FITS and memory.num_retries() > retries_before:
        outcome = Outcome.ALLOCATOR_RETRIED
    # The allocator's cache stays: a process that has failed is thrown away with it, and training needs it.
    gc.collect()
    return Attempt(microbatch_size, outcome, peak_bytes, time.perf_counter() - start, failure)


class _Exercise:
    """What training does, once: the steady state on a tiny micro-batch, a full one with gradients resident.

    Attributes:
        sizes_run: the size of each window's last micro-batch once an optimizer step has followed it.
        training_peak_bytes: the most memory in use while training, once that is known.
    """

    def __init__(
        self,
        task: Task,
        microbatch_size: int,
        *,
        device: torch.device,
        memory: DeviceMemory,
        precision: Precision,
        clip_norm: float | None,
        is_compiled: bool,
        sharding: Sharding,
        rank: int,
        num_workers: int,
        ranks: RankGroup,
    ) -> None:
        self._task, self._microbatch_size, self._memory = task, microbatch_size, memory
        self._device, self._precision, self._clip_norm = device, precision, clip_norm
        self._is_compiled = is_compiled
        self._sharding: Sharding = sharding
        self._rank, self._num_workers, self._ranks = rank, num_workers, ranks
        self.sizes_run: list[int] = []
        self.training_peak_bytes = 0

    def run(self) -> None:
        """Train, evaluate and generate; raises whatever goes wrong."""
        if not self._task.is_trained:
            self._run_evaluation()
            return
        self._model = self._build_model().train()
        if self._is_compiled:
            CompiledModel(self._model)
        self._optimizer = self._task.optimizer(self._model)
        self._shards = shard_optimizer(self._optimizer, self._sharding, self._rank, self._num_workers)
        self._state = StateSnapshot(self._model)
        try:
            tiny = self._batch(min(_TINY_SIZE, self._microbatch_size))
            self._train([tiny])
            full = self._batch(self._microbatch_size)
            self._train([tiny, full])
            self._model.zero_grad(set_to_none=True)
            self.training_peak_bytes = self._memory.peak_bytes()
            del tiny, full
            if not self._evaluation_is_small():
                self._evaluate(self._batch(self._microbatch_size))
        finally:
            del self._model, self._optimizer, self._shards, self._state

    def _run_evaluation(self) -> None:
        """Evaluate and generate, with a tiny micro-batch first, as what a kernel can count is found so."""
        self._model = self._build_model()
        self._state = StateSnapshot(self._model)
        try:
            self._state.take()
            for size in (min(_TINY_SIZE, self._microbatch_size), self._microbatch_size):
                self._evaluate(self._batch(size))
                self.sizes_run.append(size)
        finally:
            del self._model, self._state

    def _build_model(self) -> nn.Module:
        """Build the model where it is needed: hosts take seconds to draw values, which do not matter here.

        What insists on the CPU, or runs out of memory there, is built on the CPU, as for training; and so is
        what no device is to hold as a whole.
        """
        if self._device.type != "cpu" and self._ranks.num_workers == 1:
            with suppress(Exception), self._device:
                return self._task.model().to(self._device)
        return place_model(self._task.model(), self._device, self._ranks, self._sharding)

    def _batch(self, microbatch_size: int) -> Batch:
        return worst_case_batch(self._task, microbatch_size, self._device)

    def _train(self, window: list[Batch]) -> None:
        def loss(net: nn.Module, batch: Batch) -> torch.Tensor:
            with autocast(self._device, self._precision):
                return self._task.loss(net, batch)

        self._state.take()  # as training does, for a rescue
        accumulate_gradients(self._model, loss, window, weight=self._task.weight)
        if self._num_workers > 1 and not is_sharded(self._model):
            take_buffers([p.grad for p in self._model.parameters() if p.grad is not None])
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
        self._optimizer.step()
        self._shards.share_parameters(lambda tensor, owner: None)
        self.sizes_run.append(count_samples(window[-1]))

    def _evaluation_is_small(self) -> bool:
        """Whether an eighth of the micro-batch shows that evaluating all of it needs less than training it.

        Above what is resident, memory is `a + b × m` with an `a` of at least 0, and so at most eight times
        that of an eighth. It saves most of what evaluation costs here; where it does not settle the matter,
        all of it is evaluated.
        """
        part = -(-self._microbatch_size // _EVALUATED_PART)
        if not self._memory.measures_tensors or part < _TINY_SIZE:
            return False
        if is_sharded(self._model):  # all ranks have to come to the same answer
            return False
        self._memory.reset_peak()
        resident_bytes = self._memory.used_bytes()
        self._evaluate(self._batch(part))
        taken_bytes = self._memory.peak_bytes() - resident_bytes
        return resident_bytes + _EVALUATED_PART * taken_bytes <= self.training_peak_bytes

    def _evaluate(self, batch: Batch) -> None:
        self._model.eval()
        with torch.no_grad(), autocast(self._device, self._precision):
            self._task.loss(self._model, batch)
            if self._task.predict is not None:
                self._task.predict(self._model, batch)
            if self._task.generate is not None:
                self._task.generate(self._model, batch)
