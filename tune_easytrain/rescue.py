"""Rescue: a window in which memory ran out, or the loader was killed, is computed again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from operator import is_
from typing import TypeVar

import torch
from torch import Tensor, nn

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.errors import LoaderLostError, MicrobatchTooLargeError, OutOfMemoryInTrainingError
from tune_easytrain.loader_errors import is_lost_loader
from tune_easytrain.memory import DeviceMemory
from tune_easytrain.memory_errors import ErrorKind, classify_error, first_line
from tune_easytrain.protocol import PlanChanged
from tune_easytrain.random_state import get_random_state, set_random_state
from tune_easytrain.termination import EndRequested, Termination

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LARGEST_COUNT = 2**16
_MOST_LOST_LOADERS = 3


class Rescue:
    """Computes window after window; where memory runs out, it halves the micro-batch and computes anew.

    Where loader processes were killed it computes anew, with new ones, as it is.
    Before a window is computed again the random state and the model's buffers (BatchNorm's statistics) are
    set back to what they were at its start, its gradients are discarded, and the device's cache is emptied.
    So no sample is lost or counted twice. The smaller micro-batch stays in use for all later windows.

    Attributes:
        plan: the batch plan in use. It may be exchanged for another one between windows.
        is_alone: whether windows are computed by this worker alone. Where other workers wait for it inside of
            them, none can be computed again: MicrobatchTooLargeError is raised instead.
        num_rescues: how often a window was computed again with smaller micro-batches.
        num_lost_loaders: how often one was because loader processes were killed.
        termination: where given, a window is given up when the process was told to end, with everything as
            it was at the window's start; EndRequested is raised.
    """

    def __init__(
        self, model: nn.Module, plan: BatchPlan, memory: DeviceMemory, tell: Callable[[PlanChanged], None]
    ) -> None:
        """`tell` is called with every new plan, before the window is computed again."""
        self.plan = plan
        self.is_alone = True
        self.num_rescues = self.num_lost_loaders = 0
        self.termination: Termination | None = None
        self._model = model
        self._memory = memory
        self._tell = tell
        self._start = StateSnapshot(model)

    def run(self, window: Callable[[BatchPlan], Result], num_samples: int | None = None) -> Result:
        """Return `window(plan)`, in which memory may run out and every sample can be read again.

        Args:
            window: reads one window's samples in the micro-batches of the plan it is given, and computes
                gradients (or an evaluation) anew from them. The optimizer's step does not belong in it:
                done halfway, it cannot be done again.
            num_samples: samples of this window over all workers; default: the effective batch size.

        Raises:
            OutOfMemoryInTrainingError: a single sample at a time does not fit.
            LoaderLostError: loader processes are killed again and again.
            Exception: what `window` raises for other reasons, unchanged.
        """
        self._start.take()
        failed_size: int | None = None
        while True:
            size = self.plan.for_window(num_samples or self.plan.effective_batch_size).microbatch_size
            try:
                return window(self.plan)
            except EndRequested:
                self._set_back()
                raise
            except Exception as error:
                if self.termination is not None and self.termination.is_due:
                    self._set_back()  # what failed may well have been told to end too
                    raise EndRequested from error
                message = first_line(error)
                has_lost_loader = is_lost_loader(error)
                if has_lost_loader:
                    self._count_lost_loader(error)
                else:
                    self._require_size_to_blame(error, size, failed_size)
            # The traceback that held the failed pass's tensors is gone only here, behind the except block.
            self._set_back()
            if has_lost_loader:
                logger.warning("%s; reading the window again with new processes", message)
            else:
                failed_size = size
                self._make_smaller(failed_size, message)

    def _count_lost_loader(self, error: Exception) -> None:
        if not self.is_alone or self.num_lost_loaders >= _MOST_LOST_LOADERS:
            raise LoaderLostError(f"loader processes were killed: {error}") from error
        self.num_lost_loaders += 1

    def _require_size_to_blame(self, error: Exception, size: int, failed_size: int | None) -> None:
        """Raise unless a smaller micro-batch may help; `failed_size` is what failed before in this window."""
        if classify_error(error) is ErrorKind.BUG:
            if failed_size is not None:
                error.add_note(f"in place of a micro-batch of {failed_size}, which ran out of memory")
            raise error
        message = first_line(error)
        if not self.is_alone:
            raise MicrobatchTooLargeError(size, message) from error
        if size <= 1:
            raise OutOfMemoryInTrainingError(
                f"not even a single sample at a time fits any more: {message}. Give the trial more "
                "memory (batch.memory_budget, batch.memory_fraction), or use a smaller input"
            ) from error

    def _set_back(self) -> None:
        self._model.zero_grad(set_to_none=True)
        self._memory.release()
        self._start.restore()

    def _make_smaller(self, failed_size: int, message: str) -> None:
        self.num_rescues += 1
        self.plan = self.plan.with_limit(failed_size // 2)
        logger.warning(
            "memory ran out with a micro-batch of %d (%s); going on with at most %d samples at a time",
            failed_size,
            message,
            self.plan.microbatch_limit,
        )
        self._tell(PlanChanged.to(self.plan, failed_microbatch_size=failed_size, message=message))


class StateSnapshot:
    """What computing a window changes besides gradients: random state, and the model's buffers.

    All buffers are copied, on their own device, for neither version counters nor names tell which ones a
    forward pass updates (`F.batch_norm` counts no version). Against parameters and activations they are few.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots = [(module._buffers, name) for module in model.modules() for name in module._buffers]
        self._values: list[Tensor | None] = []
        self._buffers: list[Tensor] = []
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def take(self) -> None:
        """Remember the state as it is now, in place of the one before."""
        self._random_state = get_random_state()
        values = [buffers.get(name) for buffers, name in self._slots]
        if len(values) != len(self._values) or not all(map(is_, values, self._values)):
            self._values = values
            self._buffers = [value for value in values if value is not None and can_change(value)]
            self._copies = [buffer.detach().clone() for buffer in self._buffers]
        elif self._buffers:
            torch._foreach_copy_(self._copies, self._buffers)

    def restore(self) -> None:
        """Put back what was taken."""
        set_random_state(self._random_state)
        for (buffers, name), value in zip(self._slots, self._values, strict=True):
            buffers[name] = value
        with torch.no_grad():
            for buffer, copy in zip(self._buffers, self._copies, strict=True):
                buffer.copy_(copy)


def can_change(buffer: Tensor) -> bool:
    """Return whether a forward pass may write into a buffer."""
    # Nothing can be written into an expanded tensor, nor into one made in inference mode; and integers by the
    # tens of thousands are a table of positions, not a count.
    if not buffer.is_floating_point() and buffer.numel() > _LARGEST_COUNT:
        return False
    is_expanded = any(
        stride == 0 < size - 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )
    return not is_expanded and not buffer.is_inference()
