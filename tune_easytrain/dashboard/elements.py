"""The elements that pages are made of: links, tables, states, bars, notes. Texts are never read as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dash import dcc, html

from tune_easytrain.dashboard.address import TRIAL, Address
from tune_easytrain.plain_text import printable

Element = Any
"""A component of Dash, or a text."""

STATES = {
    "pending": "○",
    "probing": "◔",
    "training": "▶",
    "interrupted": "‖",
    "finished": "✓",
    "stopped": "■",
    "failed": "✗",
}
"""Every state of a trial with the sign before it: nobody has to tell them apart by colour."""

_FULL = "0.95"
"""The share of its budget from which on a trial's memory is shown as nearly used up."""


def aria(**values: str) -> dict[str, Any]:
    """Return attributes for those who have the page read to them, such as `label` for `aria-label`."""
    return {f"aria-{name}": value for name, value in values.items()}


def data(**values: str) -> dict[str, Any]:
    """Return attributes for dashboard.js."""
    return {f"data-{name}": value for name, value in values.items()}


def text(value: str) -> str:
    """Return a text from files and trials without what no browser should obey."""
    return printable(value)


def link(content: str, address: Address, **properties: Any) -> Element:
    """Return a link to another page."""
    return dcc.Link(text(content), href=str(address), **properties)


def trial_link(trial_id: str, address: Address) -> Element:
    """Return a link to a trial's page."""
    return link(trial_id, address.view_of(TRIAL, trial_id))


def state(name: str) -> Element:
    """Return a trial's state: a sign and the word."""
    return html.Span(f"{STATES.get(name, '')} {name}", className=f"state state-{name}")


def meter(value: float | None, most: float | None, label: str) -> Element:
    """Return a bar of a value against the most there may be of it, with both as text beside it."""
    if not label:
        return ""
    if value is None or not most:
        return html.Span(label, className="number")
    bar = html.Meter(
        min=0,
        max=1,
        value=f"{min(1.0, value / most):.4f}",
        low=_FULL,
        high=_FULL,
        optimum="0",
        **aria(label=label),
    )
    return html.Span([bar, html.Span(label)], className="metered")


def share_bar(shares: Mapping[str, int]) -> Element:
    """Return one bar in parts as wide as their numbers, by state; the words are beside it."""
    total = sum(shares.values()) or 1
    parts = [
        html.Span(className=f"part state-{name}", style={"width": f"{100 * number / total:.2f}%"})
        for name, number in shares.items()
    ]
    return html.Div(parts, className="shares", **aria(hidden="true"))


def tick_box(label: str, is_ticked: bool, target: Address) -> Element:
    """Return a box that mouse, Space and Enter tick; dashboard.js goes to the address that it leads to."""
    return html.Button(
        "☑" if is_ticked else "☐",
        role="checkbox",
        className="pick",
        title=label,
        **aria(label=label, checked=str(is_ticked).lower()),
        **data(search=str(target).partition("?")[2]),
    )


def table(headings: Sequence[Element], rows: Iterable[Sequence[Element]], name: str) -> Element:
    """Return a table that scrolls sideways where it is too wide, as one that keys reach.

    Args:
        headings: one per column; a heading that is a `html.Th` stands as it is.
        rows: the cells.
        name: what the table shows, for those who do not see it.
    """
    head = [cell if isinstance(cell, html.Th) else html.Th(cell, scope="col") for cell in headings]
    body = [html.Tr([html.Td(cell) for cell in row]) for row in rows]
    return html.Div(
        html.Table([html.Thead(html.Tr(head)), html.Tbody(body)]),
        className="scrolls",
        tabIndex="0",
        role="region",
        **aria(label=text(name)),
    )


def facts(pairs: Iterable[tuple[str, Element]]) -> Element:
    """Return names with what there is to say of each."""
    return html.Dl([html.Div([html.Dt(name), html.Dd(content)]) for name, content in pairs])


def choice(
    label: str, options: Iterable[tuple[str, str]], chosen: str, address: Address, name: str
) -> Element:
    """Return links to the same view with another value of one of its questions.

    Args:
        label: what is chosen.
        options: values with the words for them; the first is what an address without the question asks for.
        chosen: the value at hand.
        address: the page's.
        name: the question's name in the address.
    """
    links = [
        html.Li(
            link(words, address.asking(**{name: value}), className="chosen" if value == chosen else ""),
            **(aria(current="true") if value == chosen else {}),
        )
        for value, words in options
    ]
    return html.Nav([html.Span(f"{label}: "), html.Ul(links)], className="choice", **aria(label=label))


def box(name: str, label: str, address: Address, hint: str) -> Element:
    """Return an input whose text becomes a question in the address, which dashboard.js sees to."""
    typed = dcc.Input(
        id={"box": name},
        value=address.query.get(name, ""),
        placeholder=hint,
        type="text",
        debounce=False,  # with any, Dash puts the cursor back where it was some letters ago
        spellCheck="false",
        autoComplete="off",
    )
    return html.Label([html.Span(label), typed], className="box")


def filter_box(address: Address) -> Element:
    """Return the input of the condition that says which trials are shown."""
    return box("where", "Only trials with", address, "model.type == r3d_18 and epochs > 3")


def note(content: str) -> Element:
    """Return a sentence for the reader."""
    return html.P(text(content), className="note")


def problem(content: str) -> Element:
    """Return what went wrong, read aloud by screen readers."""
    return html.P(text(content), className="problem", role="alert")


def misunderstood(content: str) -> Element:
    """Return what an address asks for that there is not, told to those who have the page read to them too."""
    return html.P(text(content), className="misunderstood", role="status")


def section(title: str, *content: Element) -> Element:
    """Return a part of a page under a heading of its own."""
    return html.Section([html.H2(title), *content])


def without_figures(content: Sequence[Element]) -> list[Element]:
    """Return a page's elements with an empty place for each figure: plotly takes a second to load."""
    left: list[Element] = []
    for element in content:
        if isinstance(element, html.Figure):
            place, caption = html.Div(className="dash-graph"), element.children[1]
            kept = {"style": element.style} if hasattr(element, "style") else {}
            left.append(html.Figure([place, caption], **kept))
        else:
            left.append(element)
    return left


def graph(
    figure: Mapping[str, Any], caption: str, name: str = "graph", *, least_width_rem: float = 0.0
) -> Element:
    """Return a figure of plotly, with a sentence that says what it shows.

    Args:
        figure: plotly's; on a narrow screen it is as much higher as its legend has lines there.
        caption: the sentence.
        name: the figure's id.
        least_width_rem: where the screen is narrower, the figure scrolls sideways.
    """
    shown = dcc.Graph(
        id=name, figure=figure, responsive=True, config={"displaylogo": False, "displayModeBar": "hover"}
    )
    num_entries = sum(trace.get("showlegend", True) for trace in figure["data"])
    style = {
        "--entries": num_entries if figure["layout"].get("showlegend") else 0,
        "--least-width": f"{least_width_rem:.1f}rem",
    }
    scrolls: dict[str, Any] = {"tabIndex": "0"} if least_width_rem else {}
    return html.Figure([shown, html.Figcaption(text(caption))], style=style, **scrolls)
