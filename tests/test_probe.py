from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from estimates import GIB, make_estimate
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.errors import NotEnoughMemoryError
from tune_easytrain.memory_budget import headroom_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.probe import (
    MAX_ATTEMPTS,
    SMALLEST_GAIN,
    Attempt,
    Bound,
    Outcome,
    ProbeResult,
    Search,
    SearchPlan,
    describe_attempt,
    find_largest,
    next_microbatch_size,
)

BUDGET_BYTES = 3 * 2**29


def device(fits: int, *, retries_from: int | None = None) -> Callable[[int], Attempt]:
    """A device that holds `fits` samples, and whose allocator struggles from `retries_from` on."""

    def attempt(size: int) -> Attempt:
        if size > fits:
            return Attempt(size, Outcome.OUT_OF_MEMORY, 2**20 * fits, 0.5, "out of memory")
        struggles = retries_from is not None and size >= retries_from
        return Attempt(size, Outcome.ALLOCATOR_RETRIED if struggles else Outcome.FITS, 2**20 * size, 0.5)

    return attempt


def probe(
    attempt: Callable[[int], Attempt], limit: int, start: int | None = None, search: Search = "grow"
) -> ProbeResult:
    plan = SearchPlan(limit=limit, budget_bytes=BUDGET_BYTES, start=start, search=search)
    return find_largest(attempt, plan)


def sizes(result: ProbeResult) -> list[int]:
    return [attempt.microbatch_size for attempt in result.attempts]


@pytest.mark.parametrize(
    ("fits", "tried", "found", "bound"),
    [
        (10**6, [19, 28, 42, 63], 63, Bound.LIMIT),  # 64 would gain less than 10 %
        (18, [19, 9, 14, 16], 16, Bound.MEMORY),
        (16, [19, 9, 14, 16], 16, Bound.MEMORY),
        (23, [19, 28, 23], 23, Bound.MEMORY),
        (27, [19, 28, 23], 23, Bound.MEMORY),
        (15, [19, 9, 14, 16], 14, Bound.MEMORY),
        (5, [19, 9, 4, 6, 5], 5, Bound.MEMORY),
        (1, [19, 9, 4, 2, 1], 1, Bound.MEMORY),
    ],
)
def test_growing_from_19_under_a_limit_of_64(fits: int, tried: list[int], found: int, bound: Bound) -> None:
    result = probe(device(fits), limit=64, start=19)
    assert (sizes(result), result.microbatch_size, result.bounded_by) == (tried, found, bound)


@pytest.mark.parametrize(
    ("fits", "limit", "start", "tried", "found", "bound"),
    [
        (100, 64, None, [64], 64, Bound.LIMIT),
        (100, 64, 20, [20], 20, Bound.PROPOSAL),  # content with the first success
        (40, 64, None, [64, 32, 48, 40, 44], 40, Bound.MEMORY),
        (10, 64, 12, [12, 6, 9, 10, 11], 10, Bound.MEMORY),
        (100, 8, 20, [8], 8, Bound.LIMIT),  # a start above the limit
        (1, 64, None, [64, 32, 16, 8, 1], 1, Bound.ATTEMPTS),  # the last try is one sample
        (1, 1, None, [1], 1, Bound.LIMIT),
        (2, 3, None, [3, 1, 2], 2, Bound.MEMORY),
    ],
)
def test_confirming(
    fits: int, limit: int, start: int | None, tried: list[int], found: int, bound: Bound
) -> None:
    result = probe(device(fits), limit=limit, start=start, search="confirm")
    assert (sizes(result), result.microbatch_size, result.bounded_by) == (tried, found, bound)


def test_growing_ends_at_the_limit() -> None:
    result = probe(device(1000), limit=32, start=16)
    assert (sizes(result), result.bounded_by) == ([16, 24, 32], Bound.LIMIT)


def test_growing_out_of_tries_says_so() -> None:
    result = probe(device(1000), limit=1000, start=1)
    assert (sizes(result), result.bounded_by) == ([1, 2, 3, 4, 6], Bound.ATTEMPTS)


def test_growing_wants_more_than_a_size_at_which_the_allocator_retried() -> None:
    result = probe(device(64, retries_from=33), limit=64, start=64)
    assert (sizes(result), result.microbatch_size) == ([64, 32, 48, 40, 36], 32)


def test_confirming_is_content_with_a_size_at_which_the_allocator_retried() -> None:
    result = probe(device(64, retries_from=33), limit=64, search="confirm")
    assert (sizes(result), result.microbatch_size, result.bounded_by) == ([64], 64, Bound.LIMIT)


