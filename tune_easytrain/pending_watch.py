"""`PendingWatch`: a sweep whose nodes are gone for good ends with a word instead of waiting for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tune_easytrain.cluster import check_resources
from tune_easytrain.errors import InsufficientResourcesError
from tune_easytrain.trial_request import TrialRequest

LOOK_SECONDS = 5.0
PATIENCE_SECONDS = 120.0
"""How long no node may be able to hold a trial: one that is replaced is away for a minute or two."""


class PendingWatch:
    """Looks whether trials that wait could ever get what they ask for.

    Waiting for others to free what the cluster has, or for nodes that an autoscaler can start, is all right.
    """

    def __init__(
        self,
        requests: Sequence[TrialRequest],
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = list({str(request): request for request in requests}.values())
        self._patience_seconds, self._clock = patience_seconds, clock
        self._next_look = 0.0
        self._since: float | None = None

    def look(self, trials: Sequence[Any]) -> None:
        """Raise InsufficientResourcesError when for so long none of Ray's trials has run and none can.

        Args:
            trials: all trials of the sweep, as Ray Tune's callbacks get them.
        """
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + LOOK_SECONDS
        states = {trial.status for trial in trials}
        reason = None if "RUNNING" in states or "PENDING" not in states else self._lacking()
        if reason is None:
            self._since = None
            return
        if self._since is None:
            self._since = now
        if now - self._since >= self._patience_seconds:
            raise InsufficientResourcesError(
                f"nothing has run for {now - self._since:.0f} s, and no node is left on which it could: "
                f"{reason}"
            )

    def _lacking(self) -> str | None:
        """Return what is lacking, where no trial's request can be met."""
        reason = None
        for request in self._requests:
            try:
                check_resources(request)
            except InsufficientResourcesError as error:
                reason = str(error)
            else:
                return None
        return reason
