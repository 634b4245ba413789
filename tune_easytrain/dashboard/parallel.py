"""Parallel coordinates: a line per trial through its values on axes side by side, coloured by the metric."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import graph, link, note, section, state, table, text, trial_link
from tune_easytrain.dashboard.figure import COLORS, SCALE, build_figure, plain
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import Row, byte_unit, shown, sorted_rows

GRAPH = "parallel"
_GREY = "#8a8f98"
_LOGARITHMIC = 30.0
"""The ratio of largest and smallest value from which on an axis is logarithmic."""

_MOST_LABELS = 12
_LONGEST_LABEL = 18
_LABEL_HEIGHT = 0.07
"""How much of an axis a label takes up, with some air."""

_REM_A_LETTER = 0.5
_MOST_ROWS = 15
_MEASURED = ("effective_batch_size", "microbatch_size", "samples_per_second", "peak_memory_bytes")
_WORDS = {
    "effective_batch_size": "effective batch size",
    "microbatch_size": "micro-batch size",
    "samples_per_second": "samples/s",
    "peak_memory_bytes": "peak memory",
}


@dataclass(frozen=True)
class Axis:
    """One axis: where on it, between 0 and 1, a value of its column stands.

    Attributes:
        name: the column.
        values: those of an axis of words, from below; None: an axis of numbers.
        lowest, highest: its ends, where it has numbers.
        ticks: the numbers that are told at the axis; empty: some at even distances.
        is_logarithmic: whether equal ratios are equally far apart.
    """

    name: str
    values: tuple[str, ...] | None = None
    lowest: float = 0.0
    highest: float = 1.0
    ticks: tuple[float, ...] = ()
    is_logarithmic: bool = False

    @classmethod
    def of(cls, name: str, rows: Sequence[Row], drawn_from: str | None = None) -> Axis | None:
        """Return the axis for a column; None where all rows have the same.

        Args:
            name: the column.
            rows: the trials.
            drawn_from: the distribution of a key that has one; empty for a key that has a list of values,
                None for what was measured.
        """
        found = [row[name] for row in rows if row.get(name) is not None]
        if all(_is_number(value) for value in found):
            numbers = [float(value) for value in found if math.isfinite(value)]
            if not numbers or min(numbers) == max(numbers):
                return None
            lowest, highest = min(numbers), max(numbers)
            is_far = lowest > 0 and (highest / lowest >= _LOGARITHMIC or drawn_from == "loguniform")
            is_listed = drawn_from in ("", "choice", "randint")
            values = tuple(sorted(set(numbers)))
            is_few = len(values) <= _MOST_LABELS
            return cls(name, None, lowest, highest, values if is_listed or is_few else (), is_far)
        words = tuple(dict.fromkeys(shown(value) for value in found))
        return cls(name, words) if len(words) > 1 else None

    @property
    def title(self) -> str:
        """What stands above it."""
        words = _WORDS.get(self.name, self.name.removesuffix("_best"))
        return f"{words} ({self._unit[0]})" if self._unit[0] else words

    @property
    def _unit(self) -> tuple[str, int]:
        return byte_unit(self.highest) if self.name.endswith("_bytes") else ("", 1)

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
        unit = self._unit[1]
        return shown(value if unit == 1 or value is None else value / unit)

    def labels(self) -> list[tuple[float, str]]:
        """Return places with the text that stands there."""
        if self.values is not None:
            step = -(-len(self.values) // _MOST_LABELS)
            return [(self.place(value) or 0.0, _shortened(value)) for value in self.values[::step]]
        told = self.ticks or tuple(self._at(share) for share in (0, 0.25, 0.5, 0.75, 1))
        return [(share, f"{value / self._unit[1]:.3g}") for share, value in self._apart(told)]

    def _apart(self, values: Sequence[float]) -> list[tuple[float, float]]:
        """Return as many values with their places as do not cover each other; the first and last always."""
        placed = [(self.place(value) or 0.0, value) for value in values]
        kept = placed[:1]
        for share, value in placed[1:-1]:
            if min(share - kept[-1][0], placed[-1][0] - share) >= _LABEL_HEIGHT:
                kept.append((share, value))
        return [*kept, placed[-1]]

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

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.is_logarithmic else value

    def _at(self, share: float) -> float:
        value = self._scaled(self.lowest) * (1 - share) + self._scaled(self.highest) * share
        return math.exp(value) if self.is_logarithmic else value


def _shortened(text: str) -> str:
    """Return a text that fits between two axes; names differ at their ends more than in the middle."""
    half = _LONGEST_LABEL // 2
    return text if len(text) <= _LONGEST_LABEL else f"{text[:half]}…{text[-half:]}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def build(question: Question) -> Page:
    """Return the page."""
    run, address = question.run, question.address
    column = question.column
    rows = question.chosen()
    found = axes(question, rows)
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
    live = [graph(figure, caption, GRAPH, least_width_rem=_width(found))]
    if brush:
        live.append(link("All trials again", address.asking(brush="")))
        ranked = question.best_first(inside)[:_MOST_ROWS]
        cells = [
            [
                trial_link(row["trial_id"], address),
                state(row["state"]),
                *(text(axis.told(row.get(axis.name))) for axis in found),
            ]
            for row in ranked
        ]
        headings = ["trial", "state", *(axis.title for axis in found)]
        limits = "; ".join(f"{name}: {_told(limit)}" for name, limit in brush.items())
        live.append(section("Kept", note(limits), table(headings, cells, "Trials kept")))
    return Page(live)


def axes(question: Question, rows: Sequence[Row]) -> list[Axis]:
    """Return the axes: what was varied, what was measured, and the metric last."""
    grid = question.run.sweep()["grid_search"]["grid"]
    drawn_from = dict.fromkeys((*_MEASURED, question.column))
    drawn_from |= dict.fromkeys(("effective_batch_size", "microbatch_size"), "")
    for key in question.keys:
        drawn_from[key] = next(iter(grid[key])) if isinstance(grid.get(key), Mapping) else ""
    names = dict.fromkeys([*question.keys, *drawn_from])
    return [axis for name in names if (axis := Axis.of(name, rows, drawn_from[name])) is not None]


def _width(found: Sequence[Axis]) -> float:
    """Return the width in rem in which the labels of no axis reach the next one."""
    longest = max(len(text) for axis in found for _, text in axis.labels())
    return len(found) * (_REM_A_LETTER * longest + 1)


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
    found = axes(question, question.chosen())
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
    parts: dict[int, list[Row]] = {}
    first_of: dict[str, int] = {}
    for place, row in enumerate(ranked):  # equal values have one colour
        parts.setdefault(first_of.setdefault(shown(row[column]), place) // size, []).append(row)
    for number, members in parts.items():
        ends = dict.fromkeys([shown(members[0][column]), shown(members[-1][column])])
        groups.append((" to ".join(ends), SCALE[number], 0.75, members))
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
