"""Sweeps of `fault_tasks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TASK = f"{Path(__file__).with_name('fault_tasks.py')}:build_task"


def make_sweep(folder: Path, **config: Any) -> dict[str, Any]:
    """A sweep of `fault_tasks`, one trial at a time; `config` is what its trials have in common."""
    return {
        "name": "faults",
        "task": TASK,
        "config": {"folder": str(folder / "visits"), "model": {"type": "exact"}, **config},
        "grid_search": {"grid": {"fault": [None]}},
        "batch": {"effective_batch_size": 6, "memory_budget": "512MiB", "probe": "off"},
        "train": {"epochs": 4, "num_samples": None},
        "run": {"metric": "val_loss", "mode": "min", "storage": str(folder / "runs"), "max_concurrent": 1},
    }
