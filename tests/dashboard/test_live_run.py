from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import epoch, finished, make_run, trial_config
from s3_server import ENVIRONMENT, Gate, S3Server

from tune_easytrain.config import load_config
from tune_easytrain.dashboard import live_run
from tune_easytrain.dashboard.live_run import LiveRun, TrialSpan
from tune_easytrain.errors import RunDirectoryError
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
    parse_events,
)
from tune_easytrain.mirror import mirrored
from tune_easytrain.results import load_results
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.trial_record import TrialState

TRAINING = finished(epoch(1, 0.5))[:-1]


def follow(folder: Path, trials: list[list[Event]]) -> tuple[LiveRun, RunDirectory]:
    directory = RunDirectory.open(make_run(folder, trials).run_dir)
    return LiveRun(directory), directory


def add(directory: RunDirectory, index: int, *events: Event) -> None:
    append_events(directory.trial_path(trial_id(index)), events)


def test_it_reads_what_the_results_read(tmp_path: Path) -> None:
    trials = [finished(epoch(1, 0.5), epoch(2, 0.7)), TRAINING, [Created(config=trial_config())]]
    run, directory = follow(tmp_path, trials)
    results = load_results(directory.path)
    assert run.revision == 0
    assert run.records() == results.records()
    assert run.revision == 1
    assert run.frame().equals(results.frame())
    assert run.history().equals(results.history())
    assert (run.num_failed, run.num_unfinished) == (0, 2)
    best = run.best()
    assert best is not None
    assert best["trial_id"] == trial_id(0)
    assert run.sweep() == results.sweep()
    assert run.declared_values() == results.declared_values()
    assert run.events(trial_id(0)) == list(load_events(directory.trial_path(trial_id(0))))
    assert (run.name, run.place) == (directory.path.name, str(directory.path))


def test_a_poll_tells_which_trials_changed_and_leaves_what_was_given_out(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [TRAINING, TRAINING, TRAINING])
    first = run.poll()
    records = run.records()
    before = deepcopy(records)
    add(directory, 1, epoch(2, 0.9))
    assert run.poll(0) == first + 1
    assert run.changed_since(first) == [trial_id(1)]
    assert run.changed_since(run.revision) == []
    assert run.changed_since(0) == [trial_id(index) for index in range(3)]
    assert records == before
    after = run.records()
    assert [len(record.reported) for record in after] == [1, 2, 1]
    assert after[0] is records[0]
    assert run.record(trial_id(1)) is after[1]
    assert run.poll(0) == first + 1


def test_only_new_bytes_are_read_as_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, directory = follow(tmp_path, [TRAINING, TRAINING])
    run.poll()
    read: list[bytes] = []

    def parse(content: bytes) -> Iterator[tuple[Event, int]]:
        read.append(content)
        return parse_events(content)

    monkeypatch.setattr(live_run, "parse_events", parse)
    event = epoch(2, 0.9)
    add(directory, 1, event)
    run.poll(0)
    run.poll(0)
    assert read == [f"{event.to_json()}\n".encode()]


def test_what_was_just_read_is_not_read_again(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [TRAINING])
    first = run.poll()
    add(directory, 0, epoch(2, 0.9))
    assert run.poll(3600) == first
    assert run.poll(0) == first + 1


def test_trials_appear_while_the_sweep_runs(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [])
    assert run.records() == []
    first = run.revision
    assert first == 1
    add(directory, 2, *TRAINING)
    run.poll(0)
    add(directory, 0, Created(config=trial_config("large")))
    run.poll(0)
    assert [record.trial_id for record in run.records()] == [trial_id(0), trial_id(2)]
    assert run.changed_since(first + 1) == [trial_id(0)]
    directory.trial_path(trial_id(2)).unlink()
    assert run.poll(0) == first + 3
    assert [record.trial_id for record in run.records()] == [trial_id(0)]


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_half_written_line_is_taken_when_it_is_whole(tmp_path: Path, cut: int) -> None:
    run, directory = follow(tmp_path, [TRAINING])
    line = f"{epoch(2, 0.9).to_json()}\n".encode()
    run.poll()
    path = directory.trial_path(trial_id(0))
    with path.open("ab") as file:
        file.write(line[:-cut])
    run.poll(0)
    whole_without_newline = cut == 1
    assert [len(record.reported) for record in run.records()] == [1 + whole_without_newline]
    assert run.records() == load_results(directory.path).records()
    with path.open("ab") as file:
        file.write(line[-cut:])
    add(directory, 0, epoch(3, 0.8))
    run.poll(0)
    assert [report["epoch"] for report in run.records()[0].reports] == [1, 2, 3]


