"""Two sweeps compared: trials matched by what tells them apart, and what became of each in both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from tune_easytrain.columns import is_missing
from tune_easytrain.comparison import compare
from tune_easytrain.condition import select
from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import Element, box, choice, graph, link, note, table, text
from tune_easytrain.dashboard.figure import COLORS, build_figure, plain
from tune_easytrain.dashboard.live_run import LiveRun
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.paging import Paging
from tune_easytrain.dashboard.rows import shown


def build(question: Question) -> Page:
    """Return the page."""
    run, address = question.run, question.address
    others = [name for name in question.runs.names() if name != run.name]
    if not others:
        return Page(
            [
                note(
                    "There is no other sweep here. Give a second run directory, or the folder "
                    "that holds both: tune-easytrain dashboard RUN_DIR RUN_DIR"
                )
            ]
        )
    name = question.asked("with", ["", *others])
    options = [(other, other) for other in others]
    choices = choice("With", options, name, address, "with")
    if name not in others:
        return Page([choices, note("Choose the sweep to compare this one with.")])
    other = question.runs.open(name)
    assert other is not None
    other.poll()
    frame = select(compare(run, other), address.query.get("rows") or None)
    found = frame["found_in"].tolist()
    both, only_a, only_b = (found.count(which) for which in ("both", "a", "b"))
    told = f"a is {run.name}, b is {name}. Trials: {both} in both, {only_a} in a alone, {only_b} in b alone."
    paging = Paging.of(address, len(frame))
    shown_rows = _table(frame[paging.rows], run, name, address)
    return Page([choices, note(told), _graph(frame, run.metric), shown_rows, *paging.links(address)])


def boxes(address: Address) -> list[Element]:
    """Return what there is to type in."""
    return [box("rows", "Only rows with", address, "found_in == both")]


def version(question: Question) -> int:
    """Return a number that grows when the other sweep has changed."""
    name = question.address.query.get("with", "")
    other = question.runs.open(name) if name in question.runs.names() else None
    return 0 if other is None else other.poll()


def _table(frame: pd.DataFrame, run: LiveRun, other: str, address: Address) -> Element:
    metric = run.metric
    keys = list(frame.columns[: list(frame.columns).index("found_in")])
    numbers = [
        f"{metric}_a",
        f"{metric}_b",
        f"{metric}_difference",
        "samples_per_second_ratio",
        "peak_memory_bytes_ratio",
    ]
    rows = frame.to_dict("records")
    cells = [
        [
            *(text(shown(_known(row[key]))) for key in keys),
            _linked(row["trial_id_a"], address.view_of("trial", str(row["trial_id_a"]))),
            _linked(row["trial_id_b"], Address(other, "trial", str(row["trial_id_b"]))),
            *(shown(_known(row[name])) for name in numbers),
        ]
        for row in rows
    ]
    headings = [
        *keys,
        "trial a",
        "trial b",
        f"{metric} a",
        f"{metric} b",
        "difference",
        "samples/s b / a",
        "peak memory b / a",
    ]
    return table(headings, cells, "Both sweeps")


def _linked(trial_id: object, address: Address) -> Element:
    return "" if is_missing(trial_id) else link(str(trial_id), address)


def _known(value: object) -> object:
    return None if is_missing(value) else value


def _graph(frame: pd.DataFrame, metric: str) -> Element:
    pairs = [
        (a, b, plain(f"{trial_a} / {trial_b}"))
        for a, b, trial_a, trial_b in zip(
            frame[f"{metric}_a"], frame[f"{metric}_b"], frame["trial_id_a"], frame["trial_id_b"], strict=True
        )
        if math.isfinite(a) and math.isfinite(b)
    ]
    if not pairs:
        return note(f"No trial has reported {metric} in both.")
    ends = _ends([value for a, b, _ in pairs for value in (a, b)])
    traces = [
        {"type": "scatter", "mode": "markers", "name": "trials", "x": [a for a, _, _ in pairs],
         "y": [b for _, b, _ in pairs], "text": [name for _, _, name in pairs],
         "hovertemplate": "%{text}<br>a %{x:.4g}, b %{y:.4g}<extra></extra>", "marker": {"color": COLORS[0]}},
        {"type": "scatter", "mode": "lines", "name": "equal", "x": ends, "y": ends, "hoverinfo": "skip",
         "line": {"color": "#888888", "dash": "dot"}},
    ]  # fmt: skip
    figure = build_figure(
        traces, x={"title": f"{metric} in a"}, y={"title": f"{metric} in b"}, showlegend=True
    )
    return graph(figure, f"{metric} of the trials that both have: above the line b has the larger value.")


def _ends(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]
