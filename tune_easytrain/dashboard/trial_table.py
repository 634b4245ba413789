"""The table of trials: sorted, filtered, searched, page by page."""

from __future__ import annotations

from collections.abc import Sequence

from dash import html

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import (
    Element,
    aria,
    box,
    filter_box,
    link,
    meter,
    note,
    state,
    table,
    text,
    tick_box,
    trial_link,
)
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.paging import Paging
from tune_easytrain.dashboard.rows import Row, batch_text, memory_text, searched, shown, sorted_rows
from tune_easytrain.ranking import known_mode

_LONGEST_ERROR = 120
_PICKS = 20


def build(question: Question) -> Page:
    """Return the page."""
    address, run = question.address, question.run
    keys = question.keys
    best = question.column
    columns = {
        "trial_id": "trial",
        "state": "state",
        best: f"{run.metric} (best)",
        "samples_per_second": "samples/s",
        **{key: key for key in keys},
        "effective_batch_size": "micro-batch × steps × workers = effective",
        "peak_memory_bytes": "peak memory of budget",
        "epochs": "epochs",
        "num_rescues": "rescues",
    }
    rows = searched(
        question.chosen(), address.query.get("search", ""), ["trial_id", "state", "error", "device", *keys]
    )
    by = address.query.get("sort", "")
    if by.removeprefix("-") not in columns:
        by = question.asked("sort", ["", *columns])
    if by:
        rows = sorted_rows(rows, by)
    paging = Paging.of(address, len(rows))
    headings = [_heading(name, words, by, address, best, run.mode) for name, words in columns.items()]
    cells = [_cells(row, keys, best, question) for row in rows[paging.rows]]
    found = f"{len(rows)} of {len(question.rows.all())} trials"
    live = [
        html.P([found, *_picks(question)], className="note", role="status"),
        table(["curves", *headings], cells, "Trials"),
        *paging.links(address),
    ]
    if not rows:
        live.append(note("No trial is like that."))
    return Page(live)


def boxes(address: Address) -> list[Element]:
    """Return what there is to type in."""
    return [box("search", "Search", address, "words of any cell"), filter_box(address)]


def _heading(name: str, words: str, by: str, address: Address, best: str, mode: str) -> Element:
    """Return a column's heading: a link that sorts by it, the better end first, then the other way."""
    better = mode if name == best else known_mode(name)
    first, second = (f"-{name}", name) if better == "max" else (name, f"-{name}")
    target = address.asking(sort=second if by == first else first, page="")
    direction = {name: "ascending", f"-{name}": "descending"}.get(by, "none")
    arrow = {"ascending": " ↑", "descending": " ↓"}.get(direction, "")
    return html.Th(link(f"{words}{arrow}", target), scope="col", **aria(sort=direction))


def _cells(row: Row, keys: Sequence[str], best: str, question: Question) -> list[Element]:
    standing: list[Element] = [state(row["state"])]
    if row["error"]:
        standing.append(html.Div(text(str(row["error"])[:_LONGEST_ERROR]), className="error"))
    return [
        _pick(row["trial_id"], question),
        trial_link(row["trial_id"], question.address),
        standing,
        shown(row.get(best)),
        shown(row["samples_per_second"]),
        *(text(shown(row.get(key))) for key in keys),
        html.Span(batch_text(row), className="nowrap"),
        meter(row["peak_memory_bytes"], row["memory_budget_bytes"], memory_text(row)),
        shown(row["epochs"]),
        shown(row["num_rescues"]),
    ]


def _pick(trial_id: str, question: Question) -> Element:
    picked = question.picked
    is_picked = trial_id in picked
    left = [name for name in picked if name != trial_id] if is_picked else [*picked, trial_id][-_PICKS:]
    return tick_box(f"pick {trial_id}", is_picked, question.address.asking(pick=",".join(left)))


def _picks(question: Question) -> list[Element]:
    picked = question.picked
    if not picked:
        return [" · tick trials in the first column to see their curves together"]
    return [
        " · ",
        link(f"curves of the {len(picked)} picked", question.address.view_of("curves")),
        " · ",
        link("pick none", question.address.asking(pick="")),
    ]