def test_a_half_line_of_a_killed_driver_costs_that_event_alone(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [TRAINING])
    with directory.trial_path(trial_id(0)).open("ab") as file:
        file.write(b'{"event": "repo')
    run.poll()
    add(directory, 0, epoch(2, 0.9))
    run.poll(0)
    assert len(run.records()[0].reported) == 2
    assert run.records() == load_results(directory.path).records()


def test_a_file_that_holds_something_else_is_read_anew(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [finished(epoch(1, 0.5)), TRAINING])
    first = run.poll()
    path = directory.trial_path(trial_id(0))
    path.write_bytes(path.read_bytes()[:0])  # shorter
    assert run.poll(0) == first + 1
    assert run.records()[0].state is TrialState.PENDING
    other = path.with_name("other")
    append_events(other, [*TRAINING, epoch(2, 0.25), epoch(3, 0.25), Failed(error="KeyError: 'x'")])
    other.replace(path)  # longer, with another beginning
    assert run.poll(0) == first + 2
    assert run.changed_since(first) == [trial_id(0)]
    assert run.records() == load_results(directory.path).records()
    assert run.span(trial_id(0)).ended_at is not None
    other.write_bytes(path.read_bytes())
    append_events(other, [])
    other.replace(path)  # another file with the same content
    assert run.poll(0) == first + 2


def test_what_cannot_be_read_is_told_and_what_was_read_stays(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [TRAINING, TRAINING])
    run.poll()
    before = run.records()
    aside = directory.trials_dir.with_name("aside")
    directory.trials_dir.rename(aside)
    revision = run.poll(0)
    assert f"cannot read {directory.trials_dir}: No such file" in run.problem
    assert run.records() == before
    with pytest.raises(RunDirectoryError, match=r"cannot read .*trial_00001\.jsonl"):
        run.events(trial_id(1))
    aside.rename(directory.trials_dir)
    assert run.poll(0) == revision + 1
    assert run.problem == ""


def test_one_file_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, directory = follow(tmp_path, [TRAINING, TRAINING])
    run.poll()
    for index in range(2):
        add(directory, index, epoch(2, 0.9))
    look = directory.trial_files

    def look_too_early() -> dict[str, os.stat_result]:
        found = look()
        directory.trial_path(trial_id(0)).unlink(missing_ok=True)
        return found

    monkeypatch.setattr(directory, "trial_files", look_too_early)
    run.poll(0)
    assert "trial_00000.jsonl: No such file" in run.problem
    assert [len(record.reported) for record in run.records()] == [1, 2]
    run.poll(0)
    assert run.problem == ""
    assert [record.trial_id for record in run.records()] == [trial_id(1)]


def test_a_damaged_sweep_is_told_at_once(tmp_path: Path) -> None:
    _, directory = follow(tmp_path, [])
    directory.sweep_path.write_text("{}")
    with pytest.raises(RunDirectoryError, match=r"sweep\.json is damaged"):
        LiveRun(directory)


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202e", "a\n"])
def test_files_whose_names_cannot_be_shown_are_no_trials(tmp_path: Path, name: str) -> None:
    run, directory = follow(tmp_path, [TRAINING])
    directory.trial_path(name).write_text("")
    directory.trial_path("folder").mkdir()
    (directory.trials_dir / f"{trial_id(0)}.jsonl.17.tmp").write_text("")
    assert [record.trial_id for record in run.records()] == [trial_id(0)]


