"""Frames of trials: one row each, with the fixed columns, the trial's config, and its metrics."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
from pandas.api.types import is_object_dtype

from tune_easytrain.columns import COLUMNS, Mode, config_dtype, is_missing, scalar_dtype
from tune_easytrain.trial_record import PROGRESS_KEYS, TrialRecord
from tune_easytrain.trial_space import SECTION_NAMES, flatten_config

_IDENTITY = ("trial_id", "state", "error")

Declared = Mapping[str, Sequence[Any]]
"""Dotted config keys of a sweep, in its order, with the values that its file gives them."""


@dataclass(frozen=True)
class FrameLayout:
    """Which columns the frame of some trials has beside the fixed ones.

    `metrics` are names of metrics, `config_columns` the columns of config keys by their key, both in order.
    """

    metrics: tuple[str, ...]
    config_columns: Mapping[str, str]

    @classmethod
    def of(
        cls,
        records: Iterable[TrialRecord],
        configs: Iterable[Mapping[str, Any]],
        metric: str,
        config_keys: Iterable[str],
    ) -> FrameLayout:
        """Return the layout for trials of which all have `metric`, reported or not, and these config keys.

        `configs` are the trials' own, flattened.
        """
        metrics = {metric: None}  # dicts as ordered sets: every trial brings the same names again
        metrics |= {name: None for record in records for name in metric_names(record.last)}
        taken = frozenset((*(column.name for column in COLUMNS), *_metric_columns(metrics)))
        keys = dict.fromkeys(config_keys)
        for config in configs:
            keys |= dict.fromkeys(config)
        return cls(tuple(metrics), {key: config_column(key, taken) for key in keys})

    @property
    def metric_columns(self) -> list[str]:
        """Two columns per metric: the last value, and that of the best epoch."""
        return _metric_columns(self.metrics)

    @property
    def columns(self) -> list[str]:
        """All columns in their order, the fixed ones among them."""
        config = list(self.config_columns.values())
        settings = [name for name in config if name.split(".")[0] in SECTION_NAMES]
        own = [name for name in config if name.split(".")[0] not in SECTION_NAMES]
        fixed = [column.name for column in COLUMNS]
        return list(dict.fromkeys([*_IDENTITY, *own, *fixed, *self.metric_columns, *settings]))


def build_frame(
    records: Iterable[TrialRecord],
    metric: str,
    mode: Mode,
    config_keys: Iterable[str],
    declared: Declared | None = None,
) -> pd.DataFrame:
    """Return the frame of some trials: fixed columns, config keys, metrics.

    Args:
        records: the trials, one row each.
        metric, mode: by what a trial's best epoch is chosen.
        config_keys: keys that are columns also where no trial has them.
        declared: values the sweep gives its keys, which have a say in the dtype of their column.
    """
    records = list(records)
    configs = [flatten_config(record.config) for record in records]
    layout = FrameLayout.of(records, configs, metric, config_keys)
    rows = [
        _row(record, config, record.best(metric, mode), layout)
        for record, config in zip(records, configs, strict=True)
    ]
    keys = {column: key for key, column in layout.config_columns.items()}
    dtypes = {column.name: column.dtype for column in COLUMNS}
    dtypes |= dict.fromkeys(layout.metric_columns, "float64")
    frame = {}
    for name in layout.columns:
        values = [row.get(name) for row in rows]
        if name in dtypes:
            frame[name] = pd.Series(values, dtype=cast("Any", dtypes[name]))
        else:
            frame[name] = config_series(keys[name], values, (declared or {}).get(keys[name], ()))
    return pd.DataFrame(frame, index=range(len(rows)))


def config_series(key: str, values: Sequence[Any], declared: Iterable[Any] = ()) -> pd.Series[Any]:
    """Return a config key's column, of the one dtype that holds these and the declared values."""
    dtype = config_dtype(key, [*declared, *values])
    missing_as_none = [None if is_missing(value) else value for value in values]
    return pd.Series(missing_as_none, dtype=cast("Any", dtype))


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
    values = [None if is_missing(value) else value for value in column.tolist()]
    dtype = scalar_dtype(values)
    if dtype == "object":
        dtype, values = "string", [None if value is None else as_text(value) for value in values]
    return pd.Series(values, index=column.index, dtype=cast("Any", dtype or "string"))


def as_text(value: Any) -> str:
    """Return the JSON text of a config's value."""
    return json.dumps(value, default=str)


def metric_names(report: Iterable[str]) -> list[str]:
    """Return which names in a report are metrics."""
    return [name for name in report if name not in PROGRESS_KEYS]


def config_column(key: str, taken: Collection[str]) -> str:
    """Return the column of a config key; one that is also a fixed or a metric's gets the prefix `config.`."""
    return f"config.{key}" if key in taken else key


def whole(value: float | None) -> int | None:
    """Return a reported number as a column of integers can hold it: missing where it has a fraction."""
    return int(value) if value is not None and abs(value) < 2**63 and value == int(value) else None


def _metric_columns(metrics: Iterable[str]) -> list[str]:
    return [f"{name}_{which}" for name in metrics for which in ("last", "best")]


def _row(
    record: TrialRecord, config: Mapping[str, Any], best: Mapping[str, float], layout: FrameLayout
) -> dict[str, Any]:
    row = {layout.config_columns[key]: value for key, value in config.items()}
    for name in metric_names(record.last):
        row |= {f"{name}_last": record.last[name], f"{name}_best": best.get(name)}
    return row | _fixed_values(record, best)


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
        "probe_rule_of_thumb": probe and probe.rule_of_thumb_size,
        "probe_estimate": probe and probe.estimated_size,
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
        "optimizer_steps": whole(last.get("optimizer_steps")),
        "num_samples": whole(last.get("num_samples")),
        "learning_rate": last.get("learning_rate"),
        "gradient_noise_scale": last.get("gradient_noise_scale"),
        "epochs": whole(last.get("epoch")),
        "best_epoch": whole(best.get("epoch")),
        "epoch_seconds": last.get("epoch_seconds"),
    }
