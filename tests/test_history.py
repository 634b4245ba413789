from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from hypothesis import given
from hypothesis import strategies as st
from made_runs import epoch, finished, make_run, trial_config

from tune_easytrain.columns import HISTORY_COLUMNS
from tune_easytrain.events import Created, Event, Interrupted, Reported, Started
from tune_easytrain.history import build_history
from tune_easytrain.trial_record import TrialRecord

DTYPES = {column.name: column.dtype for column in HISTORY_COLUMNS}


def report(time: float = 0.0, **metrics: float) -> Reported:
    return Reported(time=time, metrics=metrics, peak_memory_bytes=7)


def history_of(*events: Event) -> pd.DataFrame:
    return build_history([TrialRecord.from_events("trial_00000", events)], "loss", [])


def test_a_history_has_a_row_per_trial_and_epoch(tmp_path: Path) -> None:
    two = finished(epoch(1, 0.25, 3.0), epoch(2, 0.5, 2.0), config=trial_config("small"))
    one = finished(epoch(1, 0.75), config=trial_config("large"))
    history = make_run(tmp_path, [two, one, [Created(config=trial_config())]]).history()
    assert history["trial_id"].tolist() == ["trial_00000", "trial_00000", "trial_00001"]
    assert history["model.type"].tolist() == ["small", "small", "large"]
    assert history["epoch"].tolist() == [1, 2, 1]
    assert history["val_accuracy"].tolist() == [0.25, 0.5, 0.75]
    assert history["train_loss"].tolist() == [3.0, 2.0, 1.0]
    row = history.iloc[1]
    assert (row["num_samples"], row["optimizer_steps"], row["peak_memory_bytes"]) == (80, 10, 200)
    assert (row["epoch_seconds"], row["samples_per_second"], row["gpu_utilization"]) == (2.5, 20.0, 0.5)
    assert list(history.columns[:3]) == ["trial_id", "model.type", "hp.batch_size"]
    assert list(history.columns[3 : 2 + len(DTYPES)]) == list(DTYPES)[1:]
    assert list(history.columns[2 + len(DTYPES) :]) == ["val_accuracy", "train_loss"]


def test_columns_and_dtypes_are_the_same_without_a_single_report(tmp_path: Path) -> None:
    runs: list[list[list[Event]]] = [[], [[Created(config=trial_config())]], [finished(epoch(1, 0.5))]]
    for trials in runs:
        history = make_run(tmp_path, trials).history()
        assert {name: str(history[name].dtype) for name in DTYPES} == DTYPES
        assert history["val_accuracy"].dtype == "float64"
        assert history["model.type"].dtype == "string"
        assert history["hp.batch_size"].dtype == "Int64"


def test_the_history_of_some_trials(tmp_path: Path) -> None:
    trials = [finished(epoch(1, accuracy), epoch(2, accuracy)) for accuracy in (0.25, 0.5)]
    results = make_run(tmp_path, trials)
    history = results.history(where="val_accuracy > 0.3")
    assert history["trial_id"].tolist() == ["trial_00001"] * 2
    assert list(history.columns) == list(results.history().columns)


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=4))
def test_a_resumed_trial_shows_every_epoch_once_as_it_was_reported_last(parts: list[list[int]]) -> None:
    """Each part goes on from some epoch, in steps of one."""
    events: list[Event] = []
    expected: dict[int, float] = {}
    number = 0.0
    for begin, *more in parts:
        events.append(Started(config={}, resumed=bool(events)))
        expected = {nr: loss for nr, loss in expected.items() if nr < begin}
        for nr in range(begin, begin + 1 + len(more)):
            number += 1
            events.append(report(epoch=nr, loss=number))
            expected[nr] = number
        events.append(Interrupted(reason="node lost"))
    history = history_of(*events)
    assert dict(zip(history["epoch"], history["loss"], strict=True)) == expected
    assert len(history) == len(expected)
    assert history["epoch"].is_monotonic_increasing


def test_a_trial_that_took_over_anothers_weights_shows_only_what_came_after() -> None:
    history = history_of(
        Started(config={}),
        report(epoch=1, loss=9.0),
        report(epoch=2, loss=8.0),
        report(epoch=3, loss=7.0),
        Started(config={}, resumed=True, cloned_from="trial_00001"),
        report(epoch=3, loss=2.0),
        report(epoch=4, loss=1.0),
    )
    assert history["epoch"].tolist() == [3, 4]
    assert history["loss"].tolist() == [2.0, 1.0]


def test_times_are_the_clocks() -> None:
    history = history_of(report(time=1_700_000_000.123456, loss=1.0))
    assert history["time"].tolist() == [pd.Timestamp("2023-11-14T22:13:20.123456", tz="UTC")]


def test_times_of_no_clock_are_missing() -> None:
    reports = [report(time=time, epoch=n + 1, loss=1.0) for n, time in enumerate([-1.0, 1e300, float("nan")])]
    history = history_of(*reports)
    assert history["time"].isna().all()
    assert history["epoch"].tolist() == [1, 2, 3]


def test_parts_of_epochs_are_rows_without_a_number() -> None:
    history = history_of(*(report(epoch=part, loss=part) for part in (0.5, 1, 1.5)))
    assert history["epoch"].fillna(0).tolist() == [0, 1, 0]
    assert history["loss"].tolist() == [0.5, 1.0, 1.5]


def test_metrics_and_keys_with_names_of_columns_stay_apart() -> None:
    config: dict[str, Any] = {"epoch": "mine", "loss": 3}
    events = [Started(config=config), report(time=5.0, loss=1.0, trial_id=4.0, gpu_utilization=0.5)]
    record = TrialRecord.from_events("trial_00000", events)
    history = build_history([record], "loss", ["epoch", "loss"])
    assert history.columns.is_unique
    (row,) = history.to_dict("records")
    assert (row["epoch"], row["config.epoch"]) == (1, "mine")
    assert (row["loss"], row["config.loss"]) == (1.0, 3)
    assert (row["trial_id"], row["metric.trial_id"], row["gpu_utilization"]) == ("trial_00000", 4.0, 0.5)
