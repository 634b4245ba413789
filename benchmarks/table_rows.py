"""What benchmarks that print a table of rows have in common: their options, and rows kept as JSON lines."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options `--device` and `--json`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="append a line per row here")
    return parser


def keep_row(row: dict[str, Any], path: Path | None) -> None:
    """Append a row to a file of JSON lines, if there is one."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
