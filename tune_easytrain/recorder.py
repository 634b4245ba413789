"""The recorder: the driver's one writer of trial events, and Ray's callback that feeds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ray import tune
from ray.util.queue import Queue

from tune_easytrain.events import Event, Failed, Finished, Stopped, TrainingEnded, append_events
from tune_easytrain.mirror import Mirror
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord

_DRAIN_INTERVAL_SECONDS = 0.1

Watch = Callable[[TrialRecord, Event], None]


class SweepRecorder:
    """Writes events to the trials' files and keeps the trials' records up to date.

    Args:
        directory: the run directory.
        records: what is known of the trials so far, by id; ended ones are not touched any more.
        watch: told of every event, with the trial as it then stands.
        on_end: told of every trial that Ray is done with, in whatever way it ended.
        on_step: given all of Ray's trials, time and again; what it raises ends the sweep.
        mirror: uploads the files, where the run directory is in an object store.
    """

    def __init__(
        self,
        directory: RunDirectory,
        records: Mapping[str, TrialRecord],
        watch: Watch | None = None,
        on_end: Callable[[str], object] | None = None,
        on_step: Callable[[Sequence[Any]], object] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self._directory = directory
        self._records = dict(records)
        self._ended = {trial_id for trial_id, record in records.items() if record.state.is_final}
        self._reasons: dict[str, str] = {}
        self._watch = watch
        self._on_end = on_end
        self._on_step = on_step
        self._mirror = mirror
        self._queue: Queue | None = None
        self._last_drain = 0.0

    def record(self, trial_id: str, event: Event) -> None:
        """Write one event, unless the trial has ended."""
        if trial_id in self._ended:
            return
        append_events(self._directory.trial_path(trial_id), [event])
        record = self._records.setdefault(trial_id, TrialRecord(trial_id))
        record.add(event)
        if isinstance(event, TrainingEnded):
            self._reasons[trial_id] = event.reason
        if record.state.is_final:
            self._ended.add(trial_id)
        if self._mirror is not None:
            self._mirror.note(trial_id, is_urgent=record.state.is_final)
        if self._watch is not None:
            self._watch(record, event)

    def listen_to(self, queue: Queue) -> None:
        """Take the events that workers put into `queue` from now on."""
        self._queue = queue

    def step(self, trials: Sequence[Any]) -> None:
        """Write what workers have sent, and let the sweep look at how its trials stand."""
        self.drain()
        if self._on_step is not None:
            self._on_step(trials)

    def drain(self, *, force: bool = False) -> None:
        """Write what workers have sent; at most ten times a second unless forced."""
        now = time.monotonic()
        if self._queue is None or (not force and now - self._last_drain < _DRAIN_INTERVAL_SECONDS):
            return
        self._last_drain = now
        num_waiting = self._queue.qsize()
        if num_waiting:
            for trial_id, event in self._queue.get_nowait_batch(num_waiting):
                self.record(trial_id, event)

    def catch_up(self) -> None:
        """Write what workers have sent, and give the mirror, if there is one, a few seconds to upload it."""
        if self._mirror is not None:
            self.drain(force=True)
            self._mirror.flush()

    def complete(self, trial_id: str) -> None:
        """Note that Ray is done with a trial: it finished, or the scheduler stopped it."""
        self._end(trial_id)
        reason = self._reasons.get(trial_id)
        if reason is None:
            self.record(trial_id, Stopped(reason="stopped by the scheduler"))
        else:
            self.record(trial_id, Finished(reason=reason))

    def fail(self, trial_id: str, details: str) -> None:
        """Note that a trial ended with an error that its own process could not report."""
        self._end(trial_id)
        lines = [line for line in details.strip().splitlines() if line.strip()]
        self.record(trial_id, Failed(error=lines[-1] if lines else "the worker died", details=details))

    def _end(self, trial_id: str) -> None:
        if self._on_end is not None:
            self._on_end(trial_id)
        self.drain(force=True)


class SweepCallback(tune.Callback):
    """Ray Tune's callback of one sweep. Ray pickles it, so it only names its recorder."""

    recorders: ClassVar[dict[str, SweepRecorder]] = {}
    """The recorders of the sweeps that this process drives, by the key of the run directory."""

    def __init__(self, key: str) -> None:
        self._key = key

    @property
    def _recorder(self) -> SweepRecorder:
        return self.recorders[self._key]

    def get_state(self) -> None:
        """Have the events stored before the state that Ray is about to store; there is none of its own.

        Ray's state would otherwise know of trials that ended, and of checkpoints, which the events do not.
        """
        self._recorder.catch_up()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Write what has come in."""
        self._recorder.step(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the trial's record."""
        self._recorder.complete(str(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the record of a trial that ended with an error."""
        error = trial.get_error()
        self._recorder.fail(str(trial), str(error) if error else "")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Write what is left."""
        self._recorder.drain(force=True)
