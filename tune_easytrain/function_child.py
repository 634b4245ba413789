"""`FunctionChild`: one child process that runs the functions of many trials, one after another. No torch.

Trials without a task on a CPU leave nothing behind on a device, so a child need not end with each: starting
one takes longer than such a trial. What fails, dies or hangs costs the child all the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from tune_easytrain.child_process import ChildProcess
from tune_easytrain.errors import ChildDiedError, EstimateError, TuneEasyTrainError
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import Attempt
from tune_easytrain.protocol import Continue, Finished, Opened, Opening, Report
from tune_easytrain.trial_children import TrainingProcess

_END_SECONDS = 1.0
"""How long a trial waits for the function of the one before it to return before it ends its process."""


class FunctionChild:
    """Keeps a child between trials."""

    def __init__(self, preloaded_modules: Sequence[str]) -> None:
        self._preloaded_modules = preloaded_modules
        self._child: ChildProcess | None = None
        self._is_ending = False

    def begin(self, opening: Opening) -> FunctionTrial:
        """Return the processes of the next trial."""
        return FunctionTrial(self, opening)

    def open(self, opening: Opening) -> ChildProcess:
        """Return a child that has been given a trial: the one kept, or a new one where it is gone."""
        if self._child is not None and not self._has_taken(self._child, opening):
            self.kill()
        self._is_ending = False
        if self._child is None:
            self._child = ChildProcess(opening, self._preloaded_modules)
        return self._child

    def _has_taken(self, child: ChildProcess, opening: Opening) -> bool:
        try:
            if self._is_ending and not isinstance(child.receive(_END_SECONDS), Finished):
                return False
            child.send(opening)
        except Exception:  # noqa: BLE001 -- whatever it is, it costs the child
            return False
        return True

    def keep(self, *, is_ending: bool) -> None:
        """Keep the child for the next trial; `is_ending`: its function has yet to return."""
        self._is_ending = is_ending

    def kill(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            with contextlib.suppress(OSError):
                self._child.kill()
            self._child = None


class FunctionTrial:
    """One trial in a kept child, as `TrialProcesses`, and as what trains."""

    def __init__(self, owner: FunctionChild, opening: Opening) -> None:
        self._owner, self._opening = owner, opening
        self._child: ChildProcess | None = None
        self._last_message: Any = None

    def open(self) -> Opened:
        """Give the trial to the child."""
        self._child = self._owner.open(self._opening)
        opened: Opened = self.receive(self._opening.settings.probe_timeout_seconds)
        return opened

    def estimate(self) -> MemoryEstimate | EstimateError:
        """Return that there is nothing to estimate."""
        return EstimateError("the trial has no task")

    def attempt(self, microbatch_size: int, timeout_seconds: float) -> Attempt:
        """Raise: there is nothing to try."""
        raise TuneEasyTrainError("a trial without a task has nothing to probe")

    def for_training(self) -> TrainingProcess:
        """Return this."""
        return self

    def send(self, message: Any) -> None:
        """Send a message to the child."""
        assert self._child is not None, "open comes first"
        self._child.send(message)

    def receive(self, timeout_seconds: float | None = None) -> Any:
        """Wait for the child's next message."""
        assert self._child is not None, "open comes first"
        self._last_message = None
        self._last_message = self._child.receive(timeout_seconds)
        return self._last_message

    def stack(self) -> str:
        """Return where the child is."""
        assert self._child is not None, "open comes first"
        return self._child.stack()

    def terminate(self, wait_seconds: float = 0.0) -> None:
        """Tell the child to end."""
        if self._child is not None:
            self._child.terminate(wait_seconds)

    def kill(self) -> None:
        """End the trial, and the child too unless its function has returned or is about to."""
        if self._child is None:
            return
        message = self._last_message
        if isinstance(message, Report) and message.is_final:
            with contextlib.suppress(ChildDiedError):  # the next trial will find out
                self.send(Continue())
            self._owner.keep(is_ending=True)
        elif isinstance(message, Finished):
            self._owner.keep(is_ending=False)
        else:
            self._owner.kill()
        self._child = None
