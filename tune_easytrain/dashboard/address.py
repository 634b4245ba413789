"""`Address`: what a page shows, as it stands in the browser's address, so that links can be shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, quote, unquote, urlencode

OVERVIEW = "overview"
TRIAL = "trial"


@dataclass(frozen=True)
class Address:
    """One page of the dashboard.

    Attributes:
        run: the run's name; empty for the list of runs.
        view: the view's name.
        trial: the trial's id on a trial's page, else empty.
        query: what the view was asked for, such as `{"sort": "-val_accuracy_best"}`.
    """

    run: str = ""
    view: str = OVERVIEW
    trial: str = ""
    query: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, path: str, search: str) -> Address:
        """Read the path and the part behind `?` of an address; what is no page is the list of runs."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        query = dict(parse_qsl(search.removeprefix("?")))
        match parts:
            case ["run", run]:
                return cls(run, query=query)
            case ["run", run, view]:
                return cls(run, view, query=query)
            case ["run", run, view, trial] if view == TRIAL:
                return cls(run, view, trial, query)
            case _:
                return cls(query=query)

    def __str__(self) -> str:
        parts = ["run", self.run, self.view, self.trial] if self.run else []
        path = "/".join(quote(part, safe="") for part in parts if part)
        search = urlencode({name: value for name, value in self.query.items() if value})
        return f"/{path}{'?' if search else ''}{search}"

    def asking(self, **changed: str) -> Address:
        """Return the same view, asked for something else; an empty value asks for the default."""
        return replace(self, query={**self.query, **changed})

    def view_of(self, view: str, trial: str = "", **query: str) -> Address:
        """Return another view of the run: of the same chosen trials, and whatever else it is asked for."""
        kept = {name: self.query[name] for name in KEPT if name in self.query}
        return Address(self.run, view, trial, {**kept, **query})


KEPT = ("where", "pick")
"""What stays from view to view: which trials are shown, and which were picked."""
