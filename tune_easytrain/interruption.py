"""Ctrl-C: once, and the trials that run store what they have; twice, and the sweep stops now."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import ray

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SLACK_SECONDS = 10.0
"""How much longer than their grace the trials are waited for, which have their own clocks."""


class Interruption:
    """Whether a sweep was interrupted, and the orderly end that follows.

    Ray Tune ends its loop on SIGINT, with a snapshot of where the trials stand. That is put off until the
    trials have stored a checkpoint. SIGTERM, as a batch system sends it, is taken for Ctrl-C.

    Args:
        hub: the handle of the sweep's `SweepHub`.
        grace_seconds: how long a trial may take to store a checkpoint.
        num_running: returns how many trials are still about to.
        say: told in a line what happens.
    """

    def __init__(
        self,
        hub: Any,
        grace_seconds: float,
        num_running: Callable[[], int],
        say: Callable[[str], object],
    ) -> None:
        self._hub, self._grace_seconds = hub, grace_seconds
        self._num_running, self._say = num_running, say
        self._end_of_ray: Any = None
        self._since: float | None = None
        self.is_due = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals inside, if this is the main thread: only there can they be taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def look(self) -> None:
        """Take a step toward the end, if it is due; called in every round of Ray Tune's loop."""
        if self._end_of_ray is None:
            self._take_over()
        if not self.is_due:
            return
        if self._since is None:
            self._since = time.monotonic()
            self._say(
                f"Interrupted: {self._num_running()} running trials store a checkpoint, for at most "
                f"{self._grace_seconds:g} s each; Ctrl-C again stops now"
            )
            ray.get(self._hub.interrupt.remote())
        elif not self._num_running() or self._is_late(self._since):
            ray.get(self._hub.conclude.remote())
            self._end_of_ray(signal.SIGINT, None)

    def _is_late(self, since: float) -> bool:
        return time.monotonic() - since > self._grace_seconds + _SLACK_SECONDS

    def _take_over(self) -> None:
        """Put our handler in the place of Ray Tune's, which it sets when its loop begins."""
        self._end_of_ray = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_due:
            raise KeyboardInterrupt
        self.is_due = True
