from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

TOYS = Path(__file__).parents[1] / "toys.py"


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of this machine for all sweeps of the session; each sweep uses the connection it finds."""
    from tune_easytrain.cluster import ray_session

    with ray_session("local"):
        yield


@pytest.fixture
def cluster_environment() -> Iterator[dict[str, str]]:
    """Variables for processes that make clusters: Ray notes their addresses where other tests do not look."""
    folder = tempfile.mkdtemp(prefix="te_", dir="/tmp")  # sockets in it need a short path
    yield os.environ | {"RAY_TMPDIR": folder}
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slow_sweep(toy_sweep: dict[str, Any]) -> dict[str, Any]:
    """Three trials of a second or so each, one at a time, so that they can be interrupted in the middle."""
    toy_sweep["config"] |= {"toy": {"seconds_per_loss": 0.05}}
    toy_sweep["grid_search"]["grid"] = {
        "model.type": ["small", "large", "small"],
        "hp.batch_size": [4, 7, 5],
        "hp.learning_rate": [1e-2],
    }
    toy_sweep["train"] = {"epochs": 4}
    return toy_sweep


@pytest.fixture
def toy_sweep(tmp_path: Path) -> dict[str, Any]:
    """Two models at the same effective batch size, reached in several micro-batches."""
    return {
        "name": "toy",
        "task": f"{TOYS}:build_task",
        "config": {"data": {"num_samples": 37}},
        "grid_search": {"grid": {"model.type": ["small", "large"], "hp.batch_size": [4, 7]}},
        "batch": {"effective_batch_size": 10, "memory_budget": "512MiB"},
        "train": {"epochs": 2},
        "run": {
            "metric": "val_accuracy",
            "mode": "max",
            "storage": str(tmp_path / "runs"),
            "max_concurrent": 1,
        },
    }
