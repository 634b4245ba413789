from __future__ import annotations

import io

import pytest
from rich.console import Console

from tune_easytrain.events import (
    CheckpointLost,
    Event,
    Failed,
    Finished,
    Interrupted,
    Planned,
    Probed,
    Reported,
    Rescued,
    Started,
)
from tune_easytrain.progress import Progress
from tune_easytrain.trial_record import TrialRecord

EVENTS: list[Event] = [
    Started(config={"model": {"type": "[small]"}}),
    Probed(
        microbatch_size=3,
        budget_bytes=2**30,
        bounded_by="memory",
        seconds=1.25,
        attempts=[
            {"microbatch_size": 6, "outcome": "out_of_memory"},
            {"microbatch_size": 3, "outcome": "fits"},
        ],
    ),
    Planned(
        device="cpu",
        budget_bytes=2**30,
        effective_batch_size=8,
        microbatch_size=3,
        accumulation_steps=3,
        num_workers=1,
        warning="a warning",
    ),
    Rescued(
        failed_microbatch_size=3,
        microbatch_limit=1,
        microbatch_size=1,
        accumulation_steps=8,
        message="CUDA out of memory",
    ),
    Reported(metrics={"epoch": 1.0, "train_loss": 0.5, "val_loss": 0.123456}, peak_memory_bytes=2**29),
]


def show(*events: Event, terminal: bool, num_pending: int = 0) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)
    pending = [TrialRecord(f"trial_{index:05d}") for index in range(1, num_pending + 1)]
    record = TrialRecord("trial_00000")
    with Progress(console, "val_loss", ["model.type"], [record, *pending]) as progress:
        for event in events:
            record.add(event)
            progress.watch(record, event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_what_trials_say_is_shown_and_not_obeyed(terminal: bool) -> None:
    hostile = "\x1b]0;owned\x07 [red]\r"
    started = Started(config={"model": {"type": hostile}})
    shown = show(started, Failed(error=f"ValueError: {hostile}"), terminal=terminal)
    assert not {"\x1b]", "\x07"} & {shown[i : i + n] for n in (1, 2) for i in range(len(shown))}
    assert shown.count(r"\x1b]0;owned\x07 [red]\r") >= 2


def test_piped_output_is_one_plain_line_per_event() -> None:
    name = "trial_00000 ([small])"
    assert show(*EVENTS, Finished(reason="all 1 epochs done"), terminal=False).splitlines() == [
        f"{name}: started",
        f"{name}: probe under 1.0 GiB: 6 out_of_memory, 3 fits (1.2 s)",
        f"{name}: effective batch size 8 in 3 micro-batches of at most 3 on cpu; a warning",
        f"{name}: memory ran out with a micro-batch of 3 (CUDA out of memory); going on with 8 of at most 1",
        f"{name}: epoch 1: train_loss 0.5, val_loss 0.1235",
        f"{name}: finished: all 1 epochs done",
    ]


def test_a_failure_is_told_at_once() -> None:
    failed = Failed(error="KeyError: 'x'", details="trace")
    assert "trial_00000: failed: KeyError: 'x'" in show(failed, terminal=False)
    assert "trial_00000 failed: KeyError: 'x'" in show(failed, terminal=True)


def test_a_terminal_gets_a_table_of_the_trials() -> None:
    shown = show(*EVENTS, terminal=True, num_pending=2)
    table = shown[shown.rindex("1 training") :]
    assert "2 pending, 1 training" in shown
    for cell in ("[small]", "1 × 8", "512.0 MiB / 1.0 GiB", "0.1235", "trial_00002"):
        assert cell in table


def test_a_long_table_shows_the_running_trials_and_counts_the_rest() -> None:
    shown = show(*EVENTS, terminal=True, num_pending=40)
    table = shown[shown.rindex("1 training") :]
    assert "trial_00000" in table
    assert "11 more trials" in table


@pytest.mark.parametrize("terminal", [False, True])
def test_a_lost_process_and_a_lost_checkpoint_are_told_at_once(terminal: bool) -> None:
    shown = show(CheckpointLost(reason="[disk full]"), Interrupted(reason="SIGKILL"), terminal=terminal)
    assert "trial_00000: a checkpoint is lost, training goes on: [disk full]" in shown
    assert "trial_00000: interrupted: SIGKILL" in shown


def test_an_interruption_of_the_whole_sweep_is_in_the_table_and_told_for_no_trial() -> None:
    shown = show(*EVENTS, Interrupted(reason="by hand", is_failure=False), terminal=True, num_pending=40)
    assert "by hand" not in shown
    table = shown[shown.rindex("1 interrupted") :]
    assert "trial_00000" in table
