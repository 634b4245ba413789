"""Probing along a knob: its rule of thumb, the sequences of sizes, and real ones under a real cap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tune_easytrain as te
from tune_easytrain.knob import Knob
from tune_easytrain.probe import Attempt, Outcome, SearchPlan, find_largest
from tune_easytrain.probe_log import describe_search
from tune_easytrain.search_space import expand_trials, num_trials
from tune_easytrain.sweep_plan import build_plan
from tune_easytrain.trial_probe import TrialProbe, probe_trial

ROOT = Path(__file__).parents[1]
TABLE = [(1, 64), (2, 64), (3, 51), (4, 51), (6, 38), (8, 32), (10, 25), (12, 19), (13, 16), (40, 16)]
MIB = 2**20


@pytest.mark.parametrize(("value", "size"), TABLE)
def test_the_first_size_is_the_limit_times_the_scale_factor_rounded_down(value: int, size: int) -> None:
    assert Knob("model.max_crops", value).first_size(64) == size


@given(st.floats(0.01, 1e6), st.integers(1, 10**6))
def test_the_first_size_is_never_above_the_limit_and_at_least_one(value: float, limit: int) -> None:
    assert 1 <= Knob("k", value).first_size(limit) <= limit


@given(st.floats(0.01, 1e3), st.floats(0.01, 1e3), st.integers(1, 10**6))
def test_a_larger_value_starts_no_higher(one: float, other: float, limit: int) -> None:
    low, high = (Knob("k", value).first_size(limit) for value in sorted((one, other)))
    assert low >= high


SCENARIOS = [
    (12, 63, [19, 28, 42, 63], 63),
    (12, 16, [19, 9, 14, 16], 16),
    (12, 24, [19, 28, 23], 23),
    # The source's log goes back to 24 here; by its own rule the sizes between are tried first.
    (13, 25, [16, 24, 36, 30, 27], 24),
]


@pytest.mark.parametrize(("value", "fits", "sizes", "found"), SCENARIOS)
def test_the_scenarios_of_the_source_are_gone_through_exactly(
    value: int, fits: int, sizes: list[int], found: int
) -> None:
    def attempt(size: int) -> Attempt:
        return Attempt(size, Outcome.FITS if size <= fits else Outcome.OUT_OF_MEMORY, size, 0.0)

    plan = SearchPlan(limit=64, budget_bytes=64, start=Knob("k", value).first_size(64), search="grow")
    result = find_largest(attempt, plan)
    assert [tried.microbatch_size for tried in result.attempts] == sizes
    assert result.microbatch_size == found


def test_where_nothing_is_trained_a_flushed_cache_does_not_make_a_size_smaller() -> None:
    def attempt(size: int) -> Attempt:
        fits = Outcome.FITS if size < 19 else Outcome.ALLOCATOR_RETRIED
        return Attempt(size, fits if size < 30 else Outcome.OUT_OF_MEMORY, size, 0.0)

    plan = SearchPlan(limit=64, budget_bytes=64, start=19, search="grow")
    evaluating = replace(plan, accepts_retries=True)
    assert [a.microbatch_size for a in find_largest(attempt, plan).attempts] == [19, 9, 14, 16]
    assert [a.microbatch_size for a in find_largest(attempt, evaluating).attempts] == [19, 28, 42, 35, 31]


def make_sweep(**batch: Any) -> te.SweepConfig:
    return te.load_config(
        {
            "name": "crops",
            "config": {"model": {"bytes_per_crop": MIB}},
            "grid_search": {"grid": {"model.max_crops": [2, 12, 13], "hp.batch_size": [64]}},
            "batch": {"knob": "model.max_crops", "search": "grow", **batch},
            "train": {"function": "none"},
            "run": {"metric": "val_loss"},
            "task": f"{ROOT / 'tests' / 'toys.py'}:build_generating_task",
        }
    )


def probe(value: int, budget_bytes: int, **batch: Any) -> tuple[TrialProbe, list[str]]:
    lines: list[str] = []
    config = make_sweep(memory_budget=budget_bytes, start_from=value, **batch)
    return probe_trial(config, 0, lines.append), lines


@pytest.mark.parametrize(("value", "fits", "sizes", "found"), SCENARIOS)
def test_the_scenarios_come_true_under_a_real_cap_on_memory_that_generation_takes(
    value: int, fits: int, sizes: list[int], found: int
) -> None:
    most_bytes = int((fits + 0.6) * value * MIB)  # generation takes a MiB for each crop of each sample
    result, _ = probe(value, most_bytes * 10 // 9)  # the probe leaves a tenth free
    assert [attempt["microbatch_size"] for attempt in result.probed.attempts] == sizes
    assert result.probed.microbatch_size == found
    outcomes = {a["microbatch_size"]: a["outcome"] for a in result.probed.attempts}
    assert outcomes == {size: "fits" if size <= fits else "out_of_memory" for size in sizes}


def test_confirm_starts_at_the_estimate_which_knows_what_generation_takes() -> None:
    result, _ = probe(12, int(20.5 * 12 * MIB) * 10 // 9, search="confirm")
    probed = result.probed
    assert probed.rule_of_thumb_size == 19
    assert probed.estimated_size is not None
    assert 19 <= probed.estimated_size <= 20
    assert probed.attempts[0]["microbatch_size"] == probed.estimated_size
    assert [attempt["outcome"] for attempt in probed.attempts] == ["fits"]


def test_the_log_tells_start_steps_and_result() -> None:
    result, said = probe(12, int(24.6 * 12 * MIB) * 10 // 9)
    first, *steps, last = describe_search(result.probed)
    assert first.startswith("max_crops=12: looking for the largest micro-batch up to 64 (rule of thumb 19, ")
    assert first.endswith("starting with 19")
    assert said[1].startswith("max_crops=12: rule of thumb 19, estimate 2")
    assert [line.split(",")[0] for line in steps] == [
        "  ✓ micro-batch 19: fits",
        *(line.split(",")[0] for line in steps[1:2]),
        "  ✓ micro-batch 23: fits",
    ]
    assert steps[0].endswith("; trying larger: 28")
    assert steps[1].startswith("  ✗ micro-batch 28: out of memory")
    assert steps[1].endswith("; trying smaller: 23")
    assert last == "max_crops=12: using micro-batch 23, bounded by memory"
    assert len([line for line in said if line.startswith("micro-batch ")]) == 3


def test_start_from_skips_smaller_values_and_the_plan_says_so() -> None:
    config = make_sweep(start_from=12)
    assert [trial["model"]["max_crops"] for trial in expand_trials(config)] == [12, 13]
    assert num_trials(config) == 2
    described = "\n".join(build_plan(config).describe())
    assert "2 trials; the Cartesian product would have been 2." in described
    assert "along model.max_crops, from 12 on; by the rule of thumb it starts at 12: 19, 13: 16." in described


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({"start": 10}, "it starts at 10 (batch.start)."),
        ({"search": "confirm"}, "at the estimate; the rule of thumb would be 2: 64, 12: 19, 13: 16."),
        ({"search": "power_of_two"}, "it starts at 1 (batch.search: power_of_two)."),
    ],
)
def test_the_plan_says_where_the_probe_starts(batch: dict[str, Any], told: str) -> None:
    (line,) = (line for line in build_plan(make_sweep(**batch)).describe() if "goes along" in line)
    assert line.endswith(told)


def test_start_from_takes_paired_values_along() -> None:
    config = te.load_config(
        {
            "grid_search": {
                "grid": {"model.max_crops": [2, 4, 8], "hp.batch_size": [64, 32, 16], "hp.lr": [1, 2]},
                "pair": [["model.max_crops", "hp.batch_size"]],
            },
            "batch": {"knob": "model.max_crops", "start_from": 3},
        }
    )
    trials = expand_trials(config)
    assert [(t["model"]["max_crops"], t["hp"]["batch_size"]) for t in trials] == [(4, 32)] * 2 + [(8, 16)] * 2


FAULTS = [
    ({"knob": "model.max_crop"}, "batch.knob", "did you mean 'model.max_crops'"),
    ({"knob": "model..x"}, "batch.knob", "is no key"),
    ({"start_from": 3}, "batch.start_from", "value of no knob"),
    ({"knob": "model.max_crops", "start_from": 9}, "batch.start_from", "the largest is 8"),
    ({"knob": "model.type"}, "grid_search.grid.model.type", "no number above 0"),
    ({"knob": "data.name"}, "config", "'real' is a value of the knob data.name"),
    ({"knob": "data.size", "start_from": 9}, "batch.start_from", "the largest is 4"),
]


@pytest.mark.parametrize(("batch", "path", "words"), FAULTS)
def test_a_knob_that_cannot_be_is_one_fault_at_its_place(
    batch: dict[str, Any], path: str, words: str
) -> None:
    with pytest.raises(te.ConfigError) as raised:
        te.load_config(
            {
                "config": {"data": {"name": "real", "size": 4}},
                "grid_search": {"grid": {"model.max_crops": [2, 8], "model.type": ["a"], "hp.batch_size": 8}},
                "batch": batch,
            }
        )
    (fault,) = raised.value.faults
    assert fault.path == path
    assert words in str(fault)


def test_a_knob_is_one_for_the_whole_sweep() -> None:
    with pytest.raises(te.ConfigError, match=r"batch\.knob is one for the whole sweep"):
        te.load_config({"grid_search": {"grid": {"batch.knob": ["a", "b"], "hp.batch_size": 8}}})
