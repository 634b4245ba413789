"""`LoggerThread`: takes what happens to trials to one tool, in a thread that nothing waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from tune_easytrain.credentials import without_users
from tune_easytrain.events import Event, load_events_between
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord

_FIRST_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 60.0
_PATIENCE_SECONDS = 60.0
_LONGEST_REASON = 300


class TrialLog(Protocol):
    """A tool that shows trials. It is built and called in one thread, and may raise anything."""

    def take(self, record: TrialRecord, event: Event) -> None:
        """Take one event, after which the trial stands as in `record`; called again where it has raised."""

    def close(self) -> None:
        """Give up what it has taken, when the sweep is over."""


class LoggerThread:
    """Gives a log every event that the run directory has, in order, and again until the log takes it.

    It reads them from the trials' files, so that however long a tool is away nothing waits in memory. What
    fails is told once and tried again with growing pauses.

    Args:
        name: the log's, as `run.loggers` has it.
        build: returns the log; called again where it has raised.
        directory: where the events come from.
        say: told in a line that the log fails, that it works again, and what it has missed.
        replays: whether the log can be told again, after a resume, of what it was told before.
        patience_seconds: how long the end of the sweep waits for a log that takes nothing.
    """

    def __init__(
        self,
        name: str,
        build: Callable[[], TrialLog],
        directory: RunDirectory,
        say: Callable[[str], object],
        *,
        replays: bool = True,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._name, self._build, self._directory, self._say = name, build, directory, say
        self._replays, self._patience_seconds = replays, patience_seconds
        self._changed = threading.Condition()
        # These belong to whoever holds the condition.
        self._due: dict[str, int] = {}
        self._is_closing = False
        self._num_taken = 0
        self._error: Exception | None = None
        self._failing = ""  # the trial that was the first to fail
        # These are the thread's own.
        self._log: TrialLog | None = None
        self._offsets: dict[str, int] = {}
        self._running: dict[str, TrialRecord] = {}
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"logger {name}")

    def start(self, records: Iterable[TrialRecord]) -> None:
        """Begin, with what the log may have missed of these trials."""
        for record in records:
            if record.has_begun:
                sizes = self._due if self._replays else self._offsets
                sizes[record.trial_id] = self._size(record.trial_id)
        self._thread.start()

    def note(self, trial_id: str) -> None:
        """Note that a trial's file has grown."""
        size = self._size(trial_id)
        with self._changed:
            self._due[trial_id] = size
            self._changed.notify_all()

    def close(self) -> None:
        """Wait until the log has taken everything, as long as it takes anything; say what it has not."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            num_before, since = self._num_taken, time.monotonic()
            while self._thread.is_alive() and time.monotonic() - since < self._patience_seconds:
                self._changed.wait(0.2)
                if self._num_taken != num_before:
                    num_before, since = self._num_taken, time.monotonic()
            num_left = len(self._due)
        if num_left:
            remedy = f"; {self._directory.resume_command} sends it" if self._replays else ""
            self._say(f"{self._name} has not taken everything of {num_left} trials{remedy}")
        elif self._thread.is_alive():
            self._say(f"{self._name} is left behind: it does not end")

    def _size(self, trial_id: str) -> int:
        return self._directory.trial_path(trial_id).stat().st_size

    def _work(self) -> None:
        pause, attempts_left = _FIRST_PAUSE_SECONDS, 2
        while True:
            with self._changed:
                while not self._due and not self._is_closing:
                    self._changed.wait()
                if self._is_closing and (not self._due or attempts_left == 0):
                    break
                trial_id, end = next(iter(self._due.items()), ("", 0))
            try:
                self._deliver(trial_id, end)
            except Exception as error:  # noqa: BLE001 -- no tool may cost a trial; it is told
                self._failed(trial_id, error)
                with self._changed:
                    self._due[trial_id] = self._due.pop(trial_id)  # the others may do better
                    attempts_left -= self._is_closing
                    self._changed.wait_for(lambda: self._is_closing, pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            pause = _FIRST_PAUSE_SECONDS
            self._succeeded(trial_id, end)
        try:
            if self._log is not None:
                self._log.close()
        except Exception as error:  # noqa: BLE001 -- as above
            self._failed("", error)
        with self._changed:
            self._changed.notify_all()

    def _deliver(self, trial_id: str, end: int) -> None:
        if self._log is None:
            self._log = self._build()
        path = self._directory.trial_path(trial_id)
        start = self._offsets.get(trial_id, 0)
        record = self._running.pop(trial_id, None)
        if record is None:
            record = TrialRecord(trial_id)
            for event, _ in load_events_between(path, 0, start):
                record.add(event)
        for event, offset in load_events_between(path, start, end):
            record.add(event)
            self._log.take(record, event)
            self._offsets[trial_id] = offset
            with self._changed:
                self._num_taken += 1
        self._offsets[trial_id] = end
        if record.state.is_running:
            self._running[trial_id] = record

    def _succeeded(self, trial_id: str, end: int) -> None:
        with self._changed:
            if self._due[trial_id] == end:
                del self._due[trial_id]
            is_back = self._error is not None and self._failing == trial_id
            if is_back:
                self._error = None
        if is_back:
            self._say(f"{self._name} works again")

    def _failed(self, trial_id: str, error: Exception) -> None:
        with self._changed:
            is_news = self._error is None
            if is_news:
                self._error, self._failing = error, trial_id
        if is_news:
            self._say(
                f"{self._name} fails ({_reason(error)}): training goes on, and it is tried again "
                "from time to time"
            )


def _reason(error: Exception) -> str:
    """Return an error in one line, without what might be a secret."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = without_users(text)
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 1]}…"
