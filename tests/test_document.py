from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune_easytrain.document import (
    Block,
    Code,
    Figure,
    Heading,
    Paragraph,
    Points,
    Table,
    as_html,
    as_markdown,
)

HOSTILE = "<script>alert(1)</script> | [x](y) `a` *b* _c_ \x1b[2J"
BLOCKS: list[Block] = [
    Heading(HOSTILE, 1),
    Paragraph(HOSTILE),
    Code(HOSTILE),
    Table([HOSTILE, "b"], [[HOSTILE, "1"], ["", "2"]]),
    Figure(
        HOSTILE,
        HOSTILE,
        HOSTILE,
        [Points(HOSTILE, [8, 16], [0.5, float("nan")], [HOSTILE, "b"], [0.1, 0.1])],
        True,
    ),
]


def test_a_page_has_everything_in_it_and_obeys_no_text() -> None:
    pytest.importorskip("plotly")
    page = as_html(BLOCKS, HOSTILE)
    own = re.sub(r"<script>/\*\*.*?</script>", "", page, flags=re.DOTALL)
    assert "<script>alert" not in own
    assert "\x1b" not in own
    assert not re.search(r'(?:src|href)="', own)
    (figure,) = re.findall(r"const f = (.*?); Plotly", own)
    content = json.loads(figure)
    assert content["data"][0]["y"] == [0.5]  # what is no number is no point
    assert "<" not in figure


def test_a_page_without_figures_is_small() -> None:
    assert len(as_html(BLOCKS[:-1], "x")) < 10_000


def test_markdown_obeys_no_text() -> None:
    text = as_markdown(BLOCKS)
    heading, paragraph = text.split("\n\n")[:2]
    escaped = r"\<script\>alert(1)\</script\> \| \[x\](y) \`a\` \*b\* \_c\_"
    assert heading.startswith(f"# {escaped}")
    assert paragraph.startswith(escaped)
    assert "| --- | --- |" in text


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_every_row_has_its_cells(cells: list[str]) -> None:
    (table,) = as_markdown([Table(cells, [cells])]).strip().split("\n\n")
    rows = table.split("\n")
    assert len(rows) == 3
    assert {len(re.findall(r"(?<!\\)\|", row.replace(r"\\", ""))) for row in rows} == {len(cells) + 1}


@pytest.mark.parametrize(
    ("x", "mode"),
    [
        ([8], "markers"),
        ([8, 16], "markers"),
        ([8, 16, 32], "lines+markers"),
        ([8, 16, 16], "markers"),
        ([8, 16, float("nan")], "markers"),
    ],
)
def test_a_line_needs_three_places(x: list[float], mode: str) -> None:
    pytest.importorskip("plotly")
    figure = Figure("a", "b", "c", [Points("d", x, [0.5] * len(x), ["e"] * len(x))], is_logarithmic=True)
    (content,) = re.findall(r"const f = (.*?); Plotly", as_html([figure], "x"))
    assert [trace["mode"] for trace in json.loads(content)["data"]] == [mode]
