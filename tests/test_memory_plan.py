from __future__ import annotations

from typing import Any

import pytest
from estimates import GIB, make_estimate
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.accelerators import Accelerator
from tune_easytrain.config import load_config
from tune_easytrain.errors import EstimateError
from tune_easytrain.memory_budget import CUDA_RESERVE_BYTES, headroom_bytes
from tune_easytrain.memory_estimate import MemoryEstimate
from tune_easytrain.memory_plan import MemoryPlan, build_memory_plan
from tune_easytrain.probe import largest_power_of_two

GPU = Accelerator("a GPU", 20 * GIB)
BUDGET = 18 * GIB - CUDA_RESERVE_BYTES
PER_SAMPLE_GIB = {"small": 0.1, "talker": 0.1, "medium": 1.0, "large": 5.0, "huge": 30.0}


def make_plan(sweep: dict[str, Any], max_experiments: int | None = None) -> MemoryPlan:
    """The plan of a sweep whose models need memory by `PER_SAMPLE_GIB`, and `odd` has no estimate."""

    def estimate(config: dict[str, Any]) -> MemoryEstimate | EstimateError:
        name = config["model"]["type"]
        missing = {"generation": "it looks at words"} if name == "talker" else {}
        if name == "odd":
            return EstimateError("control flow hangs on data")
        return make_estimate(1.0, PER_SAMPLE_GIB[name], **missing)

    config = load_config(sweep)
    return build_memory_plan(
        config, GPU, lambda configs: [estimate(config) for config in configs], max_experiments
    )


def make_sweep(models: list[str], sizes: list[int] | None = None, **batch: Any) -> dict[str, Any]:
    grid: dict[str, Any] = {"model.type": models}
    if sizes is not None:
        grid["hp.batch_size"] = sizes
    return {"grid_search": {"grid": grid}, "batch": {"effective_batch_size": 64, **batch}}


def test_each_trial_gets_the_most_that_its_pair_and_memory_allow() -> None:
    small, medium, large = make_plan(make_sweep(["small", "medium", "large"], [32, 16, 8])).trials
    assert (small.microbatch_size, small.fits) == (32, True)
    assert (medium.largest_fitting(), medium.microbatch_size) == (16, 16)
    assert (large.largest_fitting(), large.microbatch_size) == (3, 3)
    assert large.batch_plan is not None
    assert (large.batch_plan.accumulation_steps, sum(large.batch_plan.microbatch_sizes)) == (22, 64)
    assert large.estimated_peak_bytes == 16 * GIB
    assert large.phase_peak_bytes() == {"backward": 16 * GIB, "optimizer": GIB}


def test_the_micro_batch_used_is_even_where_more_would_fit() -> None:
    (trial,) = make_plan(make_sweep(["medium"], effective_batch_size=20)).trials
    assert (trial.largest_fitting(), trial.microbatch_size) == (16, 10)
    assert trial.estimated_peak_bytes == 11 * GIB


def test_the_budget_is_the_one_that_the_trial_would_get() -> None:
    sweep = make_sweep(["medium"])
    assert make_plan(sweep).trials[0].budget_bytes == BUDGET
    half = {**sweep, "trial": {"resources": {"gpu": 0.5}}}
    assert make_plan(half).trials[0].budget_bytes == 9 * GIB - CUDA_RESERVE_BYTES
    several = {**sweep, "trial": {"resources": {"gpu": 2}}}
    assert make_plan(several).trials[0].budget_bytes == BUDGET
    given = make_sweep(["medium"], memory_budget="6GiB", memory_fraction=0.5)
    assert make_plan(given).trials[0].budget_bytes == 6 * GIB


@given(st.integers(1, 30 * GIB))
def test_no_trial_is_planned_into_the_probes_headroom(budget_bytes: int) -> None:
    (trial,) = make_plan(make_sweep(["medium"], memory_budget=budget_bytes)).trials
    usable_bytes = trial.budget_bytes - headroom_bytes(trial.budget_bytes)
    assert trial.estimate is not None
    largest = trial.largest_fitting()
    assert largest is not None
    assert largest == 0 or trial.estimate.peak_bytes(largest) <= usable_bytes
    assert largest == trial.limit or trial.estimate.peak_bytes(largest + 1) > usable_bytes


def test_a_trial_that_does_not_fit_tells_what_one_sample_needs() -> None:
    plan = make_plan(make_sweep(["small", "huge"], [32, 16]))
    row = plan.trials[1].as_json()
    assert (row["fits"], row["microbatch_size"], row["accumulation_steps"]) == (False, None, None)
    assert row["estimated_peak_bytes"] == 31 * GIB
    assert row["memory_budget_bytes"] == BUDGET
    assert (
        "  trial 1 (huge, 16): needs 31.0 GiB, the budget is 17.8 GiB of which the probe uses 17.6 GiB"
        in plan.describe()
    )
    assert plan.table()[1][1][-1] == "not one sample"


