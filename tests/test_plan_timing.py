from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.batch_plan import BatchPlan
from tune_easytrain.plan_timing import TIMED_WINDOWS, WARMUP_WINDOWS, WORTH, PlanTiming, candidate_plans

PER_TURN = WARMUP_WINDOWS + TIMED_WINDOWS
MANY = 1000
sizes = st.integers(1, 300)


def run_through(timing: PlanTiming, seconds: dict[int, list[float]]) -> list[int]:
    """Train with what the timing asks for; return k of every window. `seconds`: per k, one after another."""
    steps = []
    while not timing.is_done:
        k = timing.plan.accumulation_steps
        steps.append(k)
        times = seconds[k]
        timing.add(times[steps.count(k) % len(times) - 1])
    return steps


@given(sizes, sizes, st.integers(1, 4))
def test_candidates_have_smaller_and_smaller_microbatches_for_the_same_samples(
    effective: int, limit: int, num_workers: int
) -> None:
    plan = BatchPlan.build(effective, limit, num_workers=num_workers)
    first, *others = candidate_plans(plan)
    assert first is plan
    assert len(others) <= 2
    assert not others or plan.accumulation_steps > 1
    largest = [each.microbatch_size for each in (first, *others)]
    assert largest == sorted(set(largest), reverse=True)
    assert {each.num_samples for each in others} <= {plan.num_samples}
    assert {each.accumulation_steps - plan.accumulation_steps for each in others} <= {1, 2}


def test_each_plan_has_its_turn_and_the_first_a_second_one() -> None:
    timing = PlanTiming(BatchPlan.build(64, 16), MANY)
    steps = run_through(timing, {4: [1.0], 5: [1.0], 6: [1.0]})
    assert steps == [4] * PER_TURN + [5] * PER_TURN + [6] * PER_TURN + [4] * PER_TURN


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: [1.0], 5: [0.9], 6: [0.95]}, 5),
        ({4: [1.0], 5: [0.9], 6: [0.8]}, 6),
        ({4: [1.0], 5: [1.1], 6: [1.2]}, 4),
        ({4: [1.0], 5: [0.981], 6: [0.985]}, 4),  # too little to be told from noise
        ({4: [1.0, 1.0, 1.0, 3.0], 5: [2.0, 2.0, 0.9, 2.0], 6: [2.0]}, 5),  # the best time counts
    ],
)
def test_the_fastest_is_kept_where_it_is_clearly_faster(seconds: dict[int, list[float]], chosen: int) -> None:
    timing = PlanTiming(BatchPlan.build(64, 16), MANY)
    run_through(timing, seconds)
    assert (timing.plan.accumulation_steps, timing.plan.effective_batch_size) == (chosen, 64)


def test_a_machine_that_gets_faster_by_itself_changes_nothing() -> None:
    timing = PlanTiming(BatchPlan.build(64, 16), MANY)
    seconds = 10.0
    while not timing.is_done:
        timing.add(seconds)
        seconds *= 0.9
    assert timing.plan.accumulation_steps == 4


def test_the_first_window_with_a_plan_does_not_count() -> None:
    timing = PlanTiming(BatchPlan.build(64, 16), MANY)
    window = 0
    while not timing.is_done:
        is_first_of_turn = window % PER_TURN == 0
        timing.add(0.001 if is_first_of_turn and timing.plan.accumulation_steps == 5 else 1.0)
        window += 1
    assert timing.plan.accumulation_steps == 4


@pytest.mark.parametrize(
    ("plan", "num_windows"),
    [
        (BatchPlan.build(64, 16), WORTH * 4 * PER_TURN - 1),  # too short a training
        (BatchPlan.build(64, 64), MANY),  # one step: not limited by memory
        (BatchPlan.build(64, 1), MANY),  # nothing smaller than one sample
    ],
)
def test_where_there_is_nothing_to_gain_nothing_is_timed(plan: BatchPlan, num_windows: int) -> None:
    timing = PlanTiming(plan, num_windows)
    assert timing.is_done
    assert timing.plan is plan


def test_a_training_that_is_just_long_enough_is_timed() -> None:
    assert not PlanTiming(BatchPlan.build(64, 16), WORTH * 4 * PER_TURN).is_done
