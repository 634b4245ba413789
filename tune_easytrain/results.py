"""The results of a sweep: run directory to frames, and the rows in them that are asked for.

What users need of the modules below is here too: columns (`columns.py`), frames (`frame.py`), the short table
(`summary.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from tune_easytrain.checkpoint_store import CheckpointStore, StoredCheckpoint
from tune_easytrain.columns import COLUMNS, COMPARISON_COLUMNS, HISTORY_COLUMNS, Column, Mode
from tune_easytrain.condition import select
from tune_easytrain.errors import BadInputError, RunDirectoryError, did_you_mean
from tune_easytrain.events import load_events
from tune_easytrain.frame import build_frame, metric_names, typed_columns
from tune_easytrain.frame_files import write_csv, write_parquet
from tune_easytrain.history import build_history
from tune_easytrain.ranking import best_row, find_column, require_mode, sort_rows
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.summary import summary_rows
from tune_easytrain.trial_record import TrialRecord, TrialState
from tune_easytrain.trial_space import SECTION_NAMES, flatten_config

__all__ = [
    "COLUMNS",
    "COMPARISON_COLUMNS",
    "HISTORY_COLUMNS",
    "Column",
    "SweepResults",
    "build_frame",
    "load_results",
    "summary_rows",
    "typed_columns",
]

Where = str | Iterable[str] | None
"""A condition, or several that all have to hold (`condition.py` has the grammar); None: every trial."""


class SweepResults:
    """The results of one sweep as they stand in its run directory; nothing of Ray is needed to read them."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._directory = run_directory
        run: Mapping[str, Any] = self.sweep()["run"]
        self.metric: str = run["metric"]
        self.mode: Mode = run["mode"]

    @property
    def run_dir(self) -> Path:
        """The run directory; for one in an object store its copy on this machine, without checkpoints."""
        return self._directory.path

    @property
    def place(self) -> str:
        """The run directory as a path or, where it is in an object store, its URL."""
        return self._directory.place

    def sweep(self) -> dict[str, Any]:
        """Return the sweep as it was run, every default filled in; raises RunDirectoryError if damaged."""
        try:
            sweep = self._directory.load_sweep()
        except RecursionError:
            sweep = {}
        if fault := _sweep_fault(sweep):
            raise RunDirectoryError(f"{self._directory.sweep_path} is damaged: {fault}")
        return sweep

    def records(self) -> list[TrialRecord]:
        """Return every trial as it stands now, in the sweep's order.

        Raises RunDirectoryError where a trial's events cannot be read.
        """
        self._directory.refresh()
        try:
            return [
                TrialRecord.from_events(trial_id, load_events(self._directory.trial_path(trial_id)))
                for trial_id in self._directory.trial_ids()
            ]
        except OSError as error:
            raise RunDirectoryError(f"cannot read {error.filename}: {error.strerror}") from None

    @property
    def num_failed(self) -> int:
        """How many trials failed."""
        return sum(record.state is TrialState.FAILED for record in self.records())

    @property
    def num_unfinished(self) -> int:
        """How many trials have not ended."""
        return sum(not record.state.is_final for record in self.records())

    def frame(
        self,
        *,
        where: Where = None,
        sort: str | None = None,
        metric: str | None = None,
        mode: Mode | None = None,
    ) -> pd.DataFrame:
        """Return one row per trial, failed and pending ones included; the columns are `COLUMNS` and more.

        Args:
            where: which trials, such as `model.type == r3d_18 and val_accuracy > 0.9`.
            sort: a column to sort by, rising, or falling with `-` before it; a metric's name sorts by its
                best values, the best first. Default: the sweep's order.
            metric: what a trial's best epoch is chosen by; default: the sweep's metric.
            mode: which end of that metric is better; needed where neither the sweep nor its name says so.

        Raises:
            BadInputError: a column or metric is not there, or a condition cannot be read.
        """
        records = self.records()
        chosen, mode = self._metric_and_mode(records, metric, mode)
        frame = select(self._build(records, chosen, mode), where)
        return frame if sort is None else sort_rows(frame, sort, chosen, mode)

    def history(self, *, where: Where = None) -> pd.DataFrame:
        """Return one row per trial and epoch; the columns are `HISTORY_COLUMNS`, grid keys and metrics.

        Args:
            where: which trials, as for `frame`.

        Raises:
            BadInputError: a condition cannot be read, or names a column that the frame has not.
        """
        records = self.records()
        history = build_history(records, self.metric, self.varied_keys(), self.declared_values())
        if where is None:
            return history
        chosen = select(self._build(records, self.metric, self.mode), where)["trial_id"]
        return history[history["trial_id"].isin(set(chosen))].reset_index(drop=True)

    def best(
        self, by: str | None = None, where: Where = None, *, mode: Mode | None = None
    ) -> pd.Series[Any] | None:
        """Return the row of the best trial; None where no trial has a value.

        Args:
            by: a metric, or a column of numbers; default: the sweep's metric. By a metric each trial counts
                with its best epoch by that metric, which is then what `best_epoch` and all `_best` are of.
            where: among which trials, as for `frame`.
            mode: which end is better, `min` or `max`; needed where neither the sweep nor the name says so.

        Raises:
            BadInputError: the column or metric is not there, holds no numbers, or needs a `mode`.
        """
        records = self.records()
        by = self.metric if by is None else by
        frame = self._build(records, self.metric, self.mode)
        chosen = select(frame, where)
        if by in _metrics_of(records) or by == self.metric:
            metric, mode = self._metric_and_mode(records, by, mode)
            kept = set(chosen["trial_id"])
            frame = self._build(records, metric, mode).reindex(columns=frame.columns)
            chosen, column = frame[frame["trial_id"].isin(kept)], f"{metric}_best"
        else:
            column = find_column(frame, by)
            if is_bool_dtype(frame[column].dtype) or not is_numeric_dtype(frame[column].dtype):
                raise BadInputError(f"best by {by!r}: that column holds no numbers")
            is_own = by in (f"{self.metric}_best", f"{self.metric}_last")
            mode = require_mode(by, mode or (self.mode if is_own else None))
        return best_row(chosen, column, mode)

    def checkpoints(self, trial_id: str) -> list[StoredCheckpoint]:
        """Return a trial's stored checkpoints, the newest first; OSError where they cannot be listed."""
        folder, filesystem = self._directory.ray_place
        return CheckpointStore(f"{folder}/{trial_id}", filesystem).stored()

    def varied_keys(self) -> list[str]:
        """Return the config keys that tell the trials apart: those with more than one value in the grid."""
        grid: Mapping[str, Any] = self.sweep()["grid_search"]["grid"]
        varied = {key: v for key, v in grid.items() if not isinstance(v, list) or len(v) > 1}
        return list(_grid_values(varied))

    def declared_values(self) -> dict[str, list[Any]]:
        """Return every dotted config key of the sweep, grid keys first, with the values its file gives it."""
        sweep = self.sweep()
        declared = _grid_values(sweep["grid_search"]["grid"])
        constants = flatten_config({**sweep["config"], **{name: sweep[name] for name in SECTION_NAMES}})
        for key, value in constants.items():
            if key not in sweep["grid_search"]["grid"]:
                declared.setdefault(key, []).append(value)
        return declared

    def save_csv(self, path: str | Path) -> None:
        """Write the frame as CSV; raises BadInputError where the file cannot be written."""
        write_csv(self.frame(), path)

    def save_parquet(self, path: str | Path) -> None:
        """Write the frame as Parquet; raises BadInputError where the file cannot be written.

        Columns keep their dtype. One whose values differ in type, or are lists, holds them as JSON texts.
        """
        write_parquet(self.frame(), path)

    def _build(self, records: Sequence[TrialRecord], metric: str, mode: Mode) -> pd.DataFrame:
        declared = self.declared_values()
        return build_frame(records, metric, mode, declared, declared)

    def _metric_and_mode(
        self, records: Sequence[TrialRecord], metric: str | None, mode: Mode | None
    ) -> tuple[str, Mode]:
        if metric is None or metric == self.metric:
            return self.metric, require_mode(self.metric, mode or self.mode)
        if metric not in (known := _metrics_of(records)):
            raise BadInputError(f"no metric {metric!r}; {did_you_mean(metric, [self.metric, *known])}")
        return metric, require_mode(metric, mode)


