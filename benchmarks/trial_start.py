"""How long a trial takes from its start to its first optimizer steps, on the device of this machine.

    python benchmarks/trial_start.py [--models r3d_18 swin3d_t] [--ray] [--json trial_start.json]

Trials of torchvision's video models at their published input sizes on random clips, three of each model in a
row. The first trial of all pays for the forkserver that imports torch. `opened` is the child being there with
its task and device, `probed` the end of the probe, `first report` the end of an epoch of 32 samples, all in
seconds since the trial's start. With --ray the same trials run in a sweep on a Ray of this machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from torch.utils.data import TensorDataset

import tune_easytrain as te
from tune_easytrain.child_process import modules_to_preload
from tune_easytrain.events import Planned, Probed, Reported, Started
from tune_easytrain.settings import TrialSettings
from tune_easytrain.task_source import pickle_function
from tune_easytrain.trial import TrialSpec, run_trial

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import ucf101  # noqa: E402 -- the example's folder has to be on the path first

cloudpickle.register_pickle_by_value(ucf101)  # workers have no such module

NUM_SAMPLES = 32
TRIALS_PER_MODEL = 3


def build_task(config: dict[str, Any]) -> te.Task:
    """The example's task with random clips in place of videos."""
    task = ucf101.build_task(config)
    assert task.worst_case is not None
    task.train_data = lambda: TensorDataset(*task.worst_case(NUM_SAMPLES))
    task.val_data = None
    return task


def trial_config(model: str) -> dict[str, Any]:
    """Return a trial's nested config."""
    config = te.load_config(sweep([model]))
    return te.expand_trials(config)[0]


def sweep(models: list[str], storage: str = "runs") -> dict[str, Any]:
    """Return the sweep of these models."""
    has_gpu = torch.cuda.is_available()
    return {
        "name": "trial_start",
        "config": {"optimizer": {"name": "adam"}},
        "grid_search": {
            "grid": {"model.type": models, "hp.batch_size": [8], "train.seed": list(range(TRIALS_PER_MODEL))},
            "pair": "none",
        },
        "batch": {"effective_batch_size": 16},
        "trial": {"resources": {"cpu": 1, "gpu": 1 if has_gpu else 0}},
        "run": {"metric": "train_loss", "mode": "min", "storage": storage},
    }


def measure_alone(model: str) -> dict[str, float]:
    """Run one trial in a child of this process and return when what had happened."""
    config = trial_config(model)
    times: dict[str, float] = {}
    start = time.time()

    def take(event: Any) -> None:
        names = {Started: "started", Probed: "probed", Planned: "planned", Reported: "first_report"}
        times.setdefault(names.get(type(event), "ended"), event.time - start)
        if isinstance(event, Probed):
            times["opened"] = times["probed"] - event.seconds

    spec = TrialSpec(
        config=config,
        settings=TrialSettings.from_config(config, metric="train_loss", mode="min"),
        task_payload=pickle_function(build_task, "task"),
        function_payload=None,
        device="cuda" if torch.cuda.is_available() else "cpu",
        device_share=1.0,
        num_threads=1,
        preloaded_modules=modules_to_preload(),
    )
    for _ in run_trial(spec, take):
        pass
    return times


def measure_in_ray(models: list[str]) -> list[tuple[str, dict[str, float]]]:
    """Run the sweep through Ray Tune; times count from the end of the trial before."""
    with tempfile.TemporaryDirectory() as storage:
        start = time.time()
        results = te.run(sweep(models, storage), build_task, quiet=True)
        rows = []
        for record in results.records():
            lines = (results.run_dir / "trials" / f"{record.trial_id}.jsonl").read_text().splitlines()
            events = [json.loads(line) for line in lines]
            at = {event["event"]: event["time"] - start for event in reversed(events)}
            if record.error:
                print(record.error_details)
            opened = at["probed"] - next(e["seconds"] for e in events if e["event"] == "probed")
            times = {"opened": opened, "probed": at["probed"], "first_report": at["reported"]}
            rows.append((record.config["model"]["type"], times))
            start += at["finished"]
    return rows


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["r3d_18", "swin3d_t"])
    parser.add_argument("--ray", action="store_true", help="measure the same trials in a Ray Tune sweep too")
    parser.add_argument("--json", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    measured = [
        ("alone", model, measure_alone(model)) for model in arguments.models for _ in range(TRIALS_PER_MODEL)
    ]
    if arguments.ray:
        measured += [("ray", model, times) for model, times in measure_in_ray(arguments.models)]
    columns = ("opened", "probed", "first_report")
    print(f"{'in':6} {'model':12} {'opened (s)':>16} {'probed (s)':>16} {'first report (s)':>16}")
    rows = []
    for where, model, times in measured:
        rows.append({"in": where, "model": model, **{f"{c}_seconds": round(times[c], 2) for c in columns}})
        seconds = " ".join(f"{times[column]:16.2f}" for column in columns)
        print(f"{where:6} {model:12} {seconds}")
    if arguments.json is not None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        machine = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
