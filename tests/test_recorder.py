"""The recorder with a real run directory; `tests/integration` has it on a real Ray."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tune_easytrain.errors import UnsavedEventsError
from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Finished,
    Interrupted,
    Planned,
    Reported,
    Started,
    append_events,
    load_events,
)
from tune_easytrain.recorder import SweepRecorder
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import TrialRecord, TrialState

A, B = "trial_00000", "trial_00001"
STARTED = Started(config={"hp": {"x": 1}})
PLANNED = Planned(
    device="cpu",
    budget_bytes=9,
    effective_batch_size=8,
    microbatch_size=4,
    accumulation_steps=2,
    num_workers=1,
)


def epoch(number: int) -> Reported:
    return Reported(metrics={"epoch": number}, peak_memory_bytes=0)


class Sweep:
    """A recorder of two trials, what it said, and what it told of the trials."""

    def __init__(self, folder: Path, known: dict[str, list[Event]] | None = None) -> None:
        known = {A: [], B: []} if known is None else known
        self.directory = RunDirectory.create(folder, "demo")
        for name, events in known.items():
            append_events(self.directory.trial_path(name), [Created(config={}), *events])
        self.said: list[str] = []
        self.watched: list[tuple[str, TrialState, str]] = []
        self.released: list[str] = []
        records = {name: TrialRecord.from_events(name, events) for name, events in known.items()}
        self.recorder = SweepRecorder(
            self.directory,
            records,
            lambda record, event: self.watched.append((record.trial_id, record.state, event.kind)),
            self.released.append,
            say=self.said.append,
        )

    def events(self, trial: str) -> list[Event]:
        return list(load_events(self.directory.trial_path(trial)))[1:]

    def record(self, trial: str) -> TrialRecord:
        return TrialRecord.from_events(trial, load_events(self.directory.trial_path(trial)))


def test_events_are_written_and_told_up_to_the_one_that_ends_the_trial(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    end = Finished(reason="done")
    sweep.recorder.record(A, STARTED, PLANNED)
    sweep.recorder.record(A, end, epoch(1))
    sweep.recorder.record(A, Failed(error="too late"))
    assert sweep.events(A) == [STARTED, PLANNED, end]
    assert sweep.watched == [
        (A, TrialState.PROBING, "started"),
        (A, TrialState.TRAINING, "planned"),
        (A, TrialState.FINISHED, "finished"),
    ]
    assert sweep.said == []


def test_trials_that_had_ended_are_not_touched(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, {A: [STARTED, Finished(reason="done")], B: [STARTED]})
    for trial in (A, B):
        sweep.recorder.record(trial, epoch(1))
    assert len(sweep.events(A)) == 2
    assert len(sweep.events(B)) == 2


def fill(disk: Path) -> Path:
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    return path


def long(number: int) -> Event:
    """An event that does not fit into what is left of a page."""
    return replace(STARTED, config={"number": number, "text": "x" * 5000})


def test_events_wait_while_the_run_directory_cannot_be_written_and_are_all_there_later(
    small_disk: Path,
) -> None:
    sweep = Sweep(small_disk)
    events: dict[str, list[Event]] = {A: [], B: []}
    filler = fill(small_disk)
    for number in range(6):
        trial = (A, B)[number % 2]
        events[trial].append(long(number))
        sweep.recorder.record(trial, events[trial][-1])
    (line,) = sweep.said
    assert line == (
        f"Cannot write to {sweep.directory.path} (No space left on device): "
        "events wait in memory until it can be written again"
    )
    assert len(sweep.watched) == 6  # the display shows them all the same
    assert sweep.events(A) == sweep.events(B) == []
    filler.unlink()
    deadline = time.monotonic() + 60
    while len(sweep.said) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        sweep.recorder.write()
    assert sweep.said[1:] == [f"{sweep.directory.path} can be written again"]
    assert {trial: sweep.events(trial) for trial in (A, B)} == events


def test_at_the_end_a_folder_has_what_could_not_be_written_and_a_command_puts_it_back(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    sweep = Sweep(small_disk)
    sweep.recorder.record(B, STARTED)
    filler = fill(small_disk)
    sweep.recorder.record(A, long(1))
    sweep.recorder.record(A, long(2))
    sweep.recorder.record(B, PLANNED, Finished(reason="done"))
    with pytest.raises(UnsavedEventsError, match="Nothing is lost: the last events are in") as caught:
        sweep.recorder.finish(patience_seconds=0)
    filler.unlink()
    command = str(caught.value)[str(caught.value).index("for file in ") :]
    subprocess.run(["sh", "-c", command], check=True)
    assert [event.kind for event in sweep.events(A)] == ["started", "started", "interrupted"]
    assert sweep.record(A).config["number"] == 2
    assert [event.kind for event in sweep.events(B)] == ["started", "planned", "finished"]


def test_the_end_of_a_sweep_waits_for_a_disk_that_has_room_again(small_disk: Path) -> None:
    sweep = Sweep(small_disk)
    filler = fill(small_disk)
    sweep.recorder.record(A, long(1))
    filler.unlink()
    sweep.recorder.finish(patience_seconds=60)
    assert [event.kind for event in sweep.events(A)] == ["started", "interrupted"]


def test_a_lost_process_that_nobody_told_of_is_an_interruption(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.recorder.record(A, STARTED)
    sweep.recorder.interrupt(A, "Traceback\n  ...\nActorDiedError: the actor died\n\n")
    record = sweep.record(A)
    assert (record.state, record.num_failures) == (TrialState.INTERRUPTED, 1)
    assert record.reason == "ActorDiedError: the actor died"
    assert sweep.released == [A]  # others may probe in its place
    sweep.recorder.interrupt(B, "")
    assert sweep.record(B).reason == "the trial's process is gone"


def test_what_the_trial_told_itself_is_not_counted_again(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path)
    sweep.recorder.record(A, STARTED, Interrupted(reason="ChildDiedError: SIGKILL"))
    sweep.recorder.interrupt(A, "RayTaskError: ...")
    assert (sweep.record(A).num_failures, sweep.record(A).reason) == (1, "ChildDiedError: SIGKILL")


LOST = Interrupted(reason="ChildDiedError: SIGKILL")


@pytest.mark.parametrize(
    ("told", "error"),
    [
        ([STARTED], "ActorDiedError: gone"),
        ([STARTED, LOST], "ChildDiedError: SIGKILL (failure 1; see trial.max_failures)"),
        ([STARTED, LOST, STARTED], "ActorDiedError: gone (failure 2; see trial.max_failures)"),
        ([STARTED, LOST, STARTED, LOST], "ChildDiedError: SIGKILL (failure 2; see trial.max_failures)"),
    ],
)
def test_a_trial_that_is_not_tried_again_fails_with_the_last_of_its_faults(
    tmp_path: Path, told: list[Event], error: str
) -> None:
    sweep = Sweep(tmp_path)
    sweep.recorder.record(A, *told)
    sweep.recorder.fail(A, "Traceback\nActorDiedError: gone")
    record = sweep.record(A)
    assert (record.state, record.error) == (TrialState.FAILED, error)
    assert "ActorDiedError" in record.error_details


def test_when_the_sweep_is_interrupted_every_trial_that_runs_is(tmp_path: Path) -> None:
    known: dict[str, list[Event]] = {
        "pending": [],
        "probing": [STARTED],
        "training": [STARTED, PLANNED, epoch(1)],
        "told": [STARTED, Interrupted(reason="the sweep was interrupted", is_failure=False)],
        "lost": [STARTED, LOST],
        "finished": [STARTED, PLANNED, Finished(reason="done")],
    }
    sweep = Sweep(tmp_path, known)
    sweep.recorder.finish()
    added = {name: sweep.events(name)[len(events) :] for name, events in known.items()}
    assert {name for name, events in added.items() if events} == {"probing", "training"}
    for name in ("probing", "training"):
        (event,) = added[name]
        assert isinstance(event, Interrupted)
        assert (event.reason, event.is_failure) == ("the sweep was interrupted", False)
        assert sweep.record(name).num_failures == 0
    assert sweep.recorder.num_to_wait_for() == 0


def test_a_trial_of_a_driver_that_is_gone_counts_as_interrupted_with_that_reason(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, {A: [STARTED, PLANNED], B: []})
    sweep.recorder.interrupt_running("the driver is gone")
    record = sweep.record(A)
    assert (record.state, record.reason, record.num_failures) == (
        TrialState.INTERRUPTED,
        "the driver is gone",
        0,
    )
    assert sweep.record(B).state is TrialState.PENDING


def test_only_trials_of_one_worker_that_run_are_waited_for(tmp_path: Path) -> None:
    """Several workers are not told; they go on from the last checkpoint reported."""
    known: dict[str, list[Event]] = {
        "pending": [],
        "probing": [STARTED],
        "training": [STARTED, PLANNED],
        "two workers": [STARTED, replace(PLANNED, num_workers=2)],
        "finished": [STARTED, PLANNED, Finished(reason="done")],
    }
    sweep = Sweep(tmp_path, known)
    assert sweep.recorder.num_to_wait_for() == 2
    sweep.recorder.record("training", LOST)
    assert sweep.recorder.num_to_wait_for() == 1
