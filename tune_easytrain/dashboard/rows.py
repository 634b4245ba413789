"""`TrialRows`: the rows of a followed sweep's frame, each made again only when its trial has changed."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.columns import is_missing
from tune_easytrain.condition import parse_condition
from tune_easytrain.dashboard.live_run import LiveRun
from tune_easytrain.frame import as_text, build_frame

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))

Row = Mapping[str, Any]
"""A trial by the columns of `SweepResults.frame()`; what is missing is None, or not there at all."""


class TrialRows:
    """All trials of a run as rows, in the sweep's order; many threads may ask."""

    def __init__(self, run: LiveRun) -> None:
        self._run = run
        self._rows: dict[str, Row] = {}
        self._revision = -1
        self._chosen: dict[str, tuple[int, frozenset[str]]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Row]:
        """Return every trial's row as of the run's last poll."""
        run = self._run
        with self._lock:
            revision = run.revision
            if revision != self._revision:
                changed = set(run.changed_since(self._revision))
                records = [record for record in run.records() if record.trial_id in changed]
                for row in self._made(records):
                    self._rows[row["trial_id"]] = row
                if len(changed) > 1:
                    self._rows = dict(sorted(self._rows.items()))
                self._revision = revision
            return list(self._rows.values())

    def chosen(self, where: str) -> list[Row]:
        """Return the rows that fulfil a condition, all where it is empty; raises as `select` does."""
        rows = self.all()
        if not where.strip():
            return rows
        parse_condition(where)  # a fault is told whether there are trials or not
        with self._lock:
            revision, ids = self._chosen.get(where, (-1, frozenset[str]()))
            if revision != self._revision:
                ids = frozenset(self._run.frame(where=where)["trial_id"])
                self._chosen = {where: (self._revision, ids)}
        return [row for row in rows if row["trial_id"] in ids]

    def _made(self, records: Sequence[Any]) -> list[Row]:
        run = self._run
        declared = run.declared_values()
        frame = build_frame(records, run.metric, run.mode, declared, declared)
        columns = [
            [None if is_missing(value) else value for value in frame[name].tolist()] for name in frame.columns
        ]
        return [dict(zip(frame.columns, values, strict=True)) for values in zip(*columns, strict=True)]


def searched(rows: Iterable[Row], text: str, names: Sequence[str]) -> list[Row]:
    """Return the rows in which every word of a text stands in some cell of these columns."""
    words = text.lower().split()
    if not words:
        return list(rows)
    found = []
    for row in rows:
        cells = "\n".join(shown(row.get(name)) for name in names).lower()
        if all(word in cells for word in words):
            found.append(row)
    return found


def sorted_rows(rows: Iterable[Row], by: str) -> list[Row]:
    """Return rows sorted by a column, falling with `-` before it; what is missing comes last."""
    name = by.removeprefix("-")
    present = [row for row in rows if row.get(name) is not None]
    missing = [row for row in rows if row.get(name) is None]
    return sorted(present, key=lambda row: _rank(row[name]), reverse=by.startswith("-")) + missing


def _rank(value: Any) -> tuple[int, Any]:
    if isinstance(value, (int, float)):
        return 0, value
    return 1, shown(value)


def shown(value: Any) -> str:
    """Return a cell's value as people read it: four digits of a number, JSON of a list, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else as_text(value)


def batch_text(row: Row) -> str:
    """Return how a trial makes its effective batch size: micro-batch × steps × workers = effective.

    A trial that only evaluates has none: how many samples it takes at once.
    """
    size, steps, workers = row["microbatch_size"], row["accumulation_steps"], row["num_workers"]
    effective = row["effective_batch_size"]
    if size is not None and steps is None and effective is None:
        return f"{size} at once"
    if size is None or steps is None:
        return shown(effective)
    # Shares and micro-batches differ by up to one sample: the product is then more than what is trained.
    sign = "=" if size * steps * (workers or 1) == effective else "→"
    return f"{size} × {steps} × {workers or 1} {sign} {effective}"


def byte_unit(most: float) -> tuple[str, int]:
    """Return the unit in which a figure shows memory, with its bytes; `most` is the largest value there.

    >>> byte_unit(300 * 2**20)
    ('MiB', 1048576)
    """
    return next((unit for unit in _UNITS if most >= unit[1]), ("B", 1))


def memory_text(row: Row) -> str:
    """Return a trial's peak memory against its budget; empty before it is known."""
    peak, budget = row["peak_memory_bytes"], row["memory_budget_bytes"]
    if peak is None:
        return "" if budget is None else f"of {format_bytes(budget)}"
    return format_bytes(peak) if budget is None else f"{format_bytes(peak)} of {format_bytes(budget)}"
