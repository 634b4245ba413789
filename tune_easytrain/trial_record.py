"""`TrialRecord`: what a trial's events add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Finished,
    Interrupted,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
    Stopped,
)

PROGRESS_KEYS = (
    "epoch",
    "optimizer_steps",
    "num_samples",
    "num_rescues",
    "learning_rate",
    "gradient_noise_scale",
    "samples_per_second",
    "data_wait_share",
    "tokens_per_second",
    "padding_share",
    "epoch_seconds",
)
"""Reported values that have columns of their own; all others are metrics."""


class TrialState(StrEnum):
    """Where a trial stands."""

    PENDING = "pending"
    PROBING = "probing"
    TRAINING = "training"
    INTERRUPTED = "interrupted"
    """Ended from outside; it goes on from its newest checkpoint, now or when the sweep is resumed."""
    FINISHED = "finished"
    STOPPED = "stopped"
    """Ended early by the scheduler."""
    FAILED = "failed"

    @property
    def is_running(self) -> bool:
        """Whether the trial has its resources."""
        return self in (TrialState.PROBING, TrialState.TRAINING)

    @property
    def is_final(self) -> bool:
        """Whether nothing will happen to the trial any more."""
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED)


@dataclass
class TrialRecord:
    """One trial as far as it has come.

    `has_begun` says that it has had resources, so that nothing of `config` is still to be drawn.
    `plan` is the batch plan in use, `num_rescues` how often memory ran out in training and a window was
    computed again, `num_failures` how often a fault ended the trial that was not its own;
    `reported` holds one report per epoch, the latest of each, every one with its `epoch` among its metrics.
    """

    trial_id: str
    state: TrialState = TrialState.PENDING
    config: dict[str, Any] = field(default_factory=dict)
    probe: Probed | None = None
    plan: Planned | None = None
    has_begun: bool = False
    num_rescues: int = 0
    num_failures: int = 0
    reported: list[Reported] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    reason: str = ""
    error: str = ""
    error_details: str = ""

    @classmethod
    def from_events(cls, trial_id: str, events: Iterable[Event]) -> TrialRecord:
        """Add up a trial's events."""
        record = cls(trial_id)
        for event in events:
            record.add(event)
        return record

    def add(self, event: Event) -> None:
        """Take one more event into account."""
        match event:
            case Created():
                self.config = event.config
            case Started():
                self.config, self.state, self.has_begun = event.config, TrialState.PROBING, True
                self.error = self.error_details = self.reason = ""
                if event.cloned_from:
                    self.reported.clear()
            case Probed():
                self.probe = event
            case Planned():
                self.plan, self.state = event, TrialState.TRAINING
            case Rescued():
                self._add_rescue(event)
            case Reported():
                self._add_report(event)
            case Interrupted():
                self.state, self.reason = TrialState.INTERRUPTED, event.reason
                self.num_failures += event.is_failure
            case Finished():
                self.state, self.reason = TrialState.FINISHED, event.reason
            case Stopped():
                self.state, self.reason = TrialState.STOPPED, event.reason
            case Failed():
                self.state, self.error, self.error_details = TrialState.FAILED, event.error, event.details

    def _add_rescue(self, event: Rescued) -> None:
        self.num_rescues += 1
        if self.plan is not None:
            self.plan = replace(
                self.plan,
                microbatch_size=event.microbatch_size,
                accumulation_steps=event.accumulation_steps,
            )

    def _add_report(self, event: Reported) -> None:
        # A trial that was set back to a checkpoint reports its epochs again: the later report holds.
        epoch = event.metrics.get("epoch", math.nan)
        epoch = epoch if math.isfinite(epoch) else len(self.reported) + 1
        while self.reported and self.reported[-1].metrics["epoch"] >= epoch:
            self.reported.pop()
        self.reported.append(replace(event, metrics={**event.metrics, "epoch": epoch}))
        self.peak_memory_bytes = max(self.peak_memory_bytes or 0, event.peak_memory_bytes)

    @property
    def reports(self) -> list[dict[str, float]]:
        """What was reported, once per epoch: metrics and progress."""
        return [report.metrics for report in self.reported]

    @property
    def last(self) -> Mapping[str, float]:
        """The latest report, empty before the first."""
        return self.reported[-1].metrics if self.reported else {}

    def best(self, metric: str, mode: Literal["min", "max"]) -> Mapping[str, float]:
        """Return the report in which `metric` was best, the earliest of equals; empty before the first."""
        candidates = [r for r in self.reports if metric in r and r[metric] == r[metric]]
        if not candidates:
            return {}
        choose = min if mode == "min" else max
        return choose(candidates, key=lambda report: report[metric])


def step_of(record: TrialRecord) -> int:
    """Return where curves have the last report: at its epoch, or by its place if some are no integers."""
    if all(float(report["epoch"]).is_integer() for report in record.reports):
        return int(record.last["epoch"])
    return len(record.reports)


def last_and_best(record: TrialRecord, metric: str, mode: Literal["min", "max"]) -> dict[str, float]:
    """Return the finite ones of a trial's `<metric>_last` and `<metric>_best`, as in the frame of results.

    The best ones are those of the report in which `metric`, the sweep's, was best.
    """
    best, found = record.best(metric, mode), dict[str, float]()
    for name, value in record.last.items():
        if name not in PROGRESS_KEYS:
            found |= {f"{name}_last": value, f"{name}_best": best.get(name, math.nan)}
    return {name: value for name, value in found.items() if math.isfinite(value)}
