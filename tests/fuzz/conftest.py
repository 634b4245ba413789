from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hostile import is_full, largest_memory_bytes

MOST_GROWTH_BYTES = 1 << 30


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    if is_full():  # ten thousand examples take longer than a test of the suite may
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.timeout(0))


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    """No reader needs a GiB for a file of some kilobytes."""
    before = largest_memory_bytes()
    yield
    assert largest_memory_bytes() - before < MOST_GROWTH_BYTES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")
