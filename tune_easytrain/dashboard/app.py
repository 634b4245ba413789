"""The web application: an address shows a view, which is made again when the sweep has changed."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from tune_easytrain.dashboard import (
    comparison_page,
    curves,
    importance,
    overview,
    parallel,
    probes,
    run_page,
    tradeoffs,
    trial_page,
    trial_table,
)
from tune_easytrain.dashboard.address import TRIAL, Address
from tune_easytrain.dashboard.elements import (
    Element,
    aria,
    filter_box,
    link,
    misunderstood,
    problem,
    text,
    without_figures,
)
from tune_easytrain.dashboard.page import Page, Question
from tune_easytrain.dashboard.rows import TrialRows
from tune_easytrain.dashboard.run_list import RunList
from tune_easytrain.errors import TuneEasyTrainError

TICK_MILLISECONDS = 700
"""How often a page asks whether the sweep has changed."""

_AT_ONCE_MILLISECONDS = 50

_PATIENCE_SECONDS = 4.0

_CLOCK_SECONDS = 5
"""How often times are made again on a page of a sweep in which nothing happens."""

_NUM_READ_FIRST = 2  # as many as are compared

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """A view: its name in addresses, its title, and how it is built.

    `version` says what else than the sweep makes it change, `boxes` what there is to type in.
    """

    name: str
    title: str
    build: Callable[[Question], Page]
    version: Callable[[Question], Hashable] = lambda question: None
    boxes: Callable[[Address], Sequence[Element]] = lambda address: [filter_box(address)]


def _none(address: Address) -> Sequence[Element]:
    return []


def _clock(question: Question) -> Hashable:
    return int(time.time() / _CLOCK_SECONDS) if question.run.num_unfinished else None


VIEWS = (
    View("overview", "Overview", overview.build, _clock, _none),
    View("trials", "Trials", trial_table.build, boxes=trial_table.boxes),
    View("curves", "Curves", curves.build, boxes=curves.boxes),
    View("parallel", "Parallel coordinates", parallel.build),
    View("importance", "Importance", importance.build, importance.version),
    View("tradeoffs", "Trade-offs", tradeoffs.build),
    View("probes", "Probes", probes.build),
    View("compare", "Compare", comparison_page.build, comparison_page.version, comparison_page.boxes),
)
_OF_A_TRIAL = View(TRIAL, "Trial", trial_page.build, _clock, _none)
_BY_NAME = {view.name: view for view in (*VIEWS, _OF_A_TRIAL)}


def _shown(address: Address) -> View:
    """Return the view that an address shows; the overview where there is no view of that name."""
    return _BY_NAME.get(address.view, VIEWS[0])


def _misunderstood(question: Question) -> str:
    """Return what the address asks for in vain; empty where nothing is."""
    found = list(question.misunderstood.values())
    if (name := question.address.view) not in _BY_NAME:
        found.insert(0, f"the view {name} (there are {', '.join(view.name for view in VIEWS)})")
    return f"Not understood in the address: {'; '.join(found)}." if found else ""


class Desk:
    """Answers what pages ask; one for all browsers.

    Args:
        runs: the runs there are to show.
    """

    def __init__(self, runs: RunList) -> None:
        self._runs = runs
        self._rows: dict[str, TrialRows] = {}
        self._lock = threading.Lock()

    def read_newest(self) -> None:
        """Read the newest runs, which takes a second for a thousand trials, before anybody asks for them."""
        for name in self._runs.names()[:_NUM_READ_FIRST]:
            with suppress(TuneEasyTrainError):  # told to who asks for it
                if (run := self._runs.open(name)) is not None:
                    run.poll()

    def question(self, address: Address) -> Question | None:
        """Return what a view of a run is asked; None where there is no such run.

        Raises RunDirectoryError where the run directory is damaged.
        """
        run = self._runs.open(address.run) if address.run else None
        if run is None:
            return None
        run.poll()
        with self._lock:
            rows = self._rows.setdefault(run.name, TrialRows(run))
        return Question(run, rows, self._runs, address)

    def answer(self, address: Address, seen: str) -> tuple[str, Page | None]:
        """Return a page with what tells it from others; None in its place where that is what was seen."""
        try:
            question = self.question(address)
        except TuneEasyTrainError as error:
            return self._told(address, seen, problem(str(error)))
        if question is None:
            version = f"{address} {self._runs.names()}"
            return version, None if version == seen else run_page.build(self._runs, address)
        view = _shown(address)
        version = f"{address} {question.run.revision} {question.run.problem} {view.version(question)}"
        if version == seen:
            return version, None
        try:
            page = view.build(question)
        except TuneEasyTrainError as error:
            page = Page([problem(str(error))])
        except Exception as error:  # noqa: BLE001  the reader is told, and the server goes on
            _log.exception("%s of %s", view.name, question.run.place)
            page = Page([problem(f"This view failed: {type(error).__name__}: {error}")])
        if question.run.problem:
            stale = problem(f"What you see may be old, as the sweep cannot be read: {question.run.problem}")
            page = Page([stale, *page.live])
        if said := _misunderstood(question):
            page = Page([misunderstood(said), *page.live])
        return version, replace(page, controls=view.boxes(address))

    @staticmethod
    def _told(address: Address, seen: str, content: Element) -> tuple[str, Page | None]:
        version = f"{address} {content.children}"
        return version, None if version == seen else Page([content])

    def heading(self, address: Address) -> list[Element]:
        """Return the page's head: which run, and the way to its views."""
        home = link("All sweeps", Address())
        if not address.run:
            return [html.H1("Sweeps")]
        here = _shown(address)
        items = [
            html.Li(
                link(
                    view.title,
                    address.view_of(view.name),
                    className="chosen" if view is here else "",
                ),
                **(aria(current="page") if view is here else {}),
            )
            for view in VIEWS
        ]
        return [
            html.Div([html.H1(text(address.run)), home], className="title"),
            html.Nav(html.Ul(items), className="views", **aria(label="Views")),
        ]


