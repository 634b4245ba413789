"""Conditions from a command line: rows of the frame come out, or one message; no code runs."""

from __future__ import annotations

import pandas as pd
from hostile import assert_told, fuzzed, guarded, mutated
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.condition import select
from tune_easytrain.errors import BadInputError
from tune_easytrain.ranking import sort_rows

FRAME = pd.DataFrame(
    {
        "trial_id": pd.array(["a", "b", None], dtype="string"),
        "hp.x": pd.array([1, 2**62, None], dtype="Int64"),
        "val_loss_best": [0.5, float("inf"), float("nan")],
        "flag": pd.array([True, False, None], dtype="boolean"),
        "any": [[1], "text", {"a": None}],
    }
)
CONDITIONS = [
    b"trial_id == a and hp.x >= 2",
    b"val_loss < 1e-3 and flag != true and any == '[1]'",
    b'"any" == "text" and trial_id != null',
    b"__import__('os').system('touch owned') == 1",
    b"@pd.eval('1') == `hp.x`",
]


@fuzzed()
@given(content=mutated(CONDITIONS), others=st.text("=!<>'\"\\ \x00and", max_size=20))
def test_conditions(content: bytes, others: str) -> None:
    for text in (content.decode("utf-8", "surrogateescape"), others):
        with guarded():
            try:
                chosen = select(FRAME, text)
            except BadInputError as error:
                told = str(error)
            else:
                told = ""
                assert set(chosen.index) <= set(FRAME.index)
                assert list(chosen.columns) == list(FRAME.columns)
        assert not told or told.startswith("condition ")


@fuzzed()
@given(by=st.sampled_from([*FRAME.columns, "val_loss"]) | st.text(max_size=10), falling=st.booleans())
def test_orders(by: str, falling: bool) -> None:
    with guarded():
        try:
            rows = sort_rows(FRAME, f"-{by}" if falling else by)
        except BadInputError as error:
            assert_told(error, "no column")
            return
    assert len(rows) == len(FRAME)
