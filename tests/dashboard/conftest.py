from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    """A real Chromium, for as long as a module: its Playwright must be gone before another one begins."""
    from chromium import NoChromiumError, find_chromium, running_chromium

    try:
        program = find_chromium()
    except NoChromiumError as error:
        pytest.skip(str(error))
    with running_chromium(program) as browser:
        yield browser
