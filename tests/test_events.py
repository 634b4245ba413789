from __future__ import annotations

import json
from pathlib import Path

import pytest

from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Finished,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
    Stopped,
    TrainingEnded,
    append_events,
    load_events,
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


def test_fields_of_a_newer_version_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "trial.jsonl"
    path.write_text(json.dumps({**json.loads(ALL[-1].to_json()), "shade": "blue"}) + "\n")
    assert list(load_events(path)) == [ALL[-1]]