def test_a_trial_without_an_estimate_says_why() -> None:
    plan = make_plan(make_sweep(["odd", "small"]))
    row = plan.trials[0].as_json()
    for key in ("microbatch_size", "accumulation_steps", "estimated_peak_bytes", "phase_peak_bytes", "fits"):
        assert row[key] is None, key
    assert row["error"] == "control flow hangs on data"
    assert row["effective_batch_size"] == 64
    assert plan.trials[1].as_json()["error"] is None
    assert plan.table()[1][0][-1] == "no estimate: control flow hangs on data"
    assert "  trial 0 (odd): control flow hangs on data" in plan.describe()


def test_a_phase_that_the_estimate_lacks_is_told() -> None:
    plan = make_plan(make_sweep(["talker", "medium"]))
    assert plan.describe()[-2:] == [
        "Estimated without:",
        f"  generation of {plan.trials[0].name}: it looks at words",
    ]


def test_pairs_that_do_not_fit_at_once_are_told_once_each() -> None:
    sweep = make_sweep(["medium", "large"], [16, 16], effective_batch_size=16)
    sweep["grid_search"]["grid"]["hp.learning_rate"] = [0.1, 0.01, 0.001]
    plan = make_plan(sweep)
    assert len(plan.trials) == 6
    lines = plan.describe()
    assert lines[0] == "6 of 6 trials fit on a GPU (20.0 GiB)."
    start = lines.index("Pairs that do not fit at once:")
    assert lines[start + 1 :] == ["  large 16: only 3 fit; 6 micro-batches of at most 3"]
    assert plan.table()[1][-1][-1] == "3 of 16"


def test_a_sweep_that_fits_has_nothing_to_tell_but_that() -> None:
    assert make_plan(make_sweep(["small"])).describe() == ["1 of 1 trial fits on a GPU (20.0 GiB)."]


def test_with_the_probe_off_the_size_given_either_fits_or_does_not() -> None:
    sweep = make_sweep(["medium", "large"], [17, 4], probe="off")
    medium, large = make_plan(sweep).trials
    assert (medium.fits, medium.microbatch_size) == (False, None)
    assert medium.estimated_peak_bytes == 18 * GIB
    assert (large.fits, large.microbatch_size) == (False, None)
    (small,) = make_plan(make_sweep(["small"], [16], probe="off")).trials
    assert (small.fits, small.microbatch_size) == (True, 16)
    assert "Do not fit as given, with the probe off:" in make_plan(sweep).describe()


def test_without_a_batch_size_the_most_that_fits_is_told() -> None:
    sweep = make_sweep(["medium"], effective_batch_size=None, probe="off")
    sweep["train"] = {"function": "own.py:train"}
    (trial,) = make_plan({**sweep, "batch": {"probe": "off"}}).trials
    assert trial.batch_plan is None
    assert trial.limit == 4096


def test_drawn_keys_are_estimated_at_their_largest_and_told() -> None:
    sweep = make_sweep(["small"])
    sweep["grid_search"]["grid"]["hp.learning_rate"] = {"loguniform": [1e-5, 1e-2]}
    sweep["grid_search"]["grid"]["optimizer.name"] = {"choice": ["sgd", "adam"]}
    plan = make_plan(sweep)
    assert plan.trials[0].config["hp"]["learning_rate"] == 0.01
    assert plan.trials[0].config["optimizer"]["name"] == "sgd"
    assert plan.describe()[-1] == "Drawn keys were estimated at hp.learning_rate=0.01, optimizer.name=sgd."


def test_the_plan_can_be_cut_short() -> None:
    plan = make_plan(make_sweep(["small", "huge"], [8, 8]), max_experiments=1)
    assert [trial.values["model.type"] for trial in plan.trials] == ["small"]


@pytest.mark.parametrize(
    ("batch", "most"),
    [
        ({}, 16),
        ({"start": 10}, 10),
        ({"start": 30}, 16),
        ({"start": 10, "search": "grow"}, 16),
        ({"search": "power_of_two", "effective_batch_size": 13}, 8),
        ({"probe": "off", "effective_batch_size": 9}, 9),
    ],
)
def test_training_is_limited_to_what_the_search_would_end_with(batch: dict[str, Any], most: int) -> None:
    (trial,) = make_plan(make_sweep(["medium"], **batch)).trials
    assert trial.most_at_once == most


@pytest.mark.parametrize(("number", "power"), [(0, 0), (1, 1), (2, 2), (3, 2), (64, 64), (127, 64)])
def test_powers_of_two(number: int, power: int) -> None:
    assert largest_power_of_two(number) == power


def test_a_limit_in_tokens_is_told_to_be_unknown() -> None:
    told = make_plan(make_sweep(["small"], max_tokens=4096)).describe()
    assert any(line.startswith("Not known here: how many samples batch.max_tokens allows") for line in told)
    assert not any("max_tokens" in line for line in make_plan(make_sweep(["small"])).describe())