def test_where_the_allocator_always_retried_the_smallest_that_ran_is_taken() -> None:
    result = probe(device(64, retries_from=1), limit=4)
    assert (sizes(result), result.microbatch_size) == ([4, 2, 1], 1)


def test_a_child_that_died_or_hung_counts_like_one_out_of_memory() -> None:
    def attempt(size: int) -> Attempt:
        outcome = Outcome.DIED if size > 8 else Outcome.TIMED_OUT if size > 4 else Outcome.FITS
        return Attempt(size, outcome, None, 1.0, "gone")

    assert sizes(probe(attempt, limit=16, search="confirm")) == [16, 8, 4, 6, 5]


def test_not_enough_memory_names_tries_budget_and_remedies() -> None:
    with pytest.raises(NotEnoughMemoryError) as caught:
        probe(device(0), limit=64)
    message = str(caught.value)
    assert "not even one sample fits into 1.5 GiB" in message
    assert [line.split(":")[0].strip() for line in message.splitlines()[1:]] == [
        f"micro-batch {size}" for size in (64, 32, 16, 8, 1)
    ]
    for remedy in ("batch.memory_budget", "batch.memory_fraction", "bf16", "larger device"):
        assert remedy in message


def test_a_bug_passes_through_unchanged() -> None:
    bug = KeyError("label")

    def attempt(size: int) -> Attempt:
        raise bug

    with pytest.raises(KeyError) as caught:
        probe(attempt, limit=4)
    assert caught.value is bug


def test_seconds_and_budget_are_those_of_the_attempts() -> None:
    result = probe(device(16), limit=64, start=19)
    assert result.seconds == 2.0
    assert result.budget_bytes == BUDGET_BYTES


outcomes = st.lists(st.sampled_from(Outcome), min_size=MAX_ATTEMPTS, max_size=MAX_ATTEMPTS)


@given(
    outcomes=outcomes,
    limit=st.integers(1, 1000),
    start=st.none() | st.integers(1, 2000),
    search=st.sampled_from(["confirm", "grow"]),
    estimate=st.none() | st.builds(make_estimate, st.floats(0, 4), st.floats(0.001, 1)),
    peak_bytes=st.none() | st.integers(1, 2 * BUDGET_BYTES),
)
def test_whatever_the_device_does(
    outcomes: list[Outcome],
    limit: int,
    start: int | None,
    search: Search,
    estimate: MemoryEstimate | None,
    peak_bytes: int | None,
) -> None:
    attempts: list[Attempt] = []

    def attempt(size: int) -> Attempt:
        assert len(attempts) < MAX_ATTEMPTS
        assert 1 <= size <= limit
        assert all(size != a.microbatch_size for a in attempts)
        assert all(size < a.microbatch_size for a in attempts if not a.ran)
        attempts.append(Attempt(size, outcomes[len(attempts)], peak_bytes, 0.0))
        return attempts[-1]

    plan = SearchPlan(limit=limit, budget_bytes=BUDGET_BYTES, start=start, search=search, estimate=estimate)
    try:
        result = find_largest(attempt, plan)
    except NotEnoughMemoryError:
        assert not any(a.ran for a in attempts)
        assert attempts[-1].microbatch_size == 1
        return
    assert result.attempts == tuple(attempts)
    found = next(a for a in attempts if a.microbatch_size == result.microbatch_size)
    assert found.ran
    assert (
        found.outcome is Outcome.FITS
        or all(a.outcome is not Outcome.FITS for a in attempts)
        or (search == "confirm")
    )
    if result.bounded_by is Bound.LIMIT:
        assert limit - result.microbatch_size < max(1.0, SMALLEST_GAIN * result.microbatch_size)
    if result.bounded_by is Bound.MEMORY:
        assert any(a.outcome is not Outcome.FITS for a in attempts)
    if result.bounded_by is Bound.ESTIMATE:
        assert estimate is not None


