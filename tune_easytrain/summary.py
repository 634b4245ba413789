"""The short tables of a terminal: what a person wants to see first of a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.columns import is_missing

DISPENSABLE = ("tries", "steps", "samples", "peak / budget", "samples/s", "k", "m", "E")
"""Headings of the table of trials that a narrow terminal does without, the first of them first."""

DISPENSABLE_OF_COMPARISON = ("trial b", "trial a", "peak ratio", "samples/s ratio")
"""The same of the table of a comparison."""

_LONGEST_ERROR = 200


def summary_rows(frame: pd.DataFrame, metric: str, keys: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of trials; `keys` are the config columns to show."""
    keys = [key for key in keys if key in frame]
    rows = []
    for _, row in frame.iterrows():
        peak, budget = row["peak_memory_bytes"], row["memory_budget_bytes"]
        cells = [row["trial_id"], *(row[key] for key in keys), row["state"], row["effective_batch_size"]]
        cells += [row["microbatch_size"], row["accumulation_steps"], row["probe_attempts"]]
        cells += [
            "" if pd.isna(peak) or pd.isna(budget) else f"{format_bytes(peak)} / {format_bytes(budget)}"
        ]
        cells += [row["num_samples"], row["optimizer_steps"], _short(row["samples_per_second"])]
        cells += [_short(row[f"{metric}_best"])]
        rows.append(_texts(cells))
    headings = ["trial", *keys, "state", "E", "m", "k", "tries", "peak / budget", "samples", "steps"]
    return [*headings, "samples/s", f"{metric} (best)"], rows


def comparison_rows(frame: pd.DataFrame, metric: str) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the table of a comparison."""
    keys = list(frame.columns[: list(frame.columns).index("found_in")])
    shown = [*keys, "trial_id_a", "trial_id_b"]
    numbers = [f"{metric}_a", f"{metric}_b", f"{metric}_difference"]
    numbers += ["samples_per_second_ratio", "peak_memory_bytes_ratio"]
    rows = [
        _texts([*(row[name] for name in shown), *(_short(row[name]) for name in numbers)])
        for _, row in frame.iterrows()
    ]
    return [*keys, "trial a", "trial b", *numbers[:2], "difference", "samples/s ratio", "peak ratio"], rows


def error_lines(frame: pd.DataFrame) -> list[str]:
    """Return a line per failed trial that says why, shortened where the error is long."""
    return [
        f"{trial} failed: {_first_line(error)}"
        for trial, error in zip(frame["trial_id"], frame["error"], strict=True)
        if not is_missing(error) and error
    ]


def _texts(cells: Sequence[Any]) -> list[str]:
    return ["" if is_missing(cell) else str(cell) for cell in cells]


def _short(value: Any) -> Any:
    return value if pd.isna(value) else f"{value:.4g}"


def _first_line(text: str, width: int = _LONGEST_ERROR) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= width else f"{line[: width - 1]}…"
