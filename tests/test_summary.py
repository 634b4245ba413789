from __future__ import annotations

from pathlib import Path

from made_runs import epoch, finished, make_run, trial_config

from tune_easytrain.comparison import compare
from tune_easytrain.events import Created, Failed, Started
from tune_easytrain.summary import DISPENSABLE, comparison_rows, error_lines, summary_rows


def test_a_trial_whose_plan_was_lost_is_shown_all_the_same(tmp_path: Path) -> None:
    results = make_run(tmp_path, [[Started(config=trial_config()), epoch(1, 0.5)]])
    headings, rows = summary_rows(results.frame(), "val_accuracy", [])
    assert dict(zip(headings, rows[0], strict=True))["peak / budget"] == ""


def test_the_summary_shows_the_keys_that_vary_and_the_best_value(tmp_path: Path) -> None:
    results = make_run(tmp_path, [finished(epoch(1, 0.5))])
    headings, rows = summary_rows(results.frame(), "val_accuracy", results.varied_keys())
    assert headings[:3] == ["trial", "model.type", "hp.batch_size"]
    assert headings[-1] == "val_accuracy (best)"
    assert rows[0][-1] == "0.5"
    failed = make_run(tmp_path, [[Started(config=trial_config()), Failed(error="KeyError: 'x'\nmore")]])
    headings, _ = summary_rows(failed.frame(), "val_accuracy", ["model.type", "gone"])
    assert headings[:3] == ["trial", "model.type", "state"]


def test_values_that_are_lists_stand_in_the_table(tmp_path: Path) -> None:
    results = make_run(
        tmp_path, [[Created(config={"shape": [1, 2]})]], grid_search={"grid": {"shape": [[1, 2], [3]]}}
    )
    _, rows = summary_rows(results.frame(), results.metric, results.varied_keys())
    assert rows[0][1] == "[1, 2]"


def test_a_narrow_table_does_without_columns_that_are_there(tmp_path: Path) -> None:
    headings, _ = summary_rows(make_run(tmp_path, []).frame(), "val_accuracy", [])
    assert set(headings) - set(DISPENSABLE) == {"trial", "state", "val_accuracy (best)"}
    assert set(DISPENSABLE) < set(headings)


def test_every_failure_has_a_line_of_bearable_length(tmp_path: Path) -> None:
    errors = ["KeyError: 'x'\nmore", f"ValueError: {'long ' * 100}"]
    failed = [[Started(config=trial_config()), Failed(error=error)] for error in errors]
    short, long = error_lines(make_run(tmp_path, [*failed, finished(epoch(1, 0.5))]).frame())
    assert short == "trial_00000 failed: KeyError: 'x'"
    assert len(long) < 250
    assert long.startswith("trial_00001 failed: ValueError: long long")
    assert long.endswith("…")


def test_a_comparison_is_a_table_of_its_keys_and_numbers(tmp_path: Path) -> None:
    a, b = (make_run(tmp_path, [finished(epoch(1, accuracy))]) for accuracy in (0.5, 0.75))
    headings, (row,) = comparison_rows(compare(a, b), "val_accuracy")
    assert dict(zip(headings, row, strict=True)) == {
        "trial a": "trial_00000",
        "trial b": "trial_00000",
        "val_accuracy_a": "0.5",
        "val_accuracy_b": "0.75",
        "difference": "0.25",
        "samples/s ratio": "1",
        "peak ratio": "1",
    }
