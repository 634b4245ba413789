"""The probe cache of whole sweeps on a real Ray: who searches, who waits, who goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from integration_tasks import build_task_that_hangs_once
from ray.exceptions import RayActorError

import tune_easytrain as te
from tune_easytrain.probe_cache import KnownSizes, ProbeEvidence, ProbeQuestion
from tune_easytrain.shared_probe_cache import SharedProbeCache
from tune_easytrain.sweep_hub import start_sweep_hub

TASKS = Path(__file__).parent / "integration_tasks.py"
MIB = 2**20
PATIENCE_SECONDS = 400
pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def hungry_sweep(toy_sweep: dict[str, Any]) -> dict[str, Any]:
    """Trials of which memory, and not E, is the limit."""
    return toy_sweep | {
        "task": f"{TASKS.parents[1] / 'toys.py'}:build_hungry_task",
        "config": {"num_samples": 8},
        "grid_search": {"grid": {"hp.learning_rate": [1e-3, 1e-4]}},
        "batch": {"effective_batch_size": 8, "memory_budget": "160MiB"},
        "train": {"epochs": 1},
        "run": toy_sweep["run"] | {"metric": "train_loss", "mode": "min", "max_concurrent": 2},
    }


def test_each_model_is_searched_once_also_by_a_resumed_sweep(hungry_sweep):
    models, num_rates = [4 * MIB, 6 * MIB, 8 * MIB], 4
    hungry_sweep["grid_search"]["grid"] = {
        "model.bytes_per_sample": models,
        "hp.learning_rate": [10.0**-exponent for exponent in range(num_rates)],
    }
    results = te.run(hungry_sweep, quiet=True)
    frame = results.frame()
    assert list(frame["state"]) == ["finished"] * len(models) * num_rates, list(frame["error"])
    searches = frame[~frame["probe_cached"]]
    assert sorted(searches["model.bytes_per_sample"]) == models
    assert (frame["probe_attempts"][frame["probe_cached"]] == 1).all()
    assert (frame.groupby("model.bytes_per_sample")["microbatch_size"].nunique() == 1).all()
    assert (frame["microbatch_size"] < 8).all()

    # As if the driver had been killed before the last trial began and before Ray saved anything:
    last = results.run_dir / "trials" / f"{frame['trial_id'].iloc[-1]}.jsonl"
    last.write_text(last.read_text().splitlines()[0] + "\n")
    (results.run_dir / "ray").rename(results.run_dir / "ray_lost")
    again = te.resume(results.run_dir, quiet=True).frame()
    assert list(again["microbatch_size"]) == list(frame["microbatch_size"])
    assert again["probe_cached"].iloc[-1]
    assert again["probe_attempts"].iloc[-1] == 1


def test_the_next_trial_searches_when_the_one_that_searched_is_killed(hungry_sweep, tmp_path):
    hungry_sweep["task"] = f"{TASKS}:{build_task_that_hangs_once.__name__}"
    hungry_sweep["config"] = {"toy": {"pid": str(tmp_path / "pid")}}
    hungry_sweep.setdefault("trial", {})["max_failures"] = 0
    storage = Path(hungry_sweep["run"]["storage"])

    def kill_the_worker_that_searches() -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            started = [file for file in storage.glob("*/trials/*.jsonl") if '"started"' in file.read_text()]
            pid = tmp_path / "pid"
            if len(started) == 2 and pid.is_file() and pid.read_text().endswith("\n"):
                os.kill(int(pid.read_text()), signal.SIGKILL)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_the_worker_that_searches)
    killer.start()
    frame = te.run(hungry_sweep, quiet=True).frame()
    killer.join()
    assert sorted(frame["state"]) == ["failed", "finished"]
    (survivor,) = frame[frame["state"] == "finished"].to_dict("records")
    assert not survivor["probe_cached"]
    assert survivor["microbatch_size"] == 8


def is_there(actor: Any) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote())
    except RayActorError:
        return False
    return True


def test_trials_wait_for_each_other_and_do_without_a_cache_that_is_gone():
    actor = start_sweep_hub([])
    question = ProbeQuestion(signature="s", budget_bytes=100, limit=8)
    first, second = (SharedProbeCache(actor, name, attempt_timeout_seconds=60.0) for name in ("1", "2"))
    assert first.acquire(question) == KnownSizes()
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(second.acquire, question)
        time.sleep(0.2)
        assert not waiting.done()
        first.publish(ProbeEvidence(signature="s", budget_bytes=100, fitting=(4,), failing=(5,), result=4))
        first.release()
        assert waiting.result(PATIENCE_SECONDS).proposal == 4
    ray.kill(actor)
    while is_there(actor):  # killing takes its time, and until then the actor answers
        time.sleep(0.05)
    assert second.acquire(question) == KnownSizes()
    second.publish(ProbeEvidence(signature="s", budget_bytes=100, fitting=(4,)))
    second.release()
