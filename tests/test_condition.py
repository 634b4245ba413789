from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import epoch, finished, make_run, trial_config

from tune_easytrain.condition import Comparison, parse_condition, select
from tune_easytrain.errors import BadInputError
from tune_easytrain.events import Created, Event, Failed, Started

FRAME = pd.DataFrame(
    {
        "trial_id": pd.array(["t0", "t1", "t2", "t3"], dtype="string"),
        "model.type": pd.array(["r3d_18", "s3d", "s3d", None], dtype="string"),
        "hp.batch_size": pd.array([128, 32, 2**53 + 1, None], dtype="Int64"),
        "hp.learning_rate": pd.array([0.1, 0.01, 1.0, None], dtype="Float64"),
        "val_loss_best": [0.5, 1.5, float("nan"), float("inf")],
        "probe_cached": pd.array([True, False, True, None], dtype="boolean"),
        "any": [1, "one", [1, 2], None],
        "a key, \"so\" called": [1.0, 2.0, 3.0, 4.0],
        "time": pd.to_datetime(["2026-11-22T10:00", "2026-11-22T12:00", None, None], utc=True),
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("model.type == s3d", "12"),
        ("model.type==s3d", "12"),
        ("model.type == 's3d' and hp.batch_size < 64", "1"),
        ("hp.batch_size >= 32 AND hp.learning_rate > 1e-1", "2"),
        ("hp.batch_size && 3 == 3", None),
        ("hp.batch_size == 9007199254740993", "2"),
        ("hp.batch_size == 9007199254740992", ""),
        ("hp.batch_size != 128", "12"),  # what is missing is neither equal nor unequal
        ("hp.batch_size == null", "3"),
        ("hp.batch_size != null and model.type != r3d_18", "12"),
        ("val_loss < 1", "0"),  # the metric's best values
        ("val_loss_best == inf", "3"),
        ("val_loss_best > -inf", "013"),
        ("probe_cached == true", "02"),
        ("probe_cached != true", "1"),
        ("any == 1", "0"),
        ("any == one", "1"),
        ("any == '[1, 2]'", "2"),
        ("any > 0", "0"),
        ("any != 1", "12"),
        ('"a key, \\"so\\" called" >= 3', "23"),
        ("trial_id > t1", "23"),
        ("time > 2026-11-22T11:00", "1"),
        ("model.type == 'null'", ""),
        (f"hp.learning_rate < {'9' * 5000}", "012"),
    ],
)
def test_a_condition_chooses_rows(condition: str, rows: str | None) -> None:
    if rows is None:
        with pytest.raises(BadInputError):
            select(FRAME, condition)
        return
    assert "".join(select(FRAME, condition)["trial_id"]).replace("t", "") == rows


def test_several_conditions_all_have_to_hold() -> None:
    assert select(FRAME, ["model.type == s3d", "hp.batch_size < 64"])["trial_id"].tolist() == ["t1"]
    assert select(FRAME, None) is FRAME
    assert select(FRAME, []) is FRAME
    assert list(select(FRAME, "trial_id == gone").columns) == list(FRAME.columns)


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ("", "it is empty"),
        ("model.tipe == s3d", "no column 'model.tipe'; did you mean 'model.type'?"),
        ("val_los == 1", "did you mean 'val_loss'"),
        ("model.type = s3d", "write =="),
        ("model.type => s3d", "=> is not one of == != < <= > >="),
        ("model.type", "one of == != < <= > >= is missing after 'model.type'"),
        ("== s3d", "the column before == is missing"),
        ("model.type ==", "the value after == is missing"),
        ("model.type == and any == 1", "the value after == is missing"),
        ("model.type == s3d and", "a comparison is missing"),
        ("model.type == s3d or any == 1", "joined by `and`, never by `or`"),
        ("model.type == two words", "`and` is missing between 'two' and 'words'"),
        ("model.type == 's3d", "a quote is not closed"),
        ("hp.batch_size == many", "hp.batch_size holds numbers, and 'many' is none"),
        ("hp.batch_size == '128'", "hp.batch_size holds numbers"),
        ("probe_cached == 1", "write true or false"),
        ("probe_cached < true", "write == or !="),
        ("model.type < null", "null is neither more nor less than anything"),
        ("time < noon", "write one such as 2026-11-22T10:00"),
    ],
)
def test_what_is_wrong_with_a_condition_is_told(condition: str, told: str) -> None:
    with pytest.raises(BadInputError) as caught:
        select(FRAME, condition)
    assert told in str(caught.value)
    assert repr(condition) in str(caught.value)


OPERATORS = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt,
    "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@given(
    name=st.text(min_size=1),
    values=st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=1),
    sign=st.sampled_from([*OPERATORS]),
    data=st.data(),
)
def test_numbers_are_compared_exactly(name: str, values: list[Any], sign: str, data: st.DataObject) -> None:
    near = [value for value in values if value is not None] or [0]
    number = st.sampled_from(near) | st.integers() | st.floats(allow_nan=False)
    meant = data.draw(number)
    column = pd.array(values, dtype="Int64")
    frame = pd.DataFrame({name: column}).assign(**{f"{name}_row": range(len(values))})
    chosen = select(frame, f"{quoted(name)} {sign} {meant!r}")
    assert chosen[f"{name}_row"].tolist() == rows_that_hold(values, sign, meant)


@given(values=st.lists(st.none() | st.text(), min_size=1), sign=st.sampled_from([*OPERATORS]), data=st.data())
def test_texts_are_compared_as_they_are(values: list[Any], sign: str, data: st.DataObject) -> None:
    meant = data.draw(st.sampled_from([value for value in values if value is not None] or [""]) | st.text())
    frame = pd.DataFrame({"name": pd.array(values, dtype="string"), "row": range(len(values))})
    chosen = select(frame, f"name {sign} {quoted(meant)}")
    assert chosen["row"].tolist() == rows_that_hold(values, sign, meant)


def rows_that_hold(values: list[Any], sign: str, meant: Any) -> list[int]:
    return [row for row, value in enumerate(values) if value is not None and OPERATORS[sign](value, meant)]


@given(st.text("ab.=!<>'\"\\ 1", max_size=30) | st.text(max_size=30))
def test_any_text_is_a_condition_or_one_clear_fault(text: str) -> None:
    try:
        comparisons = parse_condition(text)
    except BadInputError as error:
        told = str(error)
    else:
        told = ""
        assert comparisons
        assert_read_again(comparisons)
    assert not told or told.startswith(f"condition {text!r}: ")


def assert_read_again(comparisons: list[Comparison]) -> None:
    """Written anew, with names in quotes, it is the same condition."""
    again = " and ".join(
        f"{quoted(c.column)} {c.operator} {quoted(c.value.text) if c.value.is_quoted else c.value.text}"
        for c in comparisons
    )
    assert [(c.column, c.operator, c.value) for c in parse_condition(again)] == [
        (c.column, c.operator, c.value) for c in comparisons
    ]


def test_conditions_on_the_results_of_a_run(tmp_path: Path) -> None:
    failed: list[Event] = [Started(config=trial_config("large")), Failed(error="x")]
    results = make_run(tmp_path, [finished(epoch(1, 0.9)), failed, [Created(config=trial_config("large"))]])
    condition = "model.type == large and batch.effective_batch_size >= 8 and state != failed"
    assert results.frame(where=condition)["trial_id"].tolist() == ["trial_00002"]
    assert results.frame(where="val_accuracy > 0.5")["trial_id"].tolist() == ["trial_00000"]
