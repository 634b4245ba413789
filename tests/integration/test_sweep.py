"""Whole sweeps on a real Ray of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from integration_tasks import train_by_hand

import tune_easytrain as te
from tune_easytrain.errors import InsufficientResourcesError

TASKS = Path(__file__).parent / "integration_tasks.py"
pytestmark = pytest.mark.usefixtures("local_ray")


def run(sweep: dict[str, Any], **options: Any) -> te.SweepResults:
    return te.run(sweep, quiet=True, **options)


def test_every_trial_reaches_the_effective_batch_size_exactly_whatever_becomes_of_others(toy_sweep):
    toy_sweep["grid_search"] = {
        "grid": {
            "model.type": ["small", "small", "small", "large"],
            "hp.batch_size": [4, 4, 4, 7],
            "toy.fault": [None, "bug", "kill", None],
            "batch.probe": ["auto", "off", "off", "auto"],
        },
        "pair": [["model.type", "hp.batch_size", "toy.fault", "batch.probe"]],
    }
    results = run(toy_sweep)
    assert_a_failing_trial_is_a_row_with_its_reason(results)
    frame = results.frame()
    assert list(frame["trial_id"]) == [f"trial_{number:05}" for number in range(4)]
    assert list(frame["state"]) == ["finished", "failed", "failed", "finished"]
    frame = frame[frame["state"] == "finished"]
    assert list(frame["model.type"]) == ["small", "large"]
    assert list(frame["effective_batch_size"]) == [10, 10]
    assert list(frame["microbatch_size"]) == [4, 5]
    assert list(frame["accumulation_steps"]) == [3, 2]
    assert list(frame["num_samples"]) == [74, 74]
    assert list(frame["optimizer_steps"]) == [8, 8]
    assert list(frame["probe_attempts"]) == [1, 1]
    assert set(frame["memory_budget_bytes"]) == {512 * 2**20}
    assert frame["val_accuracy_last"].notna().all()
    assert_everything_is_in_plain_files(results, frame["trial_id"])
    assert_debug_runs_the_same_trials(toy_sweep, frame)


def assert_a_failing_trial_is_a_row_with_its_reason(results: te.SweepResults) -> None:
    frame = results.frame().set_index("toy.fault")
    assert frame.loc["bug", "error"] == "KeyError: 'a bug in the task'"
    assert "SIGKILL" in frame.loc["kill", "error"]
    assert results.num_failed == 2
    assert "a bug in the task" in results.records()[1].error_details


def assert_everything_is_in_plain_files(results: te.SweepResults, trial_ids: pd.Series[str]) -> None:
    assert json.loads((results.run_dir / "sweep.json").read_text())["name"] == "toy"
    for trial_id in trial_ids:
        events = results.run_dir / "trials" / f"{trial_id}.jsonl"
        kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
        assert kinds == [
            "created", "started", "probed", "planned", "reported", "reported", "training_ended", "finished",
        ]  # fmt: skip


def assert_debug_runs_the_same_trials(sweep: dict[str, Any], by_ray: pd.DataFrame) -> None:
    sweep["grid_search"] = {"grid": {"model.type": ["small", "large"], "hp.batch_size": [4, 7]}}
    inline = run(sweep, debug=True).frame()
    same = ["model.type", "effective_batch_size", "accumulation_steps", "num_samples"]
    assert by_ray[same].reset_index(drop=True).equals(inline[same])
    assert list(by_ray["train_loss_last"]) == pytest.approx(list(inline["train_loss_last"]), rel=1e-4)


def test_under_a_real_cap_trials_accumulate_and_what_cannot_fit_at_all_says_what_was_tried(toy_sweep):
    toy_sweep |= {
        "task": f"{TASKS.parents[1] / 'toys.py'}:build_hungry_task",
        "config": {"num_samples": 32},
        "grid_search": {
            "grid": {"hp.batch_size": [32, 4, 8], "batch.memory_budget": ["300MiB", "300MiB", "8MiB"]},
            "pair": [["hp.batch_size", "batch.memory_budget"]],
        },
        "batch": {"effective_batch_size": 32},
        "run": toy_sweep["run"] | {"metric": "train_loss", "mode": "min"},
    }
    results = run(toy_sweep)
    frame = results.frame()
    assert list(frame["state"]) == ["finished", "finished", "failed"], list(frame["error"])
    assert list(frame["effective_batch_size"])[:2] == [32, 32]
    assert 4 < frame["microbatch_size"][0] < 32
    assert frame["accumulation_steps"][0] > 1
    assert list(frame["num_samples"])[:2] == [64, 64]
    probe = results.records()[0].probe
    assert probe.bounded_by == "estimate"
    assert probe.estimated_peak_bytes <= 300 * 2**20
    assert "not even one sample fits into 8.0 MiB" in frame["error"][2]
    assert (
        frame["probe_attempts"][0] == frame["probe_attempts"][2] == 1
    )  # by the estimate no more are worth it


def test_a_metric_that_nobody_reports_is_refused_before_anything_starts(toy_sweep):
    toy_sweep["run"]["metric"] = "val_acuracy"
    with pytest.raises(te.ConfigError, match=r"run\.metric: 'val_acuracy'.*did you mean 'val_accuracy'"):
        run(toy_sweep)
    assert not Path(toy_sweep["run"]["storage"]).exists()


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "asha", "grace_period": 1, "reduction_factor": 2},
        {"name": "median", "grace_period": 1, "min_samples": 1},
    ],
)
def test_schedulers_stop_trials_early(toy_sweep, scheduler):
    # One at a time, the better learning rate first: what comes after it is worse and stopped.
    toy_sweep["grid_search"]["grid"] = {"model.type": ["large"], "hp.learning_rate": [1e-2, 1e-7, 1e-7]}
    toy_sweep["train"]["epochs"] = 4
    toy_sweep["run"] |= {"metric": "val_loss", "mode": "min", "scheduler": scheduler, "max_concurrent": 1}
    frame = run(toy_sweep).frame()
    assert frame["state"][0] == "finished"
    assert "stopped" in set(frame["state"])
    stopped = frame[frame["state"] == "stopped"]
    assert (stopped["epochs"] < 4).all()


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_trial_that_fails_before_its_first_report_does_not_disturb_a_scheduler(toy_sweep, name):
    del toy_sweep["task"]
    toy_sweep["config"] = {}
    toy_sweep["grid_search"] = {"grid": {"value": ["none", 1.0, 0.5, 0.5]}}
    toy_sweep["batch"] = {"probe": "off"}
    toy_sweep["train"] = {"function": f"{TASKS}:report_four_times", "epochs": 5}
    settings = {"asha": {"grace_period": 1, "reduction_factor": 2}, "median": {"min_samples": 1}}
    toy_sweep["run"] |= {"metric": "value", "scheduler": {"name": name, **settings.get(name, {})}}
    frame = run(toy_sweep).frame()
    assert frame["error"][0] == "ValueError: could not convert string to float: 'none'"
    assert list(frame["state"][:2]) == ["failed", "finished"], list(frame["error"])
    assert set(frame["state"][2:]) <= {"finished", "stopped"}


def test_own_training_functions_get_the_plan_in_a_worker_that_never_loads_torch(toy_sweep):
    """Also with drawn values, of which there is one trial per sample; who never reports has failed."""
    toy_sweep["train"]["function"] = f"{TASKS}:{train_by_hand.__name__}"
    toy_sweep["grid_search"] = {
        "grid": {
            "model.type": ["small", "large", "small"],
            "hp.batch_size": [4, 7, 4],
            "toy.is_silent": [False, False, True],
            "hp.learning_rate": {"loguniform": [1e-4, 1e-1]},
        },
        "pair": [["model.type", "hp.batch_size", "toy.is_silent"]],
    }
    toy_sweep["run"]["num_samples"] = 2
    frame = run(toy_sweep).frame()
    assert list(frame["model.type"]) == ["small", "large", "small"] * 2
    assert frame["hp.learning_rate"].between(1e-4, 1e-1).all()
    assert frame["hp.learning_rate"].nunique() == 6
    assert list(frame["state"]) == ["finished", "finished", "failed"] * 2, list(frame["error"])
    assert "without trial.report()" in frame["error"][2]
    frame = frame[frame["state"] == "finished"]
    assert list(frame["val_accuracy_last"]) == [0.25, 0.5] * 2
    assert list(frame["accumulation_steps_seen_last"]) == [3, 2] * 2
    assert set(frame["forkserver_has_torch_last"]) == {1}
    assert set(frame["ray_worker_has_torch_last"]) == {0}


def test_a_request_that_no_node_can_meet_is_refused_before_anything_starts(toy_sweep):
    toy_sweep["trial"] = {"resources": {"gpu": 1}}
    with pytest.raises(InsufficientResourcesError, match=r"1 GPU \(the largest node has 0\).*gpu=0"):
        run(toy_sweep)
    assert not Path(toy_sweep["run"]["storage"]).exists()