def build_app(places: Sequence[str]) -> Dash:
    """Return the application for run directories and storages.

    Raises RunDirectoryError or StorageError for a place that cannot be read.
    """
    runs = RunList(places)
    app = Dash(
        "tune_easytrain.dashboard",
        title="tune_easytrain",
        update_title="",
        assets_folder=str(Path(__file__).parent / "assets"),
        suppress_callback_exceptions=True,
        serve_locally=True,
    )
    app.index_string = _INDEX
    app.layout = html.Div(
        [
            dcc.Location(id="address", refresh=False),
            dcc.Interval(id="tick", interval=TICK_MILLISECONDS),
            dcc.Store(id="seen", data={"address": "", "version": "", "boxes": ""}),
            dcc.Store(id="heard"),
            html.A("Skip to the content", href="#content", className="skip"),
            html.Header(id="heading"),
            html.P(id="connection", role="status", className="problem", hidden=True),
            html.Main(
                [html.Div(id="controls", className="boxes"), html.Div(id="live", **aria(live="off"))],
                id="content",
                tabIndex="-1",
            ),
        ]
    )
    desk = Desk(runs)
    reading = threading.Thread(target=desk.read_newest, daemon=True, name="first reading")
    reading.start()
    reading.join(_PATIENCE_SECONDS)  # a store may be slow: then who asks first waits
    _add_callbacks(app, desk)
    return app


def _add_callbacks(app: Dash, desk: Desk) -> None:
    @app.callback(
        Output("heading", "children"),
        Output("controls", "children"),
        Output("live", "children"),
        Output("seen", "data"),
        Output("heard", "data"),
        Output("tick", "interval"),
        Input("tick", "n_intervals"),
        Input("address", "pathname"),
        Input("address", "search"),
        State("seen", "data"),
        # A question that is still being answered is not asked again: its answer would be thrown away.
        running=[(Output("tick", "disabled"), True, False)],
    )
    def show(
        num_ticks: int | None, path: str | None, search: str | None, seen: Mapping[str, str]
    ) -> Sequence[Any]:
        address = Address.parse(path or "/", search or "")
        is_same_page = seen["address"] == str(address)
        version, page = desk.answer(address, seen["version"])
        is_first = not seen["address"]
        if page is None:
            return no_update, no_update, no_update, no_update, num_ticks, TICK_MILLISECONDS
        boxes = f"{address.run}/{address.view}/{address.trial}/{len(page.controls)}"
        # What can be read at once comes first; the figures come with the next question, asked at once.
        now = {"address": str(address), "version": "" if is_first else version, "boxes": boxes}
        live = without_figures(page.live) if is_first else page.live
        interval = _AT_ONCE_MILLISECONDS if is_first else TICK_MILLISECONDS
        heading = no_update if is_same_page else desk.heading(address)
        controls = no_update if boxes == seen["boxes"] else page.controls
        return heading, controls, live, now, num_ticks, interval

    @app.callback(
        Output("address", "search", allow_duplicate=True),
        Input(parallel.GRAPH, "selectedData"),
        State("address", "pathname"),
        State("address", "search"),
        prevent_initial_call=True,
    )
    def brush(selected: dict[str, Any] | None, path: str, search: str) -> Any:
        address = Address.parse(path, search)
        question = desk.question(address) if selected else None
        if question is None or selected is None or address.view != "parallel":
            return no_update
        return str(parallel.brushed(question, selected)).partition("?")[2].join(["?", ""])

    in_browser: Callable[..., None] = app.clientside_callback  # Dash has no types for it
    in_browser(
        ClientsideFunction("dashboard", "fill"), Input("controls", "children"), Input("address", "search")
    )
    in_browser(ClientsideFunction("dashboard", "heard"), Input("heard", "data"))
    in_browser(ClientsideFunction("dashboard", "name"), Input("heading", "children"))


_INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    {%metas%}
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <meta name="color-scheme" content="light dark">
    <title>{%title%}</title>
    {%favicon%}
    {%css%}
  </head>
  <body>
    {%app_entry%}
    <footer>
      {%config%}
      {%scripts%}
      {%renderer%}
    </footer>
  </body>
</html>
"""
