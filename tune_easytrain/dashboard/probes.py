"""The probes: what each model was tried with, and what was estimated against what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dash import html

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.dashboard.elements import Element, graph, meter, note, table, text, trial_link
from tune_easytrain.dashboard.figure import COLORS, build_figure, plain
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import byte_unit, shown
from tune_easytrain.events import Probed
from tune_easytrain.trial_record import TrialRecord

_MOST_PROBES = 100
_BOUNDS = {
    "limit": "the limit given",
    "memory": "memory: the next size failed",
    "proposal": "the size proposed",
    "estimate": "the estimate: the next size does not fit",
    "attempts": "the number of tries",
}


def build(question: Question) -> Page:
    """Return the page."""
    chosen = {row["trial_id"]: row for row in question.chosen()}
    records = [record for record in question.run.records() if record.trial_id in chosen]
    probed = [(record, record.probe) for record in records if record.probe is not None]
    reused = Counter(probe.signature for _, probe in probed if probe.cached)
    # One probe of each kind is enough to see; trials that took over its result only confirmed it.
    own = [(record, probe) for record, probe in probed if not probe.cached] or probed
    if not own:
        return Page([note("No probe is over yet, or the filter leaves no trial that had one.")])
    key = next(iter(question.keys), "")
    names = {record.trial_id: shown(chosen[record.trial_id].get(key)) if key else "" for record, _ in own}
    has_knob = any(probe.knob for _, probe in own)
    cells = [
        [
            trial_link(record.trial_id, question.address),
            text(names[record.trial_id]),
            attempts(probe),
            shown(probe.microbatch_size) or "none",
            *([shown(probe.rule_of_thumb_size), shown(probe.estimated_size)] if has_knob else []),
            _BOUNDS.get(probe.bounded_by, text(probe.bounded_by)),
            estimate(probe),
            meter(measured(probe), probe.budget_bytes, _of_budget(probe)),
            f"{probe.seconds:.1f} s",
            str(reused[probe.signature]) if probe.signature else "0",
        ]
        for record, probe in own[:_MOST_PROBES]
    ]
    headings = [
        *("trial", key, "tries", "fits"),
        *(["rule of thumb (samples)", "estimate (samples)"] if has_knob else []),
        *("bounded by", "estimate", "measured of budget", "took", "used again by"),
    ]
    live = [_graph(own[:_MOST_PROBES], names), table(headings, cells, "Probes")]
    if len(own) > _MOST_PROBES:
        live.append(note(f"The first {_MOST_PROBES} of {len(own)} probes; a filter shows others."))
    return Page(live)


def attempts(probe: Probed) -> html.Ul:
    """Return every size tried with what came of it."""
    tried = [
        html.Li(
            f"{attempt['microbatch_size']} {'✓' if attempt['outcome'] == 'fits' else '✗'} "
            f"{text(str(attempt['outcome']).replace('_', ' '))}",
            title=text(str(attempt.get("message") or "")),
        )
        for attempt in probe.attempts
    ]
    return html.Ul(tried, className="tries")


def measured(probe: Probed) -> int | None:
    """Return the peak of the size found, in bytes, as the device had it; None where it was not measured."""
    peaks = [
        attempt.get("peak_bytes")
        for attempt in probe.attempts
        if attempt["microbatch_size"] == probe.microbatch_size and attempt["outcome"] == "fits"
    ]
    return next((peak for peak in reversed(peaks) if isinstance(peak, int) and peak > 0), None)


def estimate(probe: Probed) -> str:
    """Return the estimate at the size found, and how near it came; why there is none where there is none."""
    if probe.estimated_peak_bytes is None:
        return text(probe.no_estimate) or "none"
    peak = measured(probe)
    near = f" ({probe.estimated_peak_bytes / peak:.3f} × measured)" if peak else ""
    return f"{format_bytes(probe.estimated_peak_bytes)}{near}"


def _of_budget(probe: Probed) -> str:
    peak = measured(probe)
    budget = format_bytes(probe.budget_bytes)
    return f"{format_bytes(peak)} of {budget}" if peak else f"not measured, of {budget}"


def _graph(probes: Sequence[tuple[TrialRecord, Probed]], names: dict[str, str]) -> Element:
    labels = [plain(f"{names[record.trial_id]} {record.trial_id}".strip()) for record, _ in probes]
    series: dict[str, tuple[list[int | None], str, int]] = {
        "budget": ([probe.budget_bytes for _, probe in probes], "line-ew-open", 2),
        "measured": ([measured(probe) for _, probe in probes], "circle", 2),
        "estimated": ([probe.estimated_peak_bytes for _, probe in probes], "x-thin-open", 1),
    }
    unit, scale = byte_unit(max(value or 0 for values, _, _ in series.values() for value in values))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": labels,
            "y": [None if value is None else value / scale for value in values],
            "hovertemplate": f"%{{x}}<br>{name} %{{y:.3g}} {unit}<extra></extra>",
            "marker": {
                "color": COLORS[number],
                "symbol": symbol,
                "size": 10,
                "line": {"width": width, "color": COLORS[number]},
            },
        }
        for number, (name, (values, symbol, width)) in enumerate(series.items())
    ]  # fmt: skip
    figure = build_figure(
        traces, y={"title": unit, "rangemode": "tozero"}, x={"type": "category"}, showlegend=True
    )
    return graph(figure, "Peak memory of the size found: estimated, measured, and the budget.")
