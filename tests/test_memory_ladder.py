from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toys import make_settings

from tune_easytrain.errors import EstimateError
from tune_easytrain.memory_estimate import Line, MemoryEstimate, PhaseEstimate, Segment
from tune_easytrain.memory_ladder import choose_strategies, ladder
from tune_easytrain.probe import SearchPlan
from tune_easytrain.settings import TrialSettings

GIVEN = make_settings(strategy="auto")
MIB = 2**20


class Estimates:
    """A model that keeps 1 MiB per sample, or what is left of it; counts how often it was asked."""

    def __init__(self, has_blocks: bool = True, is_traceable: bool = True) -> None:
        self.has_blocks, self.is_traceable = has_blocks, is_traceable
        self.asked: list[TrialSettings] = []

    def __call__(self, settings: TrialSettings) -> MemoryEstimate | EstimateError:
        assert settings not in self.asked
        self.asked.append(settings)
        share = 0.0 if settings.checkpointing == "none" else float(str(settings.checkpointing))
        if not self.is_traceable or (share and not self.has_blocks):
            return EstimateError("no such thing")
        fixed = 50 * MIB if settings.sharding == "optimizer" or settings.num_workers == 1 else 100 * MIB
        line = Line(fixed, MIB * (1 - 0.9 * share))
        phase = PhaseEstimate.build("backward", [line], [], 0)
        return MemoryEstimate((Segment(None, (phase,)),), "cuda", flops_per_sample=300 + 100 * share)


@pytest.mark.parametrize(
    ("limit", "checkpointing", "num_asked"),
    [(1, "none", 1), (60, 0.25, 4), (75, 0.5, 4), (130, 0.75, 4), (300, 1.0, 4), (3000, 1.0, 2)],
)
def test_no_more_is_given_up_than_is_needed(limit: int, checkpointing: str | float, num_asked: int) -> None:
    estimates = Estimates()
    choice = choose_strategies(GIVEN, limit, 110 * MIB, estimates)
    assert choice.settings == replace(GIVEN, checkpointing=checkpointing)
    assert len(estimates.asked) <= num_asked
    assert choice.estimate == Estimates()(choice.settings)
    if checkpointing == "none":
        assert choice.description == ""


def largest(settings: TrialSettings, limit: int, budget_bytes: int) -> int:
    estimate = Estimates()(settings)
    assert isinstance(estimate, MemoryEstimate)
    return SearchPlan(limit=limit, budget_bytes=budget_bytes, estimate=estimate).estimated_size(limit)


@given(limit=st.integers(1, 2000), budget=st.integers(60, 600), num_workers=st.integers(1, 2))
def test_the_choice_is_the_lowest_rung_that_holds_the_limit_else_the_highest(
    limit: int, budget: int, num_workers: int
) -> None:
    given_settings = replace(GIVEN, num_workers=num_workers)
    choice = choose_strategies(given_settings, limit, budget * MIB, Estimates())
    rungs = ladder(given_settings)
    holding = [rung for rung in rungs if largest(rung, limit, budget * MIB) == limit]
    assert choice.settings == (holding[0] if holding else rungs[-1])


def test_what_it_costs_and_gains_is_said() -> None:
    choice = choose_strategies(GIVEN, 60, 110 * MIB, Estimates())
    assert choice.description == (
        "memory.strategy chose to compute 25 % of the blocks again in the backward pass "
        "(8 % more computation): 60 samples fit at once instead of 48"
    )
    choice = choose_strategies(replace(GIVEN, num_workers=2), 5000, 110 * MIB, Estimates())
    assert "to share the optimizer's state among the workers" in choice.description
    assert "100 % of the blocks" in choice.description
    assert choice.description.endswith("of 5000 wished for")


def test_what_the_sweep_file_asks_for_stays() -> None:
    asked_for = replace(GIVEN, checkpointing=("Block",), sharding="optimizer", num_workers=2)
    assert ladder(asked_for) == (asked_for,)


def test_a_model_without_blocks_shares_its_optimizer_at_most() -> None:
    given_settings = replace(GIVEN, num_workers=2)
    choice = choose_strategies(given_settings, 50, 110 * MIB, Estimates(has_blocks=False))
    assert choice.settings == replace(given_settings, sharding="optimizer")
    choice = choose_strategies(GIVEN, 300, 110 * MIB, Estimates(has_blocks=False))
    assert choice.settings == GIVEN
    assert choice.description == "memory.strategy: nothing helps, 48 of 300 fit"


def test_without_an_estimate_nothing_is_given_up() -> None:
    estimates = Estimates(is_traceable=False)
    choice = choose_strategies(GIVEN, 300, 110 * MIB, estimates)
    assert choice.settings == GIVEN
    assert choice.description == "memory.strategy: nothing was chosen; no estimate: no such thing"
    assert len(estimates.asked) == 1
