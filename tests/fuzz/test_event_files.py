"""Trials' event files, whole and hostile: what is an event counts, the rest is passed over,
a frame comes out."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE_VALUES, ask, assert_clean, fuzzed, guarded, mutated, replaced
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tune_easytrain import events as events_module
from tune_easytrain.comparison import compare
from tune_easytrain.config import load_config
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
    load_events,
)
from tune_easytrain.probe_cache import evidence_in
from tune_easytrain.progress import Progress
from tune_easytrain.results import COLUMNS, HISTORY_COLUMNS, load_results, summary_rows, typed_columns
from tune_easytrain.run_directory import RunDirectory, trial_id
from tune_easytrain.trial_record import TrialRecord

SWEEP = {
    "grid_search": {
        "grid": {"model.type": ["small", "large"], "shape": [[1, 2], [3]], "val_loss_best": [1, "x"]}
    },
    "config": {"data": {"root": "/data", "sizes": [1, 2]}, "state": "mine"},
    "batch": {"effective_batch_size": 8},
    "run": {"metric": "val_loss", "mode": "min"},
}
CONFIG = {
    "model": {"type": "small"},
    "shape": [1, 2],
    "val_loss_best": "x",
    "batch": {"effective_batch_size": 8},
}
ATTEMPT = {"microbatch_size": 4, "outcome": "fits", "peak_bytes": 9, "seconds": 0.5, "message": ""}
LIFE: list[Event] = [
    Created(time=1.0, config=CONFIG),
    Started(time=2.0, config=CONFIG),
    Probed(
        time=3.0, microbatch_size=4, budget_bytes=999, bounded_by="limit", seconds=1.5,
        attempts=[ATTEMPT] * 2,
        limit=8, signature="abc",
    ),
    Planned(
        time=4.0, device="cpu", budget_bytes=999, effective_batch_size=8, microbatch_size=4,
        accumulation_steps=2,
        num_workers=1,
    ),
    Rescued(
        time=5.0, failed_microbatch_size=4, microbatch_limit=2, microbatch_size=2, accumulation_steps=4,
        message="full"
    ),
    Reported(
        time=6.0,
        metrics={"epoch": 1.0, "num_samples": 40.0, "optimizer_steps": 5.0, "val_loss": 0.5,
        "train_loss": 1.0},
        peak_memory_bytes=70,
    ),
    Reported(time=7.0, metrics={"epoch": 2, "val_loss": 0.25, "samples_per_second": 3.5},
    peak_memory_bytes=80),
    TrainingEnded(time=8.0, reason="all done"),
    Failed(time=9.0, error="KeyError: 'x'", details="line one\nline two"),
    Stopped(time=10.0, reason="asha"),
    Finished(time=11.0, reason="done"),
]  # fmt: skip
LINES = [event.to_json().encode() for event in LIFE]
PLAIN = [{"event": event.kind, **asdict(event)} for event in LIFE]


@pytest.fixture(scope="module")
def directory(folder: Path) -> RunDirectory:
    directory = RunDirectory.create(folder, "demo")
    directory.save_sweep(load_config(SWEEP).resolved())
    directory.trial_path(trial_id(1)).write_bytes(b"\n".join(LINES) + b"\n")
    return directory


def assert_a_frame_comes_out(directory: RunDirectory, path: Path) -> None:
    """Read the first trial's file as the results and the probe cache of a resume do."""
    with guarded():
        results = load_results(directory.path)
        frame = results.frame()
        assert list(frame["trial_id"]) == [trial_id(0), trial_id(1)]
        assert {c.name: c.dtype for c in COLUMNS} == {c.name: str(frame.dtypes[c.name]) for c in COLUMNS}
        assert frame["val_loss_best"].min() <= 0.25
        summary_rows(frame, results.metric, results.varied_keys())
        typed_columns(frame)
        history = results.history()
        assert {c.name: c.dtype for c in HISTORY_COLUMNS} == {
            c.name: str(history.dtypes[c.name]) for c in HISTORY_COLUMNS
        }
        counted = history.dropna(subset=["epoch"])
        assert not counted.duplicated(["trial_id", "epoch"]).any()
        assert compare(results, results)["found_in"].tolist() == ["both", "both"]
        events = list(load_events(path))
        list(evidence_in(events))
        TrialRecord.from_events("x", events).best("train_loss", "max")


