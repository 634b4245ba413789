"""The recorder: the driver's one writer of trial events, and Ray's callback that feeds it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import ray
from ray import tune

from tune_easytrain.errors import UnsavedEventsError
from tune_easytrain.events import (
    Event,
    Failed,
    Finished,
    Interrupted,
    Stopped,
    TrainingEnded,
    append_events,
)
from tune_easytrain.mirror import Mirror
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.sweep_shared import TRAINING_ENDED
from tune_easytrain.trial_record import TrialRecord, TrialState

_DRAIN_INTERVAL_SECONDS = 0.25
_LAST_EVENTS_SECONDS = 5.0
"""How long a trial that is over may have events on their way: they and Ray's result go different ways."""

_WRITE_PAUSE_SECONDS = 1.0
"""How long it is waited before a run directory that could not be written is tried again."""

_PATIENCE_SECONDS = 60.0
"""How long the end of a sweep waits for a run directory that cannot be written."""

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
        say: told in a line when the run directory cannot be written, and when it can again.
        on_write: told of every trial whose file has grown.
    """

    def __init__(
        self,
        directory: RunDirectory,
        records: Mapping[str, TrialRecord],
        watch: Watch | None = None,
        on_failure: Callable[[str], object] | None = None,
        on_step: Callable[[Sequence[Any]], object] | None = None,
        mirror: Mirror | None = None,
        say: Callable[[str], object] = lambda line: None,
        on_write: Callable[[str], object] = lambda trial_id: None,
    ) -> None:
        self._directory = directory
        self._records = dict(records)
        self._ended = {trial_id for trial_id, record in records.items() if record.state.is_final}
        self._reasons: dict[str, str] = {}
        self._watch = watch
        self._on_failure = on_failure
        self._on_step = on_step
        self._mirror = mirror
        self._say = say
        self._on_write = on_write
        self._unwritten: dict[str, list[Event]] = {}
        self._storage_error: OSError | None = None
        self._next_write = 0.0
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
        self._unwritten.setdefault(trial_id, []).extend(written)
        self.write()

    def write(self) -> None:
        """Write the events that wait for it; where the run directory takes none they go on waiting."""
        if time.monotonic() < self._next_write:
            return
        try:
            for trial_id in list(self._unwritten):
                append_events(self._directory.trial_path(trial_id), self._unwritten[trial_id])
                del self._unwritten[trial_id]
                if self._mirror is not None:
                    self._mirror.note(trial_id, is_urgent=self._records[trial_id].state.is_final)
                self._on_write(trial_id)
        except OSError as error:
            if self._storage_error is None:
                self._say(
                    f"Cannot write to {self._directory.path} ({error.strerror or error}): "
                    "events wait in memory until it can be written again"
                )
            self._storage_error = error
            self._next_write = time.monotonic() + _WRITE_PAUSE_SECONDS
            return
        if self._storage_error is not None:
            self._say(f"{self._directory.path} can be written again")
        self._storage_error = None

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
        self.write()

    def finish(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        """Write what is still on its way at the end of the sweep, and which trials that has interrupted.

        Raises UnsavedEventsError, with a folder that has them, for events that the run directory has not
        taken in that time.
        """
        deadline = time.monotonic() + _LAST_EVENTS_SECONDS
        self.drain(force=True)
        while self._over and time.monotonic() < deadline:
            time.sleep(_DRAIN_INTERVAL_SECONDS / 10)
            self.drain(force=True)
        self.interrupt_running("the sweep was interrupted")
        deadline = time.monotonic() + patience_seconds
        while self._storage_error is not None and time.monotonic() < deadline:
            time.sleep(_WRITE_PAUSE_SECONDS)
            self.write()
        if self._storage_error is not None:
            folder = Path(tempfile.mkdtemp(prefix=f"{self._directory.path.name}_unsaved_"))
            for trial_id, events in self._unwritten.items():
                append_events(folder / self._directory.trial_path(trial_id).name, events)
            raise UnsavedEventsError(
                str(self._directory.trials_dir), str(folder), self._storage_error.strerror or ""
            )

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

    def interrupt(self, trial_id: str, details: str) -> None:
        """Note that a trial was ended by a fault that is not its own, and will be tried again."""
        self._take_last_events(trial_id)
        if self._records[trial_id].state is not TrialState.INTERRUPTED:
            self.record(trial_id, Interrupted(reason=_last_line(details), details=details))

    def fail(self, trial_id: str, details: str) -> None:
        """Note that a trial was ended by a fault that is not its own, and will not be tried again."""
        self._take_last_events(trial_id)
        record = self._records[trial_id]
        is_told = record.state is TrialState.INTERRUPTED
        error = record.reason if is_told else _last_line(details)
        if record.num_failures:
            error += f" (failure {record.num_failures + (not is_told)}; see trial.max_failures)"
        self.record(trial_id, Failed(error=error, details=details))

    def interrupt_running(self, reason: str) -> None:
        """Note of every trial that counts as running that it does not any more, through no fault."""
        for trial_id in [name for name, record in self._records.items() if record.state.is_running]:
            self.record(trial_id, Interrupted(reason=reason, is_failure=False))

    def num_to_wait_for(self) -> int:
        """Return how many trials are about to store a checkpoint when they are told to end."""
        return sum(
            record.state.is_running and (record.plan is None or record.plan.num_workers == 1)
            for record in self._records.values()
        )

    def _take_last_events(self, trial_id: str) -> None:
        """Take the events of a trial whose process is gone, and let others probe in its place."""
        if self._on_failure is not None:
            self._on_failure(trial_id)
        self.drain(force=True)
        self._records.setdefault(trial_id, TrialRecord(trial_id))


def _last_line(details: str) -> str:
    lines = [line.strip() for line in details.splitlines() if line.strip()]
    return lines[-1] if lines else "the trial's process is gone"


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

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial has lost its process and will get another one."""
        self._recorder.interrupt(str(trial), _last_error(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Close the record of a trial that ended with an error."""
        self._recorder.fail(str(trial), _last_error(trial))


def _last_error(trial: Any) -> str:
    """Return what Ray Tune has written down of a trial's last failure, on this machine."""
    try:
        text = Path(trial.error_file or "").read_text()
    except OSError:
        return ""
    _, _, last = text.rpartition("Failure # ")
    return last.partition("\n")[2].strip()
