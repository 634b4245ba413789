"""What is recommended, from memory that is given as lines; `test_cli_recommend` has the real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.fine_tuning import FineTuning, ResidentMemory
from tune_easytrain.language_models import find_language_model
from tune_easytrain.memory_estimate import Line, MemoryEstimate, PhaseEstimate, Segment
from tune_easytrain.recommendation import MOST_SAMPLES, Memory, Recommendation, recommend

GIB = 2**30
WAY = FineTuning(model=find_language_model("7b"), task="generation")


def resident_of(way: FineTuning) -> ResidentMemory:
    """A billion parameters, a hundredth of them trained with LoRA; split evenly among devices."""
    num_trained = 10**9 if way.method == "full" else 10**7
    parts = way.num_devices if way.sharding == "full" else 1
    size = 4 if way.weights == "fp32" else 2
    trained = num_trained * size // parts
    return ResidentMemory(10**9, num_trained, 10**9 * size // parts, trained, 2 * trained)


def estimate_of(way: FineTuning) -> MemoryEstimate:
    """Passes take 2 MiB a token, a tenth of it with checkpointing, and a GiB whatever the samples."""
    per_sample = way.sequence_length * 2 * 2**20 / (10 if way.checkpointing else 1)
    resident = resident_of(way).total_bytes
    phases = [
        PhaseEstimate.build("forward", [Line(resident + GIB / 2, per_sample)], (), 0),
        PhaseEstimate.build("backward", [Line(resident + GIB, per_sample)], (), 0),
        PhaseEstimate.build("optimizer", [Line(resident + 2 * GIB, 0)], (), 0),
        PhaseEstimate.build("generation", [Line(resident, per_sample / 4)], (), 0),
    ]
    return MemoryEstimate((Segment(None, tuple(phases)),), "cuda")


def made(gib: float, way: FineTuning = WAY, target: int = 32) -> Recommendation:
    return recommend(way, Memory(int(gib * GIB)), target, resident_of, estimate_of)


@given(st.floats(1, 300), st.integers(1, 200), st.sampled_from([1, 2, 3, 8]))
def test_the_largest_micro_batch_fits_and_one_more_does_not(
    gib: float, target: int, num_devices: int
) -> None:
    way = replace(WAY, num_devices=num_devices)
    result = made(gib, way, target)
    usable, estimate = result.memory.usable_bytes, estimate_of(way)
    largest = result.sizing.largest
    assert largest == 0 or estimate.peak_bytes(largest) <= usable
    assert largest == MOST_SAMPLES or estimate.peak_bytes(largest + 1) > usable
    assert result.missing_bytes == max(0, estimate.peak_bytes(1) - usable)
    assert result.fits == (not result.changed)


@given(st.floats(20, 300), st.integers(1, 200), st.sampled_from([1, 2, 3, 8]))
def test_every_effective_batch_size_is_reached_exactly(gib: float, target: int, num_devices: int) -> None:
    result = made(gib, replace(WAY, num_devices=num_devices), target)
    for size in (target, 32, 64):
        plan = result.sizing.plan(size)
        assert plan is not None
        assert max(plan.microbatch_sizes) <= result.sizing.largest
        assert sum(plan.microbatch_sizes) == -(-size // num_devices)  # the first device's share, the largest
        told = result.as_json()["accumulation"][str(size)]
        assert told["accumulation_steps"] == len(told["microbatch_sizes"]) == plan.accumulation_steps


def test_steps_are_never_rounded_down() -> None:
    result = made(25.5)
    assert result.sizing.largest == 6  # 6 × 5 = 30: two samples of 32 are left for a sixth micro-batch
    headings, rows = result.plan_table()
    assert rows[0] == ["32", "6", "2 × 6 + 4 × 5"]
    assert rows[1] == ["64", "11", "9 × 6 + 2 × 5"]
    assert headings == ["effective batch size", "accumulation steps", "micro-batches"]


def test_the_parts_add_up_to_the_peak_of_the_passes() -> None:
    parts = made(25.5).parts()
    assert parts.microbatch_size == 6
    peak = max(parts.phase_peak_bytes["forward"], parts.phase_peak_bytes["backward"])
    assert parts.resident.total_bytes + parts.activation_bytes == peak == parts.peak[1]
    assert parts.activation_bytes_per_sample == pytest.approx(1.005 * GIB)
    fixed = 1.005 * GIB + 0.005 * parts.resident.total_bytes
    assert parts.fixed_activation_bytes == pytest.approx(fixed, abs=16)
    assert parts.key_value_cache_bytes == 6 * 512 * 2**19
    assert parts.phase_peak_bytes["generation"] < peak


def test_the_phase_with_the_peak_is_named() -> None:
    result = made(16, replace(WAY, weights="bf16", checkpointing=True), target=1)
    assert result.parts().peak[0] == "optimizer"
    _, rows = result.part_table()
    assert [row[0] for row in rows] == [
        "weights",
        "gradients",
        "optimizer state",
        "activations",
        "peak",
        "peak of generation",
    ]
    assert rows[4][2] == "in the optimizer phase"


def test_what_does_not_fit_is_told_with_every_change_alone() -> None:
    result = made(12)
    assert not result.fits
    assert "Does not fit: one sample takes 17.0 GiB" in result.describe()[-1]
    _, rows = result.change_table()
    assert [(name, least, size, steps) for name, least, size, steps, _ in rows] == [
        ("checkpointing", "at least 14.9 GiB", "does not fit", ""),
        ("LoRA of rank 16", "3.9 GiB", "7", "5"),
        ("bf16 weights", "9.5 GiB", "1", "32"),
        ("split among 2 devices", "9.5 GiB", "1", "16"),
        ("split among 4 devices", "5.8 GiB", "5", "2"),
        ("split among 8 devices", "3.9 GiB", "7", "1"),
        ("256 tokens", "at least 14.9 GiB", "does not fit", ""),
        ("128 tokens", "at least 14.9 GiB", "does not fit", ""),
    ]
    assert result.describe_changes() == "What would make it fit, one change at a time:"


def test_where_no_change_alone_is_enough_more_and_more_are_made_together() -> None:
    result = made(3.4)
    alone = [changed for changed in result.changed if len(changed.changes) == 1]
    together = [changed.name for changed in result.changed if len(changed.changes) > 1]
    assert not any(changed.sizing.largest for changed in alone)
    assert together == [
        "checkpointing + LoRA of rank 16",
        "checkpointing + LoRA of rank 16 + split among 2 devices",
        "checkpointing + LoRA of rank 16 + split among 4 devices",
    ]
    assert result.changed[-1].sizing.largest > 0
    assert result.describe_changes() == "No change alone makes it fit; several together do:"
    assert result.as_json()["changes"][-1]["options"] == [
        "--checkpointing",
        "--method lora --weights bf16",
        "--sharding full --devices 4",
    ]


def test_where_nothing_is_enough_that_is_said() -> None:
    result = made(1)
    assert not any(changed.sizing.largest for changed in result.changed)
    assert len(result.changed[-1].changes) == 4  # LoRA's frozen weights are bf16 already
    assert result.describe_changes().startswith("Nothing makes it fit")
    assert result.as_json()["accumulation"] == {}


def test_what_is_resident_alone_too_much_is_not_traced_for_it() -> None:
    traced: list[FineTuning] = []

    def tracing(way: FineTuning) -> MemoryEstimate:
        traced.append(way)
        return estimate_of(way)

    result = recommend(WAY, Memory(12 * GIB), 32, resident_of, tracing)
    estimated = [c.sizing.fine_tuning for c in result.changed if c.sizing.estimate is not None]
    assert traced == [WAY, *estimated]
    for changed in result.changed:
        peak = estimate_of(changed.sizing.fine_tuning).peak_bytes(1)
        assert (changed.sizing.largest > 0) == (peak <= result.memory.usable_bytes)


def test_the_budget_is_the_one_that_training_would_get() -> None:
    memory = Memory(24 * GIB)
    assert memory.budget_bytes == int(0.9 * 24 * GIB) - 256 * 2**20
    assert memory.usable_bytes < memory.budget_bytes
    assert Memory(24 * GIB, 0.5).budget_bytes == 12 * GIB - 256 * 2**20
