from __future__ import annotations

from pathlib import Path

import pytest
from made_studies import Trained, make_run_of, make_study

from tune_easytrain.document import Figure, as_html, as_markdown
from tune_easytrain.report import Report, ReportOptions
from tune_easytrain.report_unknown import Recipe
from tune_easytrain.study import build_study

pytest.importorskip("scipy")

TRIALS = [
    *(Trained(24, seed, 0.9306 + 0.0004 * seed, epoch_seconds=1800.0) for seed in range(3)),
    *(Trained(32, seed, 0.9336 + 0.0004 * seed, epoch_seconds=1500.0) for seed in range(3)),
    *(Trained(48, seed, 0.9328 + 0.0004 * seed, epoch_seconds=1020.0) for seed in range(3)),
    *(Trained(64, seed, 0.931 + 0.0004 * seed, limit=32, epoch_seconds=1320.0) for seed in range(3)),
    Trained(64, 0, 0.0, error="OutOfMemoryError: not even one sample fits <b>"),
    Trained(96, 0, 0.0, is_over=False),
    Trained(32, 0, 0.9, model="swin_t", epoch_seconds=600.0),
]


def text_of(folder: Path, trials: list[Trained], **options: object) -> str:
    study = build_study(make_study(folder, trials, num_epochs=30))
    report = Report(study, ReportOptions(recipes=[Recipe(sweep_file="iqa.yaml")], **options))  # type: ignore[arg-type]
    return as_markdown(report.blocks()).replace("\\", "")


def test_every_arm_is_a_row_with_what_was_measured(tmp_path: Path) -> None:
    text = text_of(tmp_path, TRIALS, price=2.0)
    row = "| swin_b | 32 | 3 | 0.9340 ± 0.0004 | 0.933 to 0.935 | 30 | 25 min | 12.5 h | 221 | 4.697 |"
    assert f"{row} 16.0 GiB | 25.00 |" in text
    assert "| swin_b | 64 as 2 × 32 | 3 |" in text
    assert "An epoch is 7046 samples: 294 at E = 24, 221 at E = 32" in text
    assert text.count("| swin_b | 64 | 0 | unknown |") == 1


def test_the_decision_tree_has_this_study_s_numbers(tmp_path: Path) -> None:
    text = text_of(tmp_path, TRIALS, allowed_loss=0.003)
    assert "├─ yes → plan A: swin_b, E = 32: 0.9340 ± 0.0004, 12.5 h" in text
    assert "├─ yes → swin_t, E = 32, 10 epochs: about 100 min" in text
    assert "may val_srcc lose 0.003?" in text
    assert "├─ yes → plan B: swin_b, E = 48: 0.9332 ± 0.0004, 8.5 h" in text


def test_what_is_not_known_is_said_with_what_would_measure_it(tmp_path: Path) -> None:
    text = text_of(tmp_path, TRIALS)
    assert "every trial failed: OutOfMemoryError: not even one sample fits <b>" in text
    assert "E = 96: no trial has ended yet" in text
    assert "tune-easytrain resume" in text
    assert "swin_t, E = 32: one seed; its spread is not known." in text
    assert "--set 'grid_search.grid.train.seed=[3, 4, 5]'" in text
    assert "To measure E = 192" in text


def test_no_trend_is_said_from_two_points(tmp_path: Path) -> None:
    two = text_of(tmp_path, [trial for trial in TRIALS if trial.size in (24, 32) and trial.model == "swin_b"])
    assert "swin_b: no trend is said. It needs 3 batch sizes with 2 seeds each; there are 2 sizes" in two
    falling = [
        Trained(size, seed, 0.95 - 0.01 * number + 0.0001 * seed)
        for number, size in enumerate([16, 32, 64])
        for seed in range(2)
    ]
    assert "each doubling makes val_srcc worse by 0.01" in text_of(tmp_path, falling)


def test_the_time_to_a_target_counts_who_reached_it(tmp_path: Path) -> None:
    text = text_of(tmp_path, TRIALS, target=0.9335)
    assert "## Time to val_srcc 0.9335" in text
    assert "| swin_b, E = 24 | 0 of 3 | never |" in text
    assert "The target is the target given." in text


def test_the_rule_of_the_learning_rate_is_told(tmp_path: Path) -> None:
    assert "grow with the square root of E / 32 (train.lr_scaling: sqrt)" in text_of(tmp_path, TRIALS)


@pytest.mark.parametrize(
    "trials", [[], [Trained(32, 0, 0.0, is_over=False)], [Trained(32, 0, 0.0, error="ValueError: x")]]
)
def test_a_sweep_that_has_measured_nothing_says_so(tmp_path: Path, trials: list[Trained]) -> None:
    study = build_study(make_study(tmp_path, trials or [Trained(8, 0, 0.1, is_over=False)]))
    blocks = Report(study, ReportOptions()).blocks()
    text = as_markdown(blocks)
    assert "cannot be said" in text
    assert "nan" not in text
    assert "<figure>" not in as_html(blocks, "x")


def test_no_line_joins_what_was_made_in_different_ways(tmp_path: Path) -> None:
    trials = [Trained(size, 0, 0.9) for size in (16, 32, 64)]
    trials += [Trained(size, 0, 0.8, limit=limit) for size, limit in ((64, 32), (128, 32), (64, 16))]
    blocks = Report(build_study(make_study(tmp_path, trials)), ReportOptions()).blocks()
    over_sizes = [block for block in blocks if isinstance(block, Figure) and block.is_logarithmic]
    assert len(over_sizes) == 2
    for figure in over_sizes:
        assert {series.name: list(series.x) for series in figure.series} == {
            "swin_b": [16, 32, 64],
            "swin_b, micro-batches of 32": [64, 128],
            "swin_b, micro-batches of 16": [64],
        }


def test_one_of_a_kind_is_told_in_the_singular(tmp_path: Path) -> None:
    study = build_study(
        make_study(tmp_path, [Trained(32, 0, 0.9), Trained(32, 1, 0.0, error="x")], num_epochs=1)
    )
    text = as_markdown(Report(study, ReportOptions()).blocks())
    assert "E = 32, 1 epoch: about" in text
    assert "there is 1 size, 1 trial." in text
    assert "1 trial failed; it is in no mean." in text


def test_each_rule_of_the_learning_rate_has_its_arms(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "configs/iqa_demo.yaml"
    study = build_study(
        make_run_of(tmp_path, demo), make_run_of(tmp_path, demo, overrides=["train.lr_scaling=linear"])
    )
    text = as_markdown(Report(study, ReportOptions()).blocks()).replace("\\", "")
    assert "sqrt, E = 32 as 2 × 16: Learning rates grow with the square root of E / 32" in text
    assert "linear, E = 32 as 2 × 16: Learning rates grow with E / 32" in text


def test_what_only_evaluated_is_said_to_be_left_out(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "configs/iqa_demo.yaml"
    run = make_run_of(tmp_path, demo, overrides=["grid_search.grid.train.function=[null, none]"])
    text = as_markdown(Report(build_study(run), ReportOptions()).blocks())
    assert "3 trials only evaluated (train.function: none), and are left out" in text
