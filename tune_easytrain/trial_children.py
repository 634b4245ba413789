"""The child processes of one trial: one at a time, and an attempt that fails costs its child. No torch.

A trial needs something that opens, estimates, tries sizes and trains: `TrialProcesses`. Children of this
process are that for a trial of one worker.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tune_easytrain.child_process import TORCH_MODULES, ChildProcess
from tune_easytrain.errors import ChildDiedError, EstimateError, TerminatedError, TrialHungError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import Attempt, Outcome
from tune_easytrain.protocol import (
    AttemptReply,
    AttemptRequest,
    EstimateRequest,
    Opened,
    Opening,
    StoreOpened,
    WorkerPlace,
)


class TrainingProcess(Protocol):
    """What trains: takes a `TrainRequest` and `Continue`s, and says what the training function says."""

    def send(self, message: Any) -> None:
        """Send a message."""

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """Wait for the next message; raises what went wrong there, with its type."""

    def stack(self) -> str:
        """Return where it is, as a stack of Python calls; empty where that is not known."""


class TrialProcesses(Protocol):
    """The processes that run a trial's torch code, wherever they are."""

    def open(self) -> Opened:
        """Build the task, choose the device, and describe both."""

    def estimate(self) -> MemoryEstimate | EstimateError:
        """Return the trial's memory at any size, or why it is not known."""

    def attempt(self, microbatch_size: int, timeout_seconds: float) -> Attempt:
        """Try one size; raises what the task's own code raised, with its type."""

    def for_training(self) -> TrainingProcess:
        """Return what trains."""

    def terminate(self, wait_seconds: float = 0.0) -> None:
        """Tell them to end, from another thread too, and wait; training stores a checkpoint first."""

    def kill(self) -> None:
        """End every process."""


class TrialChildren:
    """Starts children for one trial and ends them again.

    Every attempt gets a child that has tried nothing before. A child whose attempt ran and whose memory is
    back where it was goes on to train.
    """

    def __init__(self, opening: Opening, preloaded_modules: Sequence[str] = TORCH_MODULES) -> None:
        self._opening = opening
        self._preloaded_modules = preloaded_modules
        self._child: ChildProcess | None = None
        self._has_tried = False
        self._is_terminated = False

    def estimate(self) -> MemoryEstimate | EstimateError:
        """Return the trial's memory at any size, or why it is not known.

        A child of its own works it out, without the device, and takes all that this needed with it.
        """
        timeout_seconds = self._opening.settings.probe_timeout_seconds
        self._require_not_terminated()
        child = ChildProcess(EstimateRequest(self._opening), self._preloaded_modules)
        try:
            reply: MemoryEstimate | EstimateError = child.receive(timeout_seconds)
        except TimeoutError:
            reply = EstimateError(f"tracing the task took more than {timeout_seconds:g} s")
        except ChildDiedError as error:
            reply = EstimateError(str(error))
        finally:
            child.kill()
        return reply

    def open(self) -> Opened:
        """Start a child; every later one is held to the first one's budget.

        Raises ChildDiedError where the task cannot even be built in the time that one attempt has.
        """
        self._require_not_terminated()
        self._child = ChildProcess(self._opening, self._preloaded_modules)
        timeout_seconds = self._opening.settings.probe_timeout_seconds
        try:
            opened = self._child.receive(timeout_seconds)
        except TimeoutError:
            raise TrialHungError(
                f"building the task and opening its data took more than {timeout_seconds:g} s; "
                f"look for what hangs there, or raise batch.probe_timeout\n{self._child.stack()}"
            ) from None
        assert isinstance(opened, Opened)
        self._opening = replace(self._opening, budget_bytes=opened.budget_bytes)
        return opened

    def attempt(
        self,
        microbatch_size: int,
        timeout_seconds: float,
        place: WorkerPlace | None = None,
        tell_port: Callable[[int], None] = lambda port: None,
    ) -> Attempt:
        """Try one size. A child that dies or does not answer in time is a failed attempt.

        With `place` the children of several workers try it together; `tell_port` takes the port of the store
        that the first one opens.

        Raises what the task's own code raised, with its type.
        """
        self._require_not_terminated()
        start = time.perf_counter()
        try:
            child = self._fresh_child()
            child.send(AttemptRequest(microbatch_size, place))
            reply = child.receive(timeout_seconds)
            if isinstance(reply, StoreOpened):
                tell_port(reply.port)
                reply = child.receive(timeout_seconds)
        except ChildDiedError as error:
            self._require_not_terminated()
            outcome, message = Outcome.DIED, str(error)
        except TimeoutError as error:
            outcome, message = Outcome.TIMED_OUT, str(error)
        else:
            assert isinstance(reply, AttemptReply)
            if not reply.is_clean:
                self.kill()
            return replace(reply.attempt, seconds=time.perf_counter() - start)
        self.kill()
        return Attempt(microbatch_size, outcome, None, time.perf_counter() - start, message)

    def _fresh_child(self) -> ChildProcess:
        if self._has_tried:
            self.kill()
        child = self.for_training()
        self._has_tried = True
        return child

    def for_training(self) -> ChildProcess:
        """Return the child at hand, or a new one."""
        if self._child is None:
            self.open()
        assert self._child is not None
        return self._child

    def terminate(self, wait_seconds: float = 0.0) -> None:
        """Tell the child to end, and start no other one."""
        self._is_terminated = True
        child = self._child
        if child is not None:
            child.terminate(wait_seconds)

    def _require_not_terminated(self) -> None:
        if self._is_terminated:
            raise TerminatedError("the trial was told to end")

    def kill(self) -> None:
        """End the child, if there is one."""
        self._has_tried = False
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.kill()
            self._child = None
