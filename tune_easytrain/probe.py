"""The largest micro-batch that fits: which sizes to try, and what the tries found. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from tune_easytrain.errors import NotEnoughMemoryError

logger = logging.getLogger(__name__)

Search = Literal["confirm", "grow"]

MAX_ATTEMPTS = 5
SMALLEST_GAIN = 0.10
"""The search ends when the next size would be less than this much larger than the best one known."""


class Outcome(StrEnum):
    """What one attempt showed."""

    FITS = "fits"
    ALLOCATOR_RETRIED = "allocator_retried"
    """It ran, but the allocator had to flush its cache for it: too near the edge to be fast or safe."""
    OUT_OF_MEMORY = "out_of_memory"
    DIED = "died"
    """The process was killed or crashed, as processes do that run out of memory."""
    TIMED_OUT = "timed_out"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One micro-batch size tried on the device.

    `peak_bytes` is the most device memory in use at once (None where the process died), `seconds` the
    wall time of the attempt, `message` the first line of the error, if there was one.
    """

    microbatch_size: int
    outcome: Outcome
    peak_bytes: int | None
    seconds: float
    message: str = ""

    @property
    def ran(self) -> bool:
        """Whether every pass of the attempt came to its end."""
        return self.outcome in (Outcome.FITS, Outcome.ALLOCATOR_RETRIED)


class Bound(StrEnum):
    """What kept the result from being larger."""

    LIMIT = "limit"
    """It is the limit that was given, or so near it that the limit was not worth another try."""
    MEMORY = "memory"
    """The next size worth trying failed."""
    PROPOSAL = "proposal"
    """It is the size proposed at the start; `search: confirm` does not grow past it."""
    ATTEMPTS = "attempts"
    """The tries were used up: a larger size may fit."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The largest micro-batch size that was run within the budget, and every attempt made to find it.

    `budget_bytes` is the memory budget that the attempts ran under, in bytes.
    """

    microbatch_size: int
    attempts: tuple[Attempt, ...]
    budget_bytes: int
    bounded_by: Bound

    @property
    def seconds(self) -> float:
        """Wall time of all attempts together."""
        return sum(attempt.seconds for attempt in self.attempts)


def next_microbatch_size(
    attempts: Sequence[Attempt],
    *,
    limit: int,
    start: int | None = None,
    search: Search = "confirm",
    max_attempts: int = MAX_ATTEMPTS,
) -> int | None:
    """Return the size to try next, or None when the search is over.

    The first size is `start`, else `limit`. `grow` multiplies by 1.5 after a success, never past the
    limit; `confirm` is content with the first success. Between a size that fits and one that does not,
    the middle is next; while none fits, half of the smallest, and one sample on the last try.

    Source: 003_598cc72a09f11bbd.txt (its scenarios: 19, 28, 42, 63; 19, 9, 14, 16; 19, 28, 23).

    >>> def attempts(fits, *sizes):
    ...     return [Attempt(m, Outcome.FITS if m <= fits else Outcome.OUT_OF_MEMORY, 0, 0.0) for m in sizes]
    >>> next_microbatch_size(attempts(16, 19, 9), limit=64, start=19, search="grow")
    14
    """
    if not attempts:
        return max(1, min(limit if start is None else start, limit))
    if len(attempts) >= max_attempts:
        return None
    good = max((a.microbatch_size for a in attempts if a.outcome is Outcome.FITS), default=None)
    bad = min((a.microbatch_size for a in attempts if a.outcome is not Outcome.FITS), default=None)
    if good is None:
        assert bad is not None
        if bad == 1:
            return None
        return 1 if len(attempts) == max_attempts - 1 else bad // 2
    if bad is not None:
        candidate = (good + bad) // 2
    elif search == "confirm":
        return None
    else:
        candidate = min(limit, max(good + 1, good * 3 // 2))
    return candidate if candidate - good >= max(1.0, SMALLEST_GAIN * good) else None


def find_largest(
    attempt: Callable[[int], Attempt],
    *,
    limit: int,
    budget_bytes: int,
    start: int | None = None,
    search: Search = "confirm",
) -> ProbeResult:
    """Try sizes until the search is over and return the largest that ran.

    `attempt` runs one size on the device. Raises NotEnoughMemoryError when not even one sample fits;
    whatever else `attempt` raises passes through unchanged.
    """
    attempts: list[Attempt] = []
    while (size := next_microbatch_size(attempts, limit=limit, start=start, search=search)) is not None:
        attempts.append(attempt(size))
        logger.info("probe: %s", describe_attempt(attempts[-1], budget_bytes))
    best = _best_size(attempts)
    if best is None:
        tried = "\n".join(f"  {describe_attempt(a, budget_bytes)}" for a in attempts)
        raise NotEnoughMemoryError(
            f"not even one sample fits into {format_bytes(budget_bytes)}: raise batch.memory_budget or "
            "batch.memory_fraction, use a larger device, train.precision: bf16, a smaller input or a smaller "
            f"model; tried:\n{tried}"
        )
    return ProbeResult(best, tuple(attempts), budget_bytes, _bound(attempts, best, limit, start, search))


def _best_size(attempts: Sequence[Attempt]) -> int | None:
    fitting = [a.microbatch_size for a in attempts if a.outcome is Outcome.FITS]
    if fitting:
        return max(fitting)
    return min((a.microbatch_size for a in attempts if a.ran), default=None)


def _bound(attempts: Sequence[Attempt], best: int, limit: int, start: int | None, search: Search) -> Bound:
    if best == limit:
        return Bound.LIMIT
    with_more_tries = next_microbatch_size(
        attempts, limit=limit, start=start, search=search, max_attempts=len(attempts) + 2
    )
    if with_more_tries is not None:
        return Bound.ATTEMPTS
    if all(a.outcome is Outcome.FITS for a in attempts):
        return Bound.PROPOSAL if search == "confirm" else Bound.LIMIT
    return Bound.MEMORY


def describe_attempt(attempt: Attempt, budget_bytes: int) -> str:
    """Return one line for people: size, outcome, peak against budget, seconds."""
    peak = "" if attempt.peak_bytes is None else f", peak {format_bytes(attempt.peak_bytes)}"
    why = f" ({attempt.message})" if attempt.message else ""
    outcome = attempt.outcome.value.replace("_", " ")
    return (
        f"micro-batch {attempt.microbatch_size}: {outcome}{why}{peak} "
        f"of {format_bytes(budget_bytes)}, {attempt.seconds:.1f} s"
    )


def format_bytes(num_bytes: float) -> str:
    """Return bytes as people read them, in binary units: 1536 MiB is '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
