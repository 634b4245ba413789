"""`SweepMetrics`: how a sweep stands, as Prometheus metrics that Ray exports."""

from __future__ import annotations

import math
import time
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from tune_easytrain.events import Event, Failed, Interrupted, Probed, Reported, Rescued
from tune_easytrain.trial_record import TrialRecord, TrialState

PREFIX = "tune_easytrain_"
"""Of every metric's name. Prometheus sees `ray_` before it, which Ray adds."""

_REFRESH_SECONDS = 4.0
"""Ray forgets a gauge that is not set again within its report interval, 10 s unless it is set otherwise.

So those of a trial that has ended go by themselves, and there are never more than of the running ones.
"""

_EPOCH_SECONDS = (0.1, 1, 10, 30, 60, 120, 300, 600, 1800, 3600, 14400)
_PROBE_SECONDS = (0.3, 1, 3, 10, 30, 100, 300)


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric: its name without the prefix, kind, labels besides `sweep`, and meaning."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    boundaries: tuple[float, ...] = ()

    def build(self, sweep: str) -> Any:
        """Return the metric as Ray has it, for one sweep."""
        name, keys = f"{PREFIX}{self.name}", ("sweep", *self.labels)
        if self.kind == "histogram":
            bounds = list(self.boundaries)
            metric: Any = Histogram(name, description=self.meaning, boundaries=bounds, tag_keys=keys)
        else:
            kind = Gauge if self.kind == "gauge" else Counter
            metric = kind(name, description=self.meaning, tag_keys=keys)
        return metric.set_default_tags({"sweep": sweep})


METRICS = (
    MetricRow("trials", "gauge", ("state",), "trials in this state"),
    MetricRow("best_metric", "gauge", ("metric",), "the best value of run.metric so far"),
    MetricRow(
        "eta_seconds",
        "gauge",
        (),
        "seconds until the last trial ends, at the rate at which trials have ended so far",
    ),
    MetricRow("epoch", "gauge", ("trial",), "the last epoch that a running trial has reported"),
    MetricRow(
        "samples_per_second", "gauge", ("trial",), "samples that a running trial trained on in its last epoch"
    ),
    MetricRow("peak_memory_bytes", "gauge", ("trial",), "the most device memory a running trial has used"),
    MetricRow("memory_budget_bytes", "gauge", ("trial",), "what a worker of a running trial may use"),
    MetricRow("rescues_total", "counter", (), "windows computed again since memory ran out in training"),
    MetricRow("failures_total", "counter", (), "trials that failed"),
    MetricRow("interruptions_total", "counter", (), "times a fault that was not its own ended a trial"),
    MetricRow("probe_attempts_total", "counter", ("outcome",), "micro-batch sizes tried on the device"),
    MetricRow("epochs_total", "counter", (), "epochs trained"),
    MetricRow("epoch_seconds", "histogram", (), "wall time of an epoch, with evaluation", _EPOCH_SECONDS),
    MetricRow("probe_seconds", "histogram", (), "wall time of a trial's probe", _PROBE_SECONDS),
)
"""Every metric there is. Counters begin at 0 when a sweep is resumed, as those of a process do."""


class SweepMetrics:
    """Keeps Ray's metrics of one sweep up to date; needs a connection to Ray.

    Args:
        sweep: the run directory's name, which is every metric's label `sweep`.
        metric: the sweep's metric.
        mode: whether the smallest or the largest is best.
        records: the trials as they stand.
    """

    def __init__(
        self, sweep: str, metric: str, mode: Literal["min", "max"], records: Iterable[TrialRecord]
    ) -> None:
        self._metrics = {row.name: row.build(sweep) for row in METRICS}
        self._metric, self._mode = metric, mode
        self._states = {record.trial_id: record.state for record in records}
        self._running: dict[str, TrialRecord] = {}
        self._best = math.nan
        for record in records:
            self._note_best(record.best(metric, mode))
        self._start = time.monotonic()
        self._num_ended_before = sum(state.is_final for state in self._states.values())
        self._last_refresh = float("-inf")

    def watch(self, record: TrialRecord, event: Event) -> None:
        """Take note of an event."""
        self._states[record.trial_id] = record.state
        if record.state.is_running:
            self._running[record.trial_id] = record
        else:
            self._running.pop(record.trial_id, None)
        match event:
            case Reported():
                self._note_best(event.metrics)
                self._metrics["epochs_total"].inc()
                self._observe("epoch_seconds", event.metrics.get("epoch_seconds", math.nan))
            case Probed():
                tried = Tally(str(attempt["outcome"]) for attempt in event.attempts)
                for outcome, number in tried.items():
                    self._metrics["probe_attempts_total"].inc(number, {"outcome": outcome})
                self._observe("probe_seconds", event.seconds)
            case Rescued():
                self._metrics["rescues_total"].inc()
            case Interrupted() if event.is_failure:
                self._metrics["interruptions_total"].inc()
            case Failed():
                self._metrics["failures_total"].inc()

    def refresh(self) -> None:
        """Set every gauge again, now and then; called in every round of Ray Tune's loop."""
        now = time.monotonic()
        if now - self._last_refresh < _REFRESH_SECONDS:
            return
        self._last_refresh = now
        counts = Tally(self._states.values())
        for state in TrialState:
            self._set("trials", counts[state], {"state": state.value})
        self._set("best_metric", self._best, {"metric": self._metric})
        self._set("eta_seconds", self._eta_seconds(now))
        for trial_id, record in self._running.items():
            trial, last = {"trial": trial_id}, record.last
            self._set("epoch", last.get("epoch", 0.0), trial)
            self._set("samples_per_second", last.get("samples_per_second", math.nan), trial)
            if record.peak_memory_bytes is not None:
                self._set("peak_memory_bytes", record.peak_memory_bytes, trial)
            if record.plan is not None:
                self._set("memory_budget_bytes", record.plan.budget_bytes, trial)

    def _eta_seconds(self, now: float) -> float:
        """Return the seconds left; NaN before the first trial has ended."""
        num_ended = sum(state.is_final for state in self._states.values())
        num_here = num_ended - self._num_ended_before
        if num_here == 0:
            return math.nan
        return (now - self._start) / num_here * (len(self._states) - num_ended)

    def _note_best(self, report: Mapping[str, float]) -> None:
        value = report.get(self._metric, math.nan)
        if math.isfinite(value):
            choose = min if self._mode == "min" else max
            self._best = value if math.isnan(self._best) else choose(self._best, value)

    def _set(self, name: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        if math.isfinite(value):
            self._metrics[name].set(value, tags)

    def _observe(self, name: str, seconds: float) -> None:
        if seconds > 0 and math.isfinite(seconds):  # Ray takes no zero
            self._metrics[name].observe(seconds)
