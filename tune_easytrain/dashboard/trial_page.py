"""A trial's page: state, error, batch and memory, curves, probe, log, checkpoints, config."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from dash import html

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.dashboard.curves import curve, metrics_of
from tune_easytrain.dashboard.elements import (
    Element,
    aria,
    choice,
    facts,
    graph,
    link,
    meter,
    note,
    section,
    state,
    table,
    text,
)
from tune_easytrain.dashboard.figure import build_figure
from tune_easytrain.dashboard.overview import describe_seconds
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.probes import attempts, estimate
from tune_easytrain.dashboard.rows import Row, batch_text, memory_text, shown
from tune_easytrain.errors import RunDirectoryError, StorageError
from tune_easytrain.events import Event, Failed
from tune_easytrain.progress import describe_event
from tune_easytrain.trial_record import TrialRecord
from tune_easytrain.trial_space import flatten_config

_MOST_LINES = 300
_MOST_CHECKPOINTS = 50


def build(question: Question) -> Page:
    """Return the page."""
    run, address = question.run, question.address
    record = run.record(address.trial)
    row = next((row for row in question.rows.all() if row["trial_id"] == address.trial), None)
    if record is None or row is None:
        return Page([note(f"There is no trial {address.trial} in this sweep.")])
    names = metrics_of(question)
    metric = question.asked("metric", names)
    metrics = [(name, name) for name in names]
    others = html.Ul([html.Li(item) for item in _neighbours(question)])
    live = [
        html.Nav(others, className="choice", **aria(label="Other trials")),
        html.H2([address.trial, " ", state(record.state.value)]),
        *_error(record),
        facts(_facts(question, record, row)),
        choice("Metric", metrics, metric, address, "metric"),
        *_curves(record, metric),
        *_probe(record),
        section("Log", *_log(question, record)),
        section("Checkpoints", _checkpoints(question, record)),
        section("Config", _config(record)),
    ]
    return Page(live)


def _neighbours(question: Question) -> list[Element]:
    names = [record.trial_id for record in question.run.records()]
    place = names.index(question.address.trial)
    found = {"previous trial": place - 1, "next trial": place + 1}
    links = [
        link(words, question.address.view_of("trial", names[other]))
        for words, other in found.items()
        if 0 <= other < len(names)
    ]
    return [*links, link("all trials", question.address.view_of("trials"))]


def _error(record: TrialRecord) -> list[Element]:
    if not record.error:
        return []
    details = html.Details([html.Summary("Traceback"), html.Pre(text(record.error_details))], open=True)
    return [html.P(text(record.error), className="problem"), *([details] if record.error_details else [])]


def _facts(question: Question, record: TrialRecord, row: Row) -> list[tuple[str, Element]]:
    span = question.run.span(record.trial_id)
    busy = span.busy_seconds
    if record.state.is_running and span.last_event_at is not None:
        busy += max(0.0, time.time() - span.last_event_at)
    metric = question.run.metric
    found = [
        ("Why", text(record.reason)),
        (f"{metric} (best)", shown(row.get(f"{metric}_best"))),
        (f"{metric} (last)", shown(row.get(f"{metric}_last"))),
        ("Epochs", shown(row["epochs"])),
        ("Micro-batch × steps × workers", batch_text(row)),
        ("Peak memory", meter(row["peak_memory_bytes"], row["memory_budget_bytes"], memory_text(row))),
        ("Samples/s", shown(row["samples_per_second"])),
        ("Waiting for data", "" if row["data_wait_share"] is None else f"{row['data_wait_share']:.1%}"),
        ("Device", text(shown(row["device"]))),
        ("Strategy", text(shown(row["strategy"]))),
        ("Started", clock(span.started_at)),
        ("Time with resources", describe_seconds(busy) if busy else ""),
        ("Rescues", shown(row["num_rescues"])),
        ("Failures not its own", shown(row["num_failures"])),
    ]
    return [(name, content) for name, content in found if content not in ("", "0")]


def clock(seconds: float | None) -> str:
    """Return a time, in seconds since 1970, as the clock of UTC shows it."""
    if seconds is None:
        return ""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return ""


def _curves(record: TrialRecord, metric: str) -> list[Element]:
    traces = [
        curve(record, name, name, "epoch", number)
        for number, name in enumerate(dict.fromkeys([metric, "train_loss"]))
    ]
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return []
    if len(traces) == 2:
        traces[1]["yaxis"] = "y2"
    second = {"overlaying": "y", "side": "right", "showgrid": False, "title": {"text": "train_loss"}}
    more = {"yaxis2": second} if len(traces) == 2 else {}
    figure = build_figure(
        traces, x={"title": "epoch"}, y={"title": metric}, key=metric, showlegend=True, **more
    )
    return [graph(figure, f"{metric} of {record.trial_id}, epoch by epoch.")]


def _probe(record: TrialRecord) -> list[Element]:
    probe = record.probe
    if probe is None:
        return []
    found = [
        ("Tries", attempts(probe)),
        ("Estimate", estimate(probe)),
        ("Along", text(probe.knob)),
        ("Rule of thumb", _samples(probe.rule_of_thumb_size)),
        ("Fits by the estimate", _samples(probe.estimated_size)),
        ("Budget", format_bytes(probe.budget_bytes)),
        ("Known from another trial", "yes" if probe.cached else ""),
        ("Took", f"{probe.seconds:.1f} s"),
    ]
    return [section("Probe", facts([(name, content) for name, content in found if content]))]


def _samples(size: int | None) -> str:
    return "" if size is None else f"{size} samples"


def _log(question: Question, record: TrialRecord) -> list[Element]:
    try:
        events = question.run.events(record.trial_id)
    except (OSError, RunDirectoryError) as error:
        return [note(f"Its events cannot be read: {error}")]
    told = TrialRecord(record.trial_id)
    lines: list[tuple[str, str]] = []
    for event in events:
        told.add(event)
        lines.append((clock(event.time), _line(told, event, question.run.metric)))
    lines = [(when, line) for when, line in lines if line]
    hidden = len(lines) - _MOST_LINES
    cells = [[when, text(line)] for when, line in lines[-_MOST_LINES:]]
    shown_table = table(["time", "what happened"], cells, "Log")
    return (
        [note(f"The last {_MOST_LINES} lines; {hidden} before them are not shown."), shown_table]
        if hidden > 0
        else [shown_table]
    )


def _line(record: TrialRecord, event: Event, metric: str) -> str:
    line = describe_event(record, event, metric, ())
    if not line and not isinstance(event, Failed):
        line = event.kind.replace("_", " ")
    return line.removeprefix(f"{record.trial_id}: ")


def _checkpoints(question: Question, record: TrialRecord) -> Element:
    try:
        found = question.run.checkpoints(record.trial_id)
    except (OSError, StorageError) as error:
        return note(f"The storage does not answer: {error}")
    if not found:
        return note("None is stored.")
    cells = [
        [html.Code(text(checkpoint.path)), format_bytes(checkpoint.num_bytes), clock(checkpoint.written_at)]
        for checkpoint in found[:_MOST_CHECKPOINTS]
    ]
    return table(["file", "size", "written"], cells, "Checkpoints")


def _config(record: TrialRecord) -> Element:
    values = flatten_config(record.config)
    return table(
        ["key", "value"], [[text(key), text(shown(value))] for key, value in values.items()], "Config"
    )
