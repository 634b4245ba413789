from __future__ import annotations

from typing import Any

from tune_easytrain.events import Event, Probed, Rescued, Started
from tune_easytrain.probe import Bound
from tune_easytrain.probe_cache import (
    KnownSizes,
    MeasuredSizes,
    ProbeEvidence,
    ProbeQuestion,
    evidence_in,
)

BUDGET = 1000
RESCUED = Rescued(failed_microbatch_size=12, microbatch_limit=6, microbatch_size=6, accumulation_steps=4)


def ask(sizes: MeasuredSizes, limit: int, budget_bytes: int = BUDGET, signature: str = "s") -> KnownSizes:
    return sizes.look_up(ProbeQuestion(signature=signature, budget_bytes=budget_bytes, limit=limit))


def shown(
    *fitting: int, failing: tuple[int, ...] = (), budget_bytes: int = BUDGET, **result: Any
) -> ProbeEvidence:
    return ProbeEvidence(
        signature="s", budget_bytes=budget_bytes, fitting=fitting, failing=failing, **result
    )  # fmt: skip


def test_nothing_is_known_of_another_signature() -> None:
    sizes = MeasuredSizes([shown(8, failing=(9,), result=8)])
    assert ask(sizes, 8, signature="another") == KnownSizes()
    assert ask(sizes, 8).proposal == 8


def test_a_result_that_a_small_limit_ended_never_answers_for_a_larger_one() -> None:
    sizes = MeasuredSizes([shown(16, result=16, result_limit=16)])
    assert (ask(sizes, 10).proposal, ask(sizes, 10).bounded_by) == (10, Bound.LIMIT)
    assert (ask(sizes, 16).proposal, ask(sizes, 16).bounded_by) == (16, Bound.LIMIT)
    assert ask(sizes, 17) == KnownSizes(largest_good=16)


def test_a_result_that_memory_ended_answers_for_every_limit() -> None:
    sizes = MeasuredSizes([shown(16, failing=(32, 20), result=16)])
    assert ask(sizes, 4).proposal == 4
    for limit in (18, 32, 10_000):
        assert ask(sizes, limit) == KnownSizes(
            largest_good=16, smallest_bad=20, proposal=16, bounded_by=Bound.MEMORY
        )


def test_a_proposal_that_was_confirmed_answers_up_to_the_limit_it_was_made_for() -> None:
    sizes = MeasuredSizes([shown(60, result=60, result_limit=100, bounded_by=Bound.PROPOSAL)])
    assert (ask(sizes, 100).proposal, ask(sizes, 100).bounded_by) == (60, Bound.PROPOSAL)
    assert ask(sizes, 101).proposal is None


def test_budgets_count() -> None:
    sizes = MeasuredSizes([shown(16, failing=(20,), result=16)])
    assert ask(sizes, 64, budget_bytes=985).proposal == 16  # what is free varies a little
    assert ask(sizes, 64, budget_bytes=1015).proposal == 16
    assert ask(sizes, 64, budget_bytes=500) == KnownSizes(smallest_bad=20)
    assert ask(sizes, 64, budget_bytes=2000) == KnownSizes(largest_good=16)
    assert ask(sizes, 12, budget_bytes=2000).proposal == 12
    assert ask(sizes, 12, budget_bytes=500).proposal is None


def test_a_failure_takes_back_what_was_known() -> None:
    sizes = MeasuredSizes([shown(8, 16, failing=(20,), result=16)])
    sizes.add(shown(failing=(16,)))
    assert ask(sizes, 64) == KnownSizes(largest_good=8, smallest_bad=16)
    sizes.add(shown(12, failing=(16, 14), result=12))
    assert ask(sizes, 64).proposal == 12


def test_where_not_even_one_sample_fits_one_is_confirmed() -> None:
    known = ask(MeasuredSizes([shown(failing=(8, 4, 2, 1))]), 8)
    assert (known.proposal, known.bounded_by, known.within(8)) == (1, Bound.MEMORY, 1)


def test_what_is_left_to_search_ends_below_the_smallest_size_that_fails() -> None:
    assert KnownSizes(smallest_bad=20).within(64) == 19
    assert KnownSizes(smallest_bad=20).within(10) == 10
    assert KnownSizes().within(64) == 64


def test_events_of_a_trial_say_what_it_showed() -> None:
    def probed(size: int | None, bound: Bound, *attempts: tuple[int, str], **others: Any) -> Probed:
        tried = [{"microbatch_size": m, "outcome": outcome} for m, outcome in attempts]
        values = {"signature": "s", "budget_bytes": 7, "limit": 32, "seconds": 0.0, **others}
        return Probed(microbatch_size=size, bounded_by=bound, attempts=tried, **values)

    events: list[Event] = [
        Started(config={}),
        probed(16, Bound.MEMORY, (32, "out_of_memory"), (16, "fits"), (24, "allocator_retried")),
        probed(16, Bound.LIMIT, (16, "fits"), limit=16),
        probed(1, Bound.ATTEMPTS, (32, "died"), (1, "fits")),
        probed(6, Bound.ATTEMPTS, (12, "out_of_memory"), (6, "fits")),
        probed(6, Bound.ATTEMPTS, (6, "fits")),
        probed(None, Bound.MEMORY, (1, "out_of_memory")),
        probed(4, Bound.LIMIT, (4, "fits"), signature=""),  # of a version that kept none
        probed(16, Bound.ESTIMATE, (16, "fits")),
        RESCUED,
    ]
    evidence = list(evidence_in(events))
    assert [(e.fitting, e.failing, e.result, e.result_limit) for e in evidence] == [
        ((16, 24), (32,), 16, None),  # what ran fits, allocator or not
        ((16,), (), 16, 16),
        ((1,), (32,), None, None),
        ((6,), (12,), 6, None),
        ((6,), (), None, None),
        ((), (1,), None, None),
        ((16,), (), 16, None),
        ((), (12,), 6, None),
    ]
    assert {(e.signature, e.budget_bytes) for e in evidence} == {("s", 7)}
