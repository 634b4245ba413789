"""`LiveRun`: a sweep that is followed while it runs, reading what its trials' files have gained."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pandas as pd

from tune_easytrain.columns import Mode
from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.events import Event, Started, load_events, parse_events
from tune_easytrain.results import SweepResults, Where
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord

_REFRESH_SECONDS = 0.4
"""Between two looks into an object store: two listings each, and a request for every changed file."""

_REFRESH_AFTER_ERROR_SECONDS = 5.0
_UNASKED_SECONDS = 30.0
"""How long an object store is looked into when nobody asks any more."""

_YEAR_10000 = 253402300800.0
"""Times from here on are no dates."""


@dataclass(frozen=True, slots=True)
class TrialSpan:
    """When a trial ran, in seconds since the epoch; None for what has not happened.

    Attributes:
        started_at: when it first had its resources.
        ended_at: when it finished, failed or was stopped.
        last_event_at: the latest time that any of its events has.
        busy_seconds: how long it has had resources, up to its latest event.
    """

    started_at: float | None = None
    ended_at: float | None = None
    last_event_at: float | None = None
    busy_seconds: float = 0.0

    def extended(self, event: Event, *, had_resources: bool, is_final: bool) -> TrialSpan:
        """Return the span with one more event; clocks of other machines never make time run backwards."""
        if not 0 <= event.time < _YEAR_10000:
            return self
        last = event.time if self.last_event_at is None else max(event.time, self.last_event_at)
        busy = self.busy_seconds
        is_start = isinstance(event, Started)  # what lies before it is the time without a driver
        if had_resources and not is_start and self.last_event_at is not None:
            busy += last - self.last_event_at
        ended_at = (self.ended_at or last) if is_final else None
        started_at = event.time if is_start and self.started_at is None else self.started_at
        return TrialSpan(started_at, ended_at, last, busy)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A trial as far as its file was read; never mutated, so that readers need no lock.

    Attributes:
        stamp: how the file stood when it was last looked at.
        position: the byte behind the last event that was taken; `checksum` is that of all before.
        revision: the run's when the trial last changed.
    """

    record: TrialRecord
    span: TrialSpan = TrialSpan()
    stamp: tuple[int, ...] = ()
    position: int = 0
    checksum: int = 0
    revision: int = 0

    def read_on(self, path: Path, revision: int) -> _Trial:
        """Return the trial with what its file has gained; read anew where the file holds something else."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(status.st_size)
        known, view = self, memoryview(content)
        if len(content) < self.position or crc32(view[: self.position]) != self.checksum:
            known = _Trial(TrialRecord(self.record.trial_id), revision=revision)
        record = replace(known.record, reported=list(known.record.reported))
        span, position = known.span, known.position
        for event, num_bytes in parse_events(content[known.position :]):
            had_resources = record.state.is_running
            record.add(event)
            span = span.extended(event, had_resources=had_resources, is_final=record.state.is_final)
            position = known.position + num_bytes
        if position == known.position:
            return replace(known, stamp=_stamp(status))
        checksum = crc32(view[known.position : position], known.checksum)
        return _Trial(record, span, _stamp(status), position, checksum, revision)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """Return what differs where a file has changed."""
    return status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class _Reading:
    """All that one poll has found; put in place as a whole."""

    revision: int = 0
    trials: dict[str, _Trial] = field(default_factory=dict)
    problem: str = ""


class LiveRun(SweepResults):
    """A sweep that is followed: its trials as they stand, read on from where the last reading ended.

    Any thread may call anything here. Nobody waits for a reading of another thread but the first one, and
    nobody at all for an object store, which a thread of its own looks into while there are polls.

    Raises RunDirectoryError where the stored sweep is damaged.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._sweep: dict[str, Any] | None = None
        super().__init__(directory)
        self.name = directory.name
        self._declared = super().declared_values()
        self._fetcher = _Fetcher(directory) if directory.is_followed else None
        self._frame: tuple[tuple[int, str, Mode | None] | None, pd.DataFrame | None] = (None, None)
        self._polling = threading.Lock()
        self._reading = _Reading()  # replaced by who holds the lock, read by everybody
        self._polled_at = float("-inf")

    @property
    def revision(self) -> int:
        """A number that grows whenever anything that is shown has changed; 0 before the first poll."""
        return self._reading.revision

    @property
    def problem(self) -> str:
        """Why the last poll failed, empty if it did not; what was read before stays."""
        return self._reading.problem

    def poll(self, max_age_seconds: float = 0.3) -> int:
        """Read what is new, unless that was just done or is being done; return the revision. Never raises."""
        if self._fetcher is not None:
            self._fetcher.ask()
        if self._is_recent(max_age_seconds) or not self._polling.acquire(blocking=self.revision == 0):
            return self.revision
        try:
            if not self._is_recent(max_age_seconds):
                self._reading = self._read()
                self._polled_at = time.monotonic()
        finally:
            self._polling.release()
        return self.revision

    def _is_recent(self, max_age_seconds: float) -> bool:
        return time.monotonic() - self._polled_at < max_age_seconds

    def _read(self) -> _Reading:
        before = self._reading
        revision = before.revision + 1
        problem = "" if self._fetcher is None else self._fetcher.problem
        trials: dict[str, _Trial] = {}
        try:
            for trial_id, status in self._directory.trial_files().items():
                trial = before.trials.get(trial_id) or _Trial(TrialRecord(trial_id), revision=revision)
                if trial.stamp != _stamp(status):
                    try:
                        trial = trial.read_on(self._directory.trial_path(trial_id), revision)
                    except OSError as error:
                        problem = problem or _cannot_read(error)
                trials[trial_id] = trial
        except OSError as error:
            trials, problem = before.trials, problem or _cannot_read(error)
        has_changed = (
            before.revision == 0
            or problem != before.problem
            or trials.keys() != before.trials.keys()
            or any(trial.revision == revision for trial in trials.values())
        )
        return _Reading(revision if has_changed else before.revision, trials, problem)

    def _trials(self) -> dict[str, _Trial]:
        if self.revision == 0:
            self.poll()
        return self._reading.trials

    def records(self) -> list[TrialRecord]:
        """Return every trial as of the last poll, in the sweep's order; they are never mutated."""
        return [trial.record for trial in self._trials().values()]

    def record(self, trial_id: str) -> TrialRecord | None:
        """Return one trial as of the last poll; None where there is none of that id."""
        trial = self._trials().get(trial_id)
        return None if trial is None else trial.record

    def changed_since(self, revision: int) -> list[str]:
        """Return the ids of the trials that changed after that revision, in the sweep's order."""
        return [trial_id for trial_id, trial in self._trials().items() if trial.revision > revision]

    def span(self, trial_id: str) -> TrialSpan:
        """Return when a trial ran, as of the last poll; an empty span where there is none of that id."""
        trial = self._trials().get(trial_id)
        return TrialSpan() if trial is None else trial.span

    def events(self, trial_id: str) -> list[Event]:
        """Return all events of a trial, from its file; none where there is no trial of that id.

        Raises RunDirectoryError where the file cannot be read.
        """
        if trial_id not in self._trials():
            return []
        try:
            return list(load_events(self._directory.trial_path(trial_id)))
        except OSError as error:
            raise RunDirectoryError(_cannot_read(error)) from None

    def sweep(self) -> dict[str, Any]:
        """Return the sweep as it was run, as it stood at the first call."""
        if self._sweep is None:
            self._sweep = super().sweep()
        return self._sweep

    def frame(
        self,
        *,
        where: Where = None,
        sort: str | None = None,
        metric: str | None = None,
        mode: Mode | None = None,
    ) -> pd.DataFrame:
        """Return the frame as of the last poll; that of all trials is kept until one changes."""
        if where is not None or sort is not None:
            return super().frame(where=where, sort=sort, metric=metric, mode=mode)
        asked = (self._reading.revision, metric or self.metric, mode)
        known, frame = self._frame
        if frame is None or known != asked:
            frame = super().frame(metric=metric, mode=mode)
            self._frame = asked, frame
        return frame.copy(deep=False)

    def declared_values(self) -> dict[str, list[Any]]:
        """Return every dotted config key of the sweep, grid keys first, with the values its file gives it."""
        return self._declared


def _cannot_read(error: OSError) -> str:
    return f"cannot read {error.filename}: {error.strerror or error}"


class _Fetcher:
    """Keeps the copy of a run directory up to date with its store, in a thread that ends when unasked."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self.problem = ""
        self._lock = threading.Lock()
        # These belong to whoever holds the lock.
        self._asked_at = 0.0
        self._is_running = False

    def ask(self) -> None:
        """Have the copy kept up to date from now on, for a while."""
        with self._lock:
            self._asked_at = time.monotonic()
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._work, daemon=True, name=f"fetch {self._directory.name}").start()

    def _work(self) -> None:
        try:
            while self._is_asked():
                pause = _REFRESH_SECONDS
                try:
                    self._directory.refresh(interval_seconds=0)
                    self.problem = ""
                except (BadInputError, OSError) as error:
                    self.problem, pause = str(error), _REFRESH_AFTER_ERROR_SECONDS
                time.sleep(pause)
        except BaseException:
            with self._lock:
                self._is_running = False
            raise

    def _is_asked(self) -> bool:
        with self._lock:
            self._is_running = time.monotonic() - self._asked_at < _UNASKED_SECONDS
            return self._is_running
