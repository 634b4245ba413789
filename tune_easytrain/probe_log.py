"""The probe of a trial along a knob, told step by step. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from tune_easytrain.events import Probed
from tune_easytrain.probe import Attempt, Outcome, describe_attempt


def describe_search(event: Probed) -> Iterator[str]:
    """Yield a line for the start, with rule of thumb and estimate side by side, each try, and the result.

    The steps are those that the log of 003_598cc72a09f11bbd.txt shows.
    """
    tries = [Attempt(**{**attempt, "outcome": Outcome(attempt["outcome"])}) for attempt in event.attempts]
    if not tries:
        yield f"{event.knob}: micro-batch {event.microbatch_size}, known from another trial"
        return
    starts = f"rule of thumb {event.rule_of_thumb_size}, estimate {_estimated(event)}"
    yield (
        f"{event.knob}: looking for the largest micro-batch up to {event.limit} ({starts}), "
        f"starting with {tries[0].microbatch_size}"
    )
    for tried, following in pairwise([*tries, None]):
        assert tried is not None
        # The allocator's own words say no more than that it is out of memory.
        told = replace(tried, message="") if tried.outcome is Outcome.OUT_OF_MEMORY else tried
        line = f"  {_mark(tried)} {describe_attempt(told, event.budget_bytes)}"
        if following is not None:
            is_larger = following.microbatch_size > tried.microbatch_size
            line += f"; trying {'larger' if is_larger else 'smaller'}: {following.microbatch_size}"
        yield line
    if event.microbatch_size is None:
        yield f"{event.knob}: not even one sample fits"
    else:
        yield f"{event.knob}: using micro-batch {event.microbatch_size}, bounded by {event.bounded_by}"


def _mark(attempt: Attempt) -> str:
    if attempt.outcome is Outcome.FITS:
        return "✓"
    return "~" if attempt.ran else "✗"


def _estimated(event: Probed) -> str:
    if event.estimated_size is not None:
        return str(event.estimated_size)
    return f"unknown ({event.no_estimate})" if event.no_estimate else "not made"