@pytest.mark.parametrize("unlisted", ["", "../sweep", "nothing", f"../trials/{trial_id(0)}"])
def test_no_file_is_read_for_an_id_that_is_not_listed(tmp_path: Path, unlisted: str) -> None:
    run, _ = follow(tmp_path, [TRAINING])
    assert run.events(unlisted) == []
    assert run.record(unlisted) is None
    assert run.span(unlisted) == TrialSpan()


def test_readers_of_many_threads_see_whole_readings(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [TRAINING] * 4)
    is_over = threading.Event()

    def read() -> int:
        seen, revision = 0, 0
        while not is_over.is_set():
            revision, before = run.poll(0), revision
            assert revision >= before
            records = run.records()
            assert [record.trial_id for record in records] == [trial_id(index) for index in range(4)]
            for record in records:
                assert [report["epoch"] for report in record.reports] == list(
                    range(1, 1 + len(record.reports))
                )
            seen = max(seen, *(len(record.reports) for record in records))
        return seen

    with ThreadPoolExecutor(6) as pool:
        readers = [pool.submit(read) for _ in range(6)]
        for number in range(2, 60):
            for index in range(4):
                add(directory, index, epoch(number, 0.5))
        is_over.set()
        assert all(reader.result() >= 1 for reader in readers)
    run.poll(0)
    assert [len(record.reports) for record in run.records()] == [59] * 4


def test_a_reading_that_takes_long_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, directory = follow(tmp_path, [TRAINING])
    first = run.poll()
    is_reading, may_go_on = threading.Event(), threading.Event()
    look = directory.trial_files

    def look_slowly() -> dict[str, os.stat_result]:
        is_reading.set()
        assert may_go_on.wait(60)
        return look()

    monkeypatch.setattr(directory, "trial_files", look_slowly)
    add(directory, 0, epoch(2, 0.9))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(run.poll, 0)
        assert is_reading.wait(60)
        assert run.poll(0) == first
        assert len(run.records()[0].reports) == 1
        may_go_on.set()
        assert slow.result() == first + 1


def test_a_span_counts_only_the_time_with_resources(tmp_path: Path) -> None:
    reports = [
        Reported(time=time, metrics={"epoch": number}, peak_memory_bytes=1)
        for number, time in enumerate((14.0, 13.0, 40.0, 118.0), 1)
    ]
    run, directory = follow(tmp_path, [[Created(time=5.0, config={})]])
    assert run.span(trial_id(0)) == TrialSpan(last_event_at=5.0)
    add(directory, 0, Started(time=10.0, config={}), reports[0])
    run.poll(0)
    assert run.span(trial_id(0)) == TrialSpan(10.0, None, 14.0, 4.0)
    add(directory, 0, reports[1], Interrupted(time=20.0, reason="gone"))  # the clock of a worker is behind
    run.poll(0)
    assert run.span(trial_id(0)) == TrialSpan(10.0, None, 20.0, 10.0)
    add(directory, 0, Started(time=30.0, config={}, resumed=True), reports[2])
    add(directory, 0, Started(time=110.0, config={}, resumed=True), reports[3])  # the driver was killed
    run.poll(0)
    assert run.span(trial_id(0)) == TrialSpan(10.0, None, 118.0, 28.0)
    add(directory, 0, Finished(time=119.0, reason="done"))
    run.poll(0)
    assert run.span(trial_id(0)) == TrialSpan(10.0, 119.0, 119.0, 29.0)


@given(st.lists(st.tuples(st.sampled_from("csprif"), st.floats() | st.floats(0, 1e10)), max_size=20))
def test_spans_make_sense_whatever_the_clocks_say(told: list[tuple[str, float]]) -> None:
    build = {
        "c": lambda at: Created(time=at, config={}),
        "s": lambda at: Started(time=at, config={}),
        "p": lambda at: Planned(
            time=at,
            device="cpu",
            budget_bytes=1,
            effective_batch_size=1,
            microbatch_size=1,
            accumulation_steps=1,
            num_workers=1,
        ),
        "r": lambda at: Reported(time=at, metrics={}, peak_memory_bytes=1),
        "i": lambda at: Interrupted(time=at, reason=""),
        "f": lambda at: Finished(time=at, reason=""),
    }
    span, has_resources, is_final = TrialSpan(), False, False
    for kind, at in told:
        had_resources = has_resources
        has_resources = kind in "sp" or (has_resources and kind in "cr")
        is_final = kind == "f" or (is_final and kind in "cr")
        span = span.extended(build[kind](at), had_resources=had_resources, is_final=is_final)
        times = [time for time in (span.started_at, span.ended_at, span.last_event_at) if time is not None]
        assert all(0 <= time < 1e12 for time in [*times, span.busy_seconds])
        assert all(time <= span.last_event_at for time in times)
        assert span.busy_seconds <= (span.last_event_at or 0.0) * (1 + 1e-9)


