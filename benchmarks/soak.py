"""A long sweep on a cluster whose processes and nodes are killed all the time.

    python benchmarks/soak.py [--num-trials 1000] [--seed 0] [--json soak_2_cores.json]
    python benchmarks/soak.py --bare [--num-trials 600] [--json soak_2_cores.json]

A cluster of a head and three nodes on this machine runs the same small trial many times. A schedule that is
drawn from the seed kills the child of a trial, the Ray worker of one, or a whole node, which another one then
replaces. At the end every trial must have ended once, with the same loss up to rounding; the driver's memory
and open files are watched meanwhile. It stops by itself after `--most-minutes`. Exit code 1 if anything is
wrong.

`--bare` runs trials of Ray Tune's own instead, of which nothing is killed, that report and store checkpoints
as often; how their driver's memory grows is added to the figures in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.cluster_utils import Cluster

import tune_easytrain as te

TOYS = Path(__file__).parents[1] / "tests" / "toys.py"
DRIVER = "import json, sys, tune_easytrain as te; te.run(json.loads(sys.argv[1]), address=sys.argv[2])"
NUM_NODES, CPUS_PER_NODE = 3, 1
KINDS, WEIGHTS = ("child", "worker", "node"), (12, 6, 1)
MIB = 2**20
MOST_FAILURES = 20
NUM_EPOCHS = 3


def make_sweep(num_trials: int, storage: str) -> dict[str, Any]:
    """Return a sweep of trials that differ in nothing but their number."""
    return {
        "name": "soak",
        "task": f"{TOYS}:build_exact_task",
        "config": {"data": {"num_samples": 30}},
        "grid_search": {"grid": {"number": list(range(num_trials)), "hp.batch_size": [4]}},
        "batch": {"effective_batch_size": 8, "memory_budget": "512MiB"},
        "train": {"epochs": NUM_EPOCHS},
        "trial": {"max_failures": MOST_FAILURES},
        "run": {"metric": "val_loss", "mode": "min", "storage": storage},
    }


class Processes:
    """What runs on this machine now, by what it is."""

    def __init__(self, root: int) -> None:
        """`root` is the process that all others come from."""
        names, children = dict[int, str](), dict[int, list[int]]()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
                children.setdefault(parent, []).append(int(folder.name))
        self._names, self._children = names, children
        self._all = self.below(root)

    def below(self, pid: int) -> list[int]:
        """Return a process and all that come from it."""
        found = [pid]
        for member in found:
            found += self._children.get(member, [])
        return found

    @property
    def workers(self) -> list[int]:
        """Ray workers that have a trial, or are about to."""
        return [pid for pid in self._all if "ray::SweepTrial" in self._names.get(pid, "")]

    @property
    def trial_children(self) -> list[int]:
        """Children of the workers' forkservers."""
        servers = [
            server
            for worker in self.workers
            for server in self._children.get(worker, [])
            if "forkserver" in self._names.get(server, "")
        ]
        return [child for server in servers for child in self._children.get(server, [])]


class Killer:
    """Kills something now and then, as the seed has it."""

    def __init__(self, cluster: Any, seed: int, mean_seconds: float) -> None:
        self._cluster, self._random, self._mean_seconds = cluster, random.Random(seed), mean_seconds
        self._nodes = [self._new_node() for _ in range(NUM_NODES)]
        self._due = time.monotonic() + self._wait()
        self.counts = Counter[str]()

    def _new_node(self) -> Any:
        return self._cluster.add_node(num_cpus=CPUS_PER_NODE)

    def _wait(self) -> float:
        return self._random.expovariate(1 / self._mean_seconds)

    def look(self) -> None:
        """Kill what is due."""
        if time.monotonic() < self._due:
            return
        (kind,) = self._random.choices(KINDS, WEIGHTS)
        if kind == "node":
            node = self._nodes.pop(self._random.randrange(NUM_NODES))
            self._cluster.remove_node(node, allow_graceful=False)
            self._nodes.append(self._new_node())
        else:
            found = Processes(os.getpid())
            pids = found.trial_children if kind == "child" else found.workers
            if not pids:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._random.choice(sorted(pids)), signal.SIGKILL)
        self.counts[kind] += 1
        self._due = time.monotonic() + self._wait()


def measure(pid: int) -> dict[str, float]:
    """Return a process's memory (of its own and shared), in MiB, and how many files it has open."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return {
        "memory_mib": round(int(status["VmRSS"].split()[0]) * 1024 / MIB, 1),
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


class BareTrial(tune.Trainable):  # type: ignore[misc]
    """A trial of Ray Tune's own that reports as often as those of the soak, and stores as much."""

    def setup(self, config: dict[str, Any]) -> None:
        """Begin."""
        self._epoch = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin as the next trial."""
        self._epoch = 0
        return True

    def step(self) -> dict[str, Any]:
        """Report."""
        self._epoch += 1
        return {"val_loss": 1 / self._epoch, "epoch": self._epoch, "done": self._epoch == NUM_EPOCHS}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Store next to nothing."""
        Path(checkpoint_dir, "checkpoint").write_text(str(self._epoch))

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing goes on."""


class MemoryWatch(tune.Callback):  # type: ignore[misc]
    """Measures this process each time that so many more trials have ended."""

    def __init__(self, every: int) -> None:
        self.samples: list[dict[str, float]] = []
        self._every, self._ended = every, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count, and measure."""
        self._ended += 1
        if self._ended % self._every == 0:
            self.samples.append({"ended": self._ended, **measure(os.getpid())})
            print(self.samples[-1], flush=True)


