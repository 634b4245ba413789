"""Histories of trials: one row per epoch that counts, with what was reported for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pandas as pd

from tune_easytrain.columns import HISTORY_COLUMNS
from tune_easytrain.events import Reported
from tune_easytrain.frame import Declared, config_column, config_series, metric_names, whole
from tune_easytrain.trial_record import TrialRecord
from tune_easytrain.trial_space import flatten_config

_LATEST = 2**33
"""Seconds since 1970 that no clock shows, some 270 years ahead; pandas' times end a little later."""

_NOT_OF_METRICS = frozenset({"trial_id", "time", "peak_memory_bytes"})
"""Columns that no reported metric of that name fills; the other fixed ones are reported under their names."""


def build_history(
    records: Iterable[TrialRecord], metric: str, keys: Iterable[str], declared: Declared | None = None
) -> pd.DataFrame:
    """Return one row per trial and epoch, in the trials' order.

    What a trial had to report again counts once, and what it reported before it took over another trial's
    weights does not count.

    Args:
        records: the trials.
        metric: the sweep's metric, a column also where nobody has reported it.
        keys: the config keys to tell trials apart by.
        declared: values the sweep gives these keys, which have a say in the dtype of their column.
    """
    records = list(records)
    fixed = {column.name: column.dtype for column in HISTORY_COLUMNS}
    names = {metric: None}
    names |= {name: None for record in records for report in record.reports for name in metric_names(report)}
    metrics = {name: name for name in names if name not in fixed}
    metrics |= {name: f"metric.{name}" for name in names if name in _NOT_OF_METRICS}
    configs = [flatten_config(record.config) for record in records]
    pairs = [(record, config) for record, config in zip(records, configs, strict=True)]
    events = [(record, config, event) for record, config in pairs for event in record.reported]
    first, *others = HISTORY_COLUMNS
    columns = {first.name: pd.Series([r.trial_id for r, _, _ in events], dtype=cast("Any", first.dtype))}
    taken = {*fixed, *metrics.values()}
    for key in keys:
        values = [config.get(key) for _, config, _ in events]
        columns[config_column(key, taken)] = config_series(key, values, (declared or {}).get(key, ()))
    for column in others:
        values = [_fixed_value(column.name, column.dtype, event) for _, _, event in events]
        columns[column.name] = _series(values, column.dtype)
    for name, column_name in metrics.items():
        columns[column_name] = _series([event.metrics.get(name) for _, _, event in events], "float64")
    return pd.DataFrame(columns, index=range(len(events)))


def _fixed_value(name: str, dtype: str, event: Reported) -> Any:
    if name == "time":
        return round(event.time * 1e6) if 0 <= event.time < _LATEST else None
    if name == "peak_memory_bytes":
        return event.peak_memory_bytes
    value = event.metrics.get(name)
    return whole(value) if dtype == "Int64" else value


def _series(values: list[Any], dtype: str) -> pd.Series[Any]:
    series: pd.Series[Any]
    if dtype.startswith("datetime64"):  # from whole microseconds
        times = pd.to_datetime(pd.array(values, dtype="Int64"), unit="us", utc=True)
        series = pd.Series(times, dtype=cast("Any", dtype))
    else:
        series = pd.Series(values, dtype=cast("Any", dtype))
    return series
