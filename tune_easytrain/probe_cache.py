"""What the trials of a sweep have measured, so that each distinct one is searched once. No torch, no Ray.

Nothing is taken on trust: a size that another trial found is confirmed on the device with one attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import Protocol

from tune_easytrain.events import Event, Probed, Rescued
from tune_easytrain.probe import Attempt, Bound, Outcome

_BOUNDS = frozenset(Bound)
_RAN = (Outcome.FITS, Outcome.ALLOCATOR_RETRIED)
_BUDGET_TOLERANCE = 0.02
"""Budgets nearer to each other than this count as equal: what is free on a device varies a little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeQuestion:
    """How many samples fit: into `budget_bytes`, for trials of this signature, up to `limit` samples."""

    signature: str
    budget_bytes: int
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeEvidence:
    """What one trial has shown about its signature under its budget.

    Attributes:
        fitting: micro-batch sizes that ran within the budget.
        failing: sizes that did not.
        result: the size that the search ended with; None while it has not come to its end.
        result_limit: the largest limit that `result` answers for; None: any, since memory bounded it.
        bounded_by: what kept the result from being larger.
    """

    signature: str
    budget_bytes: int
    fitting: tuple[int, ...] = ()
    failing: tuple[int, ...] = ()
    result: int | None = None
    result_limit: int | None = None
    bounded_by: Bound = Bound.MEMORY

    @classmethod
    def from_attempt(cls, question: ProbeQuestion, attempt: Attempt) -> ProbeEvidence:
        """Return what one attempt shows."""
        size, fits = (attempt.microbatch_size,), attempt.ran
        return cls(
            signature=question.signature,
            budget_bytes=question.budget_bytes,
            fitting=size if fits else (),
            failing=() if fits else size,
        )

    @classmethod
    def from_probed(cls, event: Probed) -> ProbeEvidence:
        """Return what a whole probe showed.

        Where the tries were used up, its result is handed on only if at most twice as many samples fail.
        """
        failing = tuple(a["microbatch_size"] for a in event.attempts if a["outcome"] not in _RAN)
        result, bound = event.microbatch_size, Bound(event.bounded_by)
        if bound is Bound.ATTEMPTS and result is not None and min(failing, default=inf) > 2 * result:
            result = None
        return cls(
            signature=event.signature,
            budget_bytes=event.budget_bytes,
            fitting=tuple(a["microbatch_size"] for a in event.attempts if a["outcome"] in _RAN),
            failing=failing,
            result=result,
            result_limit=event.limit if bound in (Bound.LIMIT, Bound.PROPOSAL) else None,
            bounded_by=bound,
        )

    @classmethod
    def from_rescued(cls, signature: str, budget_bytes: int, event: Rescued) -> ProbeEvidence:
        """Return what it shows that memory ran out in training: its lowered limit is for all from now on."""
        return cls(
            signature=signature,
            budget_bytes=budget_bytes,
            failing=(event.failed_microbatch_size,),
            result=event.microbatch_limit,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSizes:
    """What is known in answer to a question.

    Attributes:
        largest_good: the largest size that fits by what was measured; None: none is known.
        smallest_bad: the smallest size that does not.
        proposal: the answer, to be confirmed with one attempt; None: the question needs a search.
        bounded_by: what keeps the proposal from being larger.
    """

    largest_good: int | None = None
    smallest_bad: int | None = None
    proposal: int | None = None
    bounded_by: Bound | None = None

    def within(self, limit: int) -> int:
        """Return the largest size up to `limit` that is not known to fail; at least one sample."""
        return limit if self.smallest_bad is None else max(1, min(limit, self.smallest_bad - 1))


class MeasuredSizes:
    """The evidence of all trials, by signature.

    A size that fits also fits into larger budgets, and one that fails also fails in smaller ones; where the
    two contradict each other the failure holds. The result of a search that ended at its limit answers for
    limits up to that one; for a larger limit it is merely a size that fits.
    """

    def __init__(self, evidence: Iterable[ProbeEvidence] = ()) -> None:
        self._evidence: dict[str, list[ProbeEvidence]] = {}
        for item in evidence:
            self.add(item)

    def add(self, evidence: ProbeEvidence) -> None:
        """Take into account what a trial has shown."""
        self._evidence.setdefault(evidence.signature, []).append(evidence)

    def look_up(self, question: ProbeQuestion) -> KnownSizes:
        """Return what is known of the question, with a proposal where that amounts to an answer."""
        evidence = self._evidence.get(question.signature, [])
        least = question.budget_bytes * (1 - _BUDGET_TOLERANCE)
        most = question.budget_bytes * (1 + _BUDGET_TOLERANCE)
        bad = min((m for e in evidence if e.budget_bytes >= least for m in e.failing), default=None)
        good = max(
            (m for e in evidence if e.budget_bytes <= most for m in e.fitting if bad is None or m < bad),
            default=None,
        )
        known = KnownSizes(largest_good=good, smallest_bad=bad)
        if bad == 1:
            return replace(known, proposal=1, bounded_by=Bound.MEMORY)
        if good is not None and good >= question.limit:
            return replace(known, proposal=question.limit, bounded_by=Bound.LIMIT)
        results = [
            (e.result, e.bounded_by)
            for e in evidence
            if e.result is not None
            and least <= e.budget_bytes <= most
            and (bad is None or e.result < bad)
            and (e.result_limit is None or question.limit <= e.result_limit)
        ]
        if not results:
            return known
        result, bound = max(results)
        if result >= question.limit:
            return replace(known, proposal=question.limit, bounded_by=Bound.LIMIT)
        return replace(known, proposal=result, bounded_by=bound)


def evidence_in(events: Iterable[Event]) -> Iterator[ProbeEvidence]:
    """Yield what one trial's events say of the sizes it tried, and of those that failed in training."""
    probed: Probed | None = None
    for event in events:
        if isinstance(event, Probed) and event.signature and event.bounded_by in _BOUNDS:
            probed = event
            yield ProbeEvidence.from_probed(event)
        elif isinstance(event, Rescued) and probed is not None:
            yield ProbeEvidence.from_rescued(probed.signature, probed.budget_bytes, event)


class ProbeCache(Protocol):
    """How one trial takes part: it asks, and then either confirms a proposal or searches and tells.

    While a trial searches, other trials with the same question wait in `acquire`. Whatever happens to the
    cache, no trial fails for it: one that cannot be reached knows nothing.
    """

    def acquire(self, question: ProbeQuestion) -> KnownSizes:
        """Return what is known; without a proposal the search is this trial's, until `release`."""

    def publish(self, evidence: ProbeEvidence) -> None:
        """Tell what this trial has measured; also says that it is still at work."""

    def release(self) -> None:
        """Let others search; also after an error, and where nothing was acquired."""


class LocalProbeCache:
    """A cache for trials that run one after another in one process: nobody waits."""

    def __init__(self) -> None:
        self._sizes = MeasuredSizes()

    def acquire(self, question: ProbeQuestion) -> KnownSizes:
        """Return what earlier trials have measured."""
        return self._sizes.look_up(question)

    def publish(self, evidence: ProbeEvidence) -> None:
        """Keep what a trial has measured."""
        self._sizes.add(evidence)

    def release(self) -> None:
        """Do nothing: nobody waits."""
