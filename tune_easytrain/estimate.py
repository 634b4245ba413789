"""Peak memory of training at any micro-batch size, from a trace that allocates nothing.

The task's model, data and optimizer live on torch's `meta` device, which knows shapes and no values. Two
traces at small sizes give every allocation and free as a line in the size (see `timeline`), and with them
the peak at any size.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tune_easytrain.autocast_rules import Autocast
from tune_easytrain.checkpointing import CHECKPOINTING_KEY
from tune_easytrain.cuda_kernels import cuda_kernels
from tune_easytrain.cuda_optimizers import choose_foreach, cuda_optimizers
from tune_easytrain.errors import BadInputError, EstimateError, UnknownNameError, require_one_of
from tune_easytrain.kernel_scratch import FIXED_BYTES, cuda_scratch
from tune_easytrain.known_values import ConstantsFromHost
from tune_easytrain.memory_estimate import MemoryEstimate, PhaseEstimate, Segment
from tune_easytrain.optimizer_shards import heaviest_rank, shard_optimizer
from tune_easytrain.precision import AUTOCAST_DTYPES
from tune_easytrain.random_state import kept_random_state
from tune_easytrain.rank_group import take_buffers
from tune_easytrain.rescue import StateSnapshot
from tune_easytrain.settings import Precision, Sharding
from tune_easytrain.shard_trace import ShardTrace
from tune_easytrain.strategies import with_strategies
from tune_easytrain.task import Batch, BuildTask, Task
from tune_easytrain.timeline import MemoryRecorder, Timeline, UnknownValueError, join_peaks, join_timelines
from tune_easytrain.worst_case import with_known_worst_case, worst_case_batch

_META = torch.device("meta")
_SIZES = (2, 4)
_LADDER = (2, 4, 8, 16, 32, 64, 128, 256)


def estimate_memory(
    build_task: BuildTask,
    config: dict[str, Any],
    *,
    precision: Precision = "fp32",
    device: Literal["cuda", "cpu"] = "cuda",
    clip_norm: float | None = None,
    checkpointing: str | float | Sequence[str] = "none",
    channels_last: bool = False,
    sharding: Sharding = "none",
    num_workers: int = 1,
) -> MemoryEstimate:
    """Estimate the peak memory of training a task at any micro-batch size, without a device.

    Nothing of the model's size is allocated, and the data set is opened only where the task gives no
    `worst_case`. Gradients and optimizer state are resident, as under accumulation.

    Args:
        build_task: config to Task.
        config: what `build_task` is called with.
        precision: number format of forward passes, by CUDA's autocast rules.
        device: whose kernels to assume.
        clip_norm: largest gradient norm, None: no clipping.
        checkpointing: what the backward pass computes again, as `memory.checkpointing` says it.
        channels_last: whether images and clips lie in memory with their channels last.
        sharding: what the workers split among them, as `memory.sharding` says it.
        num_workers: workers that train together; the estimate is that of the one that needs the most.

    Raises:
        ValueError: `precision` or `device` is none of those there are.
        BadInputError: the task says that it was asked for something it does not have.
        EstimateError: training the task cannot be traced; it says why and where.
    """
    require_one_of("precision", precision, AUTOCAST_DTYPES)
    require_one_of("device", device, ("cuda", "cpu"))
    with _told_as_no_estimate():
        task = with_strategies(build_task(config), checkpointing=checkpointing, channels_last=channels_last)
    return estimate_task(
        task,
        precision=precision,
        device=device,
        clip_norm=clip_norm,
        sharding=sharding,
        num_workers=num_workers,
    )


def estimate_task(
    task: Task,
    *,
    precision: Precision = "fp32",
    device: Literal["cuda", "cpu"] = "cuda",
    clip_norm: float | None = None,
    sharding: Sharding = "none",
    num_workers: int = 1,
) -> MemoryEstimate:
    """Estimate as `estimate_memory` does, for a task that is already built."""
    collects_garbage = gc.isenabled()
    gc.disable()  # a collection would free what a model holds in cycles at another moment in each trace
    try:
        with kept_random_state(), _told_as_no_estimate():
            tracer = _Tracer(
                with_known_worst_case(task if task.is_trained else task.only_evaluated()),
                precision=precision,
                device=device,
                clip_norm=clip_norm,
                sharding=sharding,
                num_workers=num_workers,
            )
            return tracer.estimate()
    finally:
        if collects_garbage:
            gc.enable()


class _Tracer:
    """A task on the `meta` device in the steady state of training."""

    def __init__(
        self,
        task: Task,
        *,
        precision: Precision,
        device: Literal["cuda", "cpu"],
        clip_norm: float | None,
        sharding: Sharding,
        num_workers: int,
    ) -> None:
        self._task = task
        self._dtype = AUTOCAST_DTYPES[precision]
        self._device_type = device
        self._clip_norm = clip_norm
        self._autocast = Autocast()
        self._recorder = MemoryRecorder(cuda_scratch)
        self._fixed_bytes = FIXED_BYTES if device == "cuda" else 0
        self._missing: dict[str, str] = {}
        self._sharding, self._num_workers = sharding, num_workers
        self._sharded: ShardTrace | None = None

    def estimate(self) -> MemoryEstimate:
        """Trace at two sizes and join the traces; at many where they are not alike."""
        with (
            self._recorder,
            ConstantsFromHost(),
            cuda_kernels(self._autocast, self._device_type),
            self._autocast.stands_in_for_torch(),
            cuda_optimizers(),
        ):
            with _META:
                self._model = self._task.model()
            self._model.to(_META).train()
            for tensor in (*self._model.parameters(), *self._model.buffers()):
                self._recorder.track(tensor)
            if self._sharding == "full" and self._num_workers > 1:
                self._sharded = ShardTrace(self._model, self._num_workers, self._recorder)
            if self._task.is_trained:
                self._reach_steady_state()
            self._snapshot = StateSnapshot(self._model)
            self._snapshot.take()  # as training keeps one, for a rescue
            traces = {_SIZES[0]: self._trace(_SIZES[0])}
            if self._take_unused_gradients():
                traces = {_SIZES[0]: self._trace(_SIZES[0])}
            traces[_SIZES[1]] = self._trace(_SIZES[1])
            if not traces[_SIZES[1]]:  # of a task that is only evaluated, and that could not be traced
                raise EstimateError(next(iter(self._missing.values())))
            phases = self._join(traces[_SIZES[0]], traces[_SIZES[1]], _SIZES)
            if None not in phases:
                whole = Segment(None, tuple(filter(None, phases)))
                return self._estimated((whole,), traces)
            traces |= {size: self._trace(size) for size in _LADDER if size not in traces}
        return self._estimated(tuple(self._ladder(traces)), traces)

    def _reach_steady_state(self) -> None:
        """Build the optimizer, and let all gradients and its state be there, as under accumulation."""
        self._optimizer = self._task.optimizer(self._model)
        rank = heaviest_rank(self._optimizer, self._num_workers)
        self._shards = shard_optimizer(self._optimizer, self._sharding, rank, self._num_workers)
        if self._device_type == "cuda":
            choose_foreach(self._optimizer)
        self._used = self._watch_gradients()
        self._give_gradients()

    def _estimated(
        self, segments: tuple[Segment, ...], traces: dict[int, dict[str, Timeline]]
    ) -> MemoryEstimate:
        counted = ("forward", "backward") if self._task.is_trained else ("evaluation", "generation")
        small, large = (
            sum(traces[size][phase].num_flops for phase in counted if phase in traces[size])
            for size in _SIZES
        )
        return MemoryEstimate(
            segments,
            self._device_type,
            missing=self._missing,
            flops_per_sample=(large - small) / (_SIZES[1] - _SIZES[0]),
        )

    def _batch(self, microbatch_size: int) -> Batch:
        return worst_case_batch(self._task, microbatch_size, _META)

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast.enabled(self._dtype):
            return self._task.loss(self._model, batch)

    def _watch_gradients(self) -> set[Tensor]:
        """Return a set that will hold each parameter that a backward pass has reached."""
        used: set[Tensor] = set()
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(used.add)  # type: ignore[no-untyped-call]
        return used

    def _give_gradients(self) -> None:
        """Reach the steady state without a pass: every gradient is there, and the optimizer's state."""
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        self._step()

    def _take_unused_gradients(self) -> bool:
        """Take away what parameters that no backward pass reaches would not have; return if there are any."""
        unused = [p for p in self._model.parameters() if p.grad is not None and p not in self._used]
        for parameter in unused:
            parameter.grad = None
            self._optimizer.state.pop(parameter, None)
        return bool(unused)

    def _step(self) -> None:
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        with self._recorder.assuming(1.0):  # optimizers read norms and counts, whose values change no shape
            if gradients:
                torch._foreach_div_(gradients, 1.0)
            if self._num_workers > 1 and self._sharded is None:
                take_buffers(gradients)
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()
            self._shards.share_parameters(lambda tensor, owner: None)

    @kept_random_state()  # what is left out at random is left out of every trace
    def _trace(self, microbatch_size: int) -> dict[str, Timeline]:
        """Record every phase at one size, each in its steady state."""
        phases: dict[str, Timeline] = {}
        batch = self._batch(microbatch_size)
        if self._task.is_trained:
            self._trace_training(batch, phases)
        with self._evaluating(), self._passing():
            self._trace_if_possible("evaluation", self._evaluate, batch, phases)
            if self._task.generate is not None:
                generate = partial(self._task.generate, self._model)
                self._trace_if_possible("generation", generate, batch, phases)
        return phases

    def _trace_training(self, batch: Batch, phases: dict[str, Timeline]) -> None:
        recording = self._recorder.recording
        with self._passing():
            with recording() as phases["forward"]:
                loss = self._loss(batch)
            with recording() as phases["backward"]:
                loss.backward()  # type: ignore[no-untyped-call]
                del loss
                if self._sharded is not None:
                    self._sharded.end_backward()
        with recording() as phases["optimizer"]:
            self._step()

    def _passing(self) -> AbstractContextManager[None]:
        return nullcontext() if self._sharded is None else self._sharded.passing()

    def _evaluate(self, batch: Batch) -> None:
        self._loss(batch)
        if self._task.predict is not None:
            self._task.predict(self._model, batch)

    def _trace_if_possible(
        self, name: str, run: Callable[[Batch], Any], batch: Batch, phases: dict[str, Timeline]
    ) -> None:
        """Record a phase that comes after training; where that fails, training's phases still stand."""
        try:
            with self._recorder.recording() as timeline:
                run(batch)
            phases[name] = timeline
        except Exception as error:  # noqa: BLE001 -- whatever the task's code raises is why it is missing
            self._missing[name] = _reason(error)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation has no gradients; put them back for the next trace."""
        parameters = [p for p in self._model.parameters() if p.grad is not None]
        for parameter in parameters:
            parameter.grad = None
        self._model.eval()
        with torch.no_grad(), self._autocast.enabled(self._dtype):
            yield
        self._model.train()
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def _join(
        self, small: dict[str, Timeline], large: dict[str, Timeline], sizes: tuple[int, int]
    ) -> list[PhaseEstimate | None]:
        return [
            join_timelines(name, small[name], large[name], sizes, self._fixed_bytes)
            for name in small
            if name not in self._missing
        ]

    def _ladder(self, traces: dict[int, dict[str, Timeline]]) -> Iterator[Segment]:
        """Yield the phases between each two sizes traced, straight from peak to peak."""
        for sizes in pairwise(_LADDER):
            small, large = (traces[size] for size in sizes)
            phases = tuple(
                join_peaks(name, small[name], large[name], sizes, self._fixed_bytes)
                for name in small
                if name not in self._missing
            )
            yield Segment(None if sizes[1] == _LADDER[-1] else sizes[1], phases)


@contextmanager
def _told_as_no_estimate() -> Iterator[None]:
    """Raise what goes wrong inside as an EstimateError, except what the task says about its own input."""
    try:
        yield
    except UnknownNameError as error:
        if error.key != CHECKPOINTING_KEY:
            raise
        raise EstimateError(str(error)) from error  # no rung for this model, if it was a choice of ours
    except BadInputError:
        raise
    except Exception as error:
        raise EstimateError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return in words why something cannot be traced, with the place in the task's own code."""
    own = str(Path(__file__).parent)
    outside = str(Path(torch.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((own, outside, "<"))
    ]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    text = str(error).strip().splitlines()
    reason = text[0] if text else ""
    if not isinstance(error, UnknownValueError):
        reason = f"{type(error).__name__}: {reason}"
    return f"{reason}{where}"
