from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import epoch, finished, make_run
from pandas.api.types import is_object_dtype

import tune_easytrain as te
from tune_easytrain.columns import COLUMNS, is_missing
from tune_easytrain.events import Created, Started
from tune_easytrain.frame import build_frame
from tune_easytrain.trial_record import TrialRecord
from tune_easytrain.trial_space import flatten_config

GRID = {
    "hp.learning_rate": [0.001, 1],
    "hp.drawn": {"uniform": [0.0, 1.0]},
    "hp.count": {"randint": [1, 9]},
    "hp.name": {"choice": ["adam", "sgd"]},
    "hp.flag": [True, False],
    "hp.shape": [[1, 2], [3]],
    "hp.any": [1, "one"],
    "train.clip_norm": [1, None],
}
CONFIG = {"data": {"root": "/data", "num_classes": 10, "scale": None}}
DTYPES = {
    "hp.learning_rate": "Float64",
    "hp.drawn": "Float64",
    "hp.count": "Int64",
    "hp.name": "string",
    "hp.flag": "boolean",
    "hp.shape": "object",
    "hp.any": "object",
    "data.root": "string",
    "data.num_classes": "Int64",
    "train.clip_norm": "Float64",
    "train.patience": "Int64",
    "batch.memory_budget": "Int64",
    "batch.group_by_length": "boolean",
    "train.function": "string",
}


def test_config_columns_have_the_same_dtype_in_every_run(tmp_path: Path) -> None:
    sweep = {"grid_search": {"grid": GRID}, "config": CONFIG}
    hp: dict[str, Any] = {"learning_rate": 1, "drawn": 0.5, "count": 3, "name": "sgd", "flag": True}
    begun = {"hp": {**hp, "shape": [3], "any": 1}, **CONFIG, "train": {"clip_norm": 1}}
    known = {"hp": {"learning_rate": 1, "flag": True}, **CONFIG}
    runs = ([], [[Created(config=known)]], [[Started(config=begun)]], [[Created(config={})]])
    for trials in runs:
        frame = make_run(tmp_path, [*trials], **sweep).frame()
        assert {name: str(frame[name].dtype) for name in DTYPES} == DTYPES


def test_settings_have_their_dtype_though_no_trial_has_them() -> None:
    frame = build_frame([TrialRecord("trial_00000")], "loss", "min", ["train.epochs", "memory.sharding"])
    assert (frame["train.epochs"].dtype, frame["memory.sharding"].dtype) == ("Int64", "string")
    assert frame["train.epochs"].isna().all()


NAMES = st.sampled_from(["model.type", "hp.batch_size", "a", "b.c", "train.seed"])
LISTS = {
    "model.type": st.text("abc", min_size=1, max_size=3),
    "hp.batch_size": st.integers(1, 99),
    "a": st.floats(0, 1),
    "b.c": st.booleans(),
    "train.seed": st.integers(0, 9),
}


@settings(max_examples=25)
@given(st.data())
def test_pairs_are_flat_columns(data: st.DataObject) -> None:
    """Each key of a pair group is a column of its own that holds scalars; nothing is left of the tuples."""
    group = data.draw(st.lists(NAMES, min_size=2, max_size=5, unique=True))
    length = data.draw(st.integers(2, 4))
    grid = {key: data.draw(st.lists(LISTS[key], min_size=length, max_size=length)) for key in group}
    sweep = {"grid_search": {"grid": grid, "pair": [group]}, "batch": {"effective_batch_size": 8}}
    trials = te.expand_trials(te.load_config(sweep))
    records = [
        TrialRecord.from_events(f"trial_{index}", [Started(config=trial)])
        for index, trial in enumerate(trials)
    ]
    frame = build_frame(records, "loss", "min", group, grid)
    assert len(frame) == length
    for key in group:
        assert frame[key].tolist() == grid[key]
        assert not is_object_dtype(frame[key].dtype)
    assert "point" not in frame
    own = {name for trial in trials for name in flatten_config(trial)}
    assert own <= set(frame.columns)


def test_the_default_pair_is_two_columns_in_a_frame_of_a_run(tmp_path: Path) -> None:
    trials = te.expand_trials(make_config())
    frame = make_run(tmp_path, [finished(epoch(1, 0.5), config=trial) for trial in trials]).frame()
    assert frame[["model.type", "hp.batch_size"]].to_dict("list") == {
        "model.type": ["small", "large"],
        "hp.batch_size": [4, 2],
    }
    assert frame[["model.type", "hp.batch_size"]].dtypes.astype(str).tolist() == ["string", "Int64"]


def make_config() -> te.SweepConfig:
    grid = {"model.type": ["small", "large"], "hp.batch_size": [4, 2]}
    return te.load_config({"grid_search": {"grid": grid}, "batch": {"effective_batch_size": 8}})


def test_grid_values_that_are_mappings_are_columns_of_the_keys_in_them(tmp_path: Path) -> None:
    values = [{"name": "adam", "lr": 0.1}, {"name": "sgd", "lr": 1}]
    trials = [[Created(config={"optimizer": value})] for value in values]
    results = make_run(tmp_path, [*trials], grid_search={"grid": {"optimizer": values}})
    frame = results.frame()
    assert "optimizer" not in frame
    assert results.varied_keys() == ["optimizer.name", "optimizer.lr"]
    assert frame["optimizer.name"].tolist() == ["adam", "sgd"]
    assert frame["optimizer.lr"].dtype == "Float64"


def test_every_row_is_a_trial_and_every_column_of_one_length() -> None:
    frame = build_frame([TrialRecord("trial_00000"), TrialRecord("trial_00001")], "loss", "min", [])
    assert frame["trial_id"].tolist() == ["trial_00000", "trial_00001"]
    assert isinstance(frame.index, pd.RangeIndex)
    fixed = [column.name for column in COLUMNS]
    assert [name for name in frame if name in fixed] == fixed


@pytest.mark.parametrize("value", [float("nan"), None])
def test_a_missing_value_in_a_config_is_missing(tmp_path: Path, value: Any) -> None:
    trials = [[Created(config={"hp": {"x": x}})] for x in (1.5, value)]
    column = make_run(tmp_path, [*trials]).frame()["hp.x"]
    assert column.dtype == "Float64"
    assert [is_missing(cell) for cell in column] == [False, True]
