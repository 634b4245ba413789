"""What the commands of the command line share: options, and how they print."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tune_easytrain.plain_text import printable

_PIPE_WIDTH = 1000
_BETWEEN_COLUMNS = 3
_EDGES = 2

File = Annotated[Path, typer.Argument(help="The sweep file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the file; may be given several times."
    ),
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Put the values of the file's section `quick` in place, before --set.")
]
StartFrom = Annotated[
    float | None,
    typer.Option("--start-from", metavar="VALUE", help="Skip smaller values of the sweep's `batch.knob`."),
]
MaxExperiments = Annotated[
    int | None,
    typer.Option(
        "--max-experiments", "--max_experiments", min=1, help="Keep the first N trials of the file's order."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


def with_start(overrides: list[str] | None, start_from: float | None) -> list[str]:
    """Return what `--set` and `--start-from` replace in a sweep file."""
    return [*(overrides or []), *([] if start_from is None else [f"batch.start_from={start_from:g}"])]


def print_table(
    headings: Iterable[str], rows: Iterable[Iterable[str]], dispensable: Iterable[str] = ()
) -> list[str]:
    """Print a table to standard output; return the headings of the columns that a terminal had no room for.

    Args:
        headings: one per column.
        rows: the cells' texts.
        dispensable: headings of columns that may be left out, the first of them first.
    """
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit: nothing may be cut off
        console = Console(width=_PIPE_WIDTH)
    columns = [list(cells) for cells in zip(headings, *rows, strict=True)]
    left_out: list[str] = []
    if _width(columns) > console.width and (dispensable := list(dispensable)):
        names = [heading for heading, *_ in columns]
        columns = [[heading.replace(" ", "\n"), *cells] for heading, *cells in columns]
        while _width(columns) > console.width and dispensable:
            if (name := dispensable.pop(0)) in names:
                place = len(names) - 1 - names[::-1].index(name)  # behind a config key of the same name
                left_out.append(names.pop(place))
                del columns[place]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, *_ in columns:
        table.add_column(_cell(heading))
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*map(_cell, row))
    console.print(table, markup=False, highlight=False)
    return left_out


def _width(columns: Iterable[Iterable[str]]) -> int:
    widths = [max(_cell(line).cell_len for cell in cells for line in cell.split("\n")) for cells in columns]
    return sum(widths) + _BETWEEN_COLUMNS * (len(widths) - 1) + _EDGES


def _cell(text: str) -> Text:
    return Text(printable(text))  # a string would be read as markup


def to_out(text: str) -> None:
    """Print a line to standard output."""
    typer.echo(printable(text))


def to_err(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(printable(text), err=True)
