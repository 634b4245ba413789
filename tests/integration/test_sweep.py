"""Whole sweeps on a real Ray of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from integration_tasks import train_by_hand, train_in_silence

import tune_easytrain as te
from tune_easytrain.errors import InsufficientResourcesError

TASKS = Path(__file__).parent / "integration_tasks.py"
pytestmark = pytest.mark.usefixtures("local_ray")


def run(sweep: dict[str, Any], **options: Any) -> te.SweepResults:
    return te.run(sweep, quiet=True, **options)


def test_every_trial_reaches_the_effective_batch_size_exactly(toy_sweep):
    results = run(toy_sweep)
    frame = results.frame()
    assert list(frame["trial_id"]) == ["trial_00000", "trial_00001"]
    assert list(frame["model.type"]) == ["small", "large"]
    assert list(frame["state"]) == ["finished"] * 2
    assert list(frame["effective_batch_size"]) == [10, 10]
    assert list(frame["microbatch_size"]) == [4, 5]
    assert list(frame["accumulation_steps"]) == [3, 2]
    assert list(frame["num_samples"]) == [74, 74]
    assert list(frame["optimizer_steps"]) == [8, 8]
    assert list(frame["probe_attempts"]) == [1, 1]
    assert set(frame["memory_budget_bytes"]) == {512 * 2**20}
    assert frame["val_accuracy_last"].notna().all()
    assert_everything_is_in_plain_files(results)
    assert_debug_runs_the_same_trials(toy_sweep, frame)


def assert_everything_is_in_plain_files(results: te.SweepResults) -> None:
    assert json.loads((results.run_dir / "sweep.json").read_text())["name"] == "toy"
    for events in (results.run_dir / "trials").glob("*.jsonl"):
        kinds = [json.loads(line)["event"] for line in events.read_text().splitlines()]
        assert kinds == [
            "created", "started", "probed", "planned", "reported", "reported", "training_ended", "finished",
        ]  # fmt: skip


def assert_debug_runs_the_same_trials(sweep: dict[str, Any], by_ray: pd.DataFrame) -> None:
    inline = run(sweep, debug=True).frame()
    same = ["trial_id", "model.type", "effective_batch_size", "accumulation_steps", "num_samples"]
    assert by_ray[same].equals(inline[same])
    assert list(by_ray["train_loss_last"]) == pytest.approx(list(inline["train_loss_last"]), rel=1e-4)


def test_a_sweep_under_a_real_cap_accumulates_and_never_runs_out(toy_sweep):
    toy_sweep |= {
        "task": f"{TASKS.parents[1] / 'toys.py'}:build_hungry_task",
        "config": {"num_samples": 32},
        "grid_search": {"grid": {"hp.batch_size": [32, 4]}},
        "batch": {"effective_batch_size": 32, "memory_budget": "300MiB"},
        "run": toy_sweep["run"] | {"metric": "train_loss", "mode": "min"},
    }
    results = run(toy_sweep)
    frame = results.frame()
    assert list(frame["state"]) == ["finished"] * 2, list(frame["error"])
    assert list(frame["effective_batch_size"]) == [32, 32]
    assert 4 < frame["microbatch_size"][0] < 32
    assert frame["accumulation_steps"][0] > 1
    assert frame["probe_attempts"][0] == 1
    assert list(frame["num_samples"]) == [64, 64]
    probe = results.records()[0].probe
    assert probe.bounded_by == "estimate"
    assert probe.estimated_peak_bytes <= 300 * 2**20


def test_a_failing_trial_is_a_row_with_its_reason_and_harms_no_other(toy_sweep):
    faults = ["bug", "kill", None]
    toy_sweep["grid_search"]["grid"] = {"toy.fault": faults, "model.type": ["small"]}
    toy_sweep["batch"] |= {"probe": "off"}
    results = run(toy_sweep)
    frame = results.frame().set_index("toy.fault")
    assert frame.loc["bug", "error"] == "KeyError: 'a bug in the task'"
    assert "SIGKILL" in frame.loc["kill", "error"]
    assert list(frame["state"]) == ["failed", "failed", "finished"]
    assert results.num_failed == 2
    assert "a bug in the task" in results.records()[0].error_details


def test_what_cannot_fit_at_all_says_what_was_tried(toy_sweep):
    toy_sweep |= {
        "task": f"{TASKS.parents[1] / 'toys.py'}:build_hungry_task",
        "grid_search": {"grid": {"hp.batch_size": [8]}},
        "batch": {"effective_batch_size": 8, "memory_budget": "8MiB"},
        "run": toy_sweep["run"] | {"metric": "train_loss", "mode": "min"},
    }
    (row,) = run(toy_sweep).frame().to_dict("records")
    assert row["state"] == "failed"
    assert "not even one sample fits into 8.0 MiB" in row["error"]
    assert row["probe_attempts"] == 1  # by the estimate it was not worth trying more


def test_a_metric_that_nobody_reports_is_refused_before_anything_starts(toy_sweep):
    toy_sweep["run"]["metric"] = "val_acuracy"
    with pytest.raises(te.ConfigError, match=r"run\.metric: 'val_acuracy'.*did you mean 'val_accuracy'"):
        run(toy_sweep)
    assert not Path(toy_sweep["run"]["storage"]).exists()


def test_a_training_function_that_never_reports_has_failed(toy_sweep):
    toy_sweep["train"]["function"] = f"{TASKS}:{train_in_silence.__name__}"
    frame = run(toy_sweep, max_experiments=1).frame()
    assert list(frame["model.type"]) == ["small"]
    assert list(frame["state"]) == ["failed"]
    assert "without trial.report()" in frame["error"][0]


def test_drawn_values_give_one_trial_per_sample(toy_sweep):
    toy_sweep["grid_search"]["grid"] = {
        "model.type": ["small", "large"],
        "hp.learning_rate": {"loguniform": [1e-4, 1e-1]},
    }
    toy_sweep["run"]["num_samples"] = 2
    frame = run(toy_sweep).frame()
    assert list(frame["model.type"]) == ["small", "large"] * 2
    assert frame["hp.learning_rate"].between(1e-4, 1e-1).all()
    assert frame["hp.learning_rate"].nunique() == 4


@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "asha", "grace_period": 1, "reduction_factor": 2},
        {"name": "median", "grace_period": 1, "min_samples": 1},
    ],
)
def test_schedulers_stop_trials_early(toy_sweep, scheduler):
    # One at a time, the better learning rate first: what comes after it is worse and stopped.
    toy_sweep["grid_search"]["grid"] = {"model.type": ["large"], "hp.learning_rate": [1e-2, 1e-7, 1e-7, 1e-7]}
    toy_sweep["train"]["epochs"] = 6
    toy_sweep["run"] |= {"metric": "val_loss", "mode": "min", "scheduler": scheduler, "max_concurrent": 1}
    frame = run(toy_sweep).frame()
    assert frame["state"][0] == "finished"
    assert "stopped" in set(frame["state"])
    stopped = frame[frame["state"] == "stopped"]
    assert (stopped["epochs"] < 6).all()


def test_own_training_functions_get_the_plan_in_a_worker_that_never_loads_torch(toy_sweep):
    toy_sweep["train"]["function"] = f"{TASKS}:{train_by_hand.__name__}"
    frame = run(toy_sweep).frame()
    assert list(frame["state"]) == ["finished"] * 2, list(frame["error"])
    assert list(frame["val_accuracy_last"]) == [0.25, 0.5]
    assert list(frame["accumulation_steps_seen_last"]) == [3, 2]
    assert list(frame["forkserver_has_torch_last"]) == [1, 1]
    assert list(frame["ray_worker_has_torch_last"]) == [0, 0]


def test_a_request_that_no_node_can_meet_is_refused_before_anything_starts(toy_sweep):
    toy_sweep["trial"] = {"resources": {"gpu": 1}}
    with pytest.raises(InsufficientResourcesError, match=r"1 GPU \(the largest node has 0\).*gpu=0"):
        run(toy_sweep)
    assert not Path(toy_sweep["run"]["storage"]).exists()
