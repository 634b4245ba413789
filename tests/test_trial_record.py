from __future__ import annotations

import math
from dataclasses import replace

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
)
from tune_easytrain.trial_record import TrialRecord, TrialState, last_and_best, step_of

CONFIG = {"hp": {"x": 1}}
PROBED = Probed(microbatch_size=4, budget_bytes=9, bounded_by="limit", seconds=1.0, attempts=[])
PLANNED = Planned(
    device="cpu",
    budget_bytes=9,
    effective_batch_size=8,
    microbatch_size=4,
    accumulation_steps=2,
    num_workers=1,
)
START: list[Event] = [Created(config={}), Started(config=CONFIG), PROBED, PLANNED]


def epoch(number: float, loss: float, peak_memory_bytes: int = 5) -> Reported:
    return Reported(metrics={"epoch": number, "loss": loss}, peak_memory_bytes=peak_memory_bytes)


def record(*events: Event) -> TrialRecord:
    return TrialRecord.from_events("trial_00000", events)


@pytest.mark.parametrize(
    ("events", "state", "is_final"),
    [
        ([], TrialState.PENDING, False),
        (START[:1], TrialState.PENDING, False),
        (START[:2], TrialState.PROBING, False),
        (START[:3], TrialState.PROBING, False),
        (START, TrialState.TRAINING, False),
        ([*START, epoch(1, 2.0)], TrialState.TRAINING, False),
        (
            [*START, TrainingEnded(reason="done")],
            TrialState.TRAINING,
            False,
        ),  # its checkpoint is not stored yet
        ([*START, Finished(reason="done")], TrialState.FINISHED, True),
        ([*START, Interrupted(reason="SIGKILL")], TrialState.INTERRUPTED, False),
        ([*START, Interrupted(reason="SIGKILL"), *START[1:2]], TrialState.PROBING, False),
        ([*START, CheckpointLost(reason="full")], TrialState.TRAINING, False),
        ([*START, Stopped(reason="asha")], TrialState.STOPPED, True),
        ([*START, Failed(error="KeyError: 1")], TrialState.FAILED, True),
    ],
)
def test_states(events: list[Event], state: TrialState, is_final: bool) -> None:
    assert (record(*events).state, record(*events).state.is_final) == (state, is_final)


def rescued(failed: int, size: int, steps: int) -> Rescued:
    return Rescued(
        failed_microbatch_size=failed,
        microbatch_limit=size,
        microbatch_size=size,
        accumulation_steps=steps,
    )


def test_rescues_are_counted_and_leave_the_plan_that_is_in_use() -> None:
    trial = record(*START, rescued(4, 2, 4), epoch(1, 2.0), rescued(2, 1, 8))
    assert (trial.num_rescues, trial.state) == (2, TrialState.TRAINING)
    assert trial.plan == replace(PLANNED, microbatch_size=1, accumulation_steps=8)
    assert record(*START).num_rescues == 0


def test_a_plan_that_replaces_another_one_is_the_trials_plan() -> None:
    faster = replace(PLANNED, microbatch_size=3, accumulation_steps=3)
    assert record(*START, faster, epoch(1, 2.0)).plan == faster


def test_events_add_up() -> None:
    done = record(
        *START, epoch(1, 3.0, 50), epoch(2, 1.0, 70), epoch(3, 2.0, 60), Finished(reason="all done")
    )
    assert (done.config, done.probe, done.plan, done.reason) == (CONFIG, PROBED, PLANNED, "all done")
    assert done.last == {"epoch": 3, "loss": 2.0}
    assert done.peak_memory_bytes == 70
    assert done.best("loss", "min")["epoch"] == 2
    assert done.best("loss", "max")["epoch"] == 1


def test_epochs_reported_again_after_a_set_back_count_once() -> None:
    trial = record(*START, epoch(1, 3.0), epoch(2, 2.5), epoch(3, 0.1), Started(config=CONFIG, resumed=True))
    trial.add(epoch(2, 2.0))
    assert [(r["epoch"], r["loss"]) for r in trial.reports] == [(1, 3.0), (2, 2.0)]


