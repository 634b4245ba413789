from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_runs import epoch, finished, make_run, trial_config
from made_studies import GIB, NUM_SAMPLES, Trained, make_run_of, make_study

from tune_easytrain.errors import BadInputError
from tune_easytrain.study import NEUTRAL_KEYS, build_study


def test_trials_that_differ_in_their_seeds_are_one_arm(tmp_path: Path) -> None:
    trials = [Trained(32, seed, 0.9 + 0.01 * seed) for seed in range(3)] + [Trained(48, 0, 0.8)]
    study = build_study(make_study(tmp_path, trials))
    assert [(arm.effective_batch_size, len(arm.values)) for arm in study.arms] == [(32, 3), (48, 1)]
    arm = study.arms[0]
    assert arm.mean == pytest.approx(0.91)
    assert arm.deviation == pytest.approx(0.01)
    assert math.isnan(study.arms[1].deviation)
    assert arm.hours == pytest.approx(3 * 1500 / 3600)
    assert arm.peak_memory_bytes == 16 * GIB
    assert arm.devices == ("NVIDIA A100",)


def test_a_short_last_window_is_a_step_too(tmp_path: Path) -> None:
    study = build_study(make_study(tmp_path, [Trained(size, 0, 0.9) for size in (24, 32, 48, 64)]))
    assert {arm.effective_batch_size: arm.steps_per_epoch for arm in study.arms} == {
        24: 294,
        32: 221,
        48: 147,
        64: 111,
    }
    assert {arm.num_samples for arm in study.arms} == {NUM_SAMPLES}


def test_accumulation_is_an_arm_of_its_own(tmp_path: Path) -> None:
    study = build_study(make_study(tmp_path, [Trained(64, 0, 0.9), Trained(64, 0, 0.8, limit=32)]))
    assert [arm.batch_name for arm in study.arms] == ["E = 64", "E = 64 as 2 × 32"]
    assert [arm.is_accumulated for arm in study.arms] == [False, True]


def test_models_are_told_apart_also_where_the_batch_size_goes_with_them(tmp_path: Path) -> None:
    trials = [Trained(32, 0, 0.9, model="swin_t"), Trained(64, 0, 0.8, model="swin_b")]
    study = build_study(make_study(tmp_path, trials))
    assert study.setting_keys == ("model.type",)
    assert [arm.name for arm in study.arms] == ["swin_t, E = 32", "swin_b, E = 64"]


def test_what_is_paired_with_the_batch_size_is_no_setting(tmp_path: Path) -> None:
    rates = {32: 5e-6, 48: 6.1e-6}
    trials = [
        Trained(size, 0, 0.9, model=model, rate=rate)
        for model in ("swin_t", "swin_b")
        for size, rate in rates.items()
    ]
    study = build_study(make_study(tmp_path, trials))
    assert study.setting_keys == ("model.type",)
    assert [dict(arm.settled) for arm in study.arms] == [
        {"hp.learning_rate": rate} for rate in rates.values()
    ] * 2
    crossed = [*trials, Trained(32, 0, 0.9, model="swin_t", rate=1e-5)]
    assert build_study(make_study(tmp_path, crossed)).setting_keys == ("model.type", "hp.learning_rate")


def test_what_has_not_been_measured_is_an_arm_without_values(tmp_path: Path) -> None:
    trials = [
        Trained(32, 0, 0.9),
        Trained(64, 0, 0.0, error="KeyError: 'x'"),
        Trained(128, 0, 0.0, is_over=False),
    ]
    study = build_study(make_study(tmp_path, trials))
    _, failed, pending = study.arms
    assert (failed.values, dict(failed.failures), failed.num_unfinished) == (
        [],
        {"trial_00001": "KeyError: 'x'"},
        0,
    )
    assert (pending.values, pending.effective_batch_size, pending.num_unfinished) == ([], 128, 1)
    assert math.isnan(pending.mean)
    assert math.isnan(pending.hours)
    assert study.measured == [study.arms[0]]


def test_the_time_to_a_target_is_that_of_the_epoch_that_reached_it(tmp_path: Path) -> None:
    (arm,) = build_study(make_study(tmp_path, [Trained(32, 0, 0.9)], num_epochs=4)).arms
    # 0.825, 0.875, 0.8917 and 0.9 after epochs of 1500 s.
    assert arm.hours_to(0.87, "max") == [pytest.approx(3000 / 3600)]
    assert arm.hours_to(0.95, "max") == [None]
    assert arm.hours_to(0.83, "min") == [pytest.approx(1500 / 3600)]


def test_a_sweep_without_trials_is_a_study_without_arms(tmp_path: Path) -> None:
    assert build_study(make_run(tmp_path, [])).arms == ()


def test_a_sweep_of_one_batch_size_alone_is_shown_too(tmp_path: Path) -> None:
    study = build_study(
        make_run(tmp_path, [finished(epoch(1, 0.5)), finished(epoch(1, 0.6), config=trial_config("large"))])
    )
    assert [arm.name for arm in study.arms] == ["small, E = 8 as 2 × 4", "large, E = 8 as 2 × 4"]


def test_seeds_that_were_added_later_count_with_the_first(tmp_path: Path) -> None:
    first = make_study(tmp_path, [Trained(size, 0, 0.9) for size in (32, 48)])
    later = make_study(tmp_path, [Trained(48, seed, 0.8) for seed in (0, 1)])
    study = build_study(first, later)
    assert [(arm.effective_batch_size, arm.values) for arm in study.arms] == [(32, [0.9]), (48, [0.8, 0.8])]
    assert len(study.places) == 2
    assert [len(run.epoch_seconds) for run in study.arms[1].runs] == [3, 3]
    assert [arm.values for arm in build_study(later, later).arms] == [[0.8, 0.8]]  # the same seeds once more


