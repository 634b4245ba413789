from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import stacks
from estimates import GIB, make_estimate
from hypothesis import given
from hypothesis import strategies as st
from test_memory_plan import GPU, PER_SAMPLE_GIB, make_plan, make_sweep

from tune_easytrain import estimate_memory, load_config
from tune_easytrain.accelerators import Accelerator, find_accelerator
from tune_easytrain.errors import EstimateError
from tune_easytrain.gpu_packing import describe_packing, request_gpus
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.memory_plan import MemoryPlan, TrialMemory, build_memory_plan
from tune_easytrain.settings import Sharding
from tune_easytrain.trial_request import TrialRequest


def not_asked(config: dict[str, Any], num_workers: int) -> MemoryEstimate | EstimateError:
    raise AssertionError(f"{config} was estimated for {num_workers} workers")


def estimate_stack(config: dict[str, Any], num_workers: int = 1) -> MemoryEstimate:
    """The estimate of a real model, of any size: nothing of it is allocated."""
    model = config["model"]
    return _estimate_stack(model["num_blocks"], model["width"], config["memory"]["sharding"], num_workers)


@cache
def _estimate_stack(num_blocks: int, width: int, sharding: Sharding, num_workers: int) -> MemoryEstimate:
    config = {"model": {"num_blocks": num_blocks, "width": width}}
    return estimate_memory(stacks.build_task, config, sharding=sharding, num_workers=num_workers)


def request_for_stacks(
    accelerator: Accelerator, num_gpus: int, num_blocks: list[int], width: int, **batch: Any
) -> list[TrialRequest]:
    """What trials of so many blocks ask for, by real estimates."""
    config = load_config(
        {
            "config": {"model": {"width": width}},
            "grid_search": {"grid": {"model.num_blocks": num_blocks}},
            "batch": {"effective_batch_size": 8, **batch},
            "trial": {"resources": {"gpu": "auto"}},
        }
    )
    plan = build_memory_plan(config, accelerator, lambda configs: [estimate_stack(each) for each in configs])
    return request_gpus(plan.trials, TrialRequest.from_config(config.trial), num_gpus, estimate_stack)


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
    (asked,) = request_gpus(plan.trials, TrialRequest(num_workers=2), 2, not_asked)
    assert (asked.gpu, asked.num_workers, asked.shares_model) == (1.0, 2, False)
    assert describe_packing([asked], plan) == ["GPUs by the estimate (a GPU): 1 × 2 GPUs"]


@pytest.mark.parametrize(
    ("num_gpus", "needed", "num_workers"), [(8, 4, 4), (4, 4, 4), (3, 4, 1), (8, 16, 1), (1, 2, 1)]
)
def test_what_fits_on_no_gpu_gets_several_if_that_helps(num_gpus: int, needed: int, num_workers: int) -> None:
    plan = packed(["huge", "small"], [4, 4])
    tried: list[int] = []

    def estimate(config: dict[str, Any], number: int) -> MemoryEstimate:
        assert (config["model"]["type"], config["memory"]["sharding"]) == ("huge", "full")
        tried.append(number)
        return make_estimate(1.0, 4.0 if number >= needed else 17.0)  # of 18 GiB, less what is kept free

    huge, small = request_gpus(plan.trials, TrialRequest(cpu=2), num_gpus, estimate)
    assert (huge.gpu, huge.num_workers, huge.shares_model) == (1.0, num_workers, num_workers > 1)
    assert (small.gpu, small.num_workers, small.cpu) == (0.1, 1, 2)
    assert tried == [number for number in (2, 4, 8) if number <= min(num_gpus, needed)]


def test_what_has_no_estimate_shared_out_gets_one_gpu_where_it_will_say_so() -> None:
    plan = packed(["huge"], [4])
    (huge,) = request_gpus(plan.trials, TrialRequest(), 8, lambda config, number: EstimateError("no blocks"))
    assert (huge.gpu, huge.num_workers, huge.shares_model) == (1.0, 1, False)


def test_real_models_get_shares_whole_gpus_and_several() -> None:
    """A block of 16384 is 2 GiB of weights, and Adam needs ten where nothing is shared out."""
    gpu = find_accelerator("H100 80GB")
    requests = request_for_stacks(gpu, 4, [1, 4, 6, 8, 16], 16384)
    asked = [(request.gpu, request.num_workers, request.shares_model) for request in requests]
    assert asked == [
        (0.15, 1, False),
        (0.6, 1, False),
        (0.9, 1, False),
        (1.0, 2, True),
        (1.0, 4, True),
    ]
    (too_large,) = request_for_stacks(gpu, 3, [16], 16384)
    assert (too_large.gpu, too_large.num_workers, too_large.shares_model) == (1.0, 1, False)


@pytest.mark.parametrize(
    ("batch", "asked"),
    [
        ({}, (0.1, 1)),
        ({"memory_budget": "1GiB"}, (1.0, 2)),
        ({"memory_fraction": 0.01}, (1.0, 4)),
        ({"memory_budget": "1GiB", "probe": "off"}, (1.0, 1)),
    ],
)
def test_a_budget_that_is_given_counts_as_the_gpus_own(
    batch: dict[str, Any], asked: tuple[float, int]
) -> None:
    """1.3 GiB by itself, 0.7 GiB for each of two workers, 0.4 GiB for each of four."""
    (request,) = request_for_stacks(find_accelerator("H100 80GB"), 4, [8], 2048, **batch)
    assert (request.gpu, request.num_workers) == asked


def test_people_are_told_who_gets_what() -> None:
    plan = packed(["small", "talker", "medium", "odd", "huge"], [2, 2, 8, 4, 4])
    requests = request_gpus(plan.trials, TrialRequest(), 2, lambda config, number: make_estimate(1.0, 1.0))
    assert describe_packing(requests, plan) == [
        "GPUs by the estimate (a GPU): 2 × 0.1 of a GPU, 1 × 0.55 of a GPU, 1 × a whole GPU, "
        "1 × 2 GPUs with the model shared out",
        "  1 of them could not be estimated and get a whole GPU",
    ]
    headings, rows = plan.table()
    assert [row[headings.index("GPUs")] for row in rows] == ["0.1", "0.1", "0.55", "1", "1"]
    assert plan.trials[2].budget_bytes > 8 * GIB
