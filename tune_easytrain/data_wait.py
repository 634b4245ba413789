"""How long training stood still because its next micro-batch was not there."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType

import torch


class DataWait:
    """Adds up, in a `with` block around each read, how long the device had to wait for it.

    On a CPU that is the time the block takes. A CUDA device may still be busy with what was queued before
    the block: there only the time counts in which it had nothing to do, which events on its stream tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._start = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            self._events.append((_timing_event(), _timing_event()))
            self._events[-1][0].record(torch.cuda.current_stream(self._device))
        else:
            self._start = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            # Reached right after the first event, unless the device ran out of work between the two.
            self._events[-1][1].record(torch.cuda.current_stream(self._device))
            while self._events and self._events[0][1].query():  # type: ignore[no-untyped-call]
                self._add_first()
        else:
            self._seconds += time.perf_counter() - self._start

    @property
    def seconds(self) -> float:
        """The sum so far; on CUDA it waits until the device has come to the end of the last block."""
        while self._events:
            self._events[0][1].synchronize()
            self._add_first()
        return self._seconds

    def _add_first(self) -> None:
        before, after = self._events.popleft()
        self._seconds += before.elapsed_time(after) / 1000


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