def test_another_model_in_a_later_run_is_another_arm(tmp_path: Path) -> None:
    runs = [make_study(tmp_path, [Trained(32, 0, 0.9, model=model)]) for model in ("swin_t", "swin_b")]
    assert [arm.name for arm in build_study(*runs).arms] == ["swin_t, E = 32", "swin_b, E = 32"]


def test_sweeps_with_other_metrics_are_no_study(tmp_path: Path) -> None:
    srcc = make_study(tmp_path, [Trained(32, 0, 0.9)])
    loss = make_study(tmp_path, [Trained(32, 0, 0.9)], run={"metric": "val_loss", "mode": "min"})
    with pytest.raises(BadInputError, match="val_loss"):
        build_study(srcc, loss)


IQA_DEMO = Path(__file__).parents[1] / "configs/iqa_demo.yaml"


def test_a_quick_run_is_not_pooled_with_the_full_one(tmp_path: Path) -> None:
    def metric(config: dict[str, Any]) -> float:
        return 0.5 if config["train"]["epochs"] == 2 else 0.9

    runs = [make_run_of(tmp_path, IQA_DEMO, quick=quick, metric=metric) for quick in (True, False)]
    study = build_study(*runs)
    assert study.setting_keys == ("data.share", "train.epochs")
    assert [(arm.name, arm.values) for arm in study.arms] == [
        ("share = 0.5, epochs = 2, E = 16", [0.5]),
        ("share = 0.5, epochs = 2, E = 32", [0.5]),
        ("share = 0.5, epochs = 2, E = 32 as 2 × 16", [0.5]),
        ("share not set, epochs = 12, E = 16", [0.9]),
        ("share not set, epochs = 12, E = 32", [0.9]),
        ("share not set, epochs = 12, E = 32 as 2 × 16", [0.9]),
    ]
    assert study.name == f"{runs[0].run_dir.name} and {runs[1].run_dir.name}"


def test_runs_that_share_no_batch_size_are_not_one_setting(tmp_path: Path) -> None:
    """The epochs go with the batch size here, but only since each run has a batch size of its own."""
    lists = [f"grid_search.grid.{key}" for key in ("batch.effective_batch_size", "hp.batch_size")]
    runs = [
        make_run_of(
            tmp_path, IQA_DEMO, overrides=[f"train.epochs={size}", *(f"{key}=[{size}]" for key in lists)]
        )
        for size in (4, 8)
    ]
    assert [arm.name for arm in build_study(*runs).arms] == ["epochs = 4, E = 4", "epochs = 8, E = 8"]


@pytest.mark.parametrize(
    "override",
    [
        "config.data.size=64",
        "train.patience=2",
        "train.lr_scaling=linear",
        "memory.channels_last=true",
        "task=examples/other.py:build_task",
        "trial.num_workers=2",
        "run.scheduler=asha",
    ],
)
def test_whatever_an_outcome_may_come_of_tells_arms_apart(tmp_path: Path, override: str) -> None:
    study = build_study(
        make_run_of(tmp_path, IQA_DEMO), make_run_of(tmp_path, IQA_DEMO, overrides=[override])
    )
    key = override.partition("=")[0].removeprefix("config.")
    assert study.setting_keys == (key,)
    assert [len(arm.values) for arm in study.arms] == [1] * 6


NEUTRAL = {
    "train.seed": 5, "train.noise_scale": True, "train.loader_workers": 1, "batch.memory_fraction": 0.5,
    "batch.memory_budget": "2GiB", "batch.probe": "off", "batch.search": "grow", "batch.start": 2,
    "batch.knob": "data.crops", "batch.start_from": 1, "batch.probe_timeout": 5, "batch.exact": "warn",
}  # fmt: skip


def test_what_says_nothing_of_an_outcome_keeps_arms_together(tmp_path: Path) -> None:
    assert set(NEUTRAL) == set(NEUTRAL_KEYS)
    overrides = [f"{key}={json.dumps(value)}" for key, value in NEUTRAL.items()]
    overrides += [
        "name=later", "grid_search.grid.train.seed=[1]", "run.storage=./other", "run.loggers=[tensorboard]",
        "trial.resources.cpu=2", "trial.max_failures=0", "run.max_concurrent=1",
    ]  # fmt: skip
    study = build_study(make_run_of(tmp_path, IQA_DEMO), make_run_of(tmp_path, IQA_DEMO, overrides=overrides))
    assert study.setting_keys == ()
    assert [len(arm.values) for arm in study.arms] == [2] * 3
    assert [arm.seeds for arm in study.arms] == [(0, 1)] * 3


EVALUATE = "train.function=none"


def test_trials_that_only_evaluate_are_left_out(tmp_path: Path) -> None:
    trained = make_run_of(tmp_path, IQA_DEMO)
    study = build_study(trained, make_run_of(tmp_path, IQA_DEMO, overrides=[EVALUATE]))
    assert study.setting_keys == ()
    assert [len(arm.values) for arm in study.arms] == [1] * 3
    assert study.num_only_evaluated == 3
    both = build_study(
        make_run_of(tmp_path, IQA_DEMO, overrides=["grid_search.grid.train.function=[null, none]"])
    )
    assert (both.setting_keys, both.num_only_evaluated) == ((), 3)


def test_a_sweep_that_only_evaluates_is_no_study(tmp_path: Path) -> None:
    run = make_run_of(tmp_path, IQA_DEMO, overrides=[EVALUATE])
    with pytest.raises(
        BadInputError, match=f"no batch size to choose; use tune-easytrain results {run.place}"
    ):
        build_study(run)
    with pytest.raises(BadInputError, match="only evaluates"):
        build_study(make_run(tmp_path, [], train={"function": "none"}))