def load_results(run_dir: str | Path) -> SweepResults:
    """Open the results of a sweep, finished or still running, by the run directory's path or URL.

    Raises RunDirectoryError where it is no run directory, StorageError where a store cannot be read.
    """
    return SweepResults(RunDirectory.open(run_dir))


def _metrics_of(records: Iterable[TrialRecord]) -> dict[str, None]:
    """Return the names of all metrics that were reported, in order."""
    return {name: None for record in records for name in metric_names(record.last)}


def _grid_values(grid: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the values of grid keys; a key whose values are mappings stands for the keys in them."""
    values: dict[str, list[Any]] = {}
    for key, entry in grid.items():
        if isinstance(entry, Mapping):  # a distribution: its name and what it draws from
            listed = [value for drawn_from in entry.values() for value in _as_list(drawn_from)]
        else:
            listed = _as_list(entry)
        found: dict[str, list[Any]] = {}
        for value in listed:
            for name, item in flatten_config({key: value}).items():
                found.setdefault(name, []).append(item)
        for name, items in (found or {key: []}).items():
            values.setdefault(name, []).extend(items)
    return values


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _sweep_fault(sweep: Any) -> str:
    """Return what keeps a stored sweep from being shown; an empty string where nothing does."""
    if not isinstance(sweep, dict):
        return "it is no mapping"
    for name in ("run", "grid_search", "config", *SECTION_NAMES):
        if not isinstance(sweep.get(name), dict):
            return f"{name} is no mapping"
    if not isinstance(sweep["grid_search"].get("grid"), dict):
        return "grid_search.grid is no mapping"
    if not isinstance(sweep["run"].get("metric"), str):
        return "run.metric is no text"
    if sweep["run"].get("mode") not in ("min", "max"):
        return "run.mode is neither min nor max"
    try:
        json.dumps(sweep, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "a text in it is half of a surrogate pair"
    return ""
