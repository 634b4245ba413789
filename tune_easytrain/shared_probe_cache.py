"""The probe cache of a sweep on Ray, which all trials on all nodes ask. No torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from tune_easytrain.probe_cache import KnownSizes, MeasuredSizes, ProbeEvidence, ProbeQuestion

logger = logging.getLogger(__name__)

_FIRST_LEASE_SECONDS = 30.0
"""How long a lease lasts that its trial has not taken up: the trial may have died while it waited."""

_WAIT_SECONDS = 20.0
"""How long one call waits for another trial's search; then the trial asks again."""

_ANSWER_SECONDS = 60.0
"""An actor that is silent for so long cannot be reached."""


class ProbeLeases:
    """What has been measured, and which trial is searching for which signature. The actor's own side.

    At most one trial searches per signature. Its lease ends when it says so, when the driver learns that the
    trial has ended, and by itself when nothing is heard of the trial for too long.
    """

    def __init__(self, evidence: Sequence[ProbeEvidence] = ()) -> None:
        self._sizes = MeasuredSizes(evidence)
        self._leases: dict[str, tuple[str, float]] = {}  # by signature: the trial, and when its lease ends
        self._changed = asyncio.Condition()

    async def acquire(
        self, trial: str, question: ProbeQuestion, wait_seconds: float, lease_seconds: float
    ) -> KnownSizes | None:
        """Return what is known once it holds a proposal or the search is this trial's; None: ask again."""
        deadline = time.monotonic() + wait_seconds
        async with self._changed:
            while True:
                known = self._sizes.look_up(question)
                if known.proposal is not None:
                    return known
                now = time.monotonic()
                holder, end = self._leases.get(question.signature, (trial, now))
                if holder == trial or end <= now:
                    self._leases[question.signature] = (trial, now + lease_seconds)
                    return known
                if deadline <= now:
                    return None
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(end, deadline) - now)

    async def publish(self, trial: str, evidence: ProbeEvidence) -> None:
        """Take evidence, and wake those who wait for it."""
        async with self._changed:
            self._sizes.add(evidence)
            self._changed.notify_all()

    async def renew(self, trial: str, lease_seconds: float) -> None:
        """Let the trial's lease last for so long from now on, if it has one."""
        for signature, (holder, _) in self._leases.items():
            if holder == trial:
                self._leases[signature] = (trial, time.monotonic() + lease_seconds)

    async def release(self, trial: str) -> None:
        """End the trial's lease, if it has one, and wake those who wait for it."""
        async with self._changed:
            self._leases = {s: lease for s, lease in self._leases.items() if lease[0] != trial}
            self._changed.notify_all()


class SharedProbeCache:
    """One trial's side of the sweep's probe cache.

    Args:
        actor: handle of the sweep's actor.
        trial: the trial's id, by which the driver knows it too.
        attempt_timeout_seconds: the longest that one attempt takes, opening its child, or the estimate.
    """

    def __init__(self, actor: Any, trial: str, *, attempt_timeout_seconds: float) -> None:
        self._actor, self._trial = actor, trial
        self._lease_seconds = 3 * attempt_timeout_seconds + _ANSWER_SECONDS
        self._is_reachable = True

    def acquire(self, question: ProbeQuestion) -> KnownSizes:
        """Return what is known, after waiting for a trial that is searching for the same."""
        while self._is_reachable:
            known: KnownSizes | None = self._call("acquire", question, _WAIT_SECONDS, _FIRST_LEASE_SECONDS)
            if known is not None:
                self._call("renew", self._lease_seconds)
                return known
        return KnownSizes()

    def publish(self, evidence: ProbeEvidence) -> None:
        """Tell the other trials, and the actor that this one is alive."""
        self._call("publish", evidence)
        self._call("renew", self._lease_seconds)

    def release(self) -> None:
        """Let another trial search."""
        self._call("release")

    def _call(self, method: str, *arguments: Any) -> Any:
        if not self._is_reachable:
            return None
        try:
            return ray.get(
                getattr(self._actor, method).remote(self._trial, *arguments),
                timeout=_WAIT_SECONDS + _ANSWER_SECONDS,
            )
        except RayError as error:
            logger.warning("the sweep's probe cache cannot be reached, so this trial does without: %s", error)
            self._is_reachable = False
            return None
