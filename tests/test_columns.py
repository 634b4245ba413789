from __future__ import annotations

import math
import types
import typing
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain import sections
from tune_easytrain.columns import (
    COLUMNS,
    COMPARISON_COLUMNS,
    HISTORY_COLUMNS,
    SECTION_DTYPES,
    config_dtype,
    is_missing,
    scalar_dtype,
)
from tune_easytrain.trial_record import PROGRESS_KEYS

DTYPES = {int: "Int64", float: "Float64", bool: "boolean", str: "string"}


def scalar_types(annotation: Any) -> set[type]:
    """The types that a field of a section may have, None left out."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) for kind in scalar_types(part)}
    if origin is typing.Annotated:
        return scalar_types(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return set() if annotation is type(None) else {origin or annotation}


def test_dtypes_of_sections_are_those_of_their_fields() -> None:
    found = {}
    for name, section in (
        ("batch", sections.BatchConfig),
        ("train", sections.TrainConfig),
        ("memory", sections.MemoryConfig),
    ):
        for key, field in section.model_fields.items():
            kinds = scalar_types(field.annotation)
            if len(kinds) == 1:
                found[f"{name}.{key}"] = DTYPES[kinds.pop()]
    assert found == SECTION_DTYPES


def test_what_the_loop_reports_has_a_column_in_every_history() -> None:
    assert set(PROGRESS_KEYS) <= {column.name for column in HISTORY_COLUMNS}


@pytest.mark.parametrize("columns", [COLUMNS, HISTORY_COLUMNS, COMPARISON_COLUMNS])
def test_a_columns_unit_is_in_its_name_or_told(columns: tuple[Any, ...]) -> None:
    assert len({column.name for column in columns}) == len(columns)
    for column in columns:
        assert column.meaning
        for ending, unit in (("_bytes", "bytes"), ("_seconds", "s"), ("_per_second", "/s")):
            if column.name.endswith(ending):
                assert column.unit.endswith(unit), column.name


SCALARS = [
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.booleans(),
    st.text(max_size=5).filter(lambda text: "\ud800" not in text),
]


@given(
    st.sampled_from(SCALARS).flatmap(lambda scalar: st.lists(scalar | st.none() | st.just(math.nan))),
)
def test_a_column_of_one_type_holds_its_values_as_they_are(values: list[Any]) -> None:
    dtype = scalar_dtype(values)
    if dtype is None:
        assert all(is_missing(value) for value in values)
        return
    assert dtype != "object"
    column = pd.Series([None if is_missing(value) else value for value in values], dtype=dtype)  # type: ignore[call-overload]
    for before, after in zip(values, column, strict=True):
        assert is_missing(after) if is_missing(before) else (after == before)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 0.5], "Float64"),
        ([2**53 + 1, 0.5], "object"),
        ([2**63], "object"),
        ([True, 1], "object"),
        (["a", 1], "object"),
        ([[1], [2]], "object"),
        ([{}], "object"),
        ([None, math.nan, pd.NA, pd.NaT], None),
        ([], None),
    ],
)
def test_the_dtype_of_mixed_values(values: list[Any], dtype: str | None) -> None:
    assert scalar_dtype(values) == dtype


def test_a_section_s_dtype_holds_unless_its_values_are_of_another() -> None:
    assert config_dtype("train.clip_norm", []) == "Float64"
    assert config_dtype("train.clip_norm", [1]) == "Float64"
    assert config_dtype("train.epochs", [None]) == "Int64"
    assert config_dtype("train.epochs", ["three"]) == "string"
    assert config_dtype("train.epochs", [[3]]) == "object"
    assert config_dtype("hp.unknown", [None]) == "object"