def test_an_epoch_that_is_no_number_is_counted() -> None:
    trial = record(*START, epoch(1, 3.0), epoch(math.nan, 2.0), epoch(math.inf, 1.0))
    assert [(r["epoch"], r["loss"]) for r in trial.reports] == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_resume_forgets_the_error_it_resumes_from() -> None:
    trial = record(*START, Failed(error="died", details="trace"), Started(config=CONFIG, resumed=True))
    assert (trial.state, trial.error, trial.error_details) == (TrialState.PROBING, "", "")


def test_the_best_of_equals_is_the_earliest_and_nan_is_never_best() -> None:
    trial = record(epoch(1, math.nan), epoch(2, 1.0), epoch(3, 1.0), epoch(4, math.nan))
    assert trial.best("loss", "min")["epoch"] == 2
    assert trial.best("loss", "max")["epoch"] == 2


def test_before_any_report_there_is_neither_last_nor_best() -> None:
    assert record(*START).last == {}
    assert record(*START).best("loss", "min") == {}
    assert record(epoch(1, 1.0)).best("accuracy", "max") == {}


def test_reports_without_an_epoch_are_counted() -> None:
    reported = Reported(metrics={"loss": 1.0}, peak_memory_bytes=0)
    assert [r["epoch"] for r in record(reported, reported).reports] == [1, 2]


def test_faults_that_are_not_its_own_are_counted_and_an_interruption_by_hand_is_not() -> None:
    lost = Interrupted(reason="SIGKILL")
    by_hand = Interrupted(reason="the sweep was interrupted", is_failure=False)
    trial = record(*START, epoch(1, 3.0), lost, *START[1:], lost, *START[1:], by_hand)
    assert (trial.state, trial.num_failures, trial.reason) == (
        TrialState.INTERRUPTED,
        2,
        "the sweep was interrupted",
    )
    assert not trial.state.is_running
    assert trial.last == {"epoch": 1, "loss": 3.0}
    trial.add(START[1])
    assert (trial.num_failures, trial.reason) == (2, "")


def test_a_trial_has_begun_once_it_had_resources() -> None:
    assert not record().has_begun
    assert not record(START[0]).has_begun
    assert record(*START[:2]).has_begun
    assert record(*START[:2], Interrupted(reason="x")).has_begun


def test_only_what_is_running_has_its_resources() -> None:
    assert {state for state in TrialState if state.is_running} == {TrialState.PROBING, TrialState.TRAINING}
    assert {state for state in TrialState if state.is_final} == {
        TrialState.FINISHED,
        TrialState.STOPPED,
        TrialState.FAILED,
    }


def test_curves_have_a_report_at_its_epoch_or_by_its_place_where_epochs_are_no_integers() -> None:
    record = TrialRecord("trial")
    steps = []
    for epoch in (1, 2, 2.5, 3):
        record.add(Reported(metrics={"epoch": epoch}, peak_memory_bytes=0))
        steps.append(step_of(record))
    assert steps == [1, 2, 3, 4]
    record.add(Reported(metrics={"epoch": 2}, peak_memory_bytes=0))  # set back
    assert step_of(record) == 2


def test_the_last_and_the_best_of_every_metric_are_finite() -> None:
    record = TrialRecord("trial")
    assert last_and_best(record, "loss", "min") == {}
    for epoch, loss, accuracy in ((1, 0.5, math.inf), (2, 0.25, 0.5), (3, math.nan, 0.75)):
        metrics = {"epoch": epoch, "loss": loss, "accuracy": accuracy, "learning_rate": 0.1}
        record.add(Reported(metrics=metrics, peak_memory_bytes=0))
    assert last_and_best(record, "loss", "min") == {
        "loss_best": 0.25, "accuracy_last": 0.75, "accuracy_best": 0.5,
    }  # fmt: skip
