"""Parallel coordinates: a line per trial through its values on axes side by side, coloured by the metric."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import graph, link, note, section, table, text, trial_link
from tune_easytrain.dashboard.figure import COLORS, SCALE, build_figure, plain
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import Row, shown, sorted_rows

GRAPH = "parallel"
_GREY = "#8a8f98"
_LOGARITHMIC = 50.0
"""The ratio of largest and smallest value from which on an axis is logarithmic."""

_MOST_LABELS = 12
_MOST_ROWS = 15
_MEASURED = ("effective_batch_size", "microbatch_size", "samples_per_second", "peak_memory_bytes")
_WORDS = {
    "effective_batch_size": "effective batch size",
    "microbatch_size": "micro-batch size",
    "samples_per_second": "samples/s",
    "peak_memory_bytes": "peak memory (GiB)",
}
_UNITS = {"peak_memory_bytes": 2**30}


@dataclass(frozen=True)
class Axis:
    """One axis: where on it, between 0 and 1, a value of its column stands.

    Attributes:
        name: the column.
        values: those of an axis of words, from below; None: an axis of numbers.
        lowest, highest: its ends, where it has numbers.
    """

    name: str
    values: tuple[str, ...] | None = None
    lowest: float = 0.0
    highest: float = 1.0

    @classmethod
    def of(cls, name: str, rows: Sequence[Row]) -> Axis | None:
        """Return the axis for a column; None where all rows have the same."""
        found = [row[name] for row in rows if row.get(name) is not None]
        if all(_is_number(value) for value in found):
            numbers = [float(value) for value in found if math.isfinite(value)]
            if not numbers or min(numbers) == max(numbers):
                return None
            return cls(name, None, min(numbers), max(numbers))
        words = tuple(dict.fromkeys(shown(value) for value in found))
        return cls(name, words) if len(words) > 1 else None

    @property
    def title(self) -> str:
        """What stands above it."""
        return _WORDS.get(self.name, self.name.removesuffix("_best"))

    def place(self, value: Any) -> float | None:
        """Return where a value stands; None where it is missing."""
        if value is None:
            return None
        if self.values is not None:
            return self.values.index(shown(value)) / (len(self.values) - 1)
        if not math.isfinite(value):
            return None
        return (self._scaled(value) - self._scaled(self.lowest)) / (
            self._scaled(self.highest) - self._scaled(self.lowest)
        )

    def told(self, value: Any) -> str:
        """Return a value as people read it, in the unit of the title."""
        unit = _UNITS.get(self.name)
        return shown(value if unit is None or value is None else value / unit)

    def labels(self) -> list[tuple[float, str]]:
        """Return places with the text that stands there."""
        if self.values is not None:
            step = -(-len(self.values) // _MOST_LABELS)
            return [(self.place(value) or 0.0, value) for value in self.values[::step]]
        unit = _UNITS.get(self.name, 1)
        return [(share, f"{self._at(share) / unit:.3g}") for share in (0, 0.25, 0.5, 0.75, 1)]

    def between(self, low: float, high: float) -> list[Any]:
        """Return what a part of the axis stands for: its words, or the two numbers at its ends."""
        low, high = max(0.0, low), min(1.0, high)
        if self.values is not None:
            return [value for value in self.values if low <= (self.place(value) or 0.0) <= high]
        lowest = self.lowest if low == 0.0 else float(f"{self._at(low):.6g}")
        return [lowest, self.highest if high == 1.0 else float(f"{self._at(high):.6g}")]

    def holds(self, value: Any, limits: Sequence[Any]) -> bool:
        """Return whether a value is within what `between` returned."""
        if value is None:
            return False
        if self.values is not None:
            return shown(value) in limits
        return (
            len(limits) == 2
            and all(_is_number(limit) for limit in limits)
            and limits[0] <= value <= limits[1]
        )

    @property
    def _is_logarithmic(self) -> bool:
        return self.lowest > 0 and self.highest / self.lowest >= _LOGARITHMIC

    def _scaled(self, value: float) -> float:
        return math.log(value) if self._is_logarithmic else value

    def _at(self, share: float) -> float:
        value = self._scaled(self.lowest) * (1 - share) + self._scaled(self.highest) * share
        return math.exp(value) if self._is_logarithmic else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def build(question: Question) -> Page:
    """Return the page."""
    run, address = question.run, question.address
    column = question.column
    rows = question.chosen()
    found = axes(rows, question.keys, column)
    if len(found) < 2:
        return Page([note("Nothing differs between the trials yet, or the filter leaves too few.")])
    brush = read_brush(address)
    inside = [row for row in rows if _is_inside(row, found, brush)]
    figure = build_figure(
        [*_lines(rows, inside if brush else rows, found, column, run.mode), _labels(found)],
        x={"range": [-0.3, len(found) - 0.4], "showgrid": False, "showticklabels": True, "fixedrange": True,
           "side": "top", "tickvals": list(range(len(found))),
           "ticktext": [plain(axis.title) for axis in found]},
        y={"range": [-0.06, 1.06], "visible": False, "fixedrange": True},
        shapes=[
            {"type": "line", "x0": place, "x1": place, "y0": 0, "y1": 1, "line": {"width": 1, "color": _GREY}}
            for place in range(len(found))
        ]
        + _marks(found, brush),
        dragmode="select",
        selectdirection="d",  # along one axis: else what was dragged over is as wide as the figure
        selections=[],
        selectionrevision=address.query.get("brush", ""),
        showlegend=True,
        legend={"orientation": "h", "y": -0.05},
        key=address.run,
    )  # fmt: skip
    said = f"{len(inside)} of {len(rows)} trials" if brush else f"{len(rows)} trials"
    caption = f"{said}, coloured by {run.metric}. Drag along an axis to keep the trials that pass there."
    live = [graph(figure, caption, GRAPH)]
    if brush:
        live.append(link("All trials again", address.asking(brush="")))
        ranked = question.best_first(inside)[:_MOST_ROWS]
        cells = [
            [trial_link(row["trial_id"], address), *(text(axis.told(row.get(axis.name))) for axis in found)]
            for row in ranked
        ]
        limits = "; ".join(f"{name}: {_told(limit)}" for name, limit in brush.items())
        live.append(
            section(
                "Kept", note(limits), table(["trial", *(axis.title for axis in found)], cells, "Trials kept")
            )
        )
    return Page(live)


def axes(rows: Sequence[Row], keys: Sequence[str], column: str) -> list[Axis]:
    """Return the axes: what was varied, what was measured, and the metric last."""
    names = dict.fromkeys([*keys, *_MEASURED, column])
    return [axis for name in names if (axis := Axis.of(name, rows)) is not None]


def read_brush(address: Address) -> dict[str, list[Any]]:
    """Return what was kept on which axes, as the address has it; nothing where it cannot be read."""
    try:
        brush = json.loads(address.query.get("brush", "") or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(brush, dict):
        return {}
    return {name: limits for name, limits in brush.items() if isinstance(limits, list)}


def brushed(question: Question, selected: Mapping[str, Any]) -> Address:
    """Return the address after a part of the figure was dragged over, as plotly tells of it."""
    found = axes(question.chosen(), question.keys, question.column)
    around = selected.get("range") or {}
    if not ({"x", "y"} <= around.keys() and found):
        return question.address
    left, right = sorted(around["x"])
    low, high = sorted(around["y"])
    place = min(range(len(found)), key=lambda number: abs(number - (left + right) / 2))
    brush = {**read_brush(question.address), found[place].name: found[place].between(low, high)}
    return question.address.asking(brush=json.dumps(brush))


def _told(limits: Sequence[Any]) -> str:
    is_range = len(limits) == 2 and all(_is_number(limit) for limit in limits)
    return (" to " if is_range else ", ").join(map(shown, limits)) or "nothing"


def _is_inside(row: Row, found: Sequence[Axis], brush: Mapping[str, Sequence[Any]]) -> bool:
    return all(axis.holds(row.get(axis.name), brush[axis.name]) for axis in found if axis.name in brush)


def _lines(
    rows: Sequence[Row], inside: Sequence[Row], found: Sequence[Axis], column: str, mode: str
) -> list[dict[str, Any]]:
    """Return a trace for each part of the metric's values; one line for each trial would be too slow."""
    kept = {row["trial_id"] for row in inside}
    outside = [row for row in rows if row["trial_id"] not in kept]
    ranked = sorted_rows(
        [row for row in inside if row.get(column) is not None], column if mode == "max" else f"-{column}"
    )
    groups = [
        ("outside", _GREY, 0.15, outside),
        ("no metric yet", _GREY, 0.6, [r for r in inside if r.get(column) is None]),
    ]
    size = max(1, -(-len(ranked) // len(SCALE)))
    for number, color in enumerate(SCALE):
        members = ranked[number * size : (number + 1) * size]
        if members:
            first, last = shown(members[0][column]), shown(members[-1][column])
            groups.append((f"{first} to {last}", color, 0.75, members))
    return [
        _trace(name, color, opacity, members, found) for name, color, opacity, members in groups if members
    ]


def _trace(
    name: str, color: str, opacity: float, rows: Sequence[Row], found: Sequence[Axis]
) -> dict[str, Any]:
    x: list[float | None] = []
    y: list[float | None] = []
    trials: list[str] = []
    for row in rows:
        for place, axis in enumerate(found):
            x.append(place)
            y.append(axis.place(row.get(axis.name)))
            trials.append(plain(row["trial_id"]))
        x.append(None)
        y.append(None)
        trials.append("")
    return {
        "type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "text": trials, "opacity": opacity,
        "line": {"color": color, "width": 1.2}, "hovertemplate": "%{text}<extra></extra>",
    }  # fmt: skip


def _marks(found: Sequence[Axis], brush: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return what shows on the axes which parts of them were kept."""
    marks = []
    for place, axis in enumerate(found):
        limits = brush.get(axis.name, ())
        if axis.values is not None:
            values: list[Any] = [value for value in limits if value in axis.values]
        else:
            numbers = [value for value in limits if _is_number(value) and math.isfinite(value)]
            values = [min(max(value, axis.lowest), axis.highest) for value in numbers]
        shares = [share for value in values if (share := axis.place(value)) is not None]
        if shares:
            low, high = max(0.0, min(shares) - 0.01), min(1.0, max(shares) + 0.01)
            line = {"width": 5, "color": COLORS[0]}
            marks.append({"type": "line", "x0": place, "x1": place, "y0": low, "y1": high, "line": line})
    return marks


def _labels(found: Sequence[Axis]) -> dict[str, Any]:
    labels = [(place, share, text) for place, axis in enumerate(found) for share, text in axis.labels()]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [place for place, _, _ in labels],
        "y": [share for _, share, _ in labels],
        "text": [f" {plain(text)}" for _, _, text in labels],
        "textposition": "middle right",
        "hoverinfo": "skip",
        "showlegend": False,
    }
