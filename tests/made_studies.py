"""Sweeps over batch sizes made of events, for tests of what is said of them; no sweep is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_easytrain.config import load_config
from tune_easytrain.events import Created, Event, Failed, Finished, Planned, Reported, Started, append_events
from tune_easytrain.origin import Origin
from tune_easytrain.results import SweepResults, load_results
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.search_space import expand_trials

NUM_SAMPLES = 7046
GIB = 2**30


@dataclass(frozen=True)
class Trained:
    """A trial: its batch size, seed and best metric; `limit` is its micro-batch, None for the whole batch.

    `error` makes it fail, `is_over` False leaves it pending.
    """

    size: int
    seed: int
    metric: float
    limit: int | None = None
    model: str = "swin_b"
    epoch_seconds: float = 1500.0
    rate: float = 5e-6
    error: str = ""
    is_over: bool = True


def make_study(folder: Path, trials: Sequence[Trained], num_epochs: int = 3, **sweep: Any) -> SweepResults:
    """Make a run directory of these trials; the grid holds exactly them."""
    limits = [trained.limit or trained.size for trained in trials]
    content: dict[str, Any] = {
        "name": "iqa_batch_study",
        "grid_search": {
            "grid": {
                "model.type": [trained.model for trained in trials],
                "batch.effective_batch_size": [trained.size for trained in trials],
                "hp.batch_size": limits,
                "hp.learning_rate": [trained.rate for trained in trials],
                "train.seed": [trained.seed for trained in trials],
            },
            "pair": [
                [
                    "model.type",
                    "batch.effective_batch_size",
                    "hp.batch_size",
                    "hp.learning_rate",
                    "train.seed",
                ]
            ],
        },
        "train": {"epochs": num_epochs, "lr_scaling": "sqrt", "base_batch_size": 32, "patience": 7},
        "run": {"metric": "val_srcc", "mode": "max"},
        **sweep,
    }
    directory = RunDirectory.create(folder, "iqa_batch_study")
    directory.save_sweep(load_config(content).resolved())
    for index, trained in enumerate(trials):
        append_events(directory.trial_path(trial_id(index)), events_of(trained, num_epochs))
    return load_results(directory.path)


def events_of(trained: Trained, num_epochs: int) -> list[Event]:
    limit = trained.limit or trained.size
    config = {
        "model": {"type": trained.model},
        "hp": {"batch_size": limit, "learning_rate": trained.rate},
        "batch": {"effective_batch_size": trained.size},
        "train": {"seed": trained.seed},
    }
    if not trained.is_over:
        return [Created(config=config)]
    started = [Created(config=config), Started(config=config)]
    if trained.error:
        return [*started, Failed(error=trained.error)]
    steps = math.ceil(NUM_SAMPLES / trained.size)
    reports = [
        Reported(
            metrics={
                "epoch": epoch,
                "optimizer_steps": epoch * steps,
                "num_samples": epoch * NUM_SAMPLES,
                "samples_per_second": NUM_SAMPLES / trained.epoch_seconds,
                "epoch_seconds": trained.epoch_seconds,
                "val_srcc": trained.metric - 0.1 / epoch + 0.1 / num_epochs,
            },
            peak_memory_bytes=limit * GIB // 2,
        )
        for epoch in range(1, num_epochs + 1)
    ]
    planned = Planned(
        device="NVIDIA A100", budget_bytes=32 * GIB, effective_batch_size=trained.size, microbatch_size=limit,
        accumulation_steps=math.ceil(trained.size / limit), num_workers=1,
    )  # fmt: skip
    return [*started, planned, *reports, Finished(reason="all epochs done")]


def make_run_of(
    folder: Path,
    sweep: Path | dict[str, Any],
    *,
    overrides: Sequence[str] = (),
    quick: bool = False,
    metric: Callable[[dict[str, Any]], float | None] = lambda _: 0.5,
    max_trials: int | None = None,
) -> SweepResults:
    """Make a run directory of a sweep as it is run, whose trials report the metric of their configs.

    A trial without a metric fails; those from `max_trials` on have not begun. A drawn key has no value.
    """
    config = load_config(sweep, overrides=overrides, quick=quick)
    directory = RunDirectory.create(folder, config.name)
    directory.save_sweep(config.resolved())
    Origin.of(config).save(directory.origin_path)
    for index, trial in enumerate(expand_trials(config)):
        started: list[Event] = [Created(config=trial)]
        if max_trials is None or index < max_trials:
            started += [Started(config=trial), *_outcome(config.run.metric, trial, metric(trial))]
        append_events(directory.trial_path(trial_id(index)), started)
    return load_results(directory.path)


def _outcome(name: str, config: dict[str, Any], metric: float | None) -> list[Event]:
    limit = config.get("hp", {}).get("batch_size")
    size = config["batch"]["effective_batch_size"] or limit
    if metric is None or size is None:
        return [Failed(error="OutOfMemoryError: not even one sample fits")]
    microbatch_size = min(size, limit or size)
    planned = Planned(
        device="cpu", budget_bytes=GIB, effective_batch_size=size, microbatch_size=microbatch_size,
        accumulation_steps=math.ceil(size / microbatch_size), num_workers=1,
    )  # fmt: skip
    epochs = config["train"]["epochs"] or 1
    reports = [
        Reported(metrics={"epoch": epoch, "epoch_seconds": 60.0, name: metric}, peak_memory_bytes=GIB)
        for epoch in range(1, epochs + 1)
    ]
    return [planned, *reports, Finished(reason="all epochs done")]
