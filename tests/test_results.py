from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_runs import epoch, finished, make_run, trial_config
from pandas.api.types import is_object_dtype

from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.events import (
    Created,
    Event,
    Failed,
    Interrupted,
    Probed,
    Reported,
    Started,
    append_events,
)
from tune_easytrain.results import COLUMNS, SweepResults, load_results


def test_a_finished_trial_fills_every_column(tmp_path: Path) -> None:
    frame = make_run(tmp_path, [finished(epoch(1, 0.9, 3.0), epoch(2, 0.5, 2.0))]).frame()
    (row,) = frame.to_dict("records")
    assert {name: row[name] for name in (column.name for column in COLUMNS)} == {
        "trial_id": "trial_00000",
        "state": "finished",
        "error": "",
        "effective_batch_size": 8,
        "microbatch_size": 4,
        "accumulation_steps": 2,
        "num_workers": 1,
        "device": "cpu",
        "strategy": "25 % again",
        "probe_attempts": 2,
        "probe_cached": False,
        "probe_rule_of_thumb": 6,
        "probe_estimate": 5,
        "probe_seconds": 1.5,
        "memory_budget_bytes": 999,
        "peak_memory_bytes": 200,
        "num_rescues": 0,
        "num_failures": 0,
        "samples_per_second": 20.0,
        "data_wait_share": 0.25,
        "gpu_utilization": 0.5,
        "tokens_per_second": 640.0,
        "padding_share": 0.125,
        "optimizer_steps": 10,
        "num_samples": 80,
        "learning_rate": 0.1,
        "gradient_noise_scale": 100.0,
        "epochs": 2,
        "best_epoch": 1,
        "epoch_seconds": 2.5,
    }
    assert (row["val_accuracy_last"], row["val_accuracy_best"]) == (0.5, 0.9)
    assert (row["train_loss_last"], row["train_loss_best"]) == (2.0, 3.0)  # of the best accuracy's epoch
    assert (row["model.type"], row["hp.batch_size"]) == ("small", 4)


def test_columns_and_types_are_the_same_without_a_single_trial(tmp_path: Path) -> None:
    empty = make_run(tmp_path, []).frame()
    assert len(empty) == 0
    for column in COLUMNS:
        assert empty[column.name].dtype == column.dtype, column.name
    assert list(empty.columns[:5]) == ["trial_id", "state", "error", "model.type", "hp.batch_size"]
    assert {"val_accuracy_last", "val_accuracy_best", "train.epochs"} <= set(empty.columns)
    full = make_run(tmp_path, [finished(epoch(1, 0.5))]).frame()
    fixed = [column.name for column in COLUMNS]
    assert [name for name in full.columns if name in set(fixed)] == fixed
    assert full[fixed].dtypes.equals(empty[fixed].dtypes)


def test_failed_and_pending_trials_are_rows_too(tmp_path: Path) -> None:
    failed: list[Event] = [Started(config=trial_config()), Failed(error="KeyError: 'x'", details="trace")]
    results = make_run(tmp_path, [failed, [Created(config=trial_config("large"))]])
    frame = results.frame()
    assert frame["state"].tolist() == ["failed", "pending"]
    assert frame["error"].tolist() == ["KeyError: 'x'", ""]
    assert frame["model.type"].tolist() == ["small", "large"]
    assert frame["microbatch_size"].isna().all()
    assert frame["val_accuracy_best"].isna().all()
    assert frame["epochs"].dtype == "Int64"
    assert results.num_failed == 1
    assert results.best() is None


def test_trials_that_were_interrupted_are_told_with_their_failures(tmp_path: Path) -> None:
    again: list[Event] = [Started(config=trial_config()), Interrupted(reason="SIGKILL")]
    by_user: list[Event] = [
        Started(config=trial_config()),
        Interrupted(reason="the sweep was interrupted", is_failure=False),
    ]
    given_up: list[Event] = [*again, *again, Failed(error="SIGKILL (failure 2; see trial.max_failures)")]
    trials = [again, by_user, [*again, *finished(epoch(1, 0.5))], given_up, [Created(config=trial_config())]]
    results = make_run(tmp_path, trials)
    frame = results.frame()
    assert frame["state"].tolist() == ["interrupted", "interrupted", "finished", "failed", "pending"]
    assert frame["num_failures"].tolist() == [1, 0, 1, 2, 0]
    assert frame["error"].tolist()[:3] == ["", "", ""]
    assert (results.num_unfinished, results.num_failed) == (3, 1)


