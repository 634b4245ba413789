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

File = Annotated[Path, typer.Argument(help="The sweep file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the file; may be given several times."
    ),
]
MaxExperiments = Annotated[
    int | None,
    typer.Option(
        "--max-experiments", "--max_experiments", min=1, help="Keep the first N trials of the file's order."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table to standard output."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(_cell(heading))
    for row in rows:
        table.add_row(*map(_cell, row))
    console = Console()
    if not console.is_terminal:  # a pipe has no width to fit: nothing may be cut off
        console = Console(width=_PIPE_WIDTH)
    console.print(table, markup=False, highlight=False)


def _cell(text: str) -> Text:
    return Text(printable(text))  # a string would be read as markup


def to_out(text: str) -> None:
    """Print a line to standard output."""
    typer.echo(printable(text))


def to_err(text: str) -> None:
    """Print a line to standard error."""
    typer.echo(printable(text), err=True)
