from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.columns import COLUMNS
from tune_easytrain.errors import BadInputError
from tune_easytrain.ranking import find_column, known_mode, require_mode, sort_rows

FRAME = pd.DataFrame({"loss": ["own"], "loss_best": [0.5], "score_best": [1.0], "hp.lr": [0.1]})


@pytest.mark.parametrize(
    ("name", "column"),
    [("loss", "loss"), ("score", "score_best"), ("score_best", "score_best"), ("hp.lr", "hp.lr")],
)
def test_a_column_is_found_by_its_name_or_its_metrics(name: str, column: str) -> None:
    assert find_column(FRAME, name) == column


def test_a_column_that_is_not_there_is_told_with_those_like_it() -> None:
    with pytest.raises(BadInputError, match=r"no column 'hp\.rl'; did you mean 'hp\.lr'\?"):
        find_column(FRAME, "hp.rl")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("val_loss", "min"),
        ("val_loss_best", "min"),
        ("train/top-1 error", "min"),
        ("val_accuracy", "max"),
        ("f1", "max"),
        ("val_score", None),
        ("glossary", None),
        ("accuracy_loss", None),
        ("samples_per_second", "max"),
        ("peak_memory_bytes", "min"),
        ("learning_rate", None),
    ],
)
def test_which_end_is_better_is_known_by_name(name: str, mode: Any) -> None:
    assert known_mode(name) == mode


def test_every_fixed_column_says_what_is_better_or_that_nothing_is() -> None:
    for column in COLUMNS:
        assert known_mode(column.name) == column.better
        assert column.better is None or column.dtype in ("Int64", "float64")


def test_a_mode_that_is_not_known_is_asked_for() -> None:
    assert require_mode("val_score", "max") == "max"
    assert require_mode("val_loss", "max") == "max"
    with pytest.raises(BadInputError, match="add mode='max' or mode='min'"):
        require_mode("val_score", None)
    with pytest.raises(BadInputError, match="neither 'min' nor 'max'"):
        require_mode("val_score", "best")  # type: ignore[arg-type]


ROWS = pd.DataFrame(
    {
        "trial_id": ["a", "b", "c", "d"],
        "accuracy_best": [0.5, None, 0.9, 0.5],
        "score_best": [2.0, 1.0, None, 3.0],
        "any": [[2], "x", None, 1],
        "-odd": [4, 3, 2, 1],
    }
)


@pytest.mark.parametrize(
    ("by", "order"),
    [
        ("accuracy", "cadb"),  # the best first
        ("-accuracy", "cadb"),
        ("accuracy_best", "adcb"),
        ("-accuracy_best", "cadb"),
        ("score", "badc"),  # nobody knows what is better
        ("-score", "dabc"),
        ("trial_id", "abcd"),
        ("-trial_id", "dcba"),
        ("any", "dabc"),  # as JSON texts
        ("-odd", "dcba"),
    ],
)
def test_rows_are_sorted(by: str, order: str) -> None:
    assert "".join(sort_rows(ROWS, by)["trial_id"]) == order


@pytest.mark.parametrize(("mode", "order"), [("min", "badc"), ("max", "dabc")])
def test_the_sweeps_metric_is_sorted_by_its_mode(mode: Any, order: str) -> None:
    assert "".join(sort_rows(ROWS, "score", "score", mode)["trial_id"]) == order


def test_sorting_by_a_column_that_is_not_there_is_told() -> None:
    for by in ("scoer", "-scoer", "-"):
        with pytest.raises(BadInputError, match="no column"):
            sort_rows(ROWS, by)


@given(st.lists(st.none() | st.integers(-3, 3)), st.booleans())
def test_sorting_keeps_every_row_in_order(values: list[int | None], is_falling: bool) -> None:
    frame = pd.DataFrame({"x": pd.array(values, dtype="Int64"), "row": range(len(values))})
    rows = [*range(len(values))]
    present = [row for row in rows if values[row] is not None]
    expected = sorted(present, key=lambda row: -values[row] if is_falling else values[row])  # type: ignore[operator, arg-type, return-value]
    expected += [row for row in rows if values[row] is None]
    assert sort_rows(frame, "-x" if is_falling else "x")["row"].tolist() == expected
