"""What a trial costs the driver, the head and the storage, and what ten thousand would.

    python benchmarks/scale.py [--num-trials 1000] [--num-simulated 10000] [--json scale.json]

First a real sweep: trials whose own function reports once, two at a time, on a Ray of this machine with its
dashboard, while the memory and the CPU time of the driver, Ray's GCS server and raylet are watched. Then the
driver's side of a large sweep alone: its sweep file, run directory, events, progress table and results,
with events that pass through a real `SweepHub` but come from no trial.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from rich.console import Console

import tune_easytrain as te
from tune_easytrain.config import load_config
from tune_easytrain.events import Created, Event, Planned, Probed, Reported, Started, TrainingEnded
from tune_easytrain.progress import Progress
from tune_easytrain.recorder import SweepRecorder
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.search_space import known_configs
from tune_easytrain.sweep_hub import start_sweep_hub

MIB = 2**20
NUM_REPORTS = 10
WATCHED = {"driver": None, "gcs_server": "gcs_server", "raylet": "raylet/raylet"}


def train_nothing(config: dict[str, Any], trial: te.TrialContext) -> None:
    """A training function that reports once."""
    trial.report({"value": float(config["index"])}, is_final=True, reason="nothing to train")


def make_sweep(num_trials: int, storage: str) -> dict[str, Any]:
    """Return a sweep of so many trials, with a config of the size that people's have."""
    return {
        "name": "scale",
        "config": {"model": {"type": "r3d_18"}, "data": {"clip_length": 16, "frame_size": 112}},
        "grid_search": {"grid": {"index": list(range(num_trials)), "hp.batch_size": [8]}},
        "batch": {"effective_batch_size": 16, "probe": "off"},
        "train": {"function": f"{Path(__file__).resolve()}:train_nothing"},
        "run": {"metric": "value", "mode": "min", "storage": storage},
    }


def find_process(words: str | None) -> int:
    """Return the pid of this session's process whose command has these words; this one for None."""
    if words is None:
        return os.getpid()
    session = ray._private.worker.global_worker.node.get_session_dir_path()  # to tell clusters apart
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if command[0].endswith(words) and any(session in part for part in command):
            return int(folder.name)
    raise LookupError(f"no process {words}")


