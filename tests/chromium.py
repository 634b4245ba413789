"""A real Chromium, driven by Playwright, and tabs in it that note whatever goes wrong on their pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from debian_packages import install
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Locator,
    Page,
    expect,
    sync_playwright,
)

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MILLISECONDS = 60_000

_TABLE = """table => ({
    headings: [...table.tHead.rows[0].cells].map(cell => cell.innerText.replace(/ [↑↓]$/, "")),
    rows: [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.innerText)),
})"""
_FIGURE = """graph => graph.data.map(trace => ({
    name: trace.name, mode: trace.mode, color: (trace.line || trace.marker || {}).color,
    x: Array.from(trace.x), y: Array.from(trace.y), text: trace.text,
}))"""


class NoChromiumError(Exception):
    """Why this machine cannot have one."""


def find_chromium() -> Path:
    """Return the program; Debian's package is installed where there is none and we may."""
    if (installed := _installed()) is not None:
        return installed
    complaint = install(["chromium"])
    if (installed := _installed()) is not None:
        return installed
    raise NoChromiumError(f"there is no {' or '.join(PROGRAMS)} here: {complaint}")


def _installed() -> Path | None:
    return next((Path(found) for program in PROGRAMS if (found := shutil.which(program))), None)


@contextmanager
def running_chromium(program: Path) -> Iterator[Browser]:
    """The browser, until the end of the block.

    Playwright's event loop runs in this thread for so long: nothing else here can run one of its own.
    """
    expect.set_options(timeout=PATIENCE_MILLISECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, chromium_sandbox=os.geteuid() != 0
        )  # which Chromium refuses to root
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Tab:
    """A tab of the browser that looks at a dashboard.

    `faults` holds every error on the console (a forbidden script or style is one), every exception, and every
    answer that is an error.
    """

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MILLISECONDS)
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.faults.append(f"exception: {error}"))
        self.page.on(
            "response",
            lambda answer: (
                self.faults.append(f"{answer.status} {answer.url}") if answer.status >= 400 else None
            ),
        )

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def open(self, address: str = "/") -> None:
        """Open a page of the dashboard, and wait until something is shown."""
        self.page.goto(f"{self.url}{address}")
        self.wait()

    def wait(self) -> None:
        """Wait for the page's content."""
        expect(self.live.locator("> *").first).to_be_attached()

    @property
    def live(self) -> Locator:
        """The part of the page that follows the sweep."""
        return self.page.locator("#live")

    @property
    def address(self) -> str:
        """Where the tab is, from the path on."""
        parts = urlsplit(self.page.url)
        return f"{parts.path}?{parts.query}" if parts.query else parts.path

    def wait_for_address(self, part: str) -> None:
        """Wait until the address holds a text."""
        self.page.wait_for_url(lambda url: part in url)

    def region(self, name: str) -> Locator:
        """The table of that name."""
        return self.page.get_by_role("region", name=name, exact=True).locator("table")

    def table(self, name: str) -> list[dict[str, str]]:
        """Every row of the table of that name, by its headings."""
        found = self.region(name).evaluate(_TABLE)
        return [dict(zip(found["headings"], row, strict=True)) for row in found["rows"]]

    def fact(self, name: str) -> str:
        """What is said of something in a list of facts."""
        return self.live.locator(f"dl > div:has(dt:text-is('{name}')) > dd").inner_text()

    def traces(self) -> list[dict[str, Any]]:
        """What the page's first figure shows, once it is drawn."""
        graph = self.live.locator(".js-plotly-plot").first
        expect(graph.locator(".main-svg").first).to_be_visible()
        found: list[dict[str, Any]] = graph.evaluate(_FIGURE)
        return found

    def box(self, label: str) -> Locator:
        """The input of that label."""
        return self.page.get_by_label(label)

    def has_focus(self, locator: Locator) -> bool:
        """Whether an element is where the next key goes."""
        return bool(locator.evaluate("element => element === document.activeElement"))


@contextmanager
def opened(context: BrowserContext, url: str) -> Iterator[Tab]:
    """A tab that looks at the dashboard at a URL, closed afterwards; it must have had no faults."""
    tab = Tab(context.new_page(), url)
    try:
        yield tab
    finally:
        tab.page.close()
    assert not tab.faults, tab.faults