SWEEP = {"batch": {"effective_batch_size": 8}, "run": {"metric": "val_accuracy", "mode": "max"}}
PATIENCE_SECONDS = 60.0
Machine = Callable[[str], None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Work as the machine of that name: each has a cache of its own."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return lambda name: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))


@pytest.fixture
def gate(server: S3Server) -> Iterator[Gate]:
    gate = Gate(server)
    yield gate
    gate.shut()


def wait_until(run: LiveRun, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)
        run.poll(0)


def test_a_run_in_an_object_store_is_followed_from_another_machine(
    server: S3Server, gate: Gate, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "_REFRESH_AFTER_ERROR_SECONDS", 0.2)
    machine("drivers")
    written = make_stored_run(server.url("bucket/followed"))
    with mirrored(written, pytest.fail) as mirror:
        assert mirror is not None
        assert mirror.flush(PATIENCE_SECONDS)
        machine("mine")
        followed = RunDirectory.open(server.url(f"bucket/followed/{written.name}", gate.port))
        assert followed.path != written.path
        run = LiveRun(followed)
        assert run.name == written.name
        assert [len(record.reports) for record in run.records()] == [1, 1]
        first = run.poll(0)
        add(written, 1, epoch(2, 0.9))
        mirror.note(trial_id(1), is_urgent=False)
        wait_until(run, lambda: run.revision > first)
        assert run.changed_since(first) == [trial_id(1)]
        assert [len(record.reports) for record in run.records()] == [1, 2]

        gate.shut()
        wait_until(run, lambda: run.problem != "")
        assert "does not answer" in run.problem
        assert [len(record.reports) for record in run.records()] == [1, 2]
        add(written, 0, epoch(2, 0.9))
        mirror.note(trial_id(0), is_urgent=False)
        gate.open()
        wait_until(run, lambda: run.problem == "" and len(run.records()[0].reports) == 2)


def test_a_store_is_left_alone_when_nobody_asks_any_more(
    server: S3Server, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "_UNASKED_SECONDS", 0.1)
    machine("drivers")
    written = make_stored_run(server.url("bucket/unasked"))
    with mirrored(written, pytest.fail):
        pass
    machine("mine")
    run = LiveRun(RunDirectory.open(written.place))

    def num_fetchers() -> int:
        return sum(thread.name == f"fetch {run.name}" for thread in threading.enumerate())

    for _ in range(2):
        run.poll(0)
        assert num_fetchers() == 1
        deadline = time.monotonic() + PATIENCE_SECONDS
        while num_fetchers():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def make_stored_run(url: str) -> RunDirectory:
    """Make the driver's copy of a run; nothing is in the store yet."""
    directory = RunDirectory.create(url, "demo")
    directory.save_sweep(load_config(SWEEP).resolved())
    for index in range(2):
        add(directory, index, *TRAINING)
    return directory


def test_its_frame_is_that_of_the_last_poll(tmp_path: Path) -> None:
    run, directory = follow(tmp_path, [TRAINING])
    run.poll()
    assert run.frame()["epochs"].tolist() == [1]
    assert run.frame(metric="train_loss", mode="min")["epochs"].tolist() == [1]
    add(directory, 0, epoch(2, 0.9))
    assert run.frame()["epochs"].tolist() == [1]
    run.poll(max_age_seconds=0)
    assert run.frame()["epochs"].tolist() == [2]
    assert run.frame(where="epochs > 2").empty
    changed = run.frame()
    changed["epochs"] = 7
    assert run.frame()["epochs"].tolist() == [2]
