from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.errors import NotEnoughMemoryError
from tune_easytrain.probe import (
    MAX_ATTEMPTS,
    SMALLEST_GAIN,
    Attempt,
    Bound,
    Outcome,
    ProbeResult,
    Search,
    find_largest,
    format_bytes,
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
    return find_largest(attempt, limit=limit, budget_bytes=BUDGET_BYTES, start=start, search=search)


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


def test_a_size_at_which_the_allocator_retried_is_not_good_enough() -> None:
    result = probe(device(64, retries_from=33), limit=64, search="confirm")
    assert sizes(result) == [64, 32, 48, 40, 36]
    assert result.microbatch_size == 32


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
)
def test_whatever_the_device_does(
    outcomes: list[Outcome], limit: int, start: int | None, search: Search
) -> None:
    attempts: list[Attempt] = []

    def attempt(size: int) -> Attempt:
        assert len(attempts) < MAX_ATTEMPTS
        assert 1 <= size <= limit
        assert all(size != a.microbatch_size for a in attempts)
        assert all(size < a.microbatch_size for a in attempts if not a.ran)
        attempts.append(Attempt(size, outcomes[len(attempts)], 0, 0.0))
        return attempts[-1]

    try:
        result = probe(attempt, limit=limit, start=start, search=search)
    except NotEnoughMemoryError:
        assert not any(a.ran for a in attempts)
        assert attempts[-1].microbatch_size == 1
        return
    assert result.attempts == tuple(attempts)
    found = next(a for a in attempts if a.microbatch_size == result.microbatch_size)
    assert found.ran
    assert found.outcome is Outcome.FITS or all(a.outcome is not Outcome.FITS for a in attempts)
    if result.bounded_by is Bound.LIMIT:
        assert limit - result.microbatch_size < max(1.0, SMALLEST_GAIN * result.microbatch_size)
    if result.bounded_by is Bound.MEMORY:
        assert any(a.outcome is not Outcome.FITS for a in attempts)


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
