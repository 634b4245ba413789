"""The recorder: the driver's one writer of trial events, and Ray's callback that feeds it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import ray
from ray import tune

from tune_easytrain.events import Event, Failed, Finished, Stopped, TrainingEnded, append_events
from tune_easytrain.mirror import Mirror
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.sweep_trial import TRAINING_ENDED
from tune_easytrain.trial_record import TrialRecord

_DRAIN_INTERVAL_SECONDS = 0.25
_LAST_EVENTS_SECONDS = 5.0
"""How long a trial that is over may have events on their way: they and Ray's result go different ways."""

Watch = Callable[[TrialRecord, Event], None]


class SweepRecorder:
    """Writes events to the trials' files and keeps the trials' records up to date.

    Args:
        directory: the run directory.
        records: what is known of the trials so far, by id; ended ones are not touched any more.
        watch: told of every event, with the trial as it then stands.
        on_failure: told of every trial that ended with an error of Ray's.
        on_step: given all of Ray's trials, time and again; what it raises ends the sweep.
        mirror: uploads the files, where the run directory is in an object store.
    """

    def __init__(
        self,
        directory: RunDirectory,
        records: Mapping[str, TrialRecord],
        watch: Watch | None = None,
        on_failure: Callable[[str], object] | None = None,
        on_step: Callable[[Sequence[Any]], object] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self._directory = directory
        self._records = dict(records)
        self._ended = {trial_id for trial_id, record in records.items() if record.state.is_final}
        self._reasons: dict[str, str] = {}
        self._watch = watch
        self._on_failure = on_failure
        self._on_step = on_step
        self._mirror = mirror
        self._hub: Any = None
        self._last_drain = 0.0
        self._over: dict[str, tuple[float, bool]] = {}  # when it was, and whether training had ended

    def record(self, trial_id: str, *events: Event) -> None:
        """Write events of a trial, up to the one that ends it."""
        written = []
        record = self._records.setdefault(trial_id, TrialRecord(trial_id))
        for event in events:
            if trial_id in self._ended:
                break
            written.append(event)
            record.add(event)
            if record.state.is_final:
                self._ended.add(trial_id)
            if self._watch is not None:
                self._watch(record, event)
        if not written:
            return
        append_events(self._directory.trial_path(trial_id), written)
        if self._mirror is not None:
            self._mirror.note(trial_id, is_urgent=record.state.is_final)

    def listen_to(self, hub: Any) -> None:
        """Take the events that workers tell the sweep's actor from now on."""
        self._hub = hub

    def step(self, trials: Sequence[Any]) -> None:
        """Write what workers have sent, and let the sweep look at how its trials stand."""
        self.drain()
        if self._on_step is not None:
            self._on_step(trials)

    def drain(self, *, force: bool = False) -> None:
        """Write what workers have sent, and what is over; at most four times a second unless forced."""
        now = time.monotonic()
        if self._hub is None or (not force and now - self._last_drain < _DRAIN_INTERVAL_SECONDS):
            return
        self._last_drain = now
        told: dict[str, list[Event]] = {}
        for trial_id, event in ray.get(self._hub.fetch.remote()):
            told.setdefault(trial_id, []).append(event)
            if isinstance(event, TrainingEnded):
                self._reasons[trial_id] = event.reason
        for trial_id, (since, has_ended) in list(self._over.items()):
            reason = self._reasons.get(trial_id)
            if has_ended and reason is None and now - since < _LAST_EVENTS_SECONDS:
                continue
            del self._over[trial_id]
            end = Finished(reason=reason or "") if has_ended else Stopped(reason="stopped by the scheduler")
            told.setdefault(trial_id, []).append(end)
        for trial_id, events in told.items():
            self.record(trial_id, *events)

    def finish(self) -> None:
        """Write what is still on its way, at the end of the sweep."""
        deadline = time.monotonic() + _LAST_EVENTS_SECONDS
        self.drain(force=True)
        while self._over and time.monotonic() < deadline:
            time.sleep(_DRAIN_INTERVAL_SECONDS / 10)
            self.drain(force=True)

    def catch_up(self) -> None:
        """Write what workers have sent, and give the mirror, if there is one, a few seconds to upload it."""
        self.drain(force=True)
        if self._mirror is not None:
            self._mirror.flush()

    def complete(self, trial_id: str, *, has_ended: bool) -> None:
        """Note that Ray is done with a trial: its training has ended, or the scheduler stopped it.

        It is written down with the trial's last events. To fetch them for every trial by itself would be what
        the driver does most in a sweep of short ones.
        """
        self._over[trial_id] = (time.monotonic(), has_ended)

    def fail(self, trial_id: str, details: str) -> None:
        """Note that a trial ended with an error that its own process could not report."""
        if self._on_failure is not None:
            self._on_failure(trial_id)
        self.drain(force=True)
        lines = [line for line in details.strip().splitlines() if line.strip()]
        self.record(trial_id, Failed(error=lines[-1] if lines else "the worker died", details=details))


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
        self._recorder.complete(str(trial), has_ended=TRAINING_ENDED in trial.last_result)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the record of a trial that ended with an error."""
        error = trial.get_error()
        self._recorder.fail(str(trial), str(error) if error else "")
