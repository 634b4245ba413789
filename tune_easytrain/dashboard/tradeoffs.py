"""Trade-offs: the metric against batch size, speed and memory, and the trials that none beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tune_easytrain.columns import Mode
from tune_easytrain.dashboard.elements import (
    STATES,
    choice,
    graph,
    note,
    section,
    state,
    table,
    text,
    trial_link,
)
from tune_easytrain.dashboard.figure import COLORS, SYMBOLS, build_figure, pareto_front, plain
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import Row, byte_unit, shown
from tune_easytrain.trial_record import TrialState
from tune_easytrain.trial_space import MODEL_KEY

AXES: dict[str, tuple[str, Mode | None]] = {
    "samples_per_second": ("samples/s", "max"),
    "peak_memory_bytes": ("peak memory", "min"),
    "effective_batch_size": ("effective batch size", None),
    "microbatch_size": ("micro-batch size", None),
    "epoch_seconds": ("seconds an epoch", "min"),
}
"""What the metric is set against: its words, and which end is better, if one is."""


def build(question: Question) -> Page:
    """Return the page."""
    run, address = question.run, question.address
    x = question.asked("x", list(AXES))
    words, better = AXES[x]
    column = question.column
    found = [row for row in question.chosen() if _is_there(row.get(column)) and _is_there(row[x])]
    scale = 1
    if x == "peak_memory_bytes" and found:
        unit, scale = byte_unit(max(row[x] for row in found))
        words = f"{words} ({unit})"
    failed = [row for row in found if row["state"] == TrialState.FAILED]
    rows = [row for row in found if row["state"] != TrialState.FAILED]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_group(row, question), []).append(row)
    traces = [
        _trace(name, members, x, scale, column, number)
        for number, (name, members) in enumerate(groups.items())
    ]
    if failed:
        traces.append(_failed(failed, x, scale, column))
    front = _front(rows, x, column, better, run.mode)
    if rows:
        traces.append(_line(front, x, scale, column, better))
    figure = build_figure(
        traces,
        x={"title": words, "type": "log" if better is None and found else "linear"},
        y={"title": run.metric},
        key=x,
        showlegend=True,
    )
    said = (
        "The line joins the trials that no other one beats in both."
        if better
        else f"The line joins the best trial of each {words}."
    )
    left_out = f", {len(failed)} of them failed and not on the line" if failed else ""
    live = [graph(figure, f"{run.metric} against {words}, {len(found)} trials{left_out}. {said}")]
    if not found:
        live = [note(f"No trial has reported {run.metric} yet, or the filter leaves none.")]
    elif rows:
        cells = [
            [
                trial_link(row["trial_id"], address),
                state(row["state"]),
                text(_group(row, question)),
                shown(row[x] / scale),
                shown(row[column]),
            ]
            for row in front
        ]
        title = "Beaten by none" if better else f"Best of each {words}"
        live.append(
            section(
                title, table(["trial", "state", _key(question) or "trial", words, run.metric], cells, title)
            )
        )
    options: list[tuple[str, str]] = [(name, axis[0]) for name, axis in AXES.items()]
    return Page([choice("Against", options, x, address, "x"), *live])


def _is_there(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _key(question: Question) -> str:
    keys = question.keys
    return next((key for key in keys if key == MODEL_KEY), keys[0] if keys else "")


def _group(row: Row, question: Question) -> str:
    key = _key(question)
    return shown(row.get(key)) if key else ""


def _trace(name: str, rows: Sequence[Row], x: str, scale: int, column: str, number: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(name or "trials"),
        "x": [row[x] / scale for row in rows],
        "y": [row[column] for row in rows],
        "text": [plain(row["trial_id"]) for row in rows],
        "customdata": [row["trial_id"] for row in rows],
        "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}",
        "marker": {
            "color": COLORS[number % len(COLORS)],
            "symbol": SYMBOLS[number % len(SYMBOLS)],
            "size": 7,
            "opacity": 0.8,
        },
    }


def _failed(rows: Sequence[Row], x: str, scale: int, column: str) -> dict[str, Any]:
    """Return the trace of the trials that failed, which a sign of its own tells from all others."""
    name = f"{STATES[TrialState.FAILED]} {TrialState.FAILED}"
    trace = _trace(name, rows, x, scale, column, 0)
    return trace | {"marker": {"color": "#888888", "symbol": "x-thin-open", "size": 8}}


def _front(rows: Sequence[Row], x: str, column: str, better: Mode | None, mode: Mode) -> list[Row]:
    if better is not None:
        points = [(float(row[x]), float(row[column])) for row in rows]
        return sorted((rows[place] for place in pareto_front(points, (better, mode))), key=lambda row: row[x])
    best: dict[float, Row] = {}
    sign = 1 if mode == "max" else -1
    for row in rows:
        if row[x] not in best or sign * row[column] > sign * best[row[x]][column]:
            best[row[x]] = row
    return [best[value] for value in sorted(best)]


def _line(front: Sequence[Row], x: str, scale: int, column: str, better: Mode | None) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front" if better else "best",
        "x": [row[x] / scale for row in front],
        "y": [row[column] for row in front],
        "line": {"color": "#888888", "dash": "dot", "shape": "linear"},
        "hoverinfo": "skip",
    }
