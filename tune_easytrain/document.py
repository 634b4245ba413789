"""A document of headings, paragraphs, tables, figures and code, as Markdown or as one page of HTML."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tune_easytrain.plain_text import printable


@dataclass(frozen=True)
class Heading:
    """A heading; the document's own has level 1."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """Some sentences."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines to be shown as they are."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of texts, one list per row."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Points:
    """One series of a figure; `labels` say what each point is, `errors` are the reach of its bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str]
    errors: Sequence[float] | None = None


@dataclass(frozen=True)
class Figure:
    """Points over two axes; Markdown leaves it out.

    Over a logarithmic `x` the points of a series are joined, if they are three at least and no two of them
    have one `x`: a line through two points would say more than they do.
    """

    caption: str
    x_title: str
    y_title: str
    series: Sequence[Points]
    is_logarithmic: bool = False


_FEWEST_JOINED = 3

Block = Heading | Paragraph | Code | Table | Figure


def as_markdown(blocks: Iterable[Block]) -> str:
    """Return the document as Markdown; figures are left out, as the tables have their numbers."""
    parts = []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {_markdown(block.text)}")
            case Paragraph():
                parts.append(_markdown(block.text))
            case Code():
                parts.append(f"```text\n{printable(block.text)}\n```")
            case Table():
                lines = [_markdown_row(block.headings), _markdown_row(["---"] * len(block.headings))]
                parts.append("\n".join([*lines, *map(_markdown_row, block.rows)]))
            case Figure():
                pass
    return "\n\n".join(parts) + "\n"


def _markdown(text: str) -> str:
    text = printable(text).replace("\n", " ")
    return "".join(f"\\{sign}" if sign in "\\`*_<>[]#|" else sign for sign in text)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell if cell == '---' else _markdown(cell) for cell in cells)} |"


def as_html(blocks: Iterable[Block], title: str) -> str:
    """Return the document as one page that needs no network: style, script and figures are in it."""
    blocks = list(blocks)
    parts = []
    for number, block in enumerate(blocks):
        match block:
            case Heading():
                parts.append(f"<h{block.level}>{_escaped(block.text)}</h{block.level}>")
            case Paragraph():
                parts.append(f"<p>{_escaped(block.text)}</p>")
            case Code():
                parts.append(f"<pre>{_escaped(block.text)}</pre>")
            case Table():
                parts.append(_html_table(block))
            case Figure():
                parts.append(_html_figure(block, f"figure-{number}"))
    script = ""
    if any(isinstance(block, Figure) for block in blocks):
        from plotly.offline import get_plotlyjs

        script = f"<script>{get_plotlyjs()}</script>"
    return _PAGE.format(title=_escaped(title), script=script, body="\n".join(parts))


def _escaped(text: str) -> str:
    return html.escape(printable(text))


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{_escaped(cell)}</th>' for cell in table.headings)
    body = "".join(f"<tr>{''.join(f'<td>{_escaped(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scrolls" tabindex="0"><table>{content}</table></div>'


def _html_figure(figure: Figure, name: str) -> str:
    traces = []
    for points in figure.series:
        pairs = [
            (x, y, label, None if points.errors is None else points.errors[place])
            for place, (x, y, label) in enumerate(zip(points.x, points.y, points.labels, strict=True))
            if math.isfinite(x) and math.isfinite(y)
        ]
        trace: dict[str, object] = {
            "type": "scatter",
            "mode": "lines+markers"
            if figure.is_logarithmic and _may_be_joined([x for x, *_ in pairs])
            else "markers",
            "name": _escaped(points.name or "trials"),
            "x": [x for x, *_ in pairs],
            "y": [y for _, y, *_ in pairs],
            "text": [_escaped(label) for _, _, label, _ in pairs],
            "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}",
        }
        if points.errors is not None:
            trace["error_y"] = {"type": "data", "array": [error for *_, error in pairs], "visible": True}
        traces.append(trace)
    x_axis: dict[str, object] = {"title": {"text": _escaped(figure.x_title)}}
    if figure.is_logarithmic:
        ticks = sorted({x for points in figure.series for x in points.x if x > 0})
        x_axis |= {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    layout = {
        "xaxis": x_axis,
        "yaxis": {"title": {"text": _escaped(figure.y_title)}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": True,
        "margin": {"t": 20},
    }
    content = json.dumps({"data": traces, "layout": layout}).replace("<", "\\u003c")
    return (
        f'<figure><div id="{name}"></div><figcaption>{_escaped(figure.caption)}</figcaption></figure>'
        f'<script>addEventListener("load", () => {{ const f = {content}; '
        f'Plotly.newPlot("{name}", f.data, f.layout, {{responsive: true, displaylogo: false}}); }});</script>'
    )


def _may_be_joined(x: Sequence[float]) -> bool:
    return len(set(x)) == len(x) >= _FEWEST_JOINED


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1a1d21; --dim: #565d66; --line: #d5d9de;
  --raised: #f4f6f8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #14171a; --ink: #e6e8ea; --dim: #a3abb4; --line: #363c43; --raised: #1e2226; }}
}}
body {{ margin: 0 auto; max-width: 75rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--paper); color: var(--ink); }}
p {{ max-width: 50rem; overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }}
th {{ color: var(--dim); vertical-align: bottom; }}
.scrolls, pre {{ overflow-x: auto; }}
pre {{ background: var(--raised); padding: .8rem; border-radius: 4px; }}
figure {{ margin: 1rem 0; }}
figcaption {{ color: var(--dim); }}
.js-plotly-plot text {{ fill: var(--ink) !important; }}
.js-plotly-plot .gridlayer path {{ stroke: var(--line) !important; }}
@media print {{ .modebar {{ display: none; }} }}
</style>
{script}
</head>
<body>
{body}
</body>
</html>
"""
