"""Two runs side by side: trials matched by what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from tune_easytrain.columns import COMPARISON_COLUMNS, Mode, is_missing
from tune_easytrain.errors import BadInputError, did_you_mean
from tune_easytrain.frame import as_text, config_column, config_series
from tune_easytrain.results import SweepResults, load_results

Match = tuple[int, int]
"""The rows of a trial in the frames of both runs; -1 where a run has it not."""


def compare(
    run_a: SweepResults | str | Path,
    run_b: SweepResults | str | Path,
    *,
    metric: str | None = None,
    mode: Mode | None = None,
    on: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return one row per trial of two runs, those of the first run first; `COMPARISON_COLUMNS` and more.

    Trials are matched by config keys that both runs have: by as few as tell each run's trials apart, the
    first of the sweep's. What is the same for all trials of a run, or goes with another key, may so differ
    between the runs. Trials that are alike in these keys are matched in order. A trial that only one run has
    is a row too.

    Args:
        run_a: the run that is compared with, as `te.run` or `te.load_results` return it, or its path or URL.
        run_b: the run whose gains and losses are shown.
        metric: default: the metric of the first run.
        mode: which end of it is better; needed where neither run nor its name says so.
        on: the config keys to match by, in place of those that are found.

    Raises:
        BadInputError: a run has not the metric or a key of `on`.
        RunDirectoryError: a path is no run directory.
    """
    runs = [run if isinstance(run, SweepResults) else load_results(run) for run in (run_a, run_b)]
    metric = metric or runs[0].metric
    mode = mode or next((run.mode for run in runs if run.metric == metric), None)
    sides = [_Side(run, run.frame(metric=metric, mode=mode)) for run in runs]
    shared = [key for key in sides[0].keys if key in sides[1].keys]
    on = [on] if isinstance(on, str) else on
    for key in on or ():
        if key not in shared:
            raise BadInputError(f"on: no config key {key!r} in both runs; {did_you_mean(key, shared)}")
    varied = [key for key in shared if any(len(set(side.values(key))) > 1 for side in sides)]
    matches = _matches(sides, list(on) if on is not None else _distinctive_keys(sides, varied))
    agreed = [key for key in dict.fromkeys([*(on or ()), *varied]) if _agree(sides, key, matches)]
    differing = [
        key
        for key in dict.fromkeys([*sides[0].keys, *sides[1].keys])
        if key not in agreed and not (key in shared and _agree(sides, key, matches))
    ]
    frames = [side.frame for side in sides]
    measured = _measured(frames, metric, matches)
    columns = {config_column(key, measured): _common(frames, key, matches) for key in agreed} | measured
    columns |= {
        f"{key}_{name}": _taken(side.frame, key, [match[position] for match in matches])
        for key in differing
        for position, (side, name) in enumerate(zip(sides, "ab", strict=True))
        if key in side.keys
    }
    return pd.DataFrame(columns, index=range(len(matches)))


class _Side:
    """One of the runs: its frame, the columns of its config keys, and their values as they are compared."""

    def __init__(self, run: SweepResults, frame: pd.DataFrame) -> None:
        self.frame = frame
        columns = [f"config.{key}" if f"config.{key}" in frame else key for key in run.declared_values()]
        self.keys = [name for name in columns if name in frame]
        self._values: dict[str, list[Any]] = {}

    def values(self, key: str) -> list[Any]:
        """Return a config column's values so that those are equal that mean the same."""
        if key not in self._values:
            self._values[key] = [_comparable(value) for value in self.frame[key].tolist()]
        return self._values[key]

    def points(self, keys: Sequence[str]) -> list[tuple[Any, ...]]:
        """Return every trial's values of some keys."""
        if not keys:
            return [()] * len(self.frame)
        return list(zip(*(self.values(key) for key in keys), strict=True))


def _comparable(value: Any) -> Any:
    if type(value) in (str, int):  # nearly all are; the rest of this takes five times as long
        return value
    if is_missing(value):
        return None
    if isinstance(value, bool):
        return str(value), bool
    return value if isinstance(value, (int, float, str)) else (as_text(value), list)


def _distinctive_keys(sides: Sequence[_Side], keys: Sequence[str]) -> list[str]:
    """Return as few of the keys as tell the trials of each run apart and match as many as more keys do."""
    kept = list(keys)
    for key in reversed(keys):
        fewer = [other for other in kept if other != key]
        is_enough = all(len(set(side.points(fewer))) == len(set(side.points(kept))) for side in sides)
        if is_enough and _num_matched(sides, fewer) >= _num_matched(sides, kept):
            kept = fewer
    return kept


def _num_matched(sides: Sequence[_Side], keys: Sequence[str]) -> int:
    return sum(-1 not in match for match in _matches(sides, keys))


def _matches(sides: Sequence[_Side], keys: Sequence[str]) -> list[Match]:
    """Return the rows that belong together: equal in these keys, and in the order of those that are alike."""
    rows_b: dict[tuple[Any, ...], list[int]] = {}
    for row, point in enumerate(sides[1].points(keys)):
        rows_b.setdefault(point, []).append(row)
    for rows in rows_b.values():
        rows.reverse()
    matches = []
    for row, point in enumerate(sides[0].points(keys)):
        of_b = rows_b.get(point)
        matches.append((row, of_b.pop() if of_b else -1))
    return matches + [(-1, row) for row in sorted(row for rows in rows_b.values() for row in rows)]


def _agree(sides: Sequence[_Side], key: str, matches: Sequence[Match]) -> bool:
    """Return whether trials that belong together have the same value."""
    values_a, values_b = (side.values(key) for side in sides)
    return all(-1 in (row_a, row_b) or values_a[row_a] == values_b[row_b] for row_a, row_b in matches)


def _taken(frame: pd.DataFrame, column: str, rows: Sequence[int]) -> pd.Series[Any]:
    """Return a column's values in these rows; missing for -1."""
    return pd.Series(frame[column].array.take(np.array(rows, dtype="int64"), allow_fill=True))


def _common(frames: Sequence[pd.DataFrame], key: str, matches: Sequence[Match]) -> pd.Series[Any]:
    values_a, values_b = (frame[key].tolist() for frame in frames)
    return config_series(key, [values_b[row_b] if row_a < 0 else values_a[row_a] for row_a, row_b in matches])


def _measured(
    frames: Sequence[pd.DataFrame], metric: str, matches: Sequence[Match]
) -> dict[str, pd.Series[Any]]:
    """Return the columns of `COMPARISON_COLUMNS`."""
    both = {(True, True): "both", (True, False): "a", (False, True): "b"}
    found: dict[str, Any] = {"found_in": [both[row_a >= 0, row_b >= 0] for row_a, row_b in matches]}
    for position, (frame, side) in enumerate(zip(frames, "ab", strict=True)):
        rows = [match[position] for match in matches]
        for name in ("trial_id", "state", "samples_per_second", "peak_memory_bytes"):
            found[f"{name}_{side}"] = _taken(frame, name, rows)
        found[f"<metric>_{side}"] = _taken(frame, f"{metric}_best", rows)
    found["<metric>_difference"] = found["<metric>_b"] - found["<metric>_a"]
    for name in ("samples_per_second", "peak_memory_bytes"):
        before, after = (found[f"{name}_{side}"].astype("Float64") for side in "ab")
        found[f"{name}_ratio"] = (after / before.where(before > 0)).astype("float64")
    return {
        column.name.replace("<metric>", metric): pd.Series(
            found[column.name], dtype=cast("Any", column.dtype)
        )
        for column in COMPARISON_COLUMNS
    }
