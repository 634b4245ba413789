"""The thread of a logger with real files of events, and logs that do as they like."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tune_easytrain import logger_thread
from tune_easytrain.events import Created, Event, Finished, Reported, Started, append_events, load_events
from tune_easytrain.logger_thread import LoggerThread
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord

A, B = "trial_00000", "trial_00001"
STARTED, END = Started(config={}), Finished(reason="done")


def epoch(number: int) -> Reported:
    return Reported(metrics={"epoch": number}, peak_memory_bytes=0)


class Listing:
    """A log that keeps what it takes, and refuses what it is told to."""

    def __init__(self, refuses: Callable[[str, Event], bool] = lambda trial, event: False) -> None:
        self.taken: list[tuple[str, Event]] = []
        self.lengths: list[int] = []
        self.refuses = refuses
        self.is_closed = False

    def take(self, record: TrialRecord, event: Event) -> None:
        if self.refuses(record.trial_id, event):
            raise ConnectionError("no answer from https://me:hunter2@host/api\nat all")
        self.taken.append((record.trial_id, event))
        self.lengths.append(len(record.reports))

    def close(self) -> None:
        self.is_closed = True

    def of(self, trial: str) -> list[Event]:
        return [event for name, event in self.taken if name == trial]


class Sweep:
    def __init__(self, folder: Path) -> None:
        self.directory = RunDirectory.create(folder, "demo")
        self.said: list[str] = []
        for name in (A, B):
            append_events(self.directory.trial_path(name), [Created(config={})])

    def thread(self, build: Callable[[], Listing], **options: bool | float) -> LoggerThread:
        thread = LoggerThread("listing", build, self.directory, self.said.append, **options)  # type: ignore[arg-type]
        thread.start(
            TrialRecord.from_events(name, load_events(self.directory.trial_path(name))) for name in (A, B)
        )
        return thread

    def happen(self, thread: LoggerThread | None, trial: str, *events: Event) -> None:
        append_events(self.directory.trial_path(trial), events)
        if thread is not None:
            thread.note(trial)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(logger_thread, "_FIRST_PAUSE_SECONDS", 0.01)
    return Sweep(tmp_path)


def test_every_event_arrives_once_in_its_trials_order_with_the_trial_as_it_then_stood(sweep: Sweep) -> None:
    log = Listing()
    thread = sweep.thread(lambda: log)
    for number in range(1, 20):
        sweep.happen(thread, A, *([STARTED] if number == 1 else []), epoch(number))
        sweep.happen(thread, B, STARTED, epoch(1))
    sweep.happen(thread, A, END)
    thread.close()
    assert log.of(A)[1:] == [
        STARTED,
        *(epoch_of for epoch_of in log.of(A) if isinstance(epoch_of, Reported)),
        END,
    ]
    for name in (A, B):
        assert log.of(name) == list(load_events(sweep.directory.trial_path(name)))
    reports = [length for (name, event), length in zip(log.taken, log.lengths, strict=True)
               if name == A and isinstance(event, Reported)]  # fmt: skip
    assert reports == list(range(1, 20))
    assert log.is_closed
    assert sweep.said == []


def test_what_fails_is_told_once_and_tried_again_until_it_is_taken(sweep: Sweep) -> None:
    is_away = threading.Event()
    is_away.set()
    num_refused = 0

    def refuses(trial: str, event: Event) -> bool:
        nonlocal num_refused
        num_refused += is_away.is_set()
        if num_refused > 5:
            is_away.clear()
        return is_away.is_set()

    log = Listing(refuses)
    thread = sweep.thread(lambda: log)
    sweep.happen(thread, A, STARTED, epoch(1), END)
    thread._thread.join(0.5)
    thread.close()
    assert log.of(A) == list(load_events(sweep.directory.trial_path(A)))
    assert sweep.said == [
        "listing fails (no answer from https://***@host/api at all): training goes on, and it is tried "
        "again from time to time",
        "listing works again",
    ]


def test_one_trial_that_is_never_taken_does_not_keep_the_others_back(sweep: Sweep) -> None:
    log = Listing(lambda trial, event: trial == A)
    thread = sweep.thread(lambda: log)
    sweep.happen(thread, A, STARTED)
    sweep.happen(thread, B, STARTED, epoch(1), END)
    thread.close()
    assert log.of(B) == list(load_events(sweep.directory.trial_path(B)))
    assert len(sweep.said) == 2
    assert sweep.said[1].startswith("listing has not taken everything of 1 trials; tune-easytrain resume ")


def test_a_log_that_does_not_answer_is_left_behind(sweep: Sweep) -> None:
    answer = threading.Event()
    log = Listing(lambda trial, event: not answer.wait(60))
    thread = sweep.thread(lambda: log, patience_seconds=0.3)
    sweep.happen(thread, A, STARTED)
    thread.close()
    answer.set()
    (line,) = sweep.said
    assert line.startswith("listing has not taken everything of 1 trials")


@pytest.mark.parametrize("replays", [True, False])
def test_after_a_resume_a_log_is_told_what_it_may_have_missed_or_only_what_is_new(
    sweep: Sweep, replays: bool
) -> None:
    sweep.happen(None, A, STARTED, epoch(1))
    log = Listing()
    thread = sweep.thread(lambda: log, replays=replays)
    sweep.happen(thread, A, epoch(2))
    thread.close()
    found = [event.kind for event in log.of(A)]
    assert found == (["created", "started", "reported", "reported"] if replays else ["reported"])
    assert log.lengths[-1] == 2  # it knows the trial as a whole all the same
