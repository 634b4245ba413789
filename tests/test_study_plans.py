from __future__ import annotations

from pathlib import Path

import pytest
from made_studies import Trained, make_study

from tune_easytrain.study import Study, build_study
from tune_easytrain.study_plans import choose_plans, metric_text, unmeasured

pytest.importorskip("scipy")


def seeds(
    size: int, metric: float, num_seeds: int = 3, spread: float = 0.0004, **more: object
) -> list[Trained]:
    return [Trained(size, seed, metric + spread * seed, **more) for seed in range(num_seeds)]  # type: ignore[arg-type]


def study_of(folder: Path, *arms: list[Trained]) -> Study:
    return build_study(make_study(folder, [trained for arm in arms for trained in arm]))


def test_the_source_s_own_study(tmp_path: Path) -> None:
    """24 and 32 as in 001_88b761142d2cd80e.txt; 48 and the accumulated 64 are made up."""
    study = study_of(
        tmp_path,
        seeds(24, 0.9306, epoch_seconds=1800.0),
        seeds(32, 0.9336, epoch_seconds=1500.0),
        seeds(48, 0.9328, epoch_seconds=1020.0),
        seeds(64, 0.9310, limit=32, epoch_seconds=1320.0),
    )
    best, fast, larger = choose_plans(study, allowed_loss=0.003)
    assert best.arm is not None
    assert best.arm.effective_batch_size == 32
    assert fast.arm is not None
    assert fast.arm.effective_batch_size == 48
    assert "32%" in " ".join(fast.reasons)
    assert larger.arm is not None
    assert larger.arm.batch_name == "E = 64 as 2 × 32"
    assert "in one piece it was not measured" in " ".join(larger.unknown)


def test_plan_b_needs_more_than_luck(tmp_path: Path) -> None:
    slow, fast = seeds(32, 0.93, epoch_seconds=1500.0), seeds(48, 0.929, num_seeds=1, epoch_seconds=900.0)
    _, plan, _ = choose_plans(study_of(tmp_path, slow, fast), allowed_loss=0.01)
    assert plan.arm is None
    assert "one seed" in " ".join(plan.unknown)
    noisy = [Trained(48, seed, metric, epoch_seconds=900.0) for seed, metric in enumerate([0.90, 0.93, 0.95])]
    _, plan, _ = choose_plans(study_of(tmp_path, slow, noisy), allowed_loss=0.01)
    assert plan.arm is None
    assert "more seeds would tell" in " ".join(plan.unknown)


def test_plan_b_passes_over_what_is_fast_and_bad(tmp_path: Path) -> None:
    study = study_of(
        tmp_path,
        seeds(32, 0.93, epoch_seconds=1500.0),
        seeds(64, 0.90, epoch_seconds=700.0),
        seeds(48, 0.929, epoch_seconds=1000.0),
    )
    _, plan, _ = choose_plans(study, allowed_loss=0.005)
    assert plan.arm is not None
    assert plan.arm.effective_batch_size == 48
    assert not plan.unknown


def test_what_is_best_may_be_the_fastest_too(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds(32, 0.93, epoch_seconds=700.0), seeds(48, 0.92, epoch_seconds=1000.0))
    best, fast, _ = choose_plans(study, allowed_loss=0.005)
    assert fast.arm is best.arm
    assert "Nothing measured is faster" in " ".join(fast.reasons)


def test_accumulation_is_held_against_the_same_batch_in_one_piece(tmp_path: Path) -> None:
    study = study_of(
        tmp_path, seeds(64, 0.93, epoch_seconds=1000.0), seeds(64, 0.9301, limit=32, epoch_seconds=1250.0)
    )
    *_, plan = choose_plans(study, allowed_loss=0.005)
    said = " ".join(plan.reasons)
    assert "not told apart from that in one piece" in said
    assert "1.25 × the time" in said
    assert "0.50 × the memory" in said


def test_the_best_is_said_with_those_it_is_not_told_apart_from(tmp_path: Path) -> None:
    study = study_of(tmp_path, seeds(32, 0.93, spread=0.01), seeds(48, 0.931, spread=0.01), seeds(64, 0.8))
    best, *_ = choose_plans(study, allowed_loss=0.005)
    said = " ".join(best.reasons)
    assert "Not told apart from it at 95%: swin_b, E = 32" in said
    assert "E = 64" not in said


def test_less_may_be_better(tmp_path: Path) -> None:
    results = make_study(
        tmp_path, [*seeds(32, 0.5), *seeds(48, 0.4)], run={"metric": "val_srcc", "mode": "min"}
    )
    best, *_ = choose_plans(build_study(results), allowed_loss=0.01)
    assert best.arm is not None
    assert best.arm.effective_batch_size == 48


def test_nothing_is_chosen_from_nothing(tmp_path: Path) -> None:
    study = study_of(tmp_path, [Trained(32, 0, 0.0, error="ValueError: x")])
    plans = choose_plans(study, allowed_loss=0.01)
    assert [plan.arm for plan in plans] == [None] * 3
    assert all(plan.unknown for plan in plans)
    assert len(unmeasured(study)) == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.934], "0.934"),
        ([0.9336, 0.934, 0.9344], "0.9340 ± 0.0004"),
        ([5.0, 5.0], "5.0000 ± 0.0000"),
        ([], "unknown"),
    ],
)
def test_a_mean_has_the_digits_of_its_deviation(tmp_path: Path, values: list[float], text: str) -> None:
    trials = [Trained(32, seed, value) for seed, value in enumerate(values)] or [
        Trained(32, 0, 0.0, is_over=False)
    ]
    (arm,) = build_study(make_study(tmp_path, trials)).arms
    assert metric_text(arm) == text
