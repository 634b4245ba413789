"""`SweepHub`: the one actor of a sweep on Ray that all its trials talk to. No torch."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from tune_easytrain.events import Event
from tune_easytrain.probe_cache import ProbeEvidence
from tune_easytrain.shared_probe_cache import ProbeLeases

_MOST_CALLS = 100_000
"""Calls at a time: every trial has one that waits for the end."""

_MOMENT_SECONDS = 0.05
"""How long an event waits for others to be sent with it."""


class SweepHub(ProbeLeases):
    """The actor itself: it keeps what trials tell until the driver fetches it, and is their probe cache.

    It is one actor and not two since every one costs a process of its own, which takes seconds to start.
    """

    def __init__(self, evidence: Sequence[ProbeEvidence] = ()) -> None:
        super().__init__(evidence)
        self._events: list[tuple[str, Event]] = []
        self._has_been_interrupted = asyncio.Event()
        self._has_ended = asyncio.Event()

    async def interrupt(self) -> None:
        """Tell all trials that the sweep was interrupted."""
        self._has_been_interrupted.set()

    async def interruption(self) -> None:
        """Return when the sweep was interrupted."""
        await self._has_been_interrupted.wait()

    async def conclude(self) -> None:
        """Tell all trials that nobody looks for their results any more."""
        self._has_ended.set()

    async def end(self) -> None:
        """Return when nobody looks for results any more."""
        await self._has_ended.wait()

    async def tell(self, events: Sequence[tuple[str, Event]]) -> None:
        """Take events, each with its trial's id."""
        self._events += events

    async def fetch(self) -> list[tuple[str, Event]]:
        """Return what has been told since the last time, each with its trial's id, in the order it came."""
        events, self._events = self._events, []
        return events


def start_sweep_hub(evidence: Sequence[ProbeEvidence], options: Mapping[str, Any] | None = None) -> Any:
    """Start the actor of a sweep, with what an earlier run of it has measured, and return its handle.

    `options` are those of the actor; without, it may be on any node.
    """
    actor: Any = ray.remote(SweepHub)
    name = f"tune_easytrain_sweep_hub_{uuid.uuid4().hex}"
    options = {"max_concurrency": _MOST_CALLS, **(options or {"num_cpus": 0})}
    return actor.options(name=name, **options).remote(evidence)


class EventSender:
    """A trial's way to tell the driver what happens, through the sweep's actor.

    Events go out in the order they came in, those of a moment together: every call costs the actor, the
    trial and the network as much as a short trial's own work.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._waiting: list[tuple[str, Event]] = []
        self._last_call: Any = None
        self._lock = threading.Lock()
        self._has_some = threading.Event()
        threading.Thread(target=self._send_now_and_then, daemon=True).start()

    def send(self, trial: str, event: Event) -> None:
        """Send an event of a trial in a moment."""
        with self._lock:
            self._waiting.append((trial, event))
        self._has_some.set()

    def settle(self) -> None:
        """Return when everything is there, so that the driver can know it before it hears from Ray."""
        self._send_all()
        if self._last_call is not None:
            ray.get(self._last_call)  # the actor answers calls in their order

    def _send_all(self) -> None:
        with self._lock:  # also while the call goes out, so that calls are made in the events' order
            self._has_some.clear()
            if self._waiting:
                self._last_call = self._hub.tell.remote(self._waiting)
                self._waiting = []

    def _send_now_and_then(self) -> None:
        while True:
            self._has_some.wait()
            time.sleep(_MOMENT_SECONDS)
            self._send_all()
