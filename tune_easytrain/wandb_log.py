"""`WandbLog`: every trial as a run of Weights & Biases', through Ray's own callback."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ray
import wandb
from ray.air.integrations.wandb import WandbLoggerCallback, _WandbLoggingActor

from tune_easytrain.events import Event, Failed, Reported, Started
from tune_easytrain.logger_config import LoggerConfig
from tune_easytrain.ray_logger_trial import LoggedTrial, logged_trial
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord, last_and_best, step_of

_UPLOAD_SECONDS = 45
"""How long the end of a sweep waits for what is still on its way; it is on the disk in any case."""

_EXIT_CODE = "tune_easytrain_exit_code"


class _Wandb:
    """The module as Ray's actor uses it, with the exit code that the run is to end with."""

    def __init__(self) -> None:
        self.exit_code = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(wandb, name)

    def finish(self) -> None:
        """End the run, as failed if it has."""
        wandb.finish(exit_code=self.exit_code)


class _LoggingActor(_WandbLoggingActor):
    """Ray's actor of one run, which by itself ends every run as a success."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._wandb: Any = _Wandb()

    def _handle_result(self, result: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        self._wandb.exit_code = result.pop(_EXIT_CODE, 0)
        log, config = super()._handle_result(result)
        return log, config


class _Callback(WandbLoggerCallback):
    _logger_actor_cls = _LoggingActor


class WandbLog:
    """Logs trials to W&B: configs, reports by epoch, and what becomes of them.

    Ray's callback starts an actor for every run, since W&B wants a process for each. The run of a trial that
    goes on after a resume has the same id.

    Args:
        options: what `run.loggers` says.
        directory: the run directory; W&B's own files go to its folder `wandb`.
        sweep_name: names the project where neither the options nor the environment do.
        metric: the sweep's metric, by which a trial's best report is chosen.
        mode: whether the smallest or the largest is best.

    Building it raises ValueError where there is no key to log in with.
    """

    def __init__(
        self,
        options: LoggerConfig,
        directory: RunDirectory,
        sweep_name: str,
        metric: str,
        mode: Literal["min", "max"],
    ) -> None:
        self._directory, self._metric, self._mode = directory, metric, mode
        wandb_mode = options.mode or os.environ.get("WANDB_MODE") or "online"
        given: dict[str, Any] = {"resume": "allow", "mode": wandb_mode}
        if options.entity is not None:
            given["entity"] = options.entity
        if url := os.environ.get("WANDB_BASE_URL"):  # of all variables Ray's actors are given the key alone
            given["settings"] = {"base_url": url}
        self._callback: Any = _Callback(
            project=options.project or os.environ.get("WANDB_PROJECT") or sweep_name,
            group=options.group,
            upload_timeout=_UPLOAD_SECONDS,
            **given,
        )
        with _variable("WANDB_MODE", wandb_mode):  # Ray asks for a key unless it says offline
            self._callback.setup()  # type: ignore[no-untyped-call]

    def take(self, record: TrialRecord, event: Event) -> None:
        """Hand an event to the trial's actor; raises what that has ended with, if it has."""
        trial = logged_trial(self._directory, record)
        self._require_alive(trial)
        if isinstance(event, Started):
            Path(trial.local_path).mkdir(parents=True, exist_ok=True)
            self._callback.log_trial_start(trial)
            self._log(trial, record, {})
        elif trial not in self._callback._trial_logging_actors:
            if record.state.is_final:  # it failed before it had its resources, or W&B has
                Path(trial.local_path).mkdir(parents=True, exist_ok=True)
                self._end(trial, record, event)
        elif isinstance(event, Reported):
            peak = float(event.peak_memory_bytes)
            self._log(trial, record, {**record.last, "peak_memory_bytes": peak})
        elif record.state.is_final:
            self._end(trial, record, event)

    def close(self) -> None:
        """Wait a while until every run is sent, or written where it is to be offline."""
        for trial in list(self._callback._trial_logging_actors):
            self._callback._signal_logging_actor_stop(trial)
        self._callback.on_experiment_end([])

    def _end(self, trial: LoggedTrial, record: TrialRecord, event: Event) -> None:
        ends: dict[str, Any] = dict(last_and_best(record, self._metric, self._mode))
        if isinstance(event, Failed):
            ends[_EXIT_CODE] = 1
        self._log(trial, record, ends)
        self._callback.log_trial_end(trial, failed=isinstance(event, Failed))

    def _log(self, trial: LoggedTrial, record: TrialRecord, values: Mapping[str, Any]) -> None:
        config: dict[str, Any] = dict(trial.config) | {"state": record.state.value, "error": record.error}
        if record.plan is not None:
            plan = record.plan
            config |= {
                "device": plan.device,
                "effective_batch_size": plan.effective_batch_size,
                "microbatch_size": plan.microbatch_size,
                "accumulation_steps": plan.accumulation_steps,
            }
        result = dict(values) | {"config": config}
        if record.reports:
            result["training_iteration"] = step_of(record)
        self._callback.log_trial_result(0, trial, result)

    def _require_alive(self, trial: LoggedTrial) -> None:
        """Raise what the trial's actor has ended with before it was told to; the next one begins anew."""
        future = self._callback._trial_logging_futures.get(trial)
        if future is None or not ray.wait([future], timeout=0)[0]:
            return
        self._callback._logging_future_to_trial.pop(future)
        self._callback._cleanup_logging_actor(trial)
        ray.get(future)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