def test_a_probe_that_was_off_is_no_missing_value(tmp_path: Path) -> None:
    events = [event for event in finished(epoch(1, 0.5)) if not isinstance(event, Probed)]
    (row,) = make_run(tmp_path, [events]).frame().to_dict("records")
    assert (row["probe_attempts"], row["probe_seconds"], row["memory_budget_bytes"]) == (0, 0.0, 999)


def test_a_config_key_named_like_a_column_gets_a_prefix(tmp_path: Path) -> None:
    config = trial_config(device="tpu", state=7)
    frame = make_run(
        tmp_path, [finished(epoch(1, 0.5), config=config)], config={"device": "tpu", "state": 7}
    ).frame()
    assert frame["device"].tolist() == ["cpu"]
    assert frame["state"].tolist() == ["finished"]
    assert frame["config.device"].tolist() == ["tpu"]
    assert frame["config.state"].tolist() == [7]
    assert frame.columns.is_unique


def test_a_config_key_named_like_a_metric_column_is_not_lost(tmp_path: Path) -> None:
    config = trial_config(val_accuracy_best=0.1)
    frame = make_run(
        tmp_path, [finished(epoch(1, 0.5), config=config)], config={"val_accuracy_best": 0.1}
    ).frame()
    assert frame.columns.is_unique
    assert frame["val_accuracy_best"].tolist() == [0.5]


@pytest.mark.parametrize(("mode", "best"), [("max", "trial_00001"), ("min", "trial_00002")])
def test_the_best_trial_is_that_of_the_sweeps_metric(tmp_path: Path, mode: str, best: str) -> None:
    trials = [finished(epoch(1, value), epoch(2, 0.5)) for value in (0.6, 0.9, 0.2)]
    trials.append([Started(config=trial_config()), Failed(error="x")])
    results = make_run(tmp_path, trials, run={"metric": "val_accuracy", "mode": mode})
    row = results.best()
    assert row is not None
    assert row["trial_id"] == best


def two_metrics(tmp_path: Path) -> SweepResults:
    """The second trial is the more accurate one, the first has the lower loss, in its first epoch."""
    trials = [
        finished(epoch(1, 0.5, 1.0), epoch(2, 0.6, 3.0)),
        finished(epoch(1, 0.9, 4.0), epoch(2, 0.8, 2.0), config=trial_config("large")),
        [Created(config=trial_config("large"))],
    ]
    return make_run(tmp_path, [*trials])


def test_best_by_another_metric_is_of_that_metrics_epoch(tmp_path: Path) -> None:
    results = two_metrics(tmp_path)
    row = results.best("train_loss")
    assert row is not None
    assert (row["trial_id"], row["best_epoch"]) == ("trial_00000", 1)
    assert (row["train_loss_best"], row["val_accuracy_best"]) == (1.0, 0.5)
    assert list(row.index) == list(results.frame().columns)
    worst = results.best("train_loss", mode="max")
    assert worst is not None
    assert (worst["trial_id"], worst["train_loss_best"]) == ("trial_00001", 4.0)
    frame = results.frame(metric="train_loss")
    assert frame["train_loss_best"].tolist()[:2] == [1.0, 2.0]


def test_best_by_a_column_and_among_some(tmp_path: Path) -> None:
    results = two_metrics(tmp_path)
    trials = {
        by: None if (row := results.best(by, where)) is None else row["trial_id"]
        for by, where in (
            (None, None),
            ("val_accuracy", "model.type == small"),
            ("val_accuracy_last", None),
            ("train_loss_best", None),
            ("samples_per_second", ["model.type == large", "state == finished"]),
            ("peak_memory_bytes", "model.type == gone"),
        )
    }
    assert trials == {
        None: "trial_00001",
        "val_accuracy": "trial_00000",
        "val_accuracy_last": "trial_00001",
        "train_loss_best": "trial_00000",  # 3.0, in the epoch of the best accuracy, against 4.0
        "samples_per_second": "trial_00001",
        "peak_memory_bytes": None,
    }
    row = results.best("hp.batch_size", mode="min")
    assert row is not None
    assert row["trial_id"] == "trial_00000"  # the first of equals


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"by": "train_los"}, "no column 'train_los'; did you mean 'train_loss'"),
        ({"by": "model.type"}, "that column holds no numbers"),
        ({"by": "probe_cached"}, "that column holds no numbers"),
        ({"by": "hp.batch_size"}, "add mode='max' or mode='min'"),
        ({"by": "train_loss", "mode": "least"}, "neither 'min' nor 'max'"),
        ({"where": "modl.type == small"}, "did you mean 'model.type'"),
    ],
)
def test_a_best_that_cannot_be_told_is_bad_input(
    tmp_path: Path, arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadInputError, match=re.escape(told)):
        two_metrics(tmp_path).best(**arguments)


