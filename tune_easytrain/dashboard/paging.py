"""`Paging`: the part of many rows that is shown, as the address asks, and the way to the others."""

from __future__ import annotations

from dataclasses import dataclass

from dash import html

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.elements import Element, aria, link

ROWS_A_PAGE = 50
"""As many as are made again in a tenth of a second."""


@dataclass(frozen=True)
class Paging:
    """Which page of how many, both from 1."""

    page: int
    num_pages: int

    @classmethod
    def of(cls, address: Address, num_rows: int) -> Paging:
        """Return the page that an address asks for; the last where there are not so many."""
        num_pages = max(1, -(-num_rows // ROWS_A_PAGE))
        asked = address.query.get("page", "")
        page = int(asked) if asked.isdecimal() and len(asked) < 9 else 1
        return cls(min(max(1, page), num_pages), num_pages)

    @property
    def rows(self) -> slice:
        """The rows that are shown."""
        return slice((self.page - 1) * ROWS_A_PAGE, self.page * ROWS_A_PAGE)

    def links(self, address: Address) -> list[Element]:
        """Return the way to the other pages; nothing where there is one alone."""
        if self.num_pages == 1:
            return []
        steps = {"first": 1, "previous": self.page - 1, "next": self.page + 1, "last": self.num_pages}
        links = [
            html.Li(link(words, address.asking(page=str(number))))
            for words, number in steps.items()
            if 1 <= number <= self.num_pages and number != self.page
        ]
        told = f"Page {self.page} of {self.num_pages} "
        return [html.Nav([told, html.Ul(links)], className="choice", **aria(label="Pages"))]
