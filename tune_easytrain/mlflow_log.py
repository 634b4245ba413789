"""`MlflowLog`: every trial as a run of MLflow's, through Ray's own callback."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from ray.air.integrations.mlflow import MLflowLoggerCallback

from tune_easytrain.events import Event, Failed, Interrupted, Planned, Reported, Rescued, Started
from tune_easytrain.logger_config import LoggerConfig
from tune_easytrain.ray_logger_trial import LoggedTrial, as_name, as_text, logged_trial, sweep_id
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord, last_and_best, step_of

SWEEP_TAG = "tune_easytrain.sweep"
"""The tag by which a resumed sweep finds its runs."""

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""Unless the environment says otherwise. MLflow itself would try for minutes before it says that its server
is away, and print two lines of links to standard output for every trial."""

_LONGEST_PARAM = 500
_LONGEST_TAG = 5000
_MOST_PARAMS = 100
_PAGE = 1000


@dataclass
class _Run:
    """A run: the last step it has curves up to, what it was given as parameters, and whether it has ended."""

    run_id: str
    last_step: int = -1
    params: dict[str, str] = field(default_factory=dict)
    is_over: bool = False


class MlflowLog:
    """Logs trials to MLflow: configs as parameters, reports as metrics by epoch, what comes of them as tags.

    Ray's callback connects, makes the experiment and the runs, and ends them. A report is one request here,
    where Ray's would make one for every metric. Runs of an earlier driver of the sweep are found by their tag
    and gone on with: steps that they have are not sent again.

    Args:
        options: what `run.loggers` says.
        directory: the run directory.
        sweep_name: names the experiment where the options do not.
        metric: the sweep's metric, by which a trial's best report is chosen.
        mode: whether the smallest or the largest is best.

    Building it raises what keeps MLflow from answering.
    """

    def __init__(
        self,
        options: LoggerConfig,
        directory: RunDirectory,
        sweep_name: str,
        metric: str,
        mode: Literal["min", "max"],
    ) -> None:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        self._directory, self._metric, self._mode = directory, metric, mode
        self._sweep = sweep_id(directory)
        self._callback: Any = MLflowLoggerCallback(
            tracking_uri=options.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"),
            experiment_name=options.experiment_name or sweep_name,
            tags={**options.tags, SWEEP_TAG: self._sweep},
        )
        self._callback.setup()  # type: ignore[no-untyped-call]
        self._client: MlflowClient = self._callback.mlflow_util._get_client()
        self._runs = dict(self._find_runs())

    def _find_runs(self) -> Mapping[str, _Run]:
        """Return the runs of this sweep's trials that MLflow has, by trial."""
        found, token = dict[str, _Run](), None
        where = [self._callback.mlflow_util.experiment_id], f"tags.`{SWEEP_TAG}` = '{self._sweep}'"
        while True:
            page = self._client.search_runs(*where, max_results=_PAGE, page_token=token)
            for known in page:
                found[known.data.tags["trial_name"]] = _Run(
                    known.info.run_id,
                    params=dict(known.data.params),
                    is_over=known.info.status in ("FINISHED", "FAILED"),
                )
            if not (token := page.token):
                break
        for run in found.values():
            if not run.is_over:
                steps = [metric.step for metric in self._client.get_metric_history(run.run_id, "epoch")]
                run.last_step = max(steps, default=-1)
        return found

    def take(self, record: TrialRecord, event: Event) -> None:
        """Send what an event says; raises what keeps MLflow from taking it."""
        trial = replace(logged_trial(self._directory, record), config={})  # parameters are sent all at once
        run = self._runs.get(record.trial_id)
        if run is not None and run.is_over:
            return
        if isinstance(event, Started):
            self._begin(record, trial, event)
        elif run is None:  # it failed before it had its resources
            if record.state.is_final:
                self._begin(record, trial, event)
                self._end(record, trial, event)
        elif isinstance(event, Planned | Rescued) and record.plan is not None:
            plan = record.plan
            names = ("device", "effective_batch_size", "microbatch_size", "accumulation_steps")
            self._tag(run, {name: getattr(plan, name) for name in names} | {"state": record.state})
        elif isinstance(event, Reported):
            step = step_of(record)
            if step > run.last_step:  # what it has of a trial that was set back to a checkpoint stays
                values = {**record.last, "peak_memory_bytes": float(event.peak_memory_bytes)}
                self._send(run, values, step, event.time)
                run.last_step = step
        elif isinstance(event, Interrupted):
            self._tag(run, {"state": record.state, "interrupted": event.reason})
        elif record.state.is_final:
            self._end(record, trial, event)

    def close(self) -> None:
        """Note of the runs that have not ended that nobody goes on with them."""
        for run in self._runs.values():
            if not run.is_over:
                self._callback.mlflow_util.end_run(run_id=run.run_id, status="KILLED")

    def _begin(self, record: TrialRecord, trial: LoggedTrial, event: Event) -> None:
        """Begin the trial's run, or go on with it; a parameter is never changed, which MLflow refuses."""
        name, run = record.trial_id, self._runs.get(record.trial_id)
        if run is None:
            self._callback.log_trial_start(trial)
            run = self._runs[name] = _Run(self._callback._trial_runs[trial])
        else:
            self._callback._trial_runs[trial] = run.run_id
            self._client.update_run(run.run_id, status="RUNNING")
        config = logged_trial(self._directory, record).config
        texts = {as_name(key): as_text(value)[:_LONGEST_PARAM] for key, value in config.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in run.params]
        changed = {f"changed.{key}": text for key, text in texts.items() if run.params.get(key, text) != text}
        for start in range(0, len(new), _MOST_PARAMS):
            self._client.log_batch(run.run_id, params=new[start : start + _MOST_PARAMS])
        run.params |= {param.key: param.value for param in new}
        tags: dict[str, Any] = {"state": record.state, **changed}
        if isinstance(event, Started) and event.cloned_from:
            tags["cloned_from"] = event.cloned_from
        self._tag(run, tags)

    def _end(self, record: TrialRecord, trial: LoggedTrial, event: Event) -> None:
        run = self._runs[record.trial_id]
        ends = last_and_best(record, self._metric, self._mode)
        if ends:
            self._send(run, ends, step_of(record), event.time)
        tags = {"state": record.state, "reason": record.reason, "error": record.error}
        self._tag(run, {name: value for name, value in tags.items() if value})
        self._callback._trial_runs.setdefault(trial, run.run_id)
        self._callback.log_trial_end(trial, failed=isinstance(event, Failed))
        run.is_over = True

    def _send(self, run: _Run, values: Mapping[str, float], step: int, seconds: float) -> None:
        milliseconds = round(1000 * seconds)
        metrics = [Metric(as_name(key), value, milliseconds, step) for key, value in values.items()]
        self._client.log_batch(run.run_id, metrics=metrics)

    def _tag(self, run: _Run, tags: Mapping[str, Any]) -> None:
        texts = [RunTag(as_name(key), str(value)[:_LONGEST_TAG]) for key, value in tags.items()]
        self._client.log_batch(run.run_id, tags=texts)
