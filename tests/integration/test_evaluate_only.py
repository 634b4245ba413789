"""Sweeps that train nothing (`train.function: none`), along a knob, on a real Ray of this machine."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tune_easytrain as te
from tune_easytrain.events import Planned, Probed, Reported, Rescued, load_events
from tune_easytrain.progress import Progress
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord

TOYS = Path(__file__).parents[1] / "toys.py"
MIB = 2**20
pytestmark = pytest.mark.usefixtures("local_ray")


def sweep(folder: Path, *, grid: dict[str, Any], num_workers: int = 1, **batch: Any) -> dict[str, Any]:
    return {
        "name": "crops",
        "task": f"{TOYS}:build_generating_task",
        "config": {"model": {"bytes_per_crop": MIB}},
        "grid_search": {"grid": {"hp.batch_size": [64], **grid}},
        "batch": {"knob": "model.max_crops", "search": "grow", **batch},
        "train": {"function": "none"},
        "trial": {"num_workers": num_workers},
        "run": {"metric": "val_accuracy", "mode": "max", "storage": str(folder)},
    }


def events_of(results: te.SweepResults, trial_id: str) -> list[Any]:
    return list(load_events(RunDirectory.open(results.run_dir).trial_path(trial_id)))


def test_a_sweep_along_a_knob_finds_each_value_a_size_and_evaluates_with_it(tmp_path: Path) -> None:
    found = te.run(
        sweep(tmp_path, grid={"model.max_crops": [1, 4, 12]}, start_from=4, memory_budget=300 * MIB),
        quiet=True,
    )
    frame = found.frame()
    assert list(frame["model.max_crops"]) == [4, 12]
    assert list(frame["state"]) == ["finished", "finished"]
    assert list(frame["microbatch_size"]) == [64, 21]
    assert list(frame["probe_rule_of_thumb"]) == [51, 19]
    assert frame["probe_estimate"].between(20, 64).all()
    assert frame["effective_batch_size"].isna().all()
    assert frame["optimizer_steps"].isna().all()
    assert list(frame["num_samples"]) == [100, 100]
    assert frame["val_accuracy_last"].nunique() == 1
    assert list(frame["epochs"]) == [1, 1]
    events = events_of(found, "trial_00001")
    (probed,) = (event for event in events if isinstance(event, Probed))
    assert [attempt["microbatch_size"] for attempt in probed.attempts] == [19, 28, 23, 21]
    assert_progress_tells_the_search(events)


def assert_progress_tells_the_search(events: list[Any]) -> None:
    console = Console(file=io.StringIO(), width=200)
    progress, record = Progress(console, "val_accuracy", ["model.max_crops"]), TrialRecord("trial_00001")
    for event in events:
        record.add(event)
        progress.watch(record, event)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "trial_00001 (12): started" in lines
    assert "trial_00001: max_crops=12: using micro-batch 21, bounded by memory" in lines
    assert "trial_00001 (12): evaluates at most 21 at once on cpu" in lines
    assert lines[-1] == "trial_00001 (12): finished: evaluated, nothing is trained (train.function: none)"


def test_several_workers_agree_on_a_size_and_evaluate_a_share_each(tmp_path: Path) -> None:
    grid = {"model.max_crops": [4]}
    alone = te.run(sweep(tmp_path, grid=grid, memory_budget=150 * MIB), quiet=True).frame().iloc[0]
    both = te.run(sweep(tmp_path, grid=grid, memory_budget=150 * MIB, num_workers=2), quiet=True)
    row = both.frame().iloc[0]
    assert row["state"] == "finished"
    assert row["num_workers"] == 2
    assert row["microbatch_size"] <= 33 < 50  # what 135 MiB hold; 50 samples are a worker's share
    assert row["num_samples"] == 100
    assert row["val_accuracy_last"] == alone["val_accuracy_last"]
    assert row["val_loss_last"] == pytest.approx(alone["val_loss_last"])


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_less(tmp_path: Path) -> None:
    given = sweep(tmp_path, grid={"model.max_crops": [4]}, memory_budget=150 * MIB, probe="off")
    given["task"] = f"{TOYS}:build_generating_predictor"
    found = te.run(given, quiet=True)
    events = events_of(found, "trial_00000")
    (planned,) = (event for event in events if isinstance(event, Planned))
    rescues = [event.microbatch_limit for event in events if isinstance(event, Rescued)]
    (reported,) = (event for event in events if isinstance(event, Reported))
    assert planned.microbatch_size == 64
    assert rescues == [25]  # 100 samples are two times 50, which do not fit either
    assert reported.metrics["num_samples"] == 100


def test_the_same_in_this_process_for_a_debugger(tmp_path: Path) -> None:
    given = sweep(tmp_path, grid={"model.max_crops": [1]}, probe="off")
    (row,) = te.run(given, quiet=True, debug=True).frame().to_dict("records")
    assert (row["state"], row["microbatch_size"], row["num_samples"]) == ("finished", 64, 100)
