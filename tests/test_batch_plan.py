from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.batch_plan import BatchPlan

sizes = st.integers(1, 300)
workers = st.integers(1, 9)


def all_ranks(effective: int, limit: int, num_workers: int) -> list[BatchPlan]:
    return [
        BatchPlan.build(effective, limit, num_workers=num_workers, rank=rank) for rank in range(num_workers)
    ]


@given(sizes, sizes, workers)
def test_a_window_is_exact(effective: int, limit: int, num_workers: int) -> None:
    plans = all_ranks(effective, limit, num_workers)
    assert sum(sum(plan.microbatch_sizes) for plan in plans) == effective
    for plan in plans:
        assert min(plan.microbatch_sizes) >= 0
        assert max(plan.microbatch_sizes) <= limit
        assert max(plan.microbatch_sizes) - min(plan.microbatch_sizes) <= 1
        assert plan.num_samples == sum(plan.microbatch_sizes)
    shares = [plan.num_samples for plan in plans]
    assert max(shares) - min(shares) <= 1


@given(sizes, sizes, workers)
def test_steps_are_the_fewest_possible_and_the_same_on_every_rank(
    effective: int, limit: int, num_workers: int
) -> None:
    plans = all_ranks(effective, limit, num_workers)
    largest_share = max(plan.num_samples for plan in plans)
    assert {plan.accumulation_steps for plan in plans} == {math.ceil(largest_share / limit)}


@given(sizes, sizes, workers, st.integers(1, 2000))
def test_the_windows_of_an_epoch_cover_it_exactly(
    effective: int, limit: int, num_workers: int, num_samples: int
) -> None:
    ranks = [list(plan.windows(num_samples)) for plan in all_ranks(effective, limit, num_workers)]
    assert {len(windows) for windows in ranks} == {math.ceil(num_samples / effective)}
    totals = [sum(plan.num_samples for plan in window) for window in zip(*ranks, strict=True)]
    assert totals[:-1] == [effective] * (len(totals) - 1)
    assert sum(totals) == num_samples
    for window in zip(*ranks, strict=True):
        assert len({plan.accumulation_steps for plan in window}) == 1


@given(sizes, sizes, workers)
def test_the_ranks_shares_tile_the_window(effective: int, limit: int, num_workers: int) -> None:
    taken = [
        position
        for plan in all_ranks(effective, limit, num_workers)
        for position in range(plan.window_offset(), plan.window_offset() + plan.num_samples)
    ]
    assert taken == list(range(effective))


@given(sizes, sizes, workers, st.integers(2, 40), st.integers(0, 3), st.integers(1, 300))
def test_groups_stay_together_where_one_fits(
    effective: int, limit: int, num_workers: int, group_size: int, more_steps: int, last: int
) -> None:
    plans = [
        BatchPlan.build(effective, limit, num_workers=num_workers, rank=rank, group_size=group_size)
        for rank in range(num_workers)
    ]
    changes = (
        lambda plan: plan,
        lambda plan: plan.for_window(last),
        lambda plan: plan.with_steps(plan.accumulation_steps + more_steps),
        lambda plan: plan.with_limit(limit // 2 + 1),
    )
    for changed in ([change(plan) for plan in plans] for change in changes):
        first, window = changed[0], changed[0].effective_batch_size
        assert len({plan.accumulation_steps for plan in changed}) == 1
        borders = [0]
        for plan in changed:
            assert (plan.window_offset(), plan.group_size) == (borders[-1], group_size)
            assert max(plan.microbatch_sizes) <= plan.microbatch_limit
            for size in plan.microbatch_sizes:
                borders.append(borders[-1] + size)
        assert borders[-1] == window
        assert first.keeps_groups == (group_size <= first.microbatch_limit)
        if first.keeps_groups:
            assert all(border % group_size == 0 or border == window for border in borders)
        else:
            without = BatchPlan.build(window, first.microbatch_limit, num_workers=num_workers)
            assert first.num_samples == without.num_samples


@pytest.mark.parametrize(
    ("effective", "limit", "num_workers", "rank", "expected"),
    [
        (128, 128, 1, 0, (128,)),
        (100, 24, 1, 0, (20,) * 5),
        (10, 4, 1, 0, (4, 3, 3)),
        (3, 1, 2, 0, (1, 1)),
        (3, 1, 2, 1, (1, 0)),
        (2, 8, 3, 2, (0,)),
    ],
)
def test_known_plans(effective: int, limit: int, num_workers: int, rank: int, expected: tuple[int]) -> None:
    plan = BatchPlan.build(effective, limit, num_workers=num_workers, rank=rank)
    assert plan.microbatch_sizes == expected
    assert plan.microbatch_size == max(expected)


def test_a_full_window_keeps_its_plan_and_a_short_one_its_limit() -> None:
    plan = BatchPlan.build(10, 4)
    assert plan.for_window(10) is plan
    assert plan.for_window(7).microbatch_sizes == (4, 3)


@given(sizes, sizes, workers, st.integers(0, 3))
def test_more_steps_than_needed_are_as_exact(effective: int, limit: int, num_workers: int, more: int) -> None:
    plans = all_ranks(effective, limit, num_workers)
    steps = plans[0].accumulation_steps + more
    longer = [plan.with_steps(steps) for plan in plans]
    assert [plan.num_samples for plan in longer] == [plan.num_samples for plan in plans]
    for plan in longer:
        assert plan.accumulation_steps == steps
        assert max(plan.microbatch_sizes) - min(plan.microbatch_sizes) <= 1
        assert plan.with_limit(limit).accumulation_steps == plans[0].accumulation_steps
    assert all(plan.for_window(effective) is plan for plan in longer)
    assert longer[0].for_window(effective + 1) == plans[0].for_window(effective + 1)


def test_fewer_steps_than_the_limit_needs_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulation_steps must be at least 3, got 2"):
        BatchPlan.build(10, 4, accumulation_steps=2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"effective_batch_size": 0}, "effective_batch_size must be at least 1, got 0"),
        ({"microbatch_limit": -1}, "microbatch_limit must be at least 1, got -1"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"rank": 2}, "rank must be from 0 to 1, got 2"),
        ({"rank": -1}, "rank must be from 0 to 1, got -1"),
    ],
)
def test_impossible_plans_are_refused_by_name(arguments: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        BatchPlan.build(**{"effective_batch_size": 8, "microbatch_limit": 4, "num_workers": 2, **arguments})
