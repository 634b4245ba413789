"""`SweepShared`: what all trials of a sweep have in common, and what they tell Ray Tune. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tune_easytrain.checkpoint_store import CheckpointStore
from tune_easytrain.trial_space import TrialSpace

TRAINING_ENDED = "training_ended"
"""What Ray's last result of a trial holds besides its metrics, unless the trial failed or was stopped."""

TIME = "epoch"
"""What schedulers go by: the metric that counts a trial's reports."""


@dataclass(frozen=True)
class SweepShared:
    """What all trials of a sweep have in common.

    `num_workers` is how many workers the sweep file gives a trial; one that fits on no GPU may have got more,
    to share out its model.
    `ended` holds, for a resumed sweep, the last metrics of every trial that had already ended;
    `hub` is the handle of the sweep's `SweepHub`.
    Of trials that have begun, but not as far as Ray knows, `begun` holds the configs, with the values drawn
    for them. `checkpoints` is the folder, and the file system, with a folder of checkpoints for every trial.
    `timeout_seconds` and `grace_seconds` are those of a `TrialSpec`.
    """

    sweep_name: str
    space: TrialSpace
    task_payload: bytes | None
    function_payload: bytes | None
    num_workers: int
    metric: str
    mode: Literal["min", "max"]
    hub: Any
    ended: Mapping[str, Mapping[str, float]]
    begun: Mapping[str, dict[str, Any]]
    checkpoints: CheckpointStore
    preloaded_modules: tuple[str, ...]
    timeout_seconds: float | None
    grace_seconds: float
