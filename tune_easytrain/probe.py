"""The largest micro-batch that fits: which sizes to try, and what the tries found. No torch here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.errors import NotEnoughMemoryError
from tune_easytrain.memory_budget import probed_bytes
from tune_easytrain.memory_estimate import MemoryEstimate

logger = logging.getLogger(__name__)

Search = Literal["confirm", "grow", "power_of_two"]

MAX_ATTEMPTS = 5
SMALLEST_GAIN = 0.10
"""The search ends when the next size would be less than this much larger than the best one known."""
SMALLEST_CORRECTION = 0.05
"""The same for a size that the corrected estimate says will fit, unless it is but one sample more."""


_SMALLER_BY = (0.04, 0.06)
"""By which parts the next size is smaller after the first two failures of an estimate: at the edge it is
often a single sample that is too many for a heap in pieces."""

_MAPPED_OVER_RESIDENT = 1.05
"""On a CPU the peak measured is resident memory, and the cap is on what is mapped, touched or not."""


class Outcome(StrEnum):
    """What one attempt showed."""

    FITS = "fits"
    ALLOCATOR_RETRIED = "allocator_retried"
    """It ran, but the allocator had to flush its cache for it: near the edge, where it may be slow."""
    OUT_OF_MEMORY = "out_of_memory"
    SIZE_LIMIT = "size_limit"
    """A kernel cannot count so far, however much memory there is."""
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
    ESTIMATE = "estimate"
    """By the estimate, corrected by what was measured, the next size worth trying does not fit."""
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


def begins_with_estimate(search: Search, start: int | None) -> bool:
    """Whether a search takes its first size from an estimate, where there is one."""
    return start is None and search != "power_of_two"


def largest_power_of_two(number: int) -> int:
    """Return the largest power of two up to `number`; 0 for 0."""
    return 1 << (number.bit_length() - 1) if number else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchPlan:
    """How to look for the largest micro-batch size.

    Attributes:
        limit: the most samples worth having; never exceeded.
        budget_bytes: the memory budget.
        start: the first size; default: what the estimate says, else the limit.
        search: `confirm` is content with the first size that fits and never grows past what the estimate,
            corrected by what was measured, says; `grow` multiplies by 1.5 after a success; `power_of_two`
            doubles from `start`, or from 1, until a size fails.
        estimate: the memory of any size; None: it is not known.
        accepts_retries: whether a size also fits for which the allocator had to flush its cache, whatever the
            search: it may be slow, but a smaller one that is searched for instead may be slower.
    """

    limit: int
    budget_bytes: int
    start: int | None = None
    search: Search = "confirm"
    estimate: MemoryEstimate | None = None
    accepts_retries: bool = False

    @property
    def first_size(self) -> int:
        """The size to try first."""
        if self.search == "power_of_two":
            return largest_power_of_two(min(self.start or 1, self.limit))
        if self.start is not None:
            return max(1, min(self.start, self.limit))
        return max(1, self.estimated_size(self.limit))

    def is_content_with(self, attempt: Attempt) -> bool:
        """Whether an attempt's size can be the result, and need not be made smaller.

        `confirm` puts up with an allocator that flushes its cache: the size ran below the budget, and whether
        it is slow is for the timings of training's first windows to show.
        """
        accepts_retries = self.accepts_retries or self.search == "confirm"
        return attempt.ran if accepts_retries else attempt.outcome is Outcome.FITS

    def estimated_size(self, limit: int, *, ratio: float = 1.0) -> int:
        """Return the largest size up to `limit` by the estimate times `ratio`; without one, `limit`.

        What the probe leaves free is left free here too.
        """
        if self.estimate is None:
            return limit
        return self.estimate.largest_microbatch(probed_bytes(self.budget_bytes), limit, ratio=ratio)


def next_microbatch_size(
    attempts: Sequence[Attempt], plan: SearchPlan, *, max_attempts: int = MAX_ATTEMPTS
) -> int | None:
    """Return the size to try next, or None when the search is over.

    Between a size that fits and one that does not, the middle is next. While none fits, the next is smaller
    by 4 %, then by 6 % where there is an estimate, which is seldom far off, and by half where there is none
    or it was; on the last try it is one sample.

    Sources: 003_598cc72a09f11bbd.txt (grow: 19, 28, 42, 63; 19, 9, 14, 16; 19, 28, 23) and
    004_9e95472cdca4d1f3.txt (power_of_two).

    >>> def attempts(fits, *sizes):
    ...     return [Attempt(m, Outcome.FITS if m <= fits else Outcome.OUT_OF_MEMORY, 0, 0.0) for m in sizes]
    >>> next_microbatch_size(
    ...     attempts(16, 19, 9), SearchPlan(limit=64, budget_bytes=2**30, start=19, search="grow")
    ... )
    14
    """
    if not attempts:
        return plan.first_size
    good = max((a for a in attempts if plan.is_content_with(a)), key=_size, default=None)
    bad = min((a.microbatch_size for a in attempts if not plan.is_content_with(a)), default=None)
    if plan.search == "power_of_two":
        return _next_power_of_two(good, bad, plan.limit)
    if len(attempts) >= max_attempts:
        return None
    if good is None:
        assert bad is not None
        return _next_smaller(bad, len(attempts), max_attempts, plan)
    if bad is not None:
        candidate = (good.microbatch_size + bad) // 2
    elif plan.search == "grow":
        candidate = min(plan.limit, _grown(good.microbatch_size))
    else:
        return _next_corrected(good, plan)
    gain = candidate - good.microbatch_size
    return candidate if gain >= max(1.0, SMALLEST_GAIN * good.microbatch_size) else None


def _size(attempt: Attempt) -> int:
    return attempt.microbatch_size


def _grown(size: int) -> int:
    return max(size + 1, size * 3 // 2)


def _next_power_of_two(good: Attempt | None, bad: int | None, limit: int) -> int | None:
    if good is None:
        assert bad is not None
        return bad // 2 or None
    larger = 2 * good.microbatch_size
    return larger if bad is None and larger <= limit else None


def _next_smaller(bad: int, num_attempts: int, max_attempts: int, plan: SearchPlan) -> int | None:
    if bad == 1:
        return None
    if num_attempts == max_attempts - 1:
        return 1
    if plan.estimate is not None and num_attempts <= len(_SMALLER_BY):
        by = _SMALLER_BY[num_attempts - 1]
        return max(1, min(int(bad * (1 - by)), plan.estimated_size(bad - 1, ratio=1 / (1 - by))))
    return bad // 2


def _next_corrected(good: Attempt, plan: SearchPlan) -> int | None:
    """Return the larger size that the estimate allows once it is corrected by what was measured."""
    if plan.estimate is None or plan.start is not None or not good.peak_bytes:
        return None
    if good.outcome is Outcome.ALLOCATOR_RETRIED:  # whatever the peak says, there was no room left
        return None
    ratio, most = good.peak_bytes / plan.estimate.peak_bytes(good.microbatch_size), plan.limit
    if plan.estimate.device_type == "cpu":
        ratio *= _MAPPED_OVER_RESIDENT
        most = min(most, _grown(good.microbatch_size))
    larger = plan.estimated_size(most, ratio=ratio)
    gain = larger - good.microbatch_size
    is_worth_it = gain >= max(2.0, SMALLEST_CORRECTION * good.microbatch_size)
    return larger if is_worth_it or gain >= max(1.0, SMALLEST_GAIN * good.microbatch_size) else None


def find_largest(attempt: Callable[[int], Attempt], plan: SearchPlan) -> ProbeResult:
    """Try sizes until the search is over and return the largest that ran.

    `attempt` runs one size on the device. Raises NotEnoughMemoryError when not even one sample fits;
    whatever else `attempt` raises passes through unchanged.
    """
    attempts: list[Attempt] = []
    while (size := next_microbatch_size(attempts, plan)) is not None:
        attempts.append(attempt(size))
        logger.info("probe: %s", describe_attempt(attempts[-1], plan.budget_bytes))
    best = _best_size(attempts, plan)
    if best is None:
        tried = [describe_attempt(attempt, plan.budget_bytes) for attempt in attempts]
        raise NotEnoughMemoryError(
            f"not even one sample fits into {format_bytes(plan.budget_bytes)} ({tried[-1]}): raise "
            "batch.memory_budget or batch.memory_fraction, use a larger device, train.precision: bf16, a "
            "smaller input or a smaller model\n" + "\n".join(f"  {line}" for line in tried)
        )
    return ProbeResult(best, tuple(attempts), plan.budget_bytes, _bound(attempts, best, plan))


def _best_size(attempts: Sequence[Attempt], plan: SearchPlan) -> int | None:
    fitting = [a.microbatch_size for a in attempts if plan.is_content_with(a)]
    if fitting:
        return max(fitting)
    return min((a.microbatch_size for a in attempts if a.ran), default=None)


def _bound(attempts: Sequence[Attempt], best: int, plan: SearchPlan) -> Bound:
    if best == plan.limit:
        return Bound.LIMIT
    if next_microbatch_size(attempts, plan, max_attempts=len(attempts) + 2) is not None:
        return Bound.ATTEMPTS
    if not all(map(plan.is_content_with, attempts)):
        return Bound.MEMORY
    if plan.search != "confirm":
        return Bound.LIMIT
    return Bound.PROPOSAL if plan.estimate is None or plan.start is not None else Bound.ESTIMATE


def describe_attempt(attempt: Attempt, budget_bytes: int) -> str:
    """Return one line for people: size, outcome, peak against budget, seconds."""
    peak = ""
    if attempt.peak_bytes is not None:
        peak = f", peak {format_bytes(attempt.peak_bytes)} of {format_bytes(budget_bytes)}"
    why = f" ({attempt.message})" if attempt.message else ""
    outcome = attempt.outcome.value.replace("_", " ")
    return f"micro-batch {attempt.microbatch_size}: {outcome}{why}{peak}, {attempt.seconds:.1f} s"
