"""The dashboard's pages of hostile events and addresses: each is built, and says what it has to say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hostile import fuzzed, guarded, mutated, replaced
from hypothesis import given
from hypothesis import strategies as st
from plotly.utils import PlotlyJSONEncoder
from test_event_files import LINES, SWEEP

from tune_easytrain.config import load_config
from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.app import VIEWS, Desk
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.run_directory import RunDirectory, trial_id

VIEW_NAMES = [*(view.name for view in VIEWS), "trial"]
QUESTIONS = ("where", "search", "sort", "page", "pick", "metric", "x", "brush", "with")
KNOWN_ANSWERS = (
    "",
    "state == finished",
    "-val_loss_best",
    "2",
    "trial_00001,x",
    "val_loss",
    "hours",
    '{"a": [1]}',
)


@pytest.fixture(scope="module")
def directory(folder: Path) -> RunDirectory:
    directory = RunDirectory.create(folder, "demo")
    directory.save_sweep(load_config(SWEEP).resolved())
    directory.trial_path(trial_id(1)).write_bytes(b"\n".join(LINES) + b"\n")
    return directory


def built(directory: RunDirectory, view: str, query: dict[str, str]) -> str:
    """Return a page as it goes to the browser."""
    desk = Desk(RunList([str(directory.path)]))
    trial = trial_id(0) if view == "trial" else ""
    with guarded():
        _, page = desk.answer(Address(directory.path.name, view, trial, query), "")
        assert page is not None
        text = json.dumps([list(page.controls), list(page.live)], cls=PlotlyJSONEncoder)
    assert "This view failed" not in text
    json.loads(text, parse_constant=_refuse)
    return text


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON, which a browser would refuse")


@pytest.mark.parametrize("view", VIEW_NAMES)
def test_a_whole_run_is_shown(directory: RunDirectory, view: str) -> None:
    directory.trial_path(trial_id(0)).write_bytes(b"\n".join(LINES) + b"\n")
    assert built(directory, view, {})


@fuzzed(0.3, ci_share=0.5)
@given(content=mutated([b"\n".join(LINES) + b"\n"]), view=st.sampled_from(VIEW_NAMES))
def test_mutated_events(directory: RunDirectory, content: bytes, view: str) -> None:
    directory.trial_path(trial_id(0)).write_bytes(content)
    built(directory, view, {})


@fuzzed(0.3, ci_share=0.5)
@given(data=st.data(), view=st.sampled_from(VIEW_NAMES))
def test_hostile_values_in_events(directory: RunDirectory, data: st.DataObject, view: str) -> None:
    documents = [json.loads(line) for line in LINES]
    place = data.draw(st.integers(0, len(documents) - 1))
    documents[place] = data.draw(replaced([documents[place]]))
    lines = [json.dumps(document).encode() for document in documents]
    directory.trial_path(trial_id(0)).write_bytes(b"\n".join(lines) + b"\n")
    built(directory, view, {})


@fuzzed(0.3, ci_share=0.5)
@given(
    view=st.sampled_from(VIEW_NAMES) | st.text(max_size=5),
    query=st.dictionaries(st.sampled_from(QUESTIONS), st.sampled_from(KNOWN_ANSWERS) | st.text(max_size=20)),
)
def test_hostile_addresses(directory: RunDirectory, view: str, query: dict[str, str]) -> None:
    directory.trial_path(trial_id(0)).write_bytes(b"\n".join(LINES) + b"\n")
    built(directory, view, query)
