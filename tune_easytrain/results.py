"""The results of a sweep: run directory to DataFrame. This module owns every column and its unit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
from pandas.api.types import is_object_dtype

from tune_easytrain.byte_size import format_bytes
from tune_easytrain.errors import BadInputError, RunDirectoryError
from tune_easytrain.events import load_events
from tune_easytrain.run_directory import RunDirectory
from tune_easytrain.trial_record import PROGRESS_KEYS, TrialRecord, TrialState
from tune_easytrain.trial_space import SECTION_NAMES, flatten_config


@dataclass(frozen=True, slots=True)
class Column:
    """One fixed column: its name, pandas dtype, unit (empty: none), and meaning."""

    name: str
    dtype: str
    unit: str
    meaning: str


COLUMNS = (
    Column("trial_id", "string", "", "the trial's id; ids sort in the sweep file's order"),
    Column(
        "state",
        "string",
        "",
        "pending, probing, training, interrupted, finished, stopped (by the scheduler) or failed",
    ),
    Column("error", "string", "", "why the trial failed, with the error's type; empty where it did not"),
    Column("effective_batch_size", "Int64", "samples", "behind one optimizer step, over all workers"),
    Column("microbatch_size", "Int64", "samples", "in the largest forward and backward pass of one worker"),
    Column("accumulation_steps", "Int64", "", "micro-batches behind one optimizer step on one worker"),
    Column("num_workers", "Int64", "", "processes that trained the trial together"),
    Column("device", "string", "", "the device's name, cpu for a CPU"),
    Column("strategy", "string", "", "what `memory.strategy: auto` chose, and what it costs; else empty"),
    Column("probe_attempts", "Int64", "", "micro-batch sizes tried on the device; 0 with the probe off"),
    Column("probe_cached", "boolean", "", "whether it only had to confirm what another trial had found"),
    Column("probe_seconds", "float64", "s", "wall time of these attempts"),
    Column("memory_budget_bytes", "Int64", "bytes", "what one worker was allowed to use of its device"),
    Column("peak_memory_bytes", "Int64", "bytes", "the most device memory in use at once while training"),
    Column("num_rescues", "Int64", "", "times memory ran out in training and a window was replayed smaller"),
    Column(
        "num_failures",
        "Int64",
        "",
        "times a fault that was not its own ended it, and it went on from a checkpoint",
    ),
    Column("samples_per_second", "float64", "samples/s", "trained in the last epoch, evaluation left out"),
    Column("data_wait_share", "float64", "", "share of that time in which the device waited for data"),
    Column("gpu_utilization", "float64", "", "share of that time in which kernels ran on the GPU"),
    Column(
        "tokens_per_second",
        "float64",
        "tokens/s",
        "trained in the last epoch without padding; missing unless the task has `lengths`",
    ),
    Column("padding_share", "float64", "", "share of the last epoch's tokens that were padding"),
    Column("optimizer_steps", "Int64", "", "optimizer steps taken"),
    Column("num_samples", "Int64", "samples", "trained on, each counted once per epoch"),
    Column("learning_rate", "float64", "", "of the first parameter group after the last epoch"),
    Column(
        "gradient_noise_scale",
        "float64",
        "samples",
        "batch size at which noise and signal of a step are equal; missing unless `train.noise_scale`",
    ),
    Column("epochs", "Int64", "", "epochs reported; a budget of samples or steps may end inside the last"),
    Column("best_epoch", "Int64", "", "the epoch in which the sweep's metric was best"),
    Column("epoch_seconds", "float64", "s", "wall time of the last epoch, with evaluation"),
)
"""The columns every frame has, zero trials or many. Behind the first three stands the trial's config, one
column per key (`model.type`); behind all of them the metrics, two columns each (`<metric>_last`, and
`<metric>_best` from the epoch in which the sweep's metric was best), and the `batch.`, `train.` and
`memory.` keys."""

_IDENTITY = ("trial_id", "state", "error")
_SCALAR_DTYPES = ((str, "string"), (bool, "boolean"), (int, "Int64"), (float, "Float64"))


class SweepResults:
    """The results of one sweep as they stand in its run directory; nothing of Ray is needed to read them."""

    def __init__(self, run_directory: RunDirectory) -> None:
        self._directory = run_directory
        run: Mapping[str, Any] = self.sweep()["run"]
        self.metric: str = run["metric"]
        self.mode: Literal["min", "max"] = run["mode"]

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

    def frame(self) -> pd.DataFrame:
        """Return one row per trial, failed and pending ones included; the columns are `COLUMNS` and more."""
        return build_frame(self.records(), self.metric, self.mode, self._config_keys())

    def best(self) -> pd.Series[Any] | None:
        """Return the row of the trial with the best value of the sweep's metric; None before any report."""
        frame = self.frame()
        ranked = frame.dropna(subset=[f"{self.metric}_best"]).sort_values(
            f"{self.metric}_best", ascending=self.mode == "min", kind="stable"
        )
        return None if ranked.empty else ranked.iloc[0]

    def varied_keys(self) -> list[str]:
        """Return the grid keys that tell the trials apart: those with more than one value."""
        grid: Mapping[str, Any] = self.sweep()["grid_search"]["grid"]
        return [key for key, values in grid.items() if not isinstance(values, list) or len(values) > 1]

    def save_csv(self, path: str | Path) -> None:
        """Write the frame as CSV; raises BadInputError where the file cannot be written."""
        try:
            self.frame().to_csv(path, index=False)
        except OSError as error:
            raise BadInputError(f"cannot write {path}: {error}; choose another file") from None

    def save_parquet(self, path: str | Path) -> None:
        """Write the frame as Parquet; raises BadInputError where the file cannot be written.

        Columns keep their dtype. One whose values differ in type, or are lists, holds them as JSON texts.
        """
        try:
            typed_columns(self.frame()).to_parquet(path, index=False, engine="pyarrow")
        except OSError as error:
            raise BadInputError(f"cannot write {path}: {error}; choose another file") from None

    def _config_keys(self) -> list[str]:
        sweep = self.sweep()
        settings = {name: sweep[name] for name in SECTION_NAMES}
        return list(
            dict.fromkeys([*sweep["grid_search"]["grid"], *flatten_config({**sweep["config"], **settings})])
        )


def load_results(run_dir: str | Path) -> SweepResults:
    """Open the results of a sweep, finished or still running, by the run directory's path or URL.

    Raises RunDirectoryError where it is no run directory, StorageError where a store cannot be read.
    """
    return SweepResults(RunDirectory.open(run_dir))


def build_frame(
    records: Iterable[TrialRecord], metric: str, mode: Literal["min", "max"], config_keys: Iterable[str]
) -> pd.DataFrame:
    """Return the frame of some trials: fixed columns, config keys, metrics."""
    fixed = [column.name for column in COLUMNS]
    records = list(records)
    metrics = {metric: None}  # dicts as ordered sets: every trial brings the same names again
    metrics |= {name: None for record in records for name in record.last if name not in PROGRESS_KEYS}
    metric_columns = [f"{name}_{which}" for name in metrics for which in ("last", "best")]
    taken = frozenset((*fixed, *metric_columns))
    config_columns = dict.fromkeys(_config_column(key, taken) for key in config_keys)
    rows = []
    for record in records:
        config = {_config_column(key, taken): value for key, value in flatten_config(record.config).items()}
        config_columns |= dict.fromkeys(config)
        best = record.best(metric, mode)
        values: dict[str, float | None] = {}
        for name in (name for name in record.last if name not in PROGRESS_KEYS):
            values |= {f"{name}_last": record.last[name], f"{name}_best": best.get(name)}
        rows.append({**config, **values, **_fixed_values(record, best)})
    settings = [key for key in config_columns if key.split(".")[0] in SECTION_NAMES]
    own = [key for key in config_columns if key.split(".")[0] not in SECTION_NAMES]
    columns = list(dict.fromkeys([*_IDENTITY, *own, *fixed, *metric_columns, *settings]))
    frame = pd.DataFrame(rows, columns=columns)
    dtypes = {column.name: column.dtype for column in COLUMNS} | dict.fromkeys(metric_columns, "float64")
    return frame.astype(cast("dict[str, Any]", dtypes))


def typed_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with one type in every column, as files with typed columns need.

    A column of mixed values (`object`) gets the nullable dtype of its values where they are of one type, and
    else holds their JSON texts; what is missing stays missing.
    """
    typed = frame.copy()
    for position, dtype in enumerate(frame.dtypes):
        if is_object_dtype(dtype):
            typed.isetitem(position, _typed(frame.iloc[:, position]).array)
    return typed


def _typed(column: pd.Series[Any]) -> pd.Series[Any]:
    values = [None if _is_missing(value) else value for value in column]
    kinds = {type(value) for value in values if value is not None}
    for kind, dtype in _SCALAR_DTYPES:
        if kinds <= {kind}:
            with contextlib.suppress(OverflowError):  # an integer of 64 bits without a sign
                return pd.Series(values, index=column.index, dtype=cast("Any", dtype))
    texts = [None if value is None else json.dumps(value, default=str) for value in values]
    return pd.Series(texts, index=column.index, dtype="string")


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def summary_rows(frame: pd.DataFrame, metric: str, keys: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the frame as a person wants to see it first."""
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
        cells += [_short(row[f"{metric}_best"]), _first_line(row["error"])]
        rows.append(["" if _is_missing(cell) else str(cell) for cell in cells])
    headings = ["trial", *keys, "state", "E", "m", "k", "tries", "peak / budget", "samples", "steps"]
    headings += ["samples/s", f"{metric} (best)", "error"]
    if not any(row[-1] for row in rows):
        return headings[:-1], [row[:-1] for row in rows]
    return headings, rows


def _short(value: Any) -> Any:
    return value if pd.isna(value) else f"{value:.4g}"


def _first_line(text: str, width: int = 80) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= width else f"{line[: width - 1]}…"


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


def _whole(value: float | None) -> int | None:
    """Return a reported number as its column of integers can hold it: missing where it has a fraction."""
    return int(value) if value is not None and abs(value) < 2**63 and value == int(value) else None


def _fixed_values(record: TrialRecord, best: Mapping[str, float]) -> dict[str, Any]:
    probe, plan, last = record.probe, record.plan, record.last
    return {
        "trial_id": record.trial_id,
        "state": record.state.value,
        "error": record.error,
        "effective_batch_size": plan and plan.effective_batch_size,
        "microbatch_size": plan and plan.microbatch_size,
        "accumulation_steps": plan and plan.accumulation_steps,
        "num_workers": plan and plan.num_workers,
        "device": plan and plan.device,
        "strategy": plan and plan.strategy,
        "probe_attempts": len(probe.attempts) if probe else (0 if plan else None),
        "probe_cached": probe.cached if probe else (False if plan else None),
        "probe_seconds": probe.seconds if probe else (0.0 if plan else None),
        "memory_budget_bytes": probe.budget_bytes if probe else (plan and plan.budget_bytes),
        "peak_memory_bytes": record.peak_memory_bytes,
        "num_rescues": record.num_rescues if plan else None,
        "num_failures": record.num_failures,
        "samples_per_second": last.get("samples_per_second"),
        "data_wait_share": last.get("data_wait_share"),
        "gpu_utilization": last.get("gpu_utilization"),
        "tokens_per_second": last.get("tokens_per_second"),
        "padding_share": last.get("padding_share"),
        "optimizer_steps": _whole(last.get("optimizer_steps")),
        "num_samples": _whole(last.get("num_samples")),
        "learning_rate": last.get("learning_rate"),
        "gradient_noise_scale": last.get("gradient_noise_scale"),
        "epochs": _whole(last.get("epoch")),
        "best_epoch": _whole(best.get("epoch")),
        "epoch_seconds": last.get("epoch_seconds"),
    }


def _config_column(key: str, taken: Collection[str]) -> str:
    """Return the column of a config key; one that is also a fixed or a metric's gets the prefix `config.`."""
    return f"config.{key}" if key in taken else key
