from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import epoch, finished, make_run

import tune_easytrain as te
from tune_easytrain.columns import COMPARISON_COLUMNS
from tune_easytrain.comparison import compare
from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.events import Reported

Point = dict[str, Any]


def run_of(folder: Path, points: list[Point], metric: str = "val_accuracy", **sweep: Any) -> te.SweepResults:
    """A run whose grid has these keys; trial number n has the accuracy n / 8."""
    keys = (points or [{"model.type": "a", "hp.x": 1}])[0]
    grid = {key: unique([point[key] for point in points]) or ["a"] for key in keys}
    trials = [
        finished(epoch(1, number / 8, 8.0 - number), config=nested(point))
        for number, point in enumerate(points)
    ]
    run = {"metric": metric, "mode": "max"}
    return make_run(folder, [*trials], grid_search={"grid": grid, "pair": "none"}, run=run, **sweep)


def unique(values: list[Any]) -> list[Any]:
    return [value for number, value in enumerate(values) if value not in values[:number]]


def nested(point: Point) -> dict[str, Any]:
    config: dict[str, Any] = {}
    for key, value in point.items():
        section, _, name = key.partition(".")
        config.setdefault(section, {})[name] = value
    return config


def models(*values: Any, key: str = "hp.batch_size") -> list[Point]:
    return [{"model.type": model, key: value} for model, value in zip("abcd", values, strict=False)]


def matched(frame: pd.DataFrame) -> list[tuple[Any, Any]]:
    """The numbers of the trials that stand in a row together."""
    return [
        tuple(None if pd.isna(row[side]) else int(row[side][-1]) for side in ("trial_id_a", "trial_id_b"))
        for _, row in frame.iterrows()
    ]  # type: ignore[misc]


def test_trials_of_two_runs_stand_side_by_side(tmp_path: Path) -> None:
    a, b = run_of(tmp_path, models(4, 2)), run_of(tmp_path, models(4, 2)[::-1])
    frame = compare(a, b)
    assert frame["model.type"].tolist() == ["a", "b"]
    assert frame["hp.batch_size"].tolist() == [4, 2]
    assert frame["hp.batch_size"].dtype == "Int64"
    assert frame["found_in"].tolist() == ["both", "both"]
    assert matched(frame) == [(0, 1), (1, 0)]
    assert frame["val_accuracy_a"].tolist() == [0.0, 0.125]
    assert frame["val_accuracy_b"].tolist() == [0.125, 0.0]
    assert frame["val_accuracy_difference"].tolist() == [0.125, -0.125]
    assert frame["samples_per_second_ratio"].tolist() == [1.0, 1.0]
    assert frame["peak_memory_bytes_ratio"].tolist() == [1.0, 1.0]
    expected = {c.name.replace("<metric>", "val_accuracy"): c.dtype for c in COMPARISON_COLUMNS}
    assert {name: str(frame[name].dtype) for name in expected} == expected
    assert list(frame.columns) == ["model.type", "hp.batch_size", *expected]


def test_paths_will_do(tmp_path: Path) -> None:
    a, b = run_of(tmp_path, models(4, 2)), run_of(tmp_path, models(4, 3))
    pd.testing.assert_frame_equal(te.compare(a.run_dir, str(b.run_dir)), compare(a, b))
    with pytest.raises(RunDirectoryError, match="is not a run directory"):
        compare(a, tmp_path)


def test_what_differs_between_the_runs_alone_is_told_and_keeps_nothing_apart(tmp_path: Path) -> None:
    a = run_of(tmp_path, models(4, 2), train={"epochs": 1}, config={"data": {"split": 1}})
    points = [{**point, "train.epochs": 3} for point in models(4, 2)]
    b = run_of(tmp_path, points, config={"data": {"split": 2}})
    # A config of its own is complete; those of these events hold what is given, so give both.
    frame = compare(a, b)
    assert frame["found_in"].tolist() == ["both", "both"]
    assert frame["train.epochs_b"].tolist() == [3, 3]
    assert frame["train.epochs_a"].dtype == "Int64"


def test_a_key_that_goes_with_another_may_differ_between_the_runs(tmp_path: Path) -> None:
    frame = compare(run_of(tmp_path, models(8, 4, 2)), run_of(tmp_path, models(8, 2, 4)))
    assert matched(frame) == [(0, 0), (1, 1), (2, 2)]
    assert "hp.batch_size" not in frame
    assert frame["hp.batch_size_a"].tolist() == [8, 4, 2]
    assert frame["hp.batch_size_b"].tolist() == [8, 2, 4]


def test_a_trial_of_one_run_is_a_row_too(tmp_path: Path) -> None:
    frame = compare(run_of(tmp_path, models(8, 4, 2)), run_of(tmp_path, models(8, 4, 2, 1)[1:]))
    assert frame["model.type"].tolist() == ["a", "b", "c", "d"]
    assert frame["found_in"].tolist() == ["a", "both", "both", "b"]
    assert matched(frame) == [(0, None), (1, 0), (2, 1), (None, 2)]
    assert frame["val_accuracy_difference"].isna().tolist() == [True, False, False, True]
    assert frame["state_b"].isna().tolist() == [True, False, False, False]