def resident_mib(pid: int) -> float:
    """Return a process's private resident memory in MiB."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def watched(storage: Path, every: int) -> Iterator[list[dict[str, Any]]]:
    """Write down memory and CPU time each time that so many more trials have begun."""
    pids = {name: find_process(words) for name, words in WATCHED.items()}
    rows, is_over = list[dict[str, Any]](), threading.Event()

    def look() -> None:
        num_done = sum(file.stat().st_size > 1500 for file in storage.glob("*/trials/*.jsonl"))
        if not rows or num_done >= rows[-1]["num_trials"] + every or is_over.is_set():
            row: dict[str, Any] = {"num_trials": num_done, "time": time.time()}
            for name, pid in pids.items():
                row |= {f"{name}_mib": round(resident_mib(pid), 1), f"{name}_cpu_s": cpu_seconds(pid)}
            rows.append(row)

    def look_again_and_again() -> None:
        while not is_over.wait(1.0):
            look()

    look()
    thread = threading.Thread(target=look_again_and_again)
    thread.start()
    try:
        yield rows
    finally:
        is_over.set()
        thread.join()
        look()


def measure_sweep(num_trials: int) -> dict[str, Any]:
    """Run the real sweep, and return what a trial costs."""
    with tempfile.TemporaryDirectory() as storage:
        with watched(Path(storage), max(1, num_trials // 10)) as rows:
            start = time.perf_counter()
            results = te.run(make_sweep(num_trials, storage), quiet=True)
            seconds = time.perf_counter() - start
        assert results.num_failed == 0
        files = [file for file in Path(results.run_dir).rglob("*") if file.is_file()]
        first, last = rows[1], rows[-1]  # after the start's own growth
        num_between = last["num_trials"] - first["num_trials"]
        per_trial = {
            f"{name}_{what}": round((last[key] - first[key]) * factor / num_between, 2)
            for name in WATCHED
            for what, key, factor in (("kib", f"{name}_mib", 1024), ("cpu_ms", f"{name}_cpu_s", 1000))
        }
        return {
            "num_trials": num_trials,
            "seconds": round(seconds, 1),
            "per_trial": per_trial
            | {
                "storage_kib": round(sum(file.stat().st_size for file in files) / 1024 / num_trials, 2),
                "files": round(len(files) / num_trials, 2),
            },
            "rows": [{key: value for key, value in row.items() if key != "time"} for row in rows],
        }


def trial_events(index: int, config: dict[str, Any]) -> list[Event]:
    """Return what a trial of ten epochs tells, with the numbers that real ones have."""
    attempt = {"microbatch_size": 16, "outcome": "fits", "peak_bytes": 2**33, "seconds": 3.0, "message": ""}
    metrics = {"train_loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5, "samples_per_second": 300.0}
    return [
        Started(config=config),
        Probed(
            microbatch_size=16,
            budget_bytes=2**34,
            bounded_by="limit",
            seconds=3.0,
            attempts=[attempt],
            limit=16,
            signature="0" * 64,
        ),
        Planned(
            device="NVIDIA H100 80GB HBM3",
            budget_bytes=2**34,
            effective_batch_size=64,
            microbatch_size=16,
            accumulation_steps=4,
            num_workers=1,
        ),
        *(
            Reported(
                metrics={"epoch": float(epoch), "value": float(index), **metrics}, peak_memory_bytes=2**33
            )
            for epoch in range(1, NUM_REPORTS + 1)
        ),
        TrainingEnded(reason="trained for 10 epochs"),
    ]


def simulate_driver(num_trials: int) -> dict[str, Any]:
    """Do the driver's own work for so many trials, Ray Tune's left out, and return what it took."""
    costs: dict[str, Any] = {"num_trials": num_trials}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        costs[f"{name}_s"] = round(time.perf_counter() - start, 2)
        return value

    with tempfile.TemporaryDirectory() as storage:
        before = resident_mib(os.getpid())
        config = timed("load", lambda: load_config(make_sweep(num_trials, storage)))
        directory = RunDirectory.create(storage, config.name)
        directory.save_sweep(config.resolved())
        recorder = SweepRecorder(directory, {})

        def create() -> None:
            for index, known in enumerate(known_configs(config)):
                recorder.record(trial_id(index), Created(config=known))

        timed("create", create)
        hub = start_sweep_hub([])
        recorder.listen_to(hub)
        configs = list(known_configs(config))
        num_events = 0
        ingest_s = 0.0
        for begin in range(0, num_trials, 1000):  # as a thousand trials at a time would tell it
            told = [
                (trial_id(index), event)
                for index in range(begin, min(begin + 1000, num_trials))
                for event in trial_events(index, configs[index])
            ]
            num_events += len(told)
            ray.get(hub.tell.remote(told))
            for index in range(begin, min(begin + 1000, num_trials)):
                recorder.complete(trial_id(index), has_ended=True)
            start = time.perf_counter()
            recorder.drain(force=True)
            ingest_s += time.perf_counter() - start
        ray.kill(hub)
        costs |= {"num_events": num_events, "events_per_second": round(num_events / ingest_s)}
        costs["driver_kib_per_trial"] = round((resident_mib(os.getpid()) - before) * 1024 / num_trials, 2)
        results = te.SweepResults(directory)
        frame = timed("frame", results.frame)
        assert (frame["state"] == "finished").all()
        size = sum(file.stat().st_size for file in directory.path.rglob("*") if file.is_file())
        costs["storage_kib_per_trial"] = round(size / 1024 / num_trials, 2)
        console = Console(file=io.StringIO(), force_terminal=True, width=160)
        progress = Progress(console, "value", ["index"], results.records())
        timed("table", lambda: console.print(progress._table()))
    return costs


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--num-simulated", type=int, default=10000)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    sweep = measure_sweep(arguments.num_trials)
    print(f"{'trials':>7} {'driver MiB':>11} {'GCS MiB':>8} {'raylet MiB':>11}")
    for row in sweep["rows"]:
        print(
            f"{row['num_trials']:7} {row['driver_mib']:11.1f} {row['gcs_server_mib']:8.1f} "
            f"{row['raylet_mib']:11.1f}"
        )
    print(f"{sweep['seconds']} s; per trial: {sweep['per_trial']}")
    simulated = simulate_driver(arguments.num_simulated)
    print(f"the driver's own work: {simulated}")
    ray.shutdown()
    if arguments.json is not None:
        machine = {"num_cores": len(os.sched_getaffinity(0)), "ray": version("ray")}
        arguments.json.write_text(
            json.dumps({"machine": machine, "sweep": sweep, "simulated": simulated}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