@given(fits=st.integers(1, 1000), limit=st.integers(1, 1000), start=st.none() | st.integers(1, 1000))
def test_a_result_bounded_by_memory_is_within_ten_percent_of_the_best(
    fits: int, limit: int, start: int | None
) -> None:
    result = probe(device(fits), limit=limit, start=start)
    assert result.microbatch_size <= min(fits, limit)
    if result.bounded_by is not Bound.ATTEMPTS:
        assert min(fits, limit) <= max(
            result.microbatch_size * (1 + 2 * SMALLEST_GAIN), result.microbatch_size + 1
        )


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536 * 2**20, "1.5 GiB"), (2**41, "2.0 TiB"), (-2048, "-2.0 KiB")],
)
def test_bytes_as_people_read_them(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("fits", "limit", "start", "tried", "found", "bound"),
    [
        (100, 64, None, [1, 2, 4, 8, 16, 32, 64], 64, Bound.LIMIT),
        (100, 100, None, [1, 2, 4, 8, 16, 32, 64], 64, Bound.LIMIT),  # 128 would be above it
        (40, 1000, None, [1, 2, 4, 8, 16, 32, 64], 32, Bound.MEMORY),
        (40, 1000, 16, [16, 32, 64], 32, Bound.MEMORY),
        (40, 1000, 25, [16, 32, 64], 32, Bound.MEMORY),  # the power of two below the start
        (5, 1000, 32, [32, 16, 8, 4], 4, Bound.MEMORY),
        (1, 1024, 1024, [1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1], 1, Bound.MEMORY),
        (10, 3, 64, [2], 2, Bound.LIMIT),
        (1, 1, None, [1], 1, Bound.LIMIT),
    ],
)
def test_powers_of_two(
    fits: int, limit: int, start: int | None, tried: list[int], found: int, bound: Bound
) -> None:
    result = probe(device(fits), limit=limit, start=start, search="power_of_two")
    assert (sizes(result), result.microbatch_size, result.bounded_by) == (tried, found, bound)


@given(fits=st.integers(0, 5000), limit=st.integers(1, 5000), start=st.none() | st.integers(1, 5000))
def test_powers_of_two_find_the_largest_that_fits(fits: int, limit: int, start: int | None) -> None:
    if fits == 0:
        with pytest.raises(NotEnoughMemoryError):
            probe(device(fits), limit=limit, start=start, search="power_of_two")
        return
    result = probe(device(fits), limit=limit, start=start, search="power_of_two")
    most = min(fits, limit)
    assert result.microbatch_size <= most < 2 * result.microbatch_size


def measured(estimate: MemoryEstimate, factor: float, budget_bytes: int) -> Callable[[int], Attempt]:
    """A device on which everything takes `factor` times what the estimate says."""

    def attempt(size: int) -> Attempt:
        peak_bytes = round(estimate.peak_bytes(size) * factor)
        outcome = Outcome.FITS if peak_bytes <= budget_bytes else Outcome.OUT_OF_MEMORY
        return Attempt(size, outcome, min(peak_bytes, budget_bytes), 1.0)

    return attempt


BUDGET = 50 * GIB
FREE_SHARE = headroom_bytes(BUDGET) / BUDGET
ESTIMATE = make_estimate(2, (50 * (1 - FREE_SHARE) - 2) / 94.5)
"""Of which 94 samples and a half fit into what the probe does not leave free."""


@pytest.mark.parametrize(
    ("factor", "limit", "tried", "found", "bound"),
    [
        (1.0, 1000, [94], 94, Bound.ESTIMATE),
        (1.0, 95, [94], 94, Bound.ESTIMATE),
        (1.0, 94, [94], 94, Bound.LIMIT),
        (1.0, 64, [64], 64, Bound.LIMIT),
        (0.98, 1000, [94], 94, Bound.ESTIMATE),  # 96 would gain less than 5 %
        (0.9, 1000, [94, 105], 105, Bound.ESTIMATE),  # corrected by what was measured
        (0.6, 1000, [94, 160], 160, Bound.ESTIMATE),
        (0.5, 120, [94, 120], 120, Bound.LIMIT),
        (1 + FREE_SHARE, 1000, [94], 94, Bound.ESTIMATE),  # inside what is left free
        (1.03, 1000, [94, 90], 90, Bound.MEMORY),  # smaller by 4 %
        (1.1, 1000, [94, 90, 84], 84, Bound.MEMORY),  # and by a tenth of the first
        (1.45, 1000, [94, 90, 84, 42, 63], 63, Bound.ATTEMPTS),  # then it was far off
        (40.0, 1000, [94, 90, 84, 42, 1], None, None),
    ],
)
def test_confirming_an_estimate(
    factor: float, limit: int, tried: list[int], found: int | None, bound: Bound | None
) -> None:
    plan = SearchPlan(limit=limit, budget_bytes=BUDGET, estimate=ESTIMATE)
    attempt = measured(ESTIMATE, factor, BUDGET)
    if found is None:
        with pytest.raises(NotEnoughMemoryError, match="micro-batch 1: out of memory"):
            find_largest(attempt, plan)
        return
    result = find_largest(attempt, plan)
    assert (sizes(result), result.microbatch_size, result.bounded_by) == (tried, found, bound)