def test_values_of_a_crossed_grid_that_differ_are_other_trials(tmp_path: Path) -> None:
    def crossed(rates: list[float]) -> list[Point]:
        return [{"model.type": model, "hp.lr": rate} for model in "ab" for rate in rates]

    frame = compare(run_of(tmp_path, crossed([0.1, 1])), run_of(tmp_path, crossed([1.0, 10.0])))
    assert frame["found_in"].tolist() == ["a", "both", "a", "both", "b", "b"]
    other = compare(run_of(tmp_path, crossed([0.1, 1])), run_of(tmp_path, crossed([2, 10])))
    assert other["found_in"].tolist() == ["a"] * 4 + ["b"] * 4
    by_model = compare(
        run_of(tmp_path, crossed([0.1, 1])), run_of(tmp_path, crossed([2, 10])), on="model.type"
    )
    assert matched(by_model) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert by_model["hp.lr_b"].tolist() == [2, 10, 2, 10]


def test_trials_that_are_alike_are_matched_in_order(tmp_path: Path) -> None:
    alike = [{"model.type": "a"}] * 2
    frame = compare(run_of(tmp_path, alike), run_of(tmp_path, [*alike, {"model.type": "a"}]))
    assert matched(frame) == [(0, 0), (1, 1), (None, 2)]


def test_a_key_with_the_name_of_a_column_stays_apart(tmp_path: Path) -> None:
    trials = [finished(epoch(1, 0.5), config={"found_in": place}) for place in ("here", "there")]
    sweep = {"grid_search": {"grid": {"found_in": ["here", "there"]}}}
    frame = compare(make_run(tmp_path, [*trials], **sweep), make_run(tmp_path, [*trials], **sweep))
    assert frame["config.found_in"].tolist() == ["here", "there"]
    assert frame["found_in"].tolist() == ["both", "both"]


def test_true_is_not_one(tmp_path: Path) -> None:
    frame = compare(
        run_of(tmp_path, models(True, 2, key="hp.x")), run_of(tmp_path, models(1, 2, key="hp.x")), on=["hp.x"]
    )
    assert frame["found_in"].tolist() == ["a", "both", "b"]


def test_another_metric_is_compared_by_its_own_best_epochs(tmp_path: Path) -> None:
    reports = [epoch(1, 0.75, 3.0), epoch(2, 0.5, 2.0)]
    a, b = (make_run(tmp_path, [finished(*reports[:count])]) for count in (1, 2))
    (row,) = compare(a, b, metric="train_loss").to_dict("records")
    assert (row["train_loss_a"], row["train_loss_b"], row["train_loss_difference"]) == (3.0, 2.0, -1.0)
    with pytest.raises(BadInputError, match="no metric 'train_los'; did you mean 'train_loss'"):
        compare(a, b, metric="train_los")
    with pytest.raises(BadInputError, match="on: no config key 'model' in both runs; did you mean 'model"):
        compare(a, b, on=["model"])


def test_the_metric_of_the_first_run_counts(tmp_path: Path) -> None:
    a, b = run_of(tmp_path, models(4)), run_of(tmp_path, models(4), metric="train_loss")
    assert "val_accuracy_difference" in compare(a, b)
    assert "train_loss_difference" in compare(b, a)


def test_nothing_is_divided_by_no_memory(tmp_path: Path) -> None:
    none = Reported(metrics={"epoch": 1, "val_accuracy": 0.5, "samples_per_second": 0.0}, peak_memory_bytes=0)
    a, b = make_run(tmp_path, [finished(none)]), run_of(tmp_path, models(4))
    (row,) = compare(a, b, on=[]).to_dict("records")
    assert pd.isna(row["peak_memory_bytes_ratio"])
    assert pd.isna(row["samples_per_second_ratio"])


def test_runs_without_trials_are_compared_to_nothing(tmp_path: Path) -> None:
    empty = make_run(tmp_path, [])
    assert len(compare(empty, empty)) == 0
    assert compare(empty, run_of(tmp_path, models(4, 2)))["found_in"].tolist() == ["b", "b"]


POINTS = st.lists(
    st.fixed_dictionaries({"model.type": st.sampled_from("abc"), "hp.x": st.integers(1, 3)}), max_size=6
)


@settings(max_examples=10)
@given(points_a=POINTS, points_b=POINTS)
def test_every_trial_is_in_one_row_and_equal_ones_are_together(
    tmp_path_factory: pytest.TempPathFactory, points_a: list[Point], points_b: list[Point]
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    frame = compare(run_of(folder, points_a), run_of(folder, points_b), on=["model.type", "hp.x"])
    pairs = matched(frame)
    for side, points in ((0, points_a), (1, points_b)):
        assert sorted(pair[side] for pair in pairs if pair[side] is not None) == [*range(len(points))]
    assert all(points_a[a] == points_b[b] for a, b in pairs if a is not None and b is not None)
    alone = [
        [points[n] for n in rest] for points, rest in zip((points_a, points_b), alone_in(pairs), strict=True)
    ]
    assert not any(point in alone[1] for point in alone[0])
    found = compare(run_of(folder, points_a), run_of(folder, points_b))  # by keys that it finds
    together = [pair for pair in matched(found) if None not in pair]
    assert len(together) >= len([pair for pair in pairs if None not in pair])


def alone_in(pairs: list[tuple[Any, Any]]) -> tuple[list[int], list[int]]:
    return [a for a, b in pairs if b is None], [b for a, b in pairs if a is None]
