"""Search algorithms and schedulers of Ray Tune in whole sweeps on a real Ray of this machine."""

from __future__ import annotations

import json
import os
import pickle
from typing import Any

import pytest

import tune_easytrain as te

pytestmark = pytest.mark.usefixtures("local_ray")
LOW, HIGH = 1e-4, 1e-2
FIRST, SECOND = "trial_00000", "trial_00001"


@pytest.fixture
def quick_sweep(toy_sweep: dict[str, Any]) -> dict[str, Any]:
    """Trials of one model for the least loss, two steps an epoch, as many at a time as there is room for."""
    toy_sweep["config"] = {"data": {"num_samples": 20}}
    toy_sweep["grid_search"]["grid"] = {"model.type": ["large"]}
    toy_sweep["batch"]["probe"] = "off"
    toy_sweep["run"] |= {"metric": "val_loss", "mode": "min"}
    del toy_sweep["run"]["max_concurrent"]
    return toy_sweep


def run(sweep: dict[str, Any]) -> te.SweepResults:
    results = te.run(sweep, quiet=True)
    assert results.num_failed == 0, list(results.frame()["error"])
    return results


def events_of(results: te.SweepResults, trial_id: str, *kinds: str) -> list[dict[str, Any]]:
    lines = (results.run_dir / "trials" / f"{trial_id}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] in kinds]


def searcher_state(results: te.SweepResults) -> dict[str, Any]:
    """What Ray has saved of the search algorithm."""
    (path,) = (results.run_dir / "ray").glob("searcher-state-*.pkl")
    state: dict[str, Any] = pickle.loads(path.read_bytes())
    return state


def test_hyperband_stops_the_worse_half_of_its_second_bracket(quick_sweep):
    # With 2 epochs and factor 2 the first two trials are a bracket without a rung, the next two one with it.
    quick_sweep["grid_search"]["grid"]["hp.learning_rate"] = [1e-3, 1e-3, 1e-7, 1e-3]
    quick_sweep["run"]["scheduler"] = {"name": "hyperband", "reduction_factor": 2}
    frame = run(quick_sweep).frame()
    assert list(frame["state"]) == ["finished", "finished", "stopped", "finished"]
    assert list(frame["epochs"]) == [2, 2, 1, 2]


def run_population(sweep: dict[str, Any], scheduler: dict[str, Any]) -> tuple[float, float]:
    """Run two trials that take turns; the second is so much worse that it goes on from the first's weights.

    Return the learning rates of the first trial and of its clone.
    """
    sweep["grid_search"]["grid"] |= {
        "toy.handicap": [0.0, 1.0],
        "hp.learning_rate": {"loguniform": [LOW, HIGH]},
    }
    sweep["train"]["epochs"] = 3
    sweep["trial"] = {"resources": {"cpu": os.cpu_count()}}
    sweep["run"]["scheduler"] = {**scheduler, "perturbation_interval": 1, "quantile_fraction": 0.5}
    results = run(sweep)
    rates = {trial_id: assert_a_trial_trains_at_its_rate(results, trial_id) for trial_id in (FIRST, SECOND)}
    assert_the_frame_holds_the_last_config(results)
    assert len(rates[FIRST]) == 1
    assert len(rates[SECOND]) == 2
    return rates[FIRST][0], rates[SECOND][1]


def assert_a_trial_trains_at_its_rate(results: te.SweepResults, trial_id: str) -> list[float]:
    """Return the learning rates that a trial was given one after another."""
    rates: list[float] = []
    for event in events_of(results, trial_id, "started", "reported"):
        if event["event"] == "reported":
            assert event["metrics"]["learning_rate"] == pytest.approx(rates[-1], rel=1e-9)
        elif event["cloned_from"] or not rates:
            rates.append(event["config"]["hp"]["learning_rate"])
        else:  # it only had to wait
            assert rates[-1] == event["config"]["hp"]["learning_rate"]
    return rates


def assert_the_frame_holds_the_last_config(results: te.SweepResults) -> None:
    frame = results.frame()
    assert list(frame["state"]) == ["finished", "finished"]
    assert list(frame["epochs"]) == [3, 3]
    assert list(frame["optimizer_steps"]) == [6, 6]
    assert list(frame["toy.handicap"]) == [0.0, 0.0]
    assert list(frame["hp.learning_rate"]) == pytest.approx(list(frame["learning_rate"]), rel=1e-9)
    (clone,) = (event for event in events_of(results, SECOND, "started") if event["cloned_from"])
    assert clone["cloned_from"] == FIRST
    after = [e for e in events_of(results, SECOND, "reported") if e["time"] > clone["time"]]
    assert [event["metrics"]["epoch"] for event in after] == [3]
    assert frame["val_loss_best"][1] == frame["val_loss_last"][1] == after[-1]["metrics"]["val_loss"]
    assert frame["best_epoch"][1] == 3
    history = results.history()
    assert [*zip(history["trial_id"], history["epoch"], strict=True)] == [
        (FIRST, 1),
        (FIRST, 2),
        (FIRST, 3),
        (SECOND, 3),
    ]


def test_pbt_changes_the_learning_rate_of_a_trial_that_goes_on_from_another(quick_sweep):
    rate, changed = run_population(quick_sweep, {"name": "pbt", "resample_probability": 0.0})
    perturbed = [min(max(LOW, factor * rate), HIGH) for factor in (0.8, 1.2)]
    assert changed in [pytest.approx(value, rel=1e-12) for value in perturbed]


def test_pb2_chooses_the_learning_rate_of_a_trial_that_goes_on_from_another(quick_sweep):
    pytest.importorskip("sklearn", reason="pip install 'tune-easytrain[search]'")
    rate, changed = run_population(quick_sweep, {"name": "pb2"})
    assert LOW <= changed <= HIGH
    assert changed != rate


def test_optuna_chooses_whole_grid_points_and_learns_what_came_of_them(quick_sweep):
    pytest.importorskip("optuna", reason="pip install 'tune-easytrain[search]'")
    quick_sweep["grid_search"]["grid"] = {
        "model.type": ["small", "medium", "large"],
        "hp.batch_size": [3, 4, 5],
        "hp.learning_rate": {"loguniform": [LOW, HIGH]},
        "optimizer": {"choice": [{"name": "adam"}, {"name": "sgd", "momentum": [0.9]}]},
    }
    quick_sweep["run"] |= {"search": "optuna", "num_samples": 4}
    results = run(quick_sweep)
    frame = results.frame()
    assert list(frame["trial_id"]) == [f"trial_{number:05}" for number in range(4)]
    assert list(frame["state"]) == ["finished"] * 4
    pairs = {"small": 3, "medium": 4, "large": 5}
    assert [pairs[name] for name in frame["model.type"]] == list(frame["hp.batch_size"])
    assert frame["hp.learning_rate"].between(LOW, HIGH).all()
    assert set(frame["optimizer.name"]) <= {"adam", "sgd"}
    study = searcher_state(results)["_ot_study"]
    assert sorted(trial.value for trial in study.trials) == sorted(frame["val_loss_last"])
    assert te.resume(results.run_dir, quiet=True).frame().equals(frame)


def test_bohb_stops_trials_and_models_what_came_of_them(quick_sweep):
    for module in ("ConfigSpace", "hpbandster"):
        pytest.importorskip(module, reason="pip install 'tune-easytrain[bohb]'")
    quick_sweep["grid_search"]["grid"] = {
        "model.type": ["small", "large"],
        "hp.learning_rate": {"loguniform": [LOW, HIGH]},
        "one": {"choice": ["only"]},
    }
    quick_sweep["train"]["epochs"] = 3
    quick_sweep["run"] |= {"search": "bohb", "scheduler": "bohb", "num_samples": 4}
    results = run(quick_sweep)
    frame = results.frame()
    # The first bracket has three trials, of which one goes on after the first epoch; the second has no rung.
    assert sorted(frame["state"]) == ["finished", "finished", "stopped", "stopped"]
    assert sorted(frame["epochs"]) == [1, 1, 3, 3]
    assert set(frame["model.type"]) <= {"small", "large"}
    assert set(frame["one"]) == {"only"}
    # Of the trial that is stopped by a report of its own, Ray tells the model nothing.
    losses = searcher_state(results)["bohber"].losses[1]
    assert len(losses) >= 2
    assert set(losses) <= {record.reports[0]["val_loss"] for record in results.records()}
