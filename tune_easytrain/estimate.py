"""Peak memory of training at any micro-batch size, from a trace that allocates nothing.

The task's model, data and optimizer live on torch's `meta` device, which knows shapes and no values. Two
traces at small sizes give every allocation and free as a line in the size (see `timeline`), and with them
the peak at any size.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tune_easytrain.autocast_rules import Autocast
from tune_easytrain.cuda_kernels import cuda_kernels
from tune_easytrain.cuda_optimizers import choose_foreach, cuda_optimizers
from tune_easytrain.errors import BadInputError, EstimateError, require_one_of
from tune_easytrain.kernel_scratch import FIXED_BYTES, cuda_scratch
from tune_easytrain.known_values import ConstantsFromHost
from tune_easytrain.memory_estimate import MemoryEstimate, PhaseEstimate, Segment
from tune_easytrain.random_state import kept_random_state
from tune_easytrain.rescue import StateSnapshot
from tune_easytrain.task import Batch, BuildTask, Task
from tune_easytrain.timeline import MemoryRecorder, Timeline, UnknownValueError, join_peaks, join_timelines
from tune_easytrain.worst_case import with_known_worst_case, worst_case_batch

EstimatePrecision = Literal["fp32", "bf16", "fp16"]

_META = torch.device("meta")
_SIZES = (2, 4)
_LADDER = (2, 4, 8, 16, 32, 64, 128, 256)
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def estimate_memory(
    build_task: BuildTask,
    config: dict[str, Any],
    *,
    precision: EstimatePrecision = "fp32",
    device: Literal["cuda", "cpu"] = "cuda",
    clip_norm: float | None = None,
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

    Raises:
        ValueError: `precision` or `device` is none of those there are.
        BadInputError: the task says that it was asked for something it does not have.
        EstimateError: training the task cannot be traced; it says why and where.
    """
    require_one_of("precision", precision, _DTYPES)
    require_one_of("device", device, ("cuda", "cpu"))
    with _told_as_no_estimate():
        task = build_task(config)
    return estimate_task(task, precision=precision, device=device, clip_norm=clip_norm)


def estimate_task(
    task: Task,
    *,
    precision: EstimatePrecision = "fp32",
    device: Literal["cuda", "cpu"] = "cuda",
    clip_norm: float | None = None,
) -> MemoryEstimate:
    """Estimate as `estimate_memory` does, for a task that is already built."""
    collects_garbage = gc.isenabled()
    gc.disable()  # a collection would free what a model holds in cycles at another moment in each trace
    try:
        with kept_random_state(), _told_as_no_estimate():
            return _Tracer(with_known_worst_case(task), precision, device, clip_norm).estimate()
    finally:
        if collects_garbage:
            gc.enable()


class _Tracer:
    """A task on the `meta` device in the steady state of training."""

    def __init__(
        self,
        task: Task,
        precision: EstimatePrecision,
        device: Literal["cuda", "cpu"],
        clip_norm: float | None,
    ) -> None:
        self._task = task
        self._dtype = _DTYPES[precision]
        self._device_type = device
        self._clip_norm = clip_norm
        self._autocast = Autocast()
        self._recorder = MemoryRecorder(cuda_scratch)
        self._fixed_bytes = FIXED_BYTES if device == "cuda" else 0
        self._missing: dict[str, str] = {}

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
            self._optimizer = self._task.optimizer(self._model)
            if self._device_type == "cuda":
                choose_foreach(self._optimizer)
            self._used = self._watch_gradients()
            self._give_gradients()
            self._snapshot = StateSnapshot(self._model)
            self._snapshot.take()  # as training keeps one, for a rescue
            traces = {_SIZES[0]: self._trace(_SIZES[0])}
            if self._take_unused_gradients():
                traces = {_SIZES[0]: self._trace(_SIZES[0])}
            traces[_SIZES[1]] = self._trace(_SIZES[1])
            phases = self._join(traces[_SIZES[0]], traces[_SIZES[1]], _SIZES)
            if None not in phases:
                whole = Segment(None, tuple(filter(None, phases)))
                return MemoryEstimate((whole,), self._device_type, missing=self._missing)
            traces |= {size: self._trace(size) for size in _LADDER if size not in traces}
        return MemoryEstimate(tuple(self._ladder(traces)), self._device_type, missing=self._missing)

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
            if self._clip_norm is not None:
                nn.utils.clip_grad_norm_(self._model.parameters(), self._clip_norm)
            self._optimizer.step()

    @kept_random_state()  # what is left out at random is left out of every trace
    def _trace(self, microbatch_size: int) -> dict[str, Timeline]:
        """Record every phase at one size, each in its steady state."""
        recording, phases = self._recorder.recording, {}
        batch = self._batch(microbatch_size)
        with recording() as phases["forward"]:
            loss = self._loss(batch)
        with recording() as phases["backward"]:
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
        with recording() as phases["optimizer"]:
            self._step()
        with self._evaluating():
            self._trace_if_possible("evaluation", self._evaluate, batch, phases)
            if self._task.generate is not None:
                generate = partial(self._task.generate, self._model)
                self._trace_if_possible("generation", generate, batch, phases)
        return phases

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
