"""`Termination`: a process that is told to end saves what it has, in the time it is given. No torch."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from tune_easytrain.orphans import outlive_parent

Item = TypeVar("Item")


class EndRequested(BaseException):
    """Training stops here, as its process was told to end. Not an Exception: no task is to catch it."""


class Termination:
    """Whether this process was told to end, by SIGTERM: its machine is taken back, or the sweep interrupted.

    Attributes:
        is_due: whether it was.
    """

    def __init__(self, grace_seconds: float) -> None:
        """`grace_seconds` after the signal the kernel ends the process, whatever it is doing."""
        self._grace_seconds = grace_seconds
        self.is_due = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take note of the signal inside, rather than die of it; only the main thread can."""
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.is_due:
            return
        self.is_due = True
        outlive_parent()  # which may get the same signal, and not wait
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(max(1, math.ceil(self._grace_seconds)))

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items; raise EndRequested in place of the next one when the process was told to end."""
        for item in items:
            if self.is_due:
                raise EndRequested
            yield item
