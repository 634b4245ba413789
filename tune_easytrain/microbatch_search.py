"""The largest micro-batch of one trial: its limit, what other trials know, what the probe finds. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from tune_easytrain.batch_plan import largest_share
from tune_easytrain.errors import EstimateError, NotEnoughMemoryError
from tune_easytrain.events import Event, Probed
from tune_easytrain.knob import Knob
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import (
    Attempt,
    Bound,
    ProbeResult,
    SearchPlan,
    begins_with_estimate,
    find_largest,
)
from tune_easytrain.probe_cache import KnownSizes, LocalProbeCache, ProbeCache, ProbeEvidence, ProbeQuestion
from tune_easytrain.protocol import Opened
from tune_easytrain.settings import TrialSettings

Emit = Callable[[Event], None]


def find_limit(
    run_attempt: Callable[[int], Attempt],
    settings: TrialSettings,
    opened: Opened,
    emit: Emit,
    cache: ProbeCache | None = None,
    estimate: Callable[[], MemoryEstimate | EstimateError] | None = None,
) -> int | None:
    """Return the most samples one micro-batch may hold: what the probe finds, or what the sweep gives.

    `run_attempt` tries one size on the device; `cache` gets to know at once what that shows. `estimate` is
    asked for a first size where nothing else gives one. Raises NotEnoughMemoryError when not even one sample
    fits.
    """
    limit, resumed_limit = microbatch_limit(settings, opened), opened.resumed_microbatch_limit
    if limit is None or settings.probe == "off":
        return limit
    question = ProbeQuestion(
        signature=opened.signature,
        budget_bytes=opened.budget_bytes,
        limit=limit if resumed_limit is None else min(limit, resumed_limit),
    )
    cache = LocalProbeCache() if cache is None else cache
    attempts: list[Attempt] = []
    estimated: MemoryEstimate | EstimateError | None = None

    def attempt(microbatch_size: int) -> Attempt:
        attempts.append(run_attempt(microbatch_size))
        cache.publish(ProbeEvidence.from_attempt(question, attempts[-1]))
        return attempts[-1]

    def tell(microbatch_size: int | None, bound: Bound) -> None:
        event = _probed_event(attempts, question, known, microbatch_size, bound, estimated, settings.knob)
        cache.publish(ProbeEvidence.from_probed(event))
        emit(event)

    try:
        # A resumed trial has an answer of its own to confirm, and waits for nobody.
        known = KnownSizes() if resumed_limit is not None else cache.acquire(question)
        has_answer = resumed_limit is not None or known.proposal is not None
        begins = begins_with_estimate(settings.search, settings.given_start(question.limit))
        if not has_answer and (begins or settings.knob is not None) and estimate is not None:
            estimated = estimate()  # along a knob it is shown beside the rule of thumb
        usable = estimated if begins and isinstance(estimated, MemoryEstimate) else None
        plan = search_plan(settings, resumed_limit, question, known, usable)
        result = find_largest(attempt, plan)
        tell(result.microbatch_size, bound_of(result, plan.limit, question, known))
        return result.microbatch_size
    except NotEnoughMemoryError:
        tell(None, Bound.MEMORY)
        raise
    finally:
        cache.release()


def microbatch_limit(settings: TrialSettings, opened: Opened) -> int | None:
    """Return the most samples worth trying at once: the given limit, a worker's share of E, or of the data.

    Where nothing is trained, it is a worker's share of the samples to evaluate, or the given limit.

    A limit in tokens is as many of the longest samples as it holds, and at least one. None without E.
    """
    window = settings.window_size(opened.num_train_samples)
    if window is None:
        return settings.microbatch_limit
    limits = [] if settings.microbatch_limit is None else [settings.microbatch_limit]
    if settings.max_tokens is not None and opened.longest_tokens is not None:
        limits.append(max(1, settings.max_tokens // opened.longest_tokens))
    if opened.num_train_samples is None:
        return min(limits, default=largest_share(window, settings.num_workers))
    return min([*limits, largest_share(min(window, opened.num_train_samples), settings.num_workers)])


def search_plan(
    settings: TrialSettings,
    resumed_limit: int | None,
    question: ProbeQuestion,
    known: KnownSizes,
    estimate: MemoryEstimate | None,
) -> SearchPlan:
    """Return how to search: a size that this trial or another one has had is only confirmed.

    Below a size that is known to fail, the largest one is searched for from the middle, unless there is an
    estimate to start with; a search that grows goes on from what is known to fit.
    """
    plan = SearchPlan(
        limit=known.within(question.limit),
        budget_bytes=question.budget_bytes,
        start=settings.given_start(question.limit),
        search=settings.search,
        estimate=estimate,
        # Generation leaves blocks of many sizes behind: a flush says little about how near the edge is.
        accepts_retries=settings.evaluates_only,
    )
    good, bad = known.largest_good or 0, known.smallest_bad
    if resumed_limit is not None:
        return replace(plan, start=question.limit, search="confirm")
    if known.proposal is not None:
        return replace(plan, limit=known.proposal, start=known.proposal)
    if plan.search == "grow" and plan.start is not None:
        return replace(plan, start=max(plan.start, good))
    if begins_with_estimate(plan.search, plan.start) and estimate is None and bad is not None:
        return replace(plan, start=(good + bad) // 2, search="grow")
    return plan


def bound_of(result: ProbeResult, search_limit: int, question: ProbeQuestion, known: KnownSizes) -> Bound:
    """Return what kept the result from being larger, sizes that other trials had tried included."""
    if known.bounded_by is not None and result.microbatch_size == known.proposal:
        return known.bounded_by
    if result.bounded_by is Bound.LIMIT and search_limit < question.limit:
        return Bound.MEMORY
    return result.bounded_by


def _probed_event(
    attempts: Sequence[Attempt],
    question: ProbeQuestion,
    known: KnownSizes,
    size: int | None,
    bound: Bound,
    estimated: MemoryEstimate | EstimateError | None,
    knob: Knob | None,
) -> Probed:
    peak_bytes = estimated_size = None
    if isinstance(estimated, MemoryEstimate):
        peak_bytes = None if size is None else estimated.peak_bytes(size)
        search = SearchPlan(limit=question.limit, budget_bytes=question.budget_bytes, estimate=estimated)
        estimated_size = search.estimated_size(question.limit)
    return Probed(
        microbatch_size=size,
        budget_bytes=question.budget_bytes,
        bounded_by=bound,
        seconds=sum(attempt.seconds for attempt in attempts),
        attempts=[asdict(attempt) for attempt in attempts],
        limit=question.limit,
        signature=question.signature,
        cached=known.proposal is not None,
        estimated_peak_bytes=peak_bytes,
        no_estimate=str(estimated) if isinstance(estimated, EstimateError) else "",
        knob="" if knob is None else str(knob),
        rule_of_thumb_size=None if knob is None else knob.first_size(question.limit),
        estimated_size=estimated_size,
    )
