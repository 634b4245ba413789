"""The list of runs: what a dashboard of a whole storage begins with."""

from __future__ import annotations

from dash import html

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import link, note, problem, table, text
from tune_easytrain.dashboard.page import Page
from tune_easytrain.dashboard.run_list import RunList


def build(runs: RunList, address: Address) -> Page:
    """Return the page."""
    names = runs.names()
    live = [problem(f"There is no run named {address.run} here.")] if address.run else []
    if not names:
        return Page([*live, note("There is no sweep here yet; it appears as soon as one starts.")])
    cells = [[link(name, Address(name)), html.Code(text(runs.place(name)))] for name in names]
    return Page([*live, table(["sweep", "run directory"], cells, "Sweeps")])
