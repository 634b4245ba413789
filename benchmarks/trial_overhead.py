"""What a trial costs beside its training: an empty Ray Tune trial against ours, on this machine.

    python benchmarks/trial_overhead.py [--num-trials 100] [--rounds 5] [--json trial_overhead.json]

Every row runs the same number of trials one at a time in a Ray that is already up. The first trial of a row
pays for starting an actor (and, in ours, the forkserver that imports torch); `seconds per trial` is the mean
of the others, `all` what the whole call took. The first two rows are measured in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import tune

import tune_easytrain as te
from tune_easytrain.cluster import ray_session

TOYS = Path(__file__).parents[1] / "tests" / "toys.py"


def empty_trial(config: dict[str, Any]) -> None:
    """Reports once."""
    tune.report({"value": 0.0, "ended": time.time()})


def train_nothing(config: dict[str, Any], trial: te.TrialContext) -> None:
    """A training function that reports once."""
    trial.report({"value": 0.0}, is_final=True, reason="nothing to train")


def measure_bare(num_trials: int, storage: str) -> tuple[list[float], float]:
    """Return when each empty Ray Tune trial ended, and the sweep, in seconds since the sweep's start."""
    start = time.time()
    results = tune.Tuner(
        tune.with_resources(empty_trial, {"cpu": 1}),
        param_space={"index": tune.grid_search(list(range(num_trials)))},
        tune_config=tune.TuneConfig(metric="value", mode="min", reuse_actors=True, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="bare", storage_path=storage, verbose=0),
    ).fit()
    seconds = time.time() - start
    return sorted(result.metrics["ended"] - start for result in results), seconds


def measure_ours(num_trials: int, storage: str, *, with_torch: bool) -> tuple[list[float], float]:
    """Return the same of ours: an own function alone, or a probed and trained toy model."""
    sweep: dict[str, Any] = {
        "name": "torch" if with_torch else "function",
        "config": {"model": {"type": "small"}},
        "grid_search": {"grid": {"index": list(range(num_trials)), "hp.batch_size": [8]}},
        "batch": {"effective_batch_size": 16, "memory_budget": "512MiB"},
        "run": {"metric": "train_loss", "mode": "min", "storage": storage, "max_concurrent": 1},
    }
    if with_torch:
        sweep["task"] = f"{TOYS}:build_task"
    else:
        sweep["train"] = {"function": f"{Path(__file__).resolve()}:train_nothing"}
        sweep["batch"]["probe"] = "off"
        sweep["run"]["metric"] = "value"
    start = time.time()
    results = te.run(sweep, quiet=True)
    seconds = time.time() - start
    assert results.num_failed == 0, list(results.frame()["error"])
    ends = []
    for record in results.records():
        lines = (results.run_dir / "trials" / f"{record.trial_id}.jsonl").read_text().splitlines()
        events = {event["event"]: event for event in map(json.loads, lines)}
        ends.append(events["training_ended"]["time"] - start)
    return sorted(ends), seconds


def describe(name: str, measured: tuple[list[float], float]) -> dict[str, Any]:
    """Return one row: seconds to the first trial's end, and per trial after it."""
    ends, seconds = measured
    return {
        "trial": name,
        "num_trials": len(ends),
        "first_seconds": round(ends[0], 2),
        "seconds_per_trial": round((ends[-1] - ends[0]) / (len(ends) - 1), 4),
        "all_seconds": round(seconds, 2),
    }


def median_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row that took the median time."""
    return sorted(rows, key=lambda row: row["all_seconds"])[len(rows) // 2]


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="of the first two rows; the median is shown")
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage, ray_session("local"):
        number = arguments.num_trials
        rounds = [
            (
                describe("empty Ray Tune trial", measure_bare(number, storage)),
                describe("own function, probe off", measure_ours(number, storage, with_torch=False)),
            )
            for _ in range(arguments.rounds)
        ]
        rows = [median_row(same) for same in zip(*rounds, strict=True)]
        torch_row = describe("toy model, probed and trained", measure_ours(number, storage, with_torch=True))
        rows.append(torch_row)
    print(f"{'trial':32} {'first (s)':>10} {'each further (s)':>17} {'all (s)':>8}")
    for row in rows:
        print(
            f"{row['trial']:32} {row['first_seconds']:10.2f} {row['seconds_per_trial']:17.4f} "
            f"{row['all_seconds']:8.2f}"
        )
    if arguments.json is not None:
        machine = {"num_cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}
        versions = {"ray": ray.__version__, "torch": version("torch")}
        arguments.json.write_text(
            json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
