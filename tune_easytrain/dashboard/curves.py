"""Curves: what trials reported, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dash import html

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import (
    Element,
    aria,
    choice,
    filter_box,
    graph,
    link,
    note,
    state,
    trial_link,
)
from tune_easytrain.dashboard.figure import COLORS, DASHES, build_figure, plain
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import Row, shown
from tune_easytrain.frame import metric_names
from tune_easytrain.trial_record import TrialRecord, TrialState

MOST_CURVES = 12
X_AXES = {"epoch": "epoch", "optimizer_steps": "optimizer steps", "num_samples": "samples", "hours": "hours"}


def build(question: Question) -> Page:
    """Return the page."""
    run, address = question.run, question.address
    names = metrics_of(question)
    metric, x = question.asked("metric", names), question.asked("x", list(X_AXES))
    picked = question.picked
    by_id = {row["trial_id"]: row for row in question.rows.all()}
    rows = [by_id[name] for name in picked if name in by_id] or default_rows(question)
    records = [record for row in rows if (record := run.record(row["trial_id"])) is not None]
    traces = [
        trace
        for number, (row, record) in enumerate(zip(rows, records, strict=True))
        if (trace := curve(record, _name(row, question), metric, x, number))["x"]
    ]
    which = f"the {len(rows)} picked trials" if picked else f"the best {len(rows)} trials by {run.metric}"
    # The list below is the legend: it has room for every trial on any screen.
    figure = build_figure(
        traces, x={"title": X_AXES[x]}, y={"title": metric}, key=f"{metric} {x}", showlegend=False
    )
    live: list[Element] = [
        choice("Metric", [(name, name) for name in names], metric, address, "metric"),
        choice("Over", X_AXES.items(), x, address, "x"),
        graph(figure, f"{metric} of {which}.") if traces else note(f"None of {which} has reported {metric}."),
    ]
    live.append(
        html.Ul(
            [
                html.Li(
                    [
                        _swatch(number),
                        trial_link(row["trial_id"], address),
                        f" {_values(row, question)} ",
                        state(row["state"]),
                        *_leave(row, question),
                    ]
                )
                for number, row in enumerate(rows)
            ],
            className="picked",
        )
    )
    return Page(live)


def boxes(address: Address) -> list[Element]:
    """Return what there is to type in; trials that were picked are shown whatever they are like."""
    return [] if address.query.get("pick") else [filter_box(address)]


def metrics_of(question: Question) -> list[str]:
    """Return the metrics that trials have reported, the sweep's first."""
    names = {question.run.metric: None}
    for record in question.run.records():
        names |= dict.fromkeys(metric_names(record.last))
    names.pop("epoch", None)
    return list(names)


def default_rows(question: Question) -> list[Row]:
    """Return the best trials of those that the filter leaves, as many as can be told apart.

    Trials that failed come after all others.
    """
    reported = [row for row in question.best_first(question.chosen()) if row["epochs"] is not None]
    return sorted(reported, key=lambda row: row["state"] == TrialState.FAILED)[:MOST_CURVES]


def curve(record: TrialRecord, name: str, metric: str, x: str, number: int) -> dict[str, Any]:
    """Return the trace of a trial's metric, in the colour and dash of a number."""
    start = record.reported[0].time if record.reported else 0.0
    points = []
    for event in record.reported:
        value = event.metrics.get(metric)
        place = (event.time - start) / 3600 if x == "hours" else event.metrics.get(x)
        if value is not None and place is not None and math.isfinite(value) and math.isfinite(place):
            points.append((place, value))
    color, dash = _style(number)
    style = {"color": color, "dash": dash}
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 1 else "markers",
        "name": plain(name),
        "x": [place for place, _ in points],
        "y": [value for _, value in points],
        "line": style,
        "marker": {"color": style["color"]},
    }


def _style(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]


def _swatch(number: int) -> Element:
    """Return a piece of the line that has this colour and dash."""
    color, dash = _style(number)
    return html.Span(className=f"swatch {dash}", style={"color": color}, **aria(hidden="true"))


def _values(row: Row, question: Question) -> str:
    return ", ".join(shown(row.get(key)) for key in question.keys)


def _name(row: Row, question: Question) -> str:
    return f"{row['trial_id']} {_values(row, question)}"


def _leave(row: Row, question: Question) -> Sequence[Any]:
    picked = question.picked
    if row["trial_id"] not in picked:
        return []
    left = ",".join(name for name in picked if name != row["trial_id"])
    return [" ", link("leave out", question.address.asking(pick=left), className="small")]