def test_what_is_mutated_is_whole(directory: RunDirectory) -> None:
    path = directory.trial_path(trial_id(0))
    path.write_bytes(b"\n".join(LINES))
    assert list(load_events(path)) == LIFE
    assert_a_frame_comes_out(directory, path)
    assert load_results(directory.path).frame()["val_loss_best"].tolist() == [0.25, 0.25]


def test_every_field_has_a_check() -> None:
    for event_type, checks in events_module._CHECKS.items():
        assert {field.name for field in fields(event_type)} == set(checks)


@fuzzed(ci_share=0.5)
@given(content=mutated([b"\n".join(LINES) + b"\n"]))
def test_mutated_files(directory: RunDirectory, content: bytes) -> None:
    path = directory.trial_path(trial_id(0))
    path.write_bytes(content)
    whole = {line for line in content.split(b"\n") if line in LINES}
    assert_a_frame_comes_out(directory, path)
    read = list(load_events(path))
    assert all(event in read for event, line in zip(LIFE, LINES, strict=True) if line in whole)


@fuzzed(ci_share=0.5)
@given(data=st.data())
def test_hostile_values(directory: RunDirectory, data: st.DataObject) -> None:
    hostile = data.draw(st.lists(replaced(PLAIN) | HOSTILE_VALUES, min_size=1, max_size=4))
    lines = [
        json.dumps(value, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
        for value in hostile
    ]
    path = directory.trial_path(trial_id(0))
    path.write_bytes(b"\n".join(data.draw(st.permutations([*LINES, *lines]))) + b"\n")
    assert_a_frame_comes_out(directory, path)


@fuzzed(ci_share=0.5)
@given(data=st.data())
def test_hostile_values_in_known_fields(directory: RunDirectory, data: st.DataObject) -> None:
    """What a field of each event holds is anything, metrics of any name and number among them."""
    event = dict(data.draw(st.sampled_from(PLAIN)))
    number = st.floats() | st.integers() | st.booleans() | st.sampled_from([2.5, 2**53 + 1, -1, 1e300])
    name = (
        st.sampled_from(["epoch", "num_samples", "optimizer_steps", "val_loss", "learning_rate", ""])
        | st.text()
    )
    metrics = st.dictionaries(name, number, max_size=5)
    config = st.dictionaries(
        st.sampled_from(["model", "val_loss_last", "val_loss_best", "batch", ""]), HOSTILE_VALUES
    )
    known = {"metrics": metrics, "config": config}
    for field in data.draw(st.lists(st.sampled_from([*event]), min_size=1, max_size=3)):
        event[field] = data.draw(known.get(field, HOSTILE_VALUES))
    path = directory.trial_path(trial_id(0))
    line = json.dumps(event).encode()
    path.write_bytes(b"\n".join(data.draw(st.permutations([*LINES, line]))) + b"\n")
    assert_a_frame_comes_out(directory, path)


@fuzzed(0.2)
@given(data=st.data())
def test_the_command_line(directory: RunDirectory, folder: Path, data: st.DataObject) -> None:
    path = directory.trial_path(trial_id(0))
    as_json = json.dumps(data.draw(replaced(PLAIN)), ensure_ascii=data.draw(st.booleans()))
    line = data.draw(mutated(LINES) | st.just(as_json.encode("utf-8", "surrogatepass")))
    path.write_bytes(b"\n".join([*LINES[:-3], line, *LINES[:-5]]) + b"\n")
    options: list[Any] = data.draw(
        st.sampled_from(
            [
                [],
                ["--json"],
                ["--errors"],
                ["--sort", "-shape"],
                ["--where", "val_loss < 1"],
                ["--compare", directory.path],
                ["--csv", folder / "r.csv"],
                ["--parquet", folder / "r.parquet"],
            ],
        )
    )
    answer = ask("results", directory.path, *options)
    assert_clean(answer, path)
    assert answer.code == 0
    console = Console(file=io.TextIOWrapper(io.BytesIO(), "utf-8"), force_terminal=True, width=200)
    with Progress(console, "val_loss", ["shape", "model.type"], load_results(directory.path).records()):
        pass  # what `resume` shows first


def test_what_keeps_a_file_from_being_read_is_told(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "demo")
    directory.save_sweep(load_config(SWEEP).resolved())
    path = directory.trial_path(trial_id(0))
    path.mkdir()
    answer = ask("results", directory.path)
    assert (answer.code, path.name in answer.err) == (2, True)
