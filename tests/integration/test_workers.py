"""Trials of two gloo workers on a real Ray of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tune_easytrain as te
from tune_easytrain.config import load_config
from tune_easytrain.events import Probed, Reported, Rescued, load_events
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task_source import load_sweep_functions
from tune_easytrain.trial import TrialSpec, run_trial

TOYS = Path(__file__).parents[1] / "toys.py"
TASKS = Path(__file__).parent / "integration_tasks.py"

pytestmark = pytest.mark.usefixtures("local_ray")


def sweep(
    tmp_path: Path, *, num_workers: int = 2, toy: dict[str, Any] | None = None, **batch: Any
) -> dict[str, Any]:
    return {
        "name": f"workers_{num_workers}",
        "task": f"{TASKS}:build_exact_task",
        "config": {"data": {"num_samples": 16}, **({} if toy is None else {"toy": toy})},
        "grid_search": {"grid": {"hp.learning_rate": [0.1]}},
        "batch": {"effective_batch_size": 5, "memory_budget": "512MiB", **batch},
        "train": {"epochs": 3, "clip_norm": 0.5},
        "trial": {"resources": {"cpu": 1}, "num_workers": num_workers},
        "run": {"metric": "val_loss", "storage": str(tmp_path / "runs")},
    }


def states(results: te.SweepResults) -> dict[str, Any]:
    (path,) = sorted(Path(results.run_dir).rglob("checkpoint.pt"))[-1:]
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def weights(results: te.SweepResults) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = states(results)["model"]
    return model


def events(results: te.SweepResults, kind: type[Any]) -> list[Any]:
    directory = RunDirectory.open(results.run_dir)
    (name,) = directory.trial_ids()
    return [event for event in load_events(directory.trial_path(name)) if type(event) is kind]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> te.SweepResults:
    """One worker with whole batches, to compare with."""
    return te.run(sweep(tmp_path_factory.mktemp("alone"), num_workers=1), quiet=True)


def assert_the_same(results: te.SweepResults, expected: te.SweepResults) -> None:
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(results)[name], value, rtol=0, atol=1e-10)
    (row,), (own,) = results.frame().to_dict("records"), expected.frame().to_dict("records")
    for column in ("val_loss_last", "val_accuracy_last", "train_loss_last"):
        assert row[column] == pytest.approx(own[column], abs=1e-10), column
    for column in ("optimizer_steps", "num_samples", "effective_batch_size"):
        assert row[column] == own[column], column


def test_two_workers_train_as_one_does(tmp_path: Path, alone: te.SweepResults) -> None:
    """E = 5 is 3 and 2 samples, in two and one micro-batches; the last window has one sample, on one rank."""
    results = te.run(
        {**sweep(tmp_path), "config": {"data": {"num_samples": 16}, "hp": {"batch_size": 2}}}, quiet=True
    )
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_workers"], row["microbatch_size"], row["accumulation_steps"]) == (
        "finished",
        2,
        2,
        2,
    )
    assert_the_same(results, alone)


def test_one_worker_goes_on_where_two_had_come_to(tmp_path: Path, alone: te.SweepResults) -> None:
    two = te.run(sweep(tmp_path), quiet=True)
    *_, second, _ = sorted(Path(two.run_dir).rglob("checkpoint.pt"))
    assert torch.load(second, weights_only=True)["progress"]["epoch"] == 2
    config = load_config(sweep(tmp_path, num_workers=1))
    (trial,) = te.expand_trials(config)
    task, _ = load_sweep_functions(config)
    spec = TrialSpec(
        config=trial,
        settings=TrialSettings.from_config(trial, metric="val_loss", mode="min"),
        task_payload=task,
        function_payload=None,
        device="cpu",
        device_share=1.0,
        num_threads=1,
        checkpoint_path=str(second),
    )
    states = [
        torch.load(str(report.checkpoint_path), weights_only=True)
        for report in run_trial(spec, lambda event: None)
    ]
    assert [state["progress"]["epoch"] for state in states] == [3]
    for name, value in weights(alone).items():
        torch.testing.assert_close(states[0]["model"][name], value, rtol=0, atol=1e-10)


def test_memory_running_out_on_one_rank_is_made_up_for_there(tmp_path: Path, alone: te.SweepResults) -> None:
    toy = {"sample": 10, "marker": str(tmp_path / "marker"), "fault": "memory"}
    results = te.run(sweep(tmp_path, toy=toy), quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_rescues"]) == ("finished", 1)
    assert len(events(results, Rescued)) == 1
    assert_the_same(results, alone)


def test_workers_that_share_out_the_optimizer_train_as_one_does(
    tmp_path: Path, alone: te.SweepResults
) -> None:
    given = {**sweep(tmp_path), "memory": {"sharding": "optimizer"}}
    results = te.run({**given, "config": {"data": {"num_samples": 16}, "hp": {"batch_size": 2}}}, quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_workers"], row["accumulation_steps"]) == ("finished", 2, 2)
    assert_the_same(results, alone)
    own, whole = (states(each)["optimizer"] for each in (results, alone))
    assert own["param_groups"] == whole["param_groups"]
    assert own["state"].keys() == whole["state"].keys()
    for number, state in whole["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(own["state"][number][name], value, rtol=0, atol=1e-10)


def full(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {**sweep(tmp_path, **changes), "memory": {"sharding": "full"}}


def test_workers_that_share_out_the_model_train_as_one_does(tmp_path: Path, alone: te.SweepResults) -> None:
    """E = 5 is two micro-batches on one rank and one on the other; the last window has one sample in all."""
    given = {**full(tmp_path), "config": {"data": {"num_samples": 16}, "hp": {"batch_size": 2}}}
    results = te.run(given, quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_workers"], row["accumulation_steps"]) == ("finished", 2, 2), row["error"]
    assert_the_same(results, alone)
    (probed,) = events(results, Probed)
    assert [attempt["outcome"] for attempt in probed.attempts] == ["fits"]


@pytest.mark.parametrize(("epoch", "failed"), [(1, 3), (3, 2)])
def test_after_memory_ran_out_on_one_rank_a_sharded_model_goes_on_smaller(
    tmp_path: Path, alone: te.SweepResults, epoch: int, failed: int
) -> None:
    """Nobody hangs: all ranks are ended, and go on from the last checkpoint, if there is one."""
    toy = {"sample": 10, "marker": str(tmp_path / "marker"), "fault": "memory", "visit": epoch}
    results = te.run(full(tmp_path, toy=toy), quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_rescues"]) == ("finished", 1), row["error"]
    (rescued,) = events(results, Rescued)
    assert (rescued.failed_microbatch_size, rescued.microbatch_limit) == (failed, 1)
    assert [reported.metrics["epoch"] for reported in events(results, Reported)] == [1, 2, 3]
    assert_the_same(results, alone)


def test_a_sharded_model_finds_the_size_that_fits_on_the_rank_with_the_least_memory(tmp_path: Path) -> None:
    """Attempts that break one rank's cap end the other one's, which waits for it."""
    given = full(tmp_path, effective_batch_size=24, memory_budget="240MiB", search="grow", start=12)
    given["task"] = f"{TOYS}:build_uneven_ranks_task"
    given["config"] = {"num_samples": 24, "toy": {"marker": str(tmp_path / "marker")}}
    given["train"], given["run"]["metric"] = {"epochs": 1}, "train_loss"
    results = te.run(given, quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_rescues"], row["effective_batch_size"]) == ("finished", 0, 24), row[
        "error"
    ]
    (probed,) = events(results, Probed)
    outcomes = {attempt["microbatch_size"]: attempt["outcome"] for attempt in probed.attempts}
    assert outcomes[12] == "out_of_memory"
    assert outcomes[probed.microbatch_size] == "fits"


def test_a_sharded_model_that_breaks_a_rank_s_cap_in_training_goes_on_smaller(tmp_path: Path) -> None:
    given = full(tmp_path, effective_batch_size=24, memory_budget="240MiB", probe="off")
    given["task"] = f"{TOYS}:build_uneven_ranks_task"
    given["config"] = {
        "num_samples": 24,
        "toy": {"marker": str(tmp_path / "marker")},
        "hp": {"batch_size": 12},
    }
    given["train"], given["run"]["metric"] = {"epochs": 2}, "train_loss"
    results = te.run(given, quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["effective_batch_size"], row["optimizer_steps"]) == ("finished", 24, 2), row[
        "error"
    ]
    assert row["num_rescues"] == len(events(results, Rescued)) > 0


def test_the_death_of_one_rank_ends_the_trial_and_hangs_nobody(tmp_path: Path) -> None:
    toy = {"sample": 11, "marker": str(tmp_path / "marker"), "fault": "kill"}
    (row,) = te.run(sweep(tmp_path, toy=toy), quiet=True).frame().to_dict("records")
    assert row["state"] == "failed"
    assert "ChildDiedError: the trial's process was ended by SIGKILL" in row["error"]


def test_the_rank_with_the_least_memory_decides_for_all(tmp_path: Path) -> None:
    given = sweep(tmp_path, effective_batch_size=24, memory_budget="240MiB")
    given["task"] = f"{TOYS}:build_uneven_ranks_task"
    given["config"] = {"num_samples": 24, "toy": {"marker": str(tmp_path / "marker")}}
    given["train"], given["run"]["metric"] = {"epochs": 1}, "train_loss"
    results = te.run(given, quiet=True)
    (row,) = results.frame().to_dict("records")
    assert (row["state"], row["num_rescues"], row["effective_batch_size"]) == ("finished", 0, 24)
    (probed,) = events(results, Probed)
    outcomes = {attempt["microbatch_size"]: attempt["outcome"] for attempt in probed.attempts}
    assert outcomes[probed.microbatch_size] == "fits"
    assert probed.microbatch_size * 2 * 16 <= 240  # the hungrier rank keeps 16 MiB per sample, and its square
