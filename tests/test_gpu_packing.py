from __future__ import annotations

import math
from typing import Any

import pytest
from estimates import GIB
from hypothesis import given
from hypothesis import strategies as st
from test_memory_plan import GPU, PER_SAMPLE_GIB, make_plan, make_sweep

from tune_easytrain.gpu_packing import describe_packing, request_gpus
from tune_easytrain.memory_plan import MemoryPlan, TrialMemory
from tune_easytrain.trial_request import TrialRequest


def packed(models: list[str], sizes: list[int], **trial: Any) -> MemoryPlan:
    return make_plan({**make_sweep(models, sizes), "trial": {"resources": {"gpu": "auto"}, **trial}})


def test_each_trial_gets_the_smallest_share_in_which_its_limit_fits() -> None:
    plan = packed(["small", "medium", "medium", "large", "odd"], [2, 2, 8, 16, 4])
    shares = [trial.gpu for trial in plan.trials]
    # 1.2, 3 and 9 GiB with 0.9 of 20 GiB to share and 0.25 GiB a process; then 81 GiB, and what nobody knows.
    assert shares == [0.1, 0.2, 0.55, 1.0, 1.0]
    for trial in plan.trials[:3]:
        assert trial.estimate is not None
        assert trial.fits_limit
        assert trial.estimate.peak_bytes(trial.limit) <= trial.usable_bytes
        if trial.gpu > 0.1:
            assert not trial.on_gpu(trial.gpu - 0.05, GPU.total_bytes).fits_limit
    assert plan.trials[3].microbatch_size == 3  # as on a GPU of its own


@given(st.lists(st.tuples(st.sampled_from(sorted(PER_SAMPLE_GIB)), st.integers(1, 64)), min_size=1))
def test_trials_that_share_a_gpu_never_need_more_than_it_has(trials: list[tuple[str, int]]) -> None:
    plan = packed([name for name, _ in trials], [size for _, size in trials])
    together: list[list[TrialMemory]] = [[]]
    for trial in plan.trials:
        if sum(other.gpu for other in together[-1]) + trial.gpu > 1 + 1e-9:
            together.append([])
        together[-1].append(trial)
    for group in together:
        assert sum(trial.budget_bytes for trial in group) <= 0.9 * GPU.total_bytes
    for trial in plan.trials:
        assert math.isclose(20 * trial.gpu, round(20 * trial.gpu))


def test_several_workers_get_a_gpu_each() -> None:
    plan = packed(["small"], [2], num_workers=2)
    (asked,) = request_gpus(plan.trials, TrialRequest(num_workers=2), num_gpus=2)
    assert (asked.gpu, asked.num_workers, asked.shares_model) == (1.0, 2, False)
    assert describe_packing([asked], plan) == ["GPUs by the estimate (a GPU): 1 × 2 GPUs"]


@pytest.mark.parametrize(
    ("num_gpus", "needed", "num_workers"), [(8, 4, 4), (4, 4, 4), (3, 4, 1), (8, 16, 1), (1, 2, 1)]
)
def test_what_fits_on_no_gpu_gets_several_if_that_helps(num_gpus: int, needed: int, num_workers: int) -> None:
    plan = packed(["huge", "small"], [4, 4])
    tried: list[int] = []

    def fits_shared_out(trial: TrialMemory, number: int) -> bool:
        assert trial is plan.trials[0]
        tried.append(number)
        return number >= needed

    huge, small = request_gpus(plan.trials, TrialRequest(cpu=2), num_gpus, fits_shared_out)
    assert (huge.gpu, huge.num_workers, huge.shares_model) == (1.0, num_workers, num_workers > 1)
    assert (small.gpu, small.num_workers, small.cpu) == (0.1, 1, 2)
    assert tried == [number for number in (2, 4, 8) if number <= min(num_gpus, needed)]


def test_people_are_told_who_gets_what() -> None:
    plan = packed(["small", "talker", "medium", "odd", "huge"], [2, 2, 8, 4, 4])
    requests = request_gpus(plan.trials, TrialRequest(), 2, lambda trial, num_workers: True)
    assert describe_packing(requests, plan) == [
        "GPUs by the estimate (a GPU): 2 × 0.1 of a GPU, 1 × 0.55 of a GPU, 1 × a whole GPU, "
        "1 × 2 GPUs with the model shared out",
        "  1 of them could not be estimated and get a whole GPU",
    ]
    headings, rows = plan.table()
    assert [row[headings.index("GPUs")] for row in rows] == ["0.1", "0.1", "0.55", "1", "1"]
    assert plan.trials[2].budget_bytes > 8 * GIB
