"""Training functions that integration tests send to workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tune_easytrain import TrialContext


def train_by_hand(config: dict[str, Any], trial: TrialContext) -> None:
    """Reports twice, with a checkpoint, what it was given."""
    assert trial.batch_plan is not None
    for value in (0.125, 0.25 if config["model"]["type"] == "small" else 0.5):
        trial.report(
            {"val_accuracy": value, "accumulation_steps_seen": trial.batch_plan.accumulation_steps},
            checkpoint={"value": value},
        )


def train_that_looks_at_its_ancestors(config: dict[str, Any], trial: TrialContext) -> None:
    """Reports whether the forkserver, and the Ray worker behind it, have loaded torch."""
    forkserver = os.getppid()
    status = Path(f"/proc/{forkserver}/status").read_text()
    worker = int(next(line.split()[1] for line in status.splitlines() if line.startswith("PPid:")))
    trial.report(
        {
            "val_accuracy": 0.0,
            "forkserver_has_torch": _has_torch(forkserver),
            "ray_worker_has_torch": _has_torch(worker),
        }
    )


def _has_torch(pid: int) -> bool:
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
