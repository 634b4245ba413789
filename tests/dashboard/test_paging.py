from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.dashboard.address import Address
from tune_easytrain.dashboard.paging import ROWS_A_PAGE, Paging


def asking(page: str) -> Address:
    return Address("demo", "trials", query={"page": page})


@given(st.integers(0, 300))
def test_the_pages_have_every_row_once(num_rows: int) -> None:
    rows = list(range(num_rows))
    num_pages = Paging.of(asking(""), num_rows).num_pages
    seen = [row for page in range(num_pages) for row in rows[Paging.of(asking(str(page + 1)), num_rows).rows]]
    assert seen == rows


@pytest.mark.parametrize(
    ("asked", "page"), [("", 1), ("2", 2), ("99", 3), ("0", 1), ("-1", 1), ("x", 1), ("9" * 5000, 1)]
)
def test_what_is_no_page_is_one_that_there_is(asked: str, page: int) -> None:
    assert Paging.of(asking(asked), 2 * ROWS_A_PAGE + 1) == Paging(page, 3)


def test_the_way_to_the_others_leaves_out_where_one_is() -> None:
    def words(page: str) -> list[str]:
        (nav,) = Paging.of(asking(page), 3 * ROWS_A_PAGE).links(asking(page))
        return [item.children.children for item in nav.children[1].children]

    assert words("1") == ["next", "last"]
    assert words("2") == ["first", "previous", "next", "last"]
    assert words("3") == ["first", "previous"]
    assert Paging.of(asking(""), ROWS_A_PAGE).links(asking("")) == []
