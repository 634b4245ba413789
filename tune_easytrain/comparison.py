"""Two runs side by side: trials matched by what tells them apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    frames = [run.frame(metric=metric, mode=mode) for run in runs]
    configs = [_config_columns(run, frame) for run, frame in zip(runs, frames, strict=True)]
    shared = [key for key in configs[0] if key in configs[1]]
    on = [on] if isinstance(on, str) else on
    for key in on or ():
        if key not in shared:
            raise BadInputError(f"on: no config key {key!r} in both runs; {did_you_mean(key, shared)}")
    varied = [key for key in shared if any(len(set(_values(frame, key))) > 1 for frame in frames)]
    matches = _matches(frames, list(on) if on is not None else _distinctive_keys(frames, varied))
    agreed = [key for key in dict.fromkeys([*(on or ()), *varied]) if _agree(frames, key, matches)]
    differing = [
        key
        for key in dict.fromkeys([*configs[0], *configs[1]])
        if key not in agreed and not (key in shared and _agree(frames, key, matches))
    ]
    measured = _measured(frames, metric, matches)
    columns = {config_column(key, measured): _common(frames, key, matches) for key in agreed} | measured
    columns |= {
        f"{key}_{side}": _taken(frame, key, [match[position] for match in matches])
        for key in differing
        for position, (frame, side) in enumerate(zip(frames, "ab", strict=True))
        if key in configs[position]
    }
    return pd.DataFrame(columns, index=range(len(matches)))


def _config_columns(run: SweepResults, frame: pd.DataFrame) -> list[str]:
    columns = [f"config.{key}" if f"config.{key}" in frame else key for key in run.declared_values()]
    return [name for name in columns if name in frame]


def _values(frame: pd.DataFrame, key: str) -> Iterator[Any]:
    """Yield a config column's values so that those are equal that mean the same."""
    for value in frame[key].tolist():
        if is_missing(value):
            yield None
        elif isinstance(value, bool):
            yield str(value), bool
        else:
            yield value if isinstance(value, (int, float, str)) else (as_text(value), list)


def _points(frame: pd.DataFrame, keys: Iterable[str]) -> list[tuple[Any, ...]]:
    columns = [list(_values(frame, key)) for key in keys]
    return list(zip(*columns, strict=True)) if columns else [()] * len(frame)


def _distinctive_keys(frames: Sequence[pd.DataFrame], keys: Sequence[str]) -> list[str]:
    """Return as few of the keys as tell the trials of each run apart and match as many as more keys do."""
    kept = list(keys)
    for key in reversed(keys):
        fewer = [other for other in kept if other != key]
        is_enough = all(_num_points(frame, fewer) == _num_points(frame, kept) for frame in frames)
        if is_enough and _num_matched(frames, fewer) >= _num_matched(frames, kept):
            kept = fewer
    return kept


def _num_points(frame: pd.DataFrame, keys: Iterable[str]) -> int:
    return len(set(_points(frame, keys)))


def _num_matched(frames: Sequence[pd.DataFrame], keys: Sequence[str]) -> int:
    return sum(-1 not in match for match in _matches(frames, keys))


def _matches(frames: Sequence[pd.DataFrame], keys: Sequence[str]) -> list[Match]:
    """Return the rows that belong together: equal in these keys, and in the order of those that are alike."""
    rows_b: dict[tuple[Any, ...], list[int]] = {}
    for row, point in enumerate(_points(frames[1], keys)):
        rows_b.setdefault(point, []).append(row)
    for rows in rows_b.values():
        rows.reverse()
    matches = []
    for row, point in enumerate(_points(frames[0], keys)):
        of_b = rows_b.get(point)
        matches.append((row, of_b.pop() if of_b else -1))
    return matches + [(-1, row) for row in sorted(row for rows in rows_b.values() for row in rows)]


def _agree(frames: Sequence[pd.DataFrame], key: str, matches: Sequence[Match]) -> bool:
    """Return whether trials that belong together have the same value."""
    values_a, values_b = (list(_values(frame, key)) for frame in frames)
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
