"""Run directories made of events, for tests that read them; no sweep is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune_easytrain.config import load_config
from tune_easytrain.events import Event, Finished, Planned, Probed, Reported, Started, append_events
from tune_easytrain.results import SweepResults, load_results
from tune_easytrain.run_directory import RunDirectory, trial_id

GRID = {"model.type": ["small", "large"], "hp.batch_size": [4, 2]}


def make_run(folder: Path, trials: list[list[Event]], **sweep: Any) -> SweepResults:
    content = {
        "grid_search": {"grid": GRID},
        "batch": {"effective_batch_size": 8},
        "run": {"metric": "val_accuracy", "mode": "max"},
        **sweep,
    }
    directory = RunDirectory.create(folder, "demo")
    directory.save_sweep(load_config(content).resolved())
    for index, events in enumerate(trials):
        append_events(directory.trial_path(trial_id(index)), events)
    return load_results(directory.path)


def trial_config(name: str = "small", **more: Any) -> dict[str, Any]:
    return {"model": {"type": name}, "hp": {"batch_size": 4}, "batch": {"effective_batch_size": 8}, **more}


def epoch(number: int, accuracy: float, loss: float = 1.0) -> Reported:
    metrics = {
        "epoch": number,
        "optimizer_steps": 5 * number,
        "num_samples": 40 * number,
        "learning_rate": 0.1,
        "gradient_noise_scale": 50.0 * number,
    }
    metrics |= {
        "samples_per_second": 20.0,
        "data_wait_share": 0.25,
        "gpu_utilization": 0.5,
        "tokens_per_second": 640.0,
        "padding_share": 0.125,
        "epoch_seconds": 2.5,
        "train_loss": loss,
        "val_accuracy": accuracy,
    }
    return Reported(metrics=metrics, peak_memory_bytes=100 * number)


def finished(*reports: Reported, config: dict[str, Any] | None = None) -> list[Event]:
    attempt = {"microbatch_size": 4, "outcome": "fits"}
    return [
        Started(config=config or trial_config()),
        Probed(
            microbatch_size=4,
            budget_bytes=999,
            bounded_by="limit",
            seconds=1.5,
            attempts=[attempt] * 2,
            rule_of_thumb_size=6,
            estimated_size=5,
        ),
        Planned(
            device="cpu",
            budget_bytes=999,
            effective_batch_size=8,
            microbatch_size=4,
            accumulation_steps=2,
            num_workers=1,
            strategy="25 % again",
        ),
        *reports,
        Finished(reason="all done"),
    ]
