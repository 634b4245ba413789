"""Trials of two gloo workers on a real Ray of this machine.

Two sweeps have all the cases, so that what takes long, to start workers, happens twice and not for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import tune_easytrain as te
from tune_easytrain.config import load_config
from tune_easytrain.events import Interrupted, Probed, Reported, Rescued, Started, load_events
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task_source import load_sweep_functions
from tune_easytrain.trial import TrialSpec, run_trial

TOYS = Path(__file__).parents[1] / "toys.py"


class Case(NamedTuple):
    """One trial; what `toys.build_exact_task` does when it reads `sample` for the nth time."""

    sharding: str = "none"
    microbatch_limit: int = 5
    fault: str = "none"
    sample: int = -1
    visit: int = 1


PLAIN = Case(microbatch_limit=2)
OPTIMIZER_SHARDED = Case("optimizer", microbatch_limit=2)
MODEL_SHARDED = Case("full", microbatch_limit=2)
OUT_OF_MEMORY = Case(fault="memory", sample=10)
SHARDED_OUT_OF_MEMORY_AT_ONCE = Case("full", fault="memory", sample=10, visit=1)
SHARDED_OUT_OF_MEMORY_LATER = Case("full", fault="memory", sample=10, visit=3)
KILLED = Case(fault="kill", sample=11)
CASES = (
    PLAIN, OPTIMIZER_SHARDED, KILLED, MODEL_SHARDED, OUT_OF_MEMORY, SHARDED_OUT_OF_MEMORY_AT_ONCE,
    SHARDED_OUT_OF_MEMORY_LATER,
)  # fmt: skip


class Trial(NamedTuple):
    """What came of a case."""

    row: dict[str, Any]
    run_dir: Path

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.run_dir / "ray").rglob(f"{self.row['trial_id']}/**/checkpoint.pt"))

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(self.checkpoints[-1], weights_only=True)
        return found

    def events(self, kind: type[Any]) -> list[Any]:
        path = RunDirectory.open(self.run_dir).trial_path(self.row["trial_id"])
        return [event for event in load_events(path) if type(event) is kind]


def sweep(folder: Path, num_workers: int, cases: tuple[Case, ...]) -> dict[str, Any]:
    grid = {
        "memory.sharding": [case.sharding for case in cases],
        "hp.batch_size": [case.microbatch_limit for case in cases],
        "toy.fault": [case.fault for case in cases],
        "toy.sample": [case.sample for case in cases],
        "toy.visit": [case.visit for case in cases],
        "toy.marker": [str(folder / f"marker_{number}") for number in range(len(cases))],
    }
    return {
        "name": f"workers_{num_workers}",
        "task": f"{TOYS}:build_exact_task",
        "config": {"data": {"num_samples": 16}},
        "grid_search": {"grid": grid, "pair": [list(grid)]},
        "batch": {"effective_batch_size": 5, "memory_budget": "512MiB"},
        "train": {"epochs": 3, "clip_norm": 0.5},
        "trial": {"resources": {"cpu": 1}, "num_workers": num_workers},
        "run": {"metric": "val_loss", "storage": str(folder / "runs")},
    }


def run(sweep: dict[str, Any]) -> list[Trial]:
    results = te.run(sweep, quiet=True)
    return [Trial(row, Path(results.run_dir)) for row in results.frame().to_dict("records")]


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[Case, Trial]:
    return dict(zip(CASES, run(sweep(tmp_path_factory.mktemp("two"), 2, CASES)), strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Trial:
    """One worker with whole batches, to compare with."""
    (trial,) = run(sweep(tmp_path_factory.mktemp("alone"), 1, (Case(),)))
    return trial


def assert_the_same(trial: Trial, expected: Trial) -> None:
    for name, value in expected.state()["model"].items():
        torch.testing.assert_close(trial.state()["model"][name], value, rtol=0, atol=1e-10)
    for column in ("val_loss_last", "val_accuracy_last", "train_loss_last"):
        assert trial.row[column] == pytest.approx(expected.row[column], abs=1e-10), column
    for column in ("optimizer_steps", "num_samples", "effective_batch_size"):
        assert trial.row[column] == expected.row[column], column


@pytest.mark.parametrize("case", [PLAIN, OPTIMIZER_SHARDED, MODEL_SHARDED])
def test_two_workers_train_as_one_does(case: Case, trials: dict[Case, Trial], alone: Trial) -> None:
    """E = 5 is 3 and 2 samples, in two and one micro-batches; the last window has one sample, on one rank."""
    row = trials[case].row
    assert (row["state"], row["num_workers"]) == ("finished", 2), row["error"]
    assert (row["microbatch_size"], row["accumulation_steps"]) == (2, 2)
    assert_the_same(trials[case], alone)
    (probed,) = trials[case].events(Probed)
    assert [attempt["outcome"] for attempt in probed.attempts] == ["fits"]


def test_the_state_of_a_shared_out_optimizer_is_saved_whole(trials: dict[Case, Trial], alone: Trial) -> None:
    own, whole = (trial.state()["optimizer"] for trial in (trials[OPTIMIZER_SHARDED], alone))
    assert own["param_groups"] == whole["param_groups"]
    assert own["state"].keys() == whole["state"].keys()
    for number, state in whole["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(own["state"][number][name], value, rtol=0, atol=1e-10)


def test_one_worker_goes_on_where_two_had_come_to(
    trials: dict[Case, Trial], alone: Trial, tmp_path: Path
) -> None:
    *_, second, _ = trials[PLAIN].checkpoints
    assert torch.load(second, weights_only=True)["progress"]["epoch"] == 2
    config = load_config(sweep(tmp_path, 1, (Case(),)))
    (values,) = te.expand_trials(config)
    task, _ = load_sweep_functions(config)
    spec = TrialSpec(
        config=values,
        settings=TrialSettings.from_config(values, metric="val_loss", mode="min"),
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
    for name, value in alone.state()["model"].items():
        torch.testing.assert_close(states[0]["model"][name], value, rtol=0, atol=1e-10)


def test_memory_running_out_on_one_rank_is_made_up_for_there(trials: dict[Case, Trial], alone: Trial) -> None:
    trial = trials[OUT_OF_MEMORY]
    assert (trial.row["state"], trial.row["num_rescues"]) == ("finished", 1), trial.row["error"]
    assert len(trial.events(Rescued)) == 1
    assert_the_same(trial, alone)


@pytest.mark.parametrize(
    ("case", "failed"), [(SHARDED_OUT_OF_MEMORY_AT_ONCE, 3), (SHARDED_OUT_OF_MEMORY_LATER, 2)]
)
def test_after_memory_ran_out_on_one_rank_a_sharded_model_goes_on_smaller(
    case: Case, failed: int, trials: dict[Case, Trial], alone: Trial
) -> None:
    """Nobody hangs: all ranks are ended, and go on from the last checkpoint, if there is one."""
    trial = trials[case]
    assert (trial.row["state"], trial.row["num_rescues"]) == ("finished", 1), trial.row["error"]
    (rescued,) = trial.events(Rescued)
    assert (rescued.failed_microbatch_size, rescued.microbatch_limit) == (failed, 1)
    assert [reported.metrics["epoch"] for reported in trial.events(Reported)] == [1, 2, 3]
    assert_the_same(trial, alone)


def test_the_death_of_one_rank_hangs_nobody_and_the_trial_goes_on_with_the_same_numbers(
    trials: dict[Case, Trial], alone: Trial
) -> None:
    """Nor does it harm the trials that come after it on the same workers."""
    trial = trials[KILLED]
    assert (trial.row["state"], trial.row["num_failures"]) == ("finished", 1), trial.row["error"]
    (interrupted,) = trial.events(Interrupted)
    assert "ChildDiedError: the trial's process was ended by SIGKILL" in interrupted.reason
    assert len(trial.events(Started)) == 2
    assert_the_same(trial, alone)
    assert sum(other.row["num_failures"] for other in trials.values()) == 1


UNEVEN_CASES = {
    "each for itself": {"memory.sharding": "none", "batch.probe": "auto", "batch.start": None},
    "together": {"memory.sharding": "full", "batch.probe": "auto", "batch.start": 12},
    "not probed": {"memory.sharding": "full", "batch.probe": "off", "batch.start": None},
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> dict[str, Trial]:
    """Trials of which one rank needs twice the memory of the other: 16 MiB a sample, and its square."""
    folder = tmp_path_factory.mktemp("uneven")
    grid: dict[str, list[Any]] = {
        key: [case[key] for case in UNEVEN_CASES.values()] for key in UNEVEN_CASES["together"]
    }
    grid["toy.marker"] = [str(folder / name.replace(" ", "_")) for name in UNEVEN_CASES]
    given = {
        "name": "uneven",
        "task": f"{TOYS}:build_uneven_ranks_task",
        "config": {"num_samples": 24, "hp": {"batch_size": 12}},
        "grid_search": {"grid": grid, "pair": [list(grid)]},
        "batch": {"effective_batch_size": 24, "memory_budget": "240MiB"},
        "train": {"epochs": 2},
        "trial": {"resources": {"cpu": 1}, "num_workers": 2},
        "run": {"metric": "train_loss", "storage": str(folder / "runs")},
    }
    return dict(zip(UNEVEN_CASES, run(given), strict=True))


def test_the_rank_with_the_least_memory_decides_for_all(uneven: dict[str, Trial]) -> None:
    trial = uneven["each for itself"]
    assert (trial.row["state"], trial.row["num_rescues"]) == ("finished", 0), trial.row["error"]
    assert trial.row["effective_batch_size"] == 24
    (probed,) = trial.events(Probed)
    outcomes = {attempt["microbatch_size"]: attempt["outcome"] for attempt in probed.attempts}
    assert outcomes[probed.microbatch_size] == "fits"
    assert probed.microbatch_size * 2 * 16 <= 240


def test_a_sharded_model_finds_the_size_that_fits_on_the_rank_with_the_least_memory(
    uneven: dict[str, Trial],
) -> None:
    """Attempts that break one rank's cap end the other one's, which waits for it."""
    trial = uneven["together"]
    assert (trial.row["state"], trial.row["num_rescues"]) == ("finished", 0), trial.row["error"]
    assert trial.row["effective_batch_size"] == 24
    (probed,) = trial.events(Probed)
    outcomes = {attempt["microbatch_size"]: attempt["outcome"] for attempt in probed.attempts}
    assert outcomes[12] == "out_of_memory"
    assert outcomes[probed.microbatch_size] == "fits"


def test_a_sharded_model_that_breaks_a_rank_s_cap_in_training_goes_on_smaller(
    uneven: dict[str, Trial],
) -> None:
    trial = uneven["not probed"]
    assert trial.row["state"] == "finished", trial.row["error"]
    assert (trial.row["effective_batch_size"], trial.row["optimizer_steps"]) == (24, 2)
    assert trial.row["num_rescues"] == len(trial.events(Rescued)) > 0
