from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest

from tune_easytrain.events import (
    CheckpointLost,
    Created,
    Event,
    Failed,
    Finished,
    Interrupted,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
    Stopped,
    TrainingEnded,
    append_events,
    load_events,
    load_events_between,
)

ALL: list[Event] = [
    Created(time=1.0, config={"model": {"type": "s3d"}}),
    Started(time=2.0, config={"hp": {"sizes": [1, 2]}}, resumed=True),
    Probed(
        time=3.0,
        microbatch_size=None,
        budget_bytes=2**34,
        bounded_by="memory",
        seconds=1.5,
        attempts=[{"microbatch_size": 8, "outcome": "died", "peak_bytes": None}],
    ),
    Planned(
        time=4.0,
        device="cpu",
        budget_bytes=1,
        effective_batch_size=8,
        microbatch_size=4,
        accumulation_steps=2,
        num_workers=1,
        warning="größer – als",
    ),
    Rescued(
        time=4.5,
        failed_microbatch_size=4,
        microbatch_limit=2,
        microbatch_size=2,
        accumulation_steps=4,
        message="CUDA out of memory",
    ),
    Reported(time=5.0, metrics={"val_loss": 0.25, "epoch": 1}, peak_memory_bytes=7),
    CheckpointLost(time=5.5, reason="cannot write to /runs: No space left on device"),
    Interrupted(time=5.6, reason="ChildDiedError: SIGKILL", details="line one\nline two"),
    Interrupted(time=5.7, reason="the sweep was interrupted", is_failure=False),
    TrainingEnded(time=6.0, reason="all 3 epochs done"),
    Failed(time=7.0, error="KeyError: 'x'", details="line one\nline two"),
    Finished(time=8.0, reason="done"),
    Stopped(time=9.0, reason="asha"),
]


@pytest.mark.parametrize("event", ALL, ids=lambda event: event.kind)
def test_every_event_comes_back_as_it_was(event: Event, tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    append_events(path, [event])
    assert path.read_text().count("\n") == 1
    assert list(load_events(path)) == [event]


def test_events_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    append_events(path, ALL[:4])
    append_events(path, ALL[4:])
    assert list(load_events(path)) == ALL
    assert len(path.read_text().splitlines()) == len(ALL)


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_half_written_last_line_costs_that_event_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trial.jsonl"
    append_events(path, ALL[:2])
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(load_events(path))[:1] == ALL[:1]
    append_events(path, ALL[2:])
    kept = ALL[:2] if cut == 1 else ALL[:1]  # with only the newline missing, nothing is lost
    assert list(load_events(path)) == kept + ALL[2:]


@pytest.mark.parametrize(
    "junk",
    ["", "not json", "[1, 2]", "7", "null", "{}", '{"event": "unheard of"}', '{"event": "finished"}', "\xff"],
)
def test_lines_that_are_no_event_are_passed_over(tmp_path: Path, junk: str) -> None:
    path = tmp_path / "trial.jsonl"
    path.write_bytes(f"{ALL[0].to_json()}\n".encode() + junk.encode("latin-1") + b"\n")
    append_events(path, [ALL[-1]])
    assert list(load_events(path)) == [ALL[0], ALL[-1]]


@pytest.mark.parametrize(
    "wrong",
    [
        '{"event": "reported", "metrics": "0.5", "peak_memory_bytes": 1}',
        '{"event": "reported", "metrics": {"epoch": [1]}, "peak_memory_bytes": 1}',
        '{"event": "reported", "metrics": {}, "peak_memory_bytes": 9223372036854775808}',
        '{"event": "finished", "reason": "done", "time": null}',
        '{"event": "failed", "error": 7}',
        '{"event": "interrupted", "reason": "x", "is_failure": 1}',
        '{"event": "checkpoint_lost"}',
        '{"event": "created", "config": {"x": ' + "[" * 300 + "]" * 300 + "}}",
        '{"event": "created", "config": ' + '{"x": ' * 2000 + "1" + "}" * 2001,
    ],
)
def test_lines_with_values_of_other_types_are_passed_over(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "trial.jsonl"
    path.write_text(f"{wrong}\n{ALL[-1].to_json()}\n")
    assert list(load_events(path)) == [ALL[-1]]


@pytest.mark.parametrize("cut", [0, 1, 2, 40])
def test_events_are_read_on_from_the_last_one(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trial.jsonl"
    odd = Failed(error="a\rb\x0b\u2028c", details="d\r\ne\x85")
    append_events(path, [odd, ALL[0]])
    path.write_bytes(path.read_bytes() + b"junk\rjunk\n" + f"{odd.to_json()}\n".encode())
    whole = path.read_bytes()
    found: list[Event] = []
    position = 0
    for size in (len(whole) // 3, len(whole) - cut, len(whole)):
        path.write_bytes(whole[:size])
        read = list(load_events_between(path, position, size))
        found += [event for event, _ in read]
        position = read[-1][1] if read else position
    assert found == [odd, ALL[0], odd] == list(load_events(path))
    assert position >= len(whole) - 1


def test_a_bare_carriage_return_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    path.write_bytes(ALL[0].to_json().encode().replace(b", ", b",\r") + b"\n")
    assert list(load_events(path)) == ALL[:1]
    size = path.stat().st_size
    assert list(load_events_between(path, 0, size)) == [(ALL[0], size)]


def test_a_file_name_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    append_events(path, [Failed(error="DataError: clip\udcff.avi")])
    (event,) = load_events(path)
    assert isinstance(event, Failed)
    assert event.error == "DataError: clip?.avi"


def test_fields_of_a_newer_version_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    path.write_text(json.dumps({**json.loads(ALL[-1].to_json()), "shade": "blue"}) + "\n")
    assert list(load_events(path)) == [ALL[-1]]


def fill(disk: Path, num_bytes_free: int) -> Path:
    """Fill a disk, and make so much room again, in whole pages."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    os.truncate(path, path.stat().st_size - num_bytes_free)
    return path


@pytest.mark.parametrize("cut", [0, 5])
def test_on_a_full_disk_a_file_stays_as_it_was(small_disk: Path, cut: int) -> None:
    """Some of the events would have fitted; they are there all or none, behind a half-written line too."""
    path = small_disk / "trial.jsonl"
    append_events(path, ALL)
    os.truncate(path, path.stat().st_size - cut)
    before = path.read_bytes()
    filler = fill(small_disk, num_bytes_free=4096)
    many = ALL * 20
    with pytest.raises(OSError, match="No space") as caught:
        append_events(path, many)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    filler.unlink()
    append_events(path, many)
    whole = ALL if cut == 0 else ALL[:-1]
    assert list(load_events(path)) == whole + many


def test_events_that_are_longer_than_a_pipe_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    long = Failed(error="x", details="ä" * 10**6)
    append_events(path, [long, ALL[-1]])
    assert list(load_events(path)) == [long, ALL[-1]]