def test_where_the_estimate_says_that_nothing_fits_one_sample_is_tried() -> None:
    plan = SearchPlan(limit=64, budget_bytes=2 * GIB, estimate=ESTIMATE)
    result = find_largest(measured(ESTIMATE, 0.5, 2 * GIB), plan)
    assert (sizes(result), result.microbatch_size) == ([1, 3], 3)
    with pytest.raises(NotEnoughMemoryError):
        find_largest(measured(ESTIMATE, 1.0, 2 * GIB), plan)


@given(
    fixed_gib=st.floats(0, 60),
    gib_per_sample=st.floats(0.001, 10),
    factor=st.floats(0.9, 1.0),
    limit=st.integers(1, 2000),
)
def test_an_estimate_that_errs_on_the_high_side_takes_two_tries_and_no_failure(
    fixed_gib: float, gib_per_sample: float, factor: float, limit: int
) -> None:
    estimate = make_estimate(fixed_gib, gib_per_sample)
    plan = SearchPlan(limit=limit, budget_bytes=BUDGET, estimate=estimate)
    if estimate.largest_microbatch(BUDGET - headroom_bytes(BUDGET), limit) == 0:
        assert plan.first_size == 1
        return
    result = find_largest(measured(estimate, factor, BUDGET), plan)
    assert len(result.attempts) <= 2
    assert all(a.outcome is Outcome.FITS for a in result.attempts)
    best = estimate.largest_microbatch(BUDGET - headroom_bytes(BUDGET), limit, ratio=factor)
    assert best * 0.95 - 1 <= result.microbatch_size <= best


def test_a_start_is_taken_instead_of_the_estimate() -> None:
    plan = SearchPlan(limit=1000, budget_bytes=BUDGET, start=10, estimate=ESTIMATE)
    result = find_largest(measured(ESTIMATE, 0.5, BUDGET), plan)
    assert (sizes(result), result.bounded_by) == ([10], Bound.PROPOSAL)


def test_growing_begins_at_the_estimate_and_goes_past_it() -> None:
    plan = SearchPlan(limit=1000, budget_bytes=BUDGET, search="grow", estimate=ESTIMATE)
    result = find_largest(measured(ESTIMATE, 0.6, BUDGET), plan)
    assert sizes(result) == [94, 141, 211, 176, 158]
    assert (result.microbatch_size, result.bounded_by) == (158, Bound.MEMORY)


def test_on_a_cpu_an_estimate_is_corrected_by_half_as_much_again_at_a_time() -> None:
    plan = SearchPlan(limit=1000, budget_bytes=BUDGET, estimate=replace(ESTIMATE, device_type="cpu"))
    assert sizes(find_largest(measured(ESTIMATE, 0.5, BUDGET), plan)) == [94, 141, 183]
    # Of what is mapped, which counts, this is not less than estimated.
    assert sizes(find_largest(measured(ESTIMATE, 0.95, BUDGET), plan)) == [94]


def test_a_size_that_left_no_room_is_not_made_larger() -> None:
    def attempt(microbatch_size: int) -> Attempt:
        return Attempt(microbatch_size, Outcome.ALLOCATOR_RETRIED, 40 * GIB, 1.0)

    plan = SearchPlan(limit=1000, budget_bytes=BUDGET, estimate=ESTIMATE)
    assert sizes(find_largest(attempt, plan)) == [94]


def test_the_number_of_tries_can_be_less() -> None:
    plan = SearchPlan(limit=64, budget_bytes=BUDGET)
    failed = [Attempt(size, Outcome.OUT_OF_MEMORY, None, 1.0) for size in (64, 32)]
    assert next_microbatch_size(failed[:1], plan, max_attempts=2) == 1
    assert next_microbatch_size(failed, plan, max_attempts=2) is None
    assert next_microbatch_size(failed, plan) == 16


@pytest.mark.parametrize(
    ("attempt", "line"),
    [
        (Attempt(8, Outcome.FITS, GIB, 1.25), "micro-batch 8: fits, peak 1.0 GiB of 1.5 GiB, 1.2 s"),
        (
            Attempt(9, Outcome.OUT_OF_MEMORY, None, 0.5, "CUDA out of memory"),
            "micro-batch 9: out of memory (CUDA out of memory), 0.5 s",
        ),
    ],
)
def test_an_attempt_in_one_line(attempt: Attempt, line: str) -> None:
    assert describe_attempt(attempt, BUDGET_BYTES) == line
