"""Figures of plotly as plain dicts: their layout, colours, and texts.

What is text, axis or grid is coloured by dashboard.css, as that knows whether the page is light or dark.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tune_easytrain.columns import Mode
from tune_easytrain.plain_text import printable

COLORS = (
    "#3b82c4", "#d9822b", "#2a9d6f", "#c24e8a", "#8467c7",
    "#b58900", "#3f9ca0", "#cc4b4b", "#7a8a3c", "#9a6a4f",
)  # fmt: skip
"""Told apart on white and on black; dashes and signs differ too."""

SCALE = ("#3f6fb5", "#5d9bc4", "#4aa587", "#a8a13c", "#dd9a2e", "#d4553f")
"""From the worst to the best."""

DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up")


def plain(text: str) -> str:
    """Return a text as plotly shows it letter by letter: it would obey tags."""
    return html.escape(printable(text), quote=False)


def build_figure(
    traces: Sequence[Mapping[str, Any]],
    *,
    x: Mapping[str, Any] | None = None,
    y: Mapping[str, Any] | None = None,
    key: str = "",
    **layout: Any,
) -> dict[str, Any]:
    """Return a figure.

    Args:
        traces: plotly's.
        x, y: of the axes, what differs from the default; `title` is a text.
        key: while it stays the same, zoom and what was clicked away in the legend stay.
        layout: more of plotly's layout.
    """
    return {
        "data": list(traces),
        "layout": {
            "margin": {"l": 60, "r": 15, "t": 40, "b": 50},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "inherit", "size": 13},
            "hovermode": "closest",
            "uirevision": key or "same",
            "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom"},
            "xaxis": _axis(x or {}),
            "yaxis": _axis(y or {}),
            **layout,
        },
    }


def _axis(changed: Mapping[str, Any]) -> dict[str, Any]:
    axis: dict[str, Any] = {"zeroline": False, "automargin": True, **changed}
    if isinstance(axis.get("title"), str):
        axis["title"] = {"text": plain(axis["title"])}
    return axis


def pareto_front(points: Sequence[tuple[float, float]], modes: tuple[Mode, Mode]) -> list[int]:
    """Return the places of the points that no other point beats or equals in both values, by the first value.

    >>> pareto_front([(1, 1), (2, 3), (3, 2), (2, 2)], ("min", "max"))
    [0, 1]
    """
    signs = [1 if mode == "min" else -1 for mode in modes]
    order = sorted(
        range(len(points)), key=lambda place: (signs[0] * points[place][0], signs[1] * points[place][1])
    )
    front: list[int] = []
    for place in order:
        value = signs[1] * points[place][1]
        if not front or value < signs[1] * points[front[-1]][1]:
            front.append(place)
    return front