def test_a_frame_in_another_order(tmp_path: Path) -> None:
    results = two_metrics(tmp_path)
    assert results.frame(sort="val_accuracy")["trial_id"].str[-1].tolist() == ["1", "0", "2"]
    assert results.frame(sort="-trial_id", where="epochs == 2")["trial_id"].str[-1].tolist() == ["1", "0"]
    with pytest.raises(BadInputError, match="no metric 'loss'; did you mean"):
        results.frame(metric="loss")


def test_the_csv_holds_the_frame(tmp_path: Path) -> None:
    results = make_run(tmp_path, [finished(epoch(1, 0.5)), [Created(config=trial_config("large"))]])
    results.save_csv(tmp_path / "results.csv")
    back = pd.read_csv(tmp_path / "results.csv")
    assert list(back.columns) == list(results.frame().columns)
    assert back["num_samples"].tolist()[0] == 40
    assert back["state"].tolist() == ["finished", "pending"]


def test_parquet_keeps_the_columns_types(tmp_path: Path) -> None:
    trials = [
        finished(epoch(1, 0.5), config=trial_config(mixed=value, lists=[1, 2], some=some, flag=flag))
        for value, some, flag in ((1, 7, True), ("one", None, None), ([1, "a"], 9, False))
    ]
    trials.append([Created(config=trial_config("large"))])
    results = make_run(tmp_path, trials)
    frame = results.frame()
    results.save_parquet(tmp_path / "results.parquet")
    back = pd.read_parquet(tmp_path / "results.parquet")
    assert list(back.columns) == list(frame.columns)
    assert len(back) == len(frame) == 4
    kept = [name for name, dtype in frame.dtypes.items() if not is_object_dtype(dtype)]
    assert {column.name for column in COLUMNS} <= set(kept)
    pd.testing.assert_frame_equal(back[kept], frame[kept])
    assert back["mixed"].fillna("").tolist() == ["1", '"one"', '[1, "a"]', ""]
    assert back["lists"].fillna("").tolist() == ["[1, 2]"] * 3 + [""]
    assert back["flag"].dtype == "boolean"
    assert back["flag"].isna().tolist() == [False, True, False, True]
    assert back["some"].dropna().tolist() == [7, 9]


def test_parquet_of_no_trials_has_the_same_columns(tmp_path: Path) -> None:
    results = make_run(tmp_path, [])
    results.save_parquet(tmp_path / "results.parquet")
    assert list(pd.read_parquet(tmp_path / "results.parquet").columns) == list(results.frame().columns)


def test_a_file_that_cannot_be_written_is_bad_input(tmp_path: Path) -> None:
    results = make_run(tmp_path, [])
    for save in (results.save_csv, results.save_parquet):
        with pytest.raises(BadInputError, match="choose another file"):
            save(tmp_path / "missing" / "results")


def test_results_can_be_read_while_the_sweep_runs(tmp_path: Path) -> None:
    results = make_run(tmp_path, [finished(epoch(1, 0.5))[:-1]])
    assert results.frame()["state"].tolist() == ["training"]
    append_events(results.run_dir / "trials" / "trial_00000.jsonl", [epoch(2, 0.7)])
    assert results.frame()["val_accuracy_best"].tolist() == [0.7]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="not a run directory"):
        load_results(tmp_path)


def test_a_config_key_named_like_a_metrics_column_stays_apart(tmp_path: Path) -> None:
    own = trial_config(val_accuracy_best="mine")
    frame = make_run(tmp_path, [finished(epoch(1, 0.9), config=own), [Created(config=own)]]).frame()
    assert frame["config.val_accuracy_best"].tolist() == ["mine", "mine"]
    assert frame["val_accuracy_best"].tolist()[0] == 0.9


def test_a_count_with_a_fraction_is_missing(tmp_path: Path) -> None:
    report = Reported(metrics={"epoch": 0.5, "val_accuracy": 0.25}, peak_memory_bytes=1)
    frame = make_run(tmp_path, [finished(report)]).frame()
    assert frame["epochs"].isna().all()
    assert frame["val_accuracy_best"].tolist() == [0.25]


@pytest.mark.parametrize(
    "sweep", ["[]", "{}", '{"run": 1}', "[" * 2000, '{"run": {"metric": null, "mode": "min"}}']
)
def test_a_damaged_sweep_is_one_error(tmp_path: Path, sweep: str) -> None:
    results = make_run(tmp_path, [])
    (results.run_dir / "sweep.json").write_text(sweep)
    with pytest.raises(RunDirectoryError, match=r"sweep\.json is damaged"):
        load_results(results.run_dir)
