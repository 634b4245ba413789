"""The overview of a sweep: how far it is, how long it takes yet, what it uses, what is best, what failed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dash import html

from tune_easytrain.dashboard.elements import (
    STATES,
    Element,
    facts,
    link,
    meter,
    note,
    section,
    share_bar,
    state,
    table,
    text,
    trial_link,
)
from tune_easytrain.dashboard.live_run import LiveRun, TrialSpan
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import Row, batch_text, memory_text, shown
from tune_easytrain.trial_record import TrialRecord

_MOST_ROWS = 10
_LONGEST_ERROR = 200


def build(question: Question) -> Page:
    """Return the page."""
    run, rows = question.run, question.rows.all()
    counts = Counter(str(row["state"]) for row in rows)
    return Page(
        [
            _summary(question, counts),
            *_running(question, [row for row in rows if row["state"] in ("probing", "training")]),
            *_best(question, rows),
            *_failed(question, rows),
            html.P(["Run directory: ", html.Code(text(run.place))], className="note"),
        ]
    )


def _summary(question: Question, counts: Counter[str]) -> Element:
    run = question.run
    spans = [(record, run.span(record.trial_id)) for record in run.records()]
    ordered = {name: counts[name] for name in reversed(STATES) if counts[name]}
    num_trials = sum(counts.values())
    num_ended = counts["finished"] + counts["stopped"] + counts["failed"]
    words = [html.Li([state(name), f" {number}"]) for name, number in ordered.items()]
    found = [
        ("Ended", f"{num_ended} of {num_trials} trials"),
        ("Time left", describe_time_left(spans, time.time())),
        ("Used", _used(run, spans)),
        ("Devices", _devices(question.rows.all())),
    ]
    return html.Section(
        [html.H2("Where it stands"), share_bar(ordered), html.Ul(words, className="states"), facts(found)]
    )


def describe_time_left(trials: Iterable[tuple[TrialRecord, TrialSpan]], now: float) -> str:
    """Return how long the sweep takes yet, or why that cannot be said."""
    trials = list(trials)
    left = [(record, span) for record, span in trials if not record.state.is_final]
    if not left:
        return "none: every trial has ended" if trials else "no trial yet"
    running = [(record, span) for record, span in left if record.state.is_running]
    seconds = [
        span.busy_seconds for record, span in trials if record.state.is_final and span.busy_seconds > 0
    ]
    if not running:
        return "no trial is running"
    if not seconds:
        return "known when the first trial has ended"
    mean = sum(seconds) / len(seconds)
    in_use = sum(_left_of(span, mean, now) for _, span in running)
    waiting = mean * (len(left) - len(running))
    return f"about {describe_seconds((in_use + waiting) / len(running))}, at {describe_seconds(mean)} a trial"


def _left_of(span: TrialSpan, mean: float, now: float) -> float:
    since = now - span.last_event_at if span.last_event_at is not None else 0.0
    return max(mean - span.busy_seconds - since, 0.05 * mean)


def describe_seconds(seconds: float) -> str:
    """Return a time in the two largest units that it has.

    >>> describe_seconds(7260)
    '2 h 1 min'
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _used(run: LiveRun, trials: Iterable[tuple[TrialRecord, TrialSpan]]) -> str:
    trial = run.sweep()["trial"]
    resources = trial.get("resources") or {}
    workers = trial.get("num_workers") or 1
    hours = sum(span.busy_seconds for _, span in trials) * workers / 3600
    gpu = resources.get("gpu")
    if isinstance(gpu, (int, float)) and gpu > 0:
        return f"{hours * gpu:.2f} GPU hours"
    cpu = resources.get("cpu")
    if not gpu and isinstance(cpu, (int, float)) and cpu > 0:
        return f"{hours * cpu:.2f} CPU hours"
    return f"{hours:.2f} hours of workers"  # `gpu: auto` gives every trial another share


def _devices(rows: Sequence[Row]) -> str:
    busy = Counter(
        str(row["device"]) for row in rows if row["state"] in ("probing", "training") and row["device"]
    )
    if busy:
        return ", ".join(
            f"{number} {'trial' if number == 1 else 'trials'} on {text(name)}"
            for name, number in busy.items()
        )
    known = sorted({str(row["device"]) for row in rows if row["device"]})
    return text(", ".join(known)) or "none yet"


def _running(question: Question, rows: Sequence[Row]) -> list[Element]:
    if not rows:
        return []
    total = question.run.sweep()["train"].get("epochs")
    keys = question.keys
    cells = [
        [
            trial_link(row["trial_id"], question.address),
            state(row["state"]),
            _epochs(row, total),
            shown(row.get(f"{question.run.metric}_last")),
            shown(row["samples_per_second"]),
            *(text(shown(row.get(key))) for key in keys),
            html.Span(batch_text(row), className="nowrap"),
            meter(row["peak_memory_bytes"], row["memory_budget_bytes"], memory_text(row)),
        ]
        for row in rows[:_MOST_ROWS]
    ]
    headings = ["trial", "state", "epochs", question.run.metric, "samples/s", *keys, "batch", "peak memory"]
    return [
        section(
            "Running now",
            table(headings, cells, "Running trials"),
            *_more(question, rows, "state == training"),
        )
    ]


def _epochs(row: Row, total: Any) -> Element:
    epochs = row["epochs"] or 0
    if not isinstance(total, int):
        return str(epochs)
    return meter(epochs, total, f"{epochs} of {total}")


def _best(question: Question, rows: Sequence[Row]) -> list[Element]:
    run = question.run
    column = question.column
    ranked = [row for row in question.best_first(rows) if row.get(column) is not None][:5]
    if not ranked:
        return [section("Best so far", note(f"No trial has reported {run.metric} yet."))]
    keys = question.keys
    cells = [
        [
            shown(row[column]),
            trial_link(row["trial_id"], question.address),
            *(text(shown(row.get(key))) for key in keys),
            html.Span(batch_text(row), className="nowrap"),
            shown(row["samples_per_second"]),
            shown(row["best_epoch"]),
            state(row["state"]),
        ]
        for row in ranked
    ]
    title = f"Best so far: {run.metric} {shown(ranked[0][column])}"
    headings = [run.metric, "trial", *keys, "batch", "samples/s", "best epoch", "state"]
    return [section(text(title), table(headings, cells, f"The best trials by {run.metric}"))]


def _failed(question: Question, rows: Sequence[Row]) -> list[Element]:
    failed = [row for row in rows if row["error"]]
    if not failed:
        return []
    cells = [
        [trial_link(row["trial_id"], question.address), text(str(row["error"])[:_LONGEST_ERROR])]
        for row in failed[:_MOST_ROWS]
    ]
    content = table(["trial", "error"], cells, "Failed trials")
    return [section(f"Failed: {len(failed)}", content, *_more(question, failed, "state == failed"))]


def _more(question: Question, rows: Sequence[Row], where: str) -> list[Element]:
    if len(rows) <= _MOST_ROWS:
        return []
    return [html.P(link(f"All {len(rows)}", question.address.view_of("trials", where=where)))]