def run_bare(num_trials: int) -> dict[str, Any]:
    """Run bare trials on a Ray of this machine, and return how this process grew meanwhile."""
    watch = MemoryWatch(every=max(1, num_trials // 12))
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as storage:
        tune.Tuner(
            BareTrial,
            param_space={"number": tune.grid_search(list(range(num_trials))), "hp": {"batch_size": 4}},
            tune_config=tune.TuneConfig(metric="val_loss", mode="min", reuse_actors=True),
            run_config=tune.RunConfig(
                storage_path=storage,
                verbose=0,
                callbacks=[watch],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=2, checkpoint_frequency=1),
            ),
        ).fit()
    ray.shutdown()
    return {
        "num_trials": num_trials,
        "kib_per_trial": growth_per_trial(watch.samples),
        "driver": watch.samples,
    }


def growth_per_trial(samples: list[dict[str, float]]) -> float:
    """Return by how many KiB a driver grew per trial, once a tenth of the trials had ended."""
    first = next(sample for sample in samples if sample["ended"] >= samples[-1]["ended"] / 10)
    last = samples[-1]
    mib = (last["memory_mib"] - first["memory_mib"]) / (last["ended"] - first["ended"])
    return round(1024 * mib, 1)


def check(results: te.SweepResults, num_trials: int) -> list[str]:
    """Return what is wrong with the results of a sweep."""
    faults = []
    frame = results.frame()
    if len(frame) != num_trials:
        faults.append(f"{len(frame)} rows for {num_trials} trials")
    for _, row in frame[frame["state"] != "finished"].iterrows():
        faults.append(f"{row['trial_id']} is {row['state']}: {row['error']}")
    done = frame[frame["state"] == "finished"]
    for column in ("train_loss_last", "val_loss_last", "num_samples", "optimizer_steps", "epochs"):
        least, most = done[column].min(), done[column].max()
        if not most - least <= 1e-9 * abs(most):  # micro-batches of other sizes round differently
            faults.append(f"{column} is between {least} and {most}")
    for path in sorted((results.run_dir / "trials").iterdir()):
        ends = [line for line in path.read_text().splitlines() if '"event": "finished"' in line]
        if len(ends) != 1:
            faults.append(f"{path.stem} has ended {len(ends)} times")
    return faults


def soak(num_trials: int, seed: int, mean_seconds: float, most_minutes: float) -> dict[str, Any]:
    """Run the sweep and return what there is to tell of it."""
    leftovers = set(Path(tempfile.gettempdir()).glob("tune_easytrain_*"))
    with tempfile.TemporaryDirectory() as storage:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        killer = Killer(cluster, seed, mean_seconds)
        sweep = json.dumps(make_sweep(num_trials, storage))
        start = time.monotonic()
        with (Path(storage) / "driver.log").open("w") as log:
            driver = subprocess.Popen(
                [sys.executable, "-c", DRIVER, sweep, cluster.address], stdout=log, stderr=log
            )
        samples: list[dict[str, float]] = []
        results: te.SweepResults | None = None
        try:
            while driver.poll() is None and time.monotonic() - start < 60 * most_minutes:
                time.sleep(0.2)
                if results is None:
                    found = list(Path(storage).glob("soak_*/sweep.json"))
                    results = te.load_results(found[0].parent) if found else None
                    continue
                killer.look()
                minutes = (time.monotonic() - start) / 60
                if not samples or minutes >= samples[-1]["minutes"] + 0.5:
                    ended = sum(r.state.is_final for r in results.records())
                    samples.append({"minutes": round(minutes, 2), "ended": ended, **measure(driver.pid)})
                    print(samples[-1], dict(killer.counts), flush=True)
            seconds = time.monotonic() - start
            has_ended = driver.poll() == 0
        finally:
            driver.kill()
            driver.wait()
            cluster.shutdown()
        assert results is not None, (Path(storage) / "driver.log").read_text()
        faults = [] if has_ended else [(Path(storage) / "driver.log").read_text()[-2000:]]
        faults += check(results, num_trials)
        frame = results.frame()
        return {
            "num_trials": num_trials,
            "seed": seed,
            "minutes": round(seconds / 60, 1),
            "killed": dict(killer.counts),
            "states": dict(Counter(frame["state"])),
            "num_failures": int(frame["num_failures"].sum()),
            "most_failures_of_a_trial": int(frame["num_failures"].max()),
            "kib_per_trial": growth_per_trial(samples),
            "driver": samples,
            "num_leftover_folders": len(
                set(Path(tempfile.gettempdir()).glob("tune_easytrain_*")) - leftovers
            ),
            "faults": faults[:50],
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("ray", "torch")},
        }


def main() -> None:
    """Run it as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean-seconds", type=float, default=10.0, help="between two kills, on average")
    parser.add_argument("--most-minutes", type=float, default=60.0)
    parser.add_argument("--bare", action="store_true", help="trials of Ray Tune's own, to compare with")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the cluster is this machine's, for this time
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.bare:
        bare = run_bare(options.num_trials)
        if options.json is not None:
            figures = json.loads(options.json.read_text()) | {"bare_ray_tune": bare}
            options.json.write_text(json.dumps(figures, indent=1) + "\n")
        return
    figures = soak(options.num_trials, options.seed, options.mean_seconds, options.most_minutes)
    told = {key: value for key, value in figures.items() if key != "driver"}
    print(json.dumps(told, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(1 if figures["faults"] else 0)


if __name__ == "__main__":
    main()
